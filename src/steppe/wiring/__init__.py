"""Compares the computation of a block with its pattern."""
