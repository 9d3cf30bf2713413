"""Exact arithmetic on tensors; knows no nn.Module."""
