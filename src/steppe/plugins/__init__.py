"""The paper's changes to training, each one file, and the verbs that put them in and out."""

from steppe.plugins.base import Plugin
from steppe.plugins.constrain import Constrained, constrain_
from steppe.plugins.jumping_relu import JumpingSquaredReLU
from steppe.plugins.restricted_norm import RestrictedNorm
from steppe.plugins.sparsify import (
    added_parameters,
    advance_,
    project_,
    restore_,
    sparsify_,
)
from steppe.plugins.zeroth_bias import ZerothBias

__all__ = [
    "Constrained",
    "JumpingSquaredReLU",
    "Plugin",
    "RestrictedNorm",
    "ZerothBias",
    "added_parameters",
    "advance_",
    "constrain_",
    "project_",
    "restore_",
    "sparsify_",
]
