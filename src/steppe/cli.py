"""Where the command line begins: it listens to Ctrl-C before anything slow is imported."""

from __future__ import annotations

import os
import signal
import sys

INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main() -> None:
    """Run the command line, and exit with its code."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup has it ignored
        signal.signal(signal.SIGINT, end_at_once)
    from steppe.commands.app import run

    code = run()
    # Of `python -m`: a KeyboardInterrupt that has crossed an `exec` of source text, as dataclasses
    # are made by, lets Python end by the signal and not with the code, although it was caught. The
    # next `exec` makes it forget.
    exec("")
    sys.exit(code)


def end_at_once(signal_number: int, frame: object) -> None:
    """End the process with one line.

    While modules are imported, an exception will not do: they turn it into another or swallow it.
    """
    os.write(2, b"interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
