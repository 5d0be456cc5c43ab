"""Stage `sensitivity`."""
