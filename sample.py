"""Draw samples: python sample.py --checkpoint runs/digits --num 16 --out samples.png"""

import sys

from flowgen.cli import main

if __name__ == "__main__":
    sys.exit(main(["sample", *sys.argv[1:]]))
