"""A budget -> what becomes of every part."""
