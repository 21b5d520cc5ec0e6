"""``ggufx`` and ``python -m ggufx``: the command line."""

from __future__ import annotations

import signal
from typing import NoReturn

__all__ = ["start"]


def start() -> NoReturn:
    """Run the command line. An interrupt while its modules load ends the process without a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from ggufx.cli import run

    run()


if __name__ == "__main__":
    start()
