"""The tokens of a forward pass: their absolute positions, and which of them are padding.

A block sees hidden states only. The module above it that takes ``input_ids`` (its stack) gets the
attention mask, the position ids and the cache; a `TokenContext` listens there.
"""

from steppe.tokens.arguments import IGNORED_LABEL, arguments_by_name
from steppe.tokens.context import TokenContext
from steppe.tokens.generation import Generation, current_generation
from steppe.tokens.layout import Layout
from steppe.tokens.listening import DecoderLabels, attach, listen

__all__ = [
    "IGNORED_LABEL",
    "DecoderLabels",
    "Generation",
    "Layout",
    "TokenContext",
    "arguments_by_name",
    "attach",
    "current_generation",
    "listen",
]
