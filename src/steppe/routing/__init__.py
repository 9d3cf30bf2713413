"""A block's input, led around its own modules to where the block is computed at once."""
