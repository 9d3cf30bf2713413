"""Where the command line begins: it listens to Ctrl-C before anything slow is imported."""

from __future__ import annotations

import signal
import sys

INTERRUPTED = 128 + signal.SIGINT  # as shells have it


def main() -> None:
    """Run the command line, and exit with its code."""
    try:
        from steppe.commands import run

        code = run()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one ends what is still winding up
        print("interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


if __name__ == "__main__":
    main()
