"""Stage `curve`."""
