"""Draw samples: python sample.py --checkpoint runs/digits --num 16 --out samples.png"""

import sys

from flowgen.cli import program

if __name__ == "__main__":
    sys.exit(program(["sample", *sys.argv[1:]]))
