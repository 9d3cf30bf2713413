"""The changes to training, the paper's and ours, each one file, and the verbs for them."""

from steppe.plugins.base import Plugin
from steppe.plugins.constrain import Constrained, constrain_
from steppe.plugins.fold import fold_
from steppe.plugins.jumping_relu import JumpingSquaredReLU
from steppe.plugins.penalty import ActivationPenalty, penalize
from steppe.plugins.restricted_norm import RestrictedNorm
from steppe.plugins.rising_threshold import RisingThreshold
from steppe.plugins.sparsify import (
    added_parameters,
    advance_,
    project_,
    restore_,
    sparsify_,
)
from steppe.plugins.zeroth_bias import ZerothBias

__all__ = [
    "ActivationPenalty",
    "Constrained",
    "JumpingSquaredReLU",
    "Plugin",
    "RestrictedNorm",
    "RisingThreshold",
    "ZerothBias",
    "added_parameters",
    "advance_",
    "constrain_",
    "fold_",
    "penalize",
    "project_",
    "restore_",
    "sparsify_",
]
