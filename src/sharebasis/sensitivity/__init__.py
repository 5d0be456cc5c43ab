"""How far the loss that was predicted is from the one that is measured, cell by cell."""
