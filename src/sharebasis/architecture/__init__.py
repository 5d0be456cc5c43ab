"""What sublayers a model has: families as a table, sizes, roles, parts."""
