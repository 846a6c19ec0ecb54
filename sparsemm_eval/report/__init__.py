"""Results to tables and figures: pandas and matplotlib only."""
