"""Stage `propagate`."""
