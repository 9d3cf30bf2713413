"""`accelerate_` and `explain`: the MLP blocks of a model on the sparse kernels."""
