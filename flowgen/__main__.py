"""`python -m flowgen`."""

import sys

from flowgen.cli import main

sys.exit(main())
