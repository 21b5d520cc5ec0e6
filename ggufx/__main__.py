"""``python -m ggufx``: the command line."""

from ggufx.cli import run

run()
