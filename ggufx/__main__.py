"""``python -m ggufx``: the command line."""

from ggufx.cli import main

main()
