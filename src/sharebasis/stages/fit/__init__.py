"""Stage `fit`."""
