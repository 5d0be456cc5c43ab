"""artifacts/compressed: its index, written, loaded and rewritten."""
