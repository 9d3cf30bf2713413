"""Times MLP blocks on the sparse kernels against the same blocks dense."""

from steppe.bench.block import COLD_BYTES, saved_bytes, time_block, time_blocks
from steppe.bench.cases import (
    DECODE,
    DENSITIES,
    PATTERNS,
    PREFILL,
    TRAINING,
    Block,
    Case,
    Setting,
    usual_settings,
)
from steppe.bench.model import time_model
from steppe.bench.surroundings import surroundings
from steppe.bench.times import break_even
from steppe.timing import PairedTimes, time_pair

__all__ = [
    "COLD_BYTES",
    "DECODE",
    "DENSITIES",
    "PATTERNS",
    "PREFILL",
    "TRAINING",
    "Block",
    "Case",
    "PairedTimes",
    "Setting",
    "break_even",
    "saved_bytes",
    "surroundings",
    "time_block",
    "time_blocks",
    "time_model",
    "time_pair",
    "usual_settings",
]
