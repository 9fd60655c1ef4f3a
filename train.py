"""Train a model: python train.py --config configs/tarflow_digits.py --workdir runs/digits [--field.name value ...]"""

import sys

from flowgen.cli import program

if __name__ == "__main__":
    sys.exit(program(["train", *sys.argv[1:]]))
