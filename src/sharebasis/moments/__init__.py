"""artifacts/moments, and the problems that are made of it."""
