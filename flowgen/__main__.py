"""`python -m flowgen`."""

import sys

from flowgen.cli import program

sys.exit(program())
