"""How fast an MLP block is on the sparse kernels and dense."""
