"""The MLP blocks of a model: their parts in each architecture, and where they hang."""
