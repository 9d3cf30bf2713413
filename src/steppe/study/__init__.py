"""Studies: arms × seeds × settings of recipes, run in parallel processes, with their statistics."""
