"""Every error that steppe raises on purpose.

Each class is also the builtin that a caller would catch, so ``except ValueError`` goes on working
in code that has never heard of steppe. A message says where, what was expected, what was found and
what to type instead. It names settings, as Python has them; the command line names its flags. The
values in it may come from anywhere: long ones are shortened, and none can steer a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from steppe.printable import printable, shortened


class SteppeError(Exception):
    """Base of all errors that steppe raises on purpose.

    Args:
        message: where, what was expected, what was found, and what to do.
        *instead: settings and their values to do it with, at the end of the message. Each mapping
            is a way by itself.

    Example:
        >>> print(SteppeError("no column of text. Say which", {"text_column": "NAME"}))
        no column of text. Say which: text_column=NAME
    """

    def __init__(self, message: str, *instead: Mapping[str, object]) -> None:
        self.message = message
        self.instead = instead
        super().__init__(self.with_settings(lambda name, value: f"{name}={value}", ", "))

    def with_settings(
        self, setting: Callable[[str, object], str | None], between: str = " "
    ) -> str:
        """The message with its settings written in another way.

        Args:
            setting: how to write a setting of a name and a value; None if it cannot be given, which
                leaves out all that its way needs.
            between: the text between the settings of one way.

        Example:
            >>> error = SteppeError("too long", {"length": 64, "stride": 8}, {"cut": True})
            >>> error.with_settings(
            ...     lambda name, value: None if name == "cut" else f"-{name} {value}"
            ... )
            'too long: -length 64 -stride 8'
        """
        ways = [[setting(name, value) for name, value in way.items()] for way in self.instead]
        told = [between.join(map(str, way)) for way in ways if None not in way]
        text = f"{self.message}: {'; or '.join(told)}" if told else self.message
        return shortened(printable(text))


class BlocksNotFoundError(SteppeError, LookupError):
    """No MLP block of a known shape was found in the model."""


class PatternError(SteppeError, ValueError):
    """A value is no `BlockPattern`, or one cannot be written into a file."""


class UnfitBlockError(SteppeError, ValueError):
    """A plug-in does not fit a block; the model was left as it was."""


class WiringError(SteppeError, ValueError):
    """A block does not compute what its pattern says, as its first pass has shown."""


class SparsificationError(SteppeError, RuntimeError):
    """The model carries the plug-in already, or carries none where one was expected."""


class TokenPositionError(SteppeError, ValueError):
    """The absolute position of a token is unknown or beyond the table of zeroth biases."""


class ScheduleError(SteppeError, ValueError):
    """A schedule or an optimizer lacks what it needs to drive the plug-ins."""


class CheckpointError(SteppeError, ValueError):
    """A checkpoint is corrupt, or belongs to another model."""


class EmptyLoaderError(SteppeError, ValueError):
    """A loader gave no batch, or no token that counts."""


class NonFiniteLossError(SteppeError, ArithmeticError):
    """The training loss became NaN or infinite."""


class RunError(SteppeError, ValueError):
    """The record of a run is missing, damaged, or of another version."""


class LossError(SteppeError, ValueError):
    """A loss is no scalar, its labels are missing, or no gradient came from it."""


class DeviceError(SteppeError, ValueError):
    """A model is on devices on which it cannot be measured."""


class KernelError(SteppeError, RuntimeError):
    """The native kernels cannot be loaded, or cannot take what they were given."""


class AccelerationError(SteppeError, ValueError):
    """A block cannot run on the sparse kernels; the model was left as it was."""


class DataError(SteppeError, ValueError):
    """A data set is not there, cannot be read, or does not fit the model."""


class RecipeError(SteppeError, ValueError):
    """A recipe is not there, or asks for what cannot be."""


class StudyError(SteppeError, ValueError):
    """A study is not there, asks for what cannot be, or its results are damaged."""


class OutOfMemoryError(SteppeError, MemoryError):
    """A training step does not fit into the memory."""


class OutputError(SteppeError, OSError):
    """A result cannot be written where it was asked for."""


class MissingExtraError(SteppeError, ImportError):
    """An optional dependency is not installed."""


class IncompleteCoverageWarning(UserWarning):
    """A part of the model looks like an MLP and is not among the blocks."""
