"""What is measured: density and derivative density, streaming."""

from steppe.measures.density import BlockDensity, DensityReport
from steppe.measures.measure import measure
from steppe.measures.watch import Monitor, watch

__all__ = ["BlockDensity", "DensityReport", "Monitor", "measure", "watch"]
