"""Points that were measured, and all that is made of them to be read."""
