"""Everything to be known of steppe on an NVIDIA card, in one run of minutes.

    python -u benchmarks/gpu.py --out DIR --seconds 470

Facts of the card, the device tests, kernels against float64, times of MLP blocks, the training of
a small GPT with and without plug-ins, how tokens share active units, the CPU kernels; a table at
the end. It needs torch with Triton, and what is in the repository: no network, no installation.
The steps are in `gpu_steps/`, one file each. Each runs in a process of its own with a time limit,
so that an error, a crash, a lack of memory or a hang in one leaves the others alone. A step that
too little time is left for is skipped.

Files in DIR: ``gpu.json``, written anew after each step; of each step a JSON file and a log. With
``--dry-run`` all steps run on the CPU with tiny sizes: numbers that mean nothing.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_steps.results import read_json, write_json
from gpu_steps.summary import summary

ROOT = Path(__file__).resolve().parents[1]
CLOSING = 5.0  # seconds kept for the table
OK, LATE, INTERRUPTED = "ok", "skipped: late", "interrupted"


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        name: of its files.
        module: has ``run(context)``.
        seconds: it is stopped after so many.
        least: with fewer left it is skipped.
        argument: what ``run`` finds in ``context.argument``.
        in_background: it starts with the first step, and is waited for in its turn.
    """

    name: str
    module: str
    seconds: float
    least: float
    argument: str = ""
    in_background: bool = False


STEPS = (
    Step("facts", "gpu_steps.facts", 40, 10),
    Step("tests", "gpu_steps.device_tests", 110, 20),
    Step("kernels", "gpu_steps.kernels", 60, 10),
    Step("blocks", "gpu_steps.blocks", 50, 10),
    Step("decode", "gpu_steps.decode", 40, 10),
    Step("packed", "gpu_steps.packed", 60, 15),
    Step("training-vanilla", "gpu_steps.training", 60, 20, "vanilla"),
    Step("training-steppe", "gpu_steps.training", 60, 20, "steppe"),
    Step("training-threshold", "gpu_steps.training", 60, 20, "threshold"),
    Step("training-both", "gpu_steps.training", 60, 20, "steppe + threshold"),
    Step("union", "gpu_steps.union", 30, 10),
    Step("native", "gpu_steps.native", 400, 5, in_background=True),
    Step("cpu", "gpu_steps.cpu", 60, 15),
)


