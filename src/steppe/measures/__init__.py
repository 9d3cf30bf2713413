"""Measures: densities, augmented flatness and its factors, curvature; streaming."""

from steppe.measures.curvature import BlockCurvature
from steppe.measures.measure import measure
from steppe.measures.monitor import Monitor
from steppe.measures.report import FREQUENCY_EDGES, BlockReport, Report
from steppe.measures.watch import watch

__all__ = [
    "FREQUENCY_EDGES",
    "BlockCurvature",
    "BlockReport",
    "Monitor",
    "Report",
    "measure",
    "watch",
]
