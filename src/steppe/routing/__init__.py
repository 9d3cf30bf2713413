"""The way of a block's input around its own modules, to where the whole block is computed."""
