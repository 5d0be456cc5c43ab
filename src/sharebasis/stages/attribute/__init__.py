"""Stage `attribute`."""
