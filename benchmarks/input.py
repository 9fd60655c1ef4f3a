"""Reading training data: JPEG files of 1,000 x 750 pixels, decoded to 256 x 256, from a folder and from tar files.

python benchmarks/input.py --out benchmarks/results/input.json [--images 256]

The program writes the images to a temporary folder and packs them into shards. Both are read in the same random order,
taking turns, from the page cache. A second pair of rows reads the bytes of each file without decoding them, which shows
the difference between the two ways to read.
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import measure
import numpy as np
from PIL import Image

from flowgen.data import DataConfig, load
from flowgen.data.listing import list_files
from flowgen.data.tar import list_tar

Row = dict[str, Any]
HEIGHT, WIDTH, SIZE, QUALITY = 750, 1000, 256, 90
SHARDS, BATCH = 4, 32


def write_images(folder: Path, count: int) -> None:
    """Writes JPEG files with smooth shapes and some noise, which compress about as well as photographs."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (15, 20, 3), np.uint8))
        pixels = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(pixels + random.integers(-6, 7, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:05}.jpg", quality=QUALITY)


def pack(folder: Path, shards: Path) -> None:
    """Packs every fourth file into each of four shards."""
    shards.mkdir()
    files = sorted(folder.iterdir())
    for number in range(SHARDS):
        with tarfile.open(shards / f"{number}.tar", "w") as shard:
            for file in files[number::SHARDS]:
                shard.add(file, file.name)


def decoding(name: str, path: Path) -> tuple[measure.Run, int]:
    """Returns a run that decodes every image once, in batches, and the number of images."""
    config = DataConfig(name, path=str(path), eval_fraction=0.0, in_memory_bytes=0)
    dataset = load(config, image_size=(SIZE, SIZE), channels=3, split="train")
    batches = np.array_split(np.random.default_rng(1).permutation(len(dataset)), -(-len(dataset) // BATCH))
    return lambda: measure.cost(lambda: [dataset[batch] for batch in batches]), len(dataset)


def reading(name: str, path: Path) -> tuple[measure.Run, int]:
    """Returns a run that reads the bytes of every file once, in one thread, and the number of files."""
    files = (list_files if name == "folder" else list_tar)(path, (".jpg",), "images").files
    order = np.random.default_rng(1).permutation(len(files)).tolist()
    return lambda: measure.cost(lambda: [files[number].read_bytes() for number in order]), len(files)


def rows(folder: Path, shards: Path) -> list[Row]:
    """Returns a row for each way to read, beside the folder."""
    found = []
    for what, make, rounds in (("decode", decoding, 10), ("read", reading, 50)):
        made = {name: make(name, path) for name, path in (("folder", folder), ("tar", shards))}
        timings = measure.alternate({name: run for name, (run, _) in made.items()}, rounds, slow_rounds=rounds)
        for name, timing in timings.items():
            figures = measure.figures(timing, baseline=f"{what} folder", against=timings["folder"], compiled=False)
            count = made[name][1]
            found.append(
                {"name": f"{what} {name}", "images": count, "shape": f"{HEIGHT} x {WIDTH} -> {SIZE} x {SIZE}"}
                | figures
                | {"images_per_second": round(count / timing.median, 1)}
                | {"fastest_images_per_second": round(count / timing.fastest, 1)}
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=256, help="number of images")
    parser.add_argument("--threads", type=int, default=2, help="number of processor cores")
    given = parser.parse_args()
    measure.check_cores(parser, "--threads", given.threads)
    measure.confine(given.threads)
    with tempfile.TemporaryDirectory() as folder:
        photos, shards = Path(folder) / "photos", Path(folder) / "shards"
        write_images(photos, given.images)
        pack(photos, shards)
        found = rows(photos, shards)
    where = measure.environment(given.threads, None)
    measure.save(given.out, [row | where for row in found])
    for row in found:
        sys.stdout.write(f"{row['name']:14s} {row['images_per_second']:10.1f} images/s  {row['ratio']:.3f}\n")


if __name__ == "__main__":
    main()
