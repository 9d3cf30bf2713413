"""The thresholds that `RisingThreshold` put into blocks."""

from __future__ import annotations

from steppe import MLPBlock
from steppe.plugins.rising_threshold import MODULE_NAME, Threshold


def threshold_of(block: MLPBlock) -> Threshold | None:
    threshold = block.activated._modules.get(MODULE_NAME)
    return threshold if isinstance(threshold, Threshold) else None
