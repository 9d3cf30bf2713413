"""The public names of steppe, each from where it is defined."""

from steppe.acceleration.accelerate import accelerate_, restore_
from steppe.acceleration.explanation import BlockExplanation, Explanation, explain
from steppe.activations import Rectifier, SShapedSquaredReLU
from steppe.blocks.block import MLPBlock
from steppe.blocks.find import find_blocks
from steppe.blocks.patterns import BlockPattern
from steppe.checkpoints import load_pretrained
from steppe.errors import IncompleteCoverageWarning, SteppeError, WiringError
from steppe.measures import BlockCurvature, BlockReport, Monitor, Report, measure, watch
from steppe.ops.cpu.library import Kernels, kernels
from steppe.plugins import (
    ActivationPenalty,
    JumpingSquaredReLU,
    Plugin,
    RestrictedNorm,
    RisingThreshold,
    SShapedActivation,
    ZerothBias,
    added_parameters,
    advance_,
    constrain_,
    fold_,
    penalize,
    project_,
    sparsify_,
)

__all__ = [
    "ActivationPenalty",
    "BlockCurvature",
    "BlockExplanation",
    "BlockPattern",
    "BlockReport",
    "Explanation",
    "IncompleteCoverageWarning",
    "JumpingSquaredReLU",
    "Kernels",
    "MLPBlock",
    "Monitor",
    "Plugin",
    "Rectifier",
    "Report",
    "RestrictedNorm",
    "RisingThreshold",
    "SShapedActivation",
    "SShapedSquaredReLU",
    "SteppeError",
    "WiringError",
    "ZerothBias",
    "accelerate_",
    "added_parameters",
    "advance_",
    "constrain_",
    "explain",
    "find_blocks",
    "fold_",
    "kernels",
    "load_pretrained",
    "measure",
    "penalize",
    "project_",
    "restore_",
    "sparsify_",
    "watch",
]
