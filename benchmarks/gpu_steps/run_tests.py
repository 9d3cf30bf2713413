"""The tests of a file on one device, with pytest or without: ``python -m gpu_steps.run_tests``.

After each test the outcomes are in a file, so that a crash tells which test it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

from gpu_steps import small_pytest
from gpu_steps.results import write_json
from gpu_steps.stand_ins import fill_in

ROOT = Path(__file__).resolve().parents[2]


class Outcomes:
    """A plugin for pytest, and what the small runner reports to.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._by_test: dict[str, str] = {}

    def note(self, test: str, outcome: str) -> None:
        """Take down what a test has come to."""
        self._by_test[test] = outcome
        write_json(self._path, self._by_test)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """A test begins."""
        self.note(nodeid.partition("::")[2], "running")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """A part of a test is over."""
        test = report.nodeid.partition("::")[2]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.note(test, f"failed: {' '.join(str(crash or report.longrepr).split())[-300:]}")
        elif report.skipped:
            self.note(test, f"skipped: {report.longrepr[-1]}")
        elif report.when == "call":
            self.note(test, "passed")


def main() -> int:
    """Run them.

    Returns:
        0 if none failed.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--only", default="", help="a part of the tests' names")
    options = parser.parse_args()
    fill_in()
    outcomes = Outcomes(options.results)
    if importlib.util.find_spec("pytest") is None:
        sys.path.insert(0, str(ROOT / "tests"))
        return small_pytest.run_file(options.file, options.device, options.only, outcomes.note)
    import pytest  # not on every machine

    mark = "gpu" if options.device == "cuda" else "not gpu"
    arguments = [f"--rootdir={ROOT}", "-p", "no:cacheprovider", "-q", "-m", mark]
    arguments += ["-W", "default"]  # versions that are not ours may warn of anything
    return pytest.main([*arguments, "-k", options.only, str(options.file)], plugins=[outcomes])


if __name__ == "__main__":
    sys.exit(main())
