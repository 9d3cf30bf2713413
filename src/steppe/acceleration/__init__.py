"""`accelerate_`: the MLP blocks of a model on the sparse kernels."""
