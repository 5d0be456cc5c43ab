"""Stage `vary`."""
