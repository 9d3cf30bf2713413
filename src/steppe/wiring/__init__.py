"""Whether a block computes what its pattern says."""
