"""Tables, plots and a page of what was measured."""

from steppe.report.bench_table import bench_table
from steppe.report.blocks_table import blocks_table
from steppe.report.calibration_table import calibration_summary, calibration_table
from steppe.report.find import find_runs
from steppe.report.flops import BlockFlops, Product, count_flops
from steppe.report.measure_table import curve_table, measure_table
from steppe.report.page import write_report
from steppe.report.plots import draw_training_density, plot_bench, plot_training_density
from steppe.report.tables import (
    accelerated_sentence,
    demo_table,
    recipe_table,
    speed_table,
)

__all__ = [
    "BlockFlops",
    "Product",
    "accelerated_sentence",
    "bench_table",
    "blocks_table",
    "calibration_summary",
    "calibration_table",
    "count_flops",
    "curve_table",
    "demo_table",
    "draw_training_density",
    "find_runs",
    "measure_table",
    "plot_bench",
    "plot_training_density",
    "recipe_table",
    "speed_table",
    "write_report",
]
