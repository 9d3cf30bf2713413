"""Hysteresis and back-off: when the sparse path, or the screen, is given up and tried again.

The density of a call, and the share of candidates, are only known once some work was done: counting
is a pass over the first product, screening an int8 product. A block that is too dense would pay for
that in every call, and a block near its threshold would change sides from call to call. So two
standard remedies. *Hysteresis*: a share that was below its threshold goes on until it is above by
more than `MARGIN`; one that was given up has to get below the threshold itself. *Back-off*: after a
try that failed, 16 calls run dense without counting, then 32, up to 256: a block that stays dense
is counted once in 256 calls, and one that becomes sparse is found after as many.

This is inference only. A training step decides by its own tensors alone, since a forward pass that
checkpointing repeats has to take the same way as the first one.

There is one `BackOff` for each question, kept where its answer belongs. For the density of a block:
one for each threshold, in its `steppe.ops.cpu.block.CpuBlock`. For the candidates of a weight: one
for decoding and one for more tokens, beside the weight's screen in the cache of copies, so that
they start over when the weight changes. State changes in `limit_and_count` and `record` alone, each
at most once in a call: `CpuBlock.plan_and_count` counts for the density, `screen_limit_and_count`
and `_find_and_record` for a screen.
"""

from __future__ import annotations

from dataclasses import dataclass

MARGIN = 0.05  # by how much a share may be above its threshold, once it was below
_LEAST_WAIT, _MOST_WAIT = 16, 256  # calls


@dataclass
class BackOff:
    """Whether to try the sparse path, or the screen, from how the last tries ended.

    Attributes:
        share: density or share of candidates at the last try; NaN if it was not counted.
        held: whether it was low enough, or nothing is known yet.
        wait: calls until the next try.
        next_wait: calls to wait after the next try that fails.
    """

    share: float = float("nan")
    held: bool = True
    wait: int = 0
    next_wait: int = _LEAST_WAIT

    def limit_and_count(self, threshold: float) -> float:
        """The largest share at which this call may go on; 0 for no try. Counts a call that waits.

        Args:
            threshold: the share up to which it pays.
        """
        if self.held:
            return threshold + MARGIN
        if self.wait:
            self.wait -= 1
            return 0.0
        return threshold

    def record(self, share: float, threshold_held: bool) -> None:
        """Record how a try ended.

        Args:
            share: density or share of candidates; NaN if it was not counted.
            threshold_held: whether it was low enough.
        """
        self.share, self.held = share, threshold_held
        if threshold_held:
            self.next_wait = _LEAST_WAIT
        else:
            self.wait, self.next_wait = self.next_wait, min(2 * self.next_wait, _MOST_WAIT)
