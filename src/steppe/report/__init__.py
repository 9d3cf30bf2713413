"""Tables and plots of what was measured."""

from steppe.report.plots import plot_training_density
from steppe.report.tables import demo_markdown, demo_table

__all__ = ["demo_markdown", "demo_table", "plot_training_density"]
