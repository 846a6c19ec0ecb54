"""Many cells: whole grids of methods and budgets."""
