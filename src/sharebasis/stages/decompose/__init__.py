"""Stage `decompose`."""