class Running:
    """The process of a step, in a session of its own.

    Args:
        step: the step.
        folder: for its results while it runs, and for what one step leaves to another.
        log: the file for what it prints.
        seconds: what it is told that it may take.
        is_dry: whether it runs tiny, on the CPU.
    """

    def __init__(self, step: Step, folder: Path, log: Path, seconds: float, is_dry: bool) -> None:
        self.step = step
        self.started = time.monotonic()
        self._results = folder / f"{step.name}.json"
        paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-u", "-m", "gpu_steps.step", step.module]
        command += ["--results", str(self._results), "--folder", str(folder)]
        command += ["--seconds", str(seconds), "--argument", step.argument]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if is_dry:
            environment["OMP_NUM_THREADS"] = "1"  # more threads only get in each other's way
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command + ["--dry-run"] * is_dry,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float) -> str:
        """Wait for the end and stop what is then still running.

        Returns:
            The status: ``ok``, or how it failed.
        """
        try:
            code = self._process.wait(max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            return f"failed: stopped after {time.monotonic() - self.started:.0f} s"
        finally:
            self.stop()
        if code < 0:
            return f"failed: {signal.Signals(-code).name}"
        return OK if code == 0 else f"failed: {self.results().get('error', f'exit status {code}')}"

    def stop(self) -> None:
        """Kill the process and all that it has started."""
        with suppress(ProcessLookupError):  # all of them have ended
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def results(self) -> dict[str, Any]:
        """What it has measured up to now, also if it did not come to its end."""
        return read_json(self._results) if self._results.exists() else {}


def run_steps(
    steps: Sequence[Step], out: Path, seconds: float, is_dry: bool = False
) -> dict[str, Any]:
    """Run steps one after the other, and write what each has found.

    Args:
        steps: in their order.
        out: the folder for the files.
        seconds: for all of them.
        is_dry: whether they run tiny, on the CPU.

    Returns:
        What stands in ``gpu.json``.

    Raises:
        KeyboardInterrupt: Ctrl-C, or SIGTERM; the files are written and no process is left.
    """
    deadline = time.monotonic() + seconds
    whole: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "machine": platform.platform(),
        "dry_run": is_dry,
        "seconds": seconds,
        "steps": {},
    }
    folder = Path(tempfile.mkdtemp(prefix="steppe-gpu-"))
    running: dict[Step, Running] = {}

    def start(step: Step, limit: float) -> None:
        log = out / f"{steps.index(step):02}-{step.name}.log"
        running[step] = Running(step, folder, log, limit, is_dry)

    def write(step: Step, status: str, taken: float, results: dict[str, Any]) -> None:
        row = {"status": status, "seconds": round(results.pop("took_s", taken), 1), **results}
        whole["steps"][step.name] = row
        write_json(out / f"{steps.index(step):02}-{step.name}.json", row)
        write_json(out / "gpu.json", whole)
        print(f"{step.name}: {status}, {row['seconds']:.0f} s", flush=True)

    try:
        for step in steps:
            if step.in_background:
                start(step, min(step.seconds, seconds))
        for number, step in enumerate(steps):
            limit = time_for(steps[number:], deadline - time.monotonic())
            if limit < step.least:
                if step in running:
                    running.pop(step).stop()
                write(step, LATE, 0.0, {})
                continue
            if step not in running:
                start(step, limit)
            one = running[step]
            status = one.wait(limit)
            write(step, status, time.monotonic() - one.started, one.results())
            del running[step]
    except KeyboardInterrupt:
        for step, one in running.items():
            one.stop()
            write(step, INTERRUPTED, time.monotonic() - one.started, one.results())
        raise
    finally:
        for one in running.values():
            one.stop()
        shutil.rmtree(folder, ignore_errors=True)
    return whole


def time_for(steps: Sequence[Step], left: float) -> float:
    """Seconds for the first of some steps, steps of the same module sharing alike.

    Args:
        steps: those that are still to come.
        left: seconds for all of them.

    Example:
        >>> arms = [Step(name, "training", 60, 20) for name in ("one", "two")]
        >>> time_for([*arms, Step("last", "cpu", 30, 10)], left=95.0)
        40.0
    """
    first, *later = steps
    alike = 1 + sum(step.module == first.module for step in later)
    others = sum(step.least for step in later if step.module != first.module)
    free = left - CLOSING
    share = max((free - others) / alike, min(first.least, free))
    return min(first.seconds, share)


def why_no_device() -> str:
    """What keeps torch from a CUDA device, asked in a process of its own; empty if nothing does."""
    program = "import torch; print(torch.__version__); torch.cuda.init()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return f"torch {done.stdout.strip()}: {reason}" if done.stdout else reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all steps.

    Returns:
        0 if none failed, 1 if one did, 2 without a device, 130 after Ctrl-C.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder for the results")
    parser.add_argument("--seconds", type=float, default=470.0, help="for all steps together")
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU")
    parser.add_argument("--steps", default="", help="only these, by name, with commas")
    options = parser.parse_args(arguments)
    names = [step.name for step in STEPS]
    wanted = options.steps.split(",") if options.steps else names
    if unknown := sorted(set(wanted) - set(names)):
        parser.error(f"--steps: expected some of {', '.join(names)}; got {', '.join(unknown)}")
    if not options.dry_run and (reason := why_no_device()):
        parser.error(f"no CUDA device ({reason}). To see that the script runs: --dry-run")
    options.out.mkdir(parents=True, exist_ok=True)
    for sent in (signal.SIGINT, signal.SIGTERM):  # a shell's background job ignores the first
        signal.signal(sent, signal.default_int_handler)
    steps = [step for step in STEPS if step.name in wanted]
    try:
        whole = run_steps(steps, options.out, options.seconds, options.dry_run)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {options.out / 'gpu.json'}")
        return 130
    text = summary(whole)
    (options.out / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
    failed = [name for name, row in whole["steps"].items() if row["status"] not in (OK, LATE)]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
