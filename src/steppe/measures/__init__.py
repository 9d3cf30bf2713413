"""Measures: densities, augmented flatness and its factors, curvature; streaming."""

from steppe.measures.curvature import BlockCurvature
from steppe.measures.measure import measure
from steppe.measures.monitor import Monitor
from steppe.measures.report import BlockReport, Report
from steppe.measures.watch import watch

__all__ = ["BlockCurvature", "BlockReport", "Monitor", "Report", "measure", "watch"]
