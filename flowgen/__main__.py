"""The entry point of `python -m flowgen`."""

import sys

from flowgen.cli import program

sys.exit(program())
