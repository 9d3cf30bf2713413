"""The changes to training, the paper's and ours, each one file, and the verbs for them."""

from steppe.plugins.applied import added_parameters, restore_
from steppe.plugins.base import BiasShift, Constraint, LossTerm, Plugin
from steppe.plugins.constrain import Constrained, advance_, constrain_, project_
from steppe.plugins.fold import fold_
from steppe.plugins.jumping_relu import JumpingSquaredReLU
from steppe.plugins.penalty import ActivationPenalty, penalize
from steppe.plugins.registry import PLUGINS, register
from steppe.plugins.restricted_norm import RestrictedNorm
from steppe.plugins.rising_threshold import RisingThreshold
from steppe.plugins.s_shaped import SShapedActivation
from steppe.plugins.sparsify import sparsify_
from steppe.plugins.zeroth_bias import ZerothBias

__all__ = [
    "PLUGINS",
    "ActivationPenalty",
    "BiasShift",
    "Constrained",
    "Constraint",
    "JumpingSquaredReLU",
    "LossTerm",
    "Plugin",
    "RestrictedNorm",
    "RisingThreshold",
    "SShapedActivation",
    "ZerothBias",
    "added_parameters",
    "advance_",
    "constrain_",
    "fold_",
    "penalize",
    "project_",
    "register",
    "restore_",
    "sparsify_",
]
