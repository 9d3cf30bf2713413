"""The MLP blocks of a model: what they look like in each architecture, and where they are."""
