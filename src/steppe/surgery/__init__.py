"""Reversible in-place edits of a model."""
