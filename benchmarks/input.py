"""Times the input of images: JPEGs of 1,000 x 750 pixels, decoded and resized to 256 x 256.

python benchmarks/input.py --out benchmarks/results/input.json --torch-python PATH_TO_python_WITH_torchvision
"""

import argparse
import tarfile
import tempfile
from pathlib import Path

import measure
import numpy as np

SIZE, BATCH, SIDE = (1000, 750), 32, 256
CLASSES, SHARDS = ("cat", "dog"), 4
BASELINE = "ImageFolder and DataLoader"


def write_images(folder: Path, count: int) -> None:
    """Writes JPEGs with smooth areas, edges and noise, of about 190 kB each."""
    from PIL import Image

    random = np.random.default_rng(0)

    def blown_up(columns: int, rows: int) -> np.ndarray:
        small = Image.fromarray(random.integers(0, 256, (rows, columns, 3), np.uint8))
        return np.asarray(small.resize(SIZE, Image.Resampling.BICUBIC), np.float32)

    for number in range(count):
        noise = random.normal(0, 4, (*SIZE[::-1], 3))
        pixels = 0.75 * blown_up(12, 16) + 0.2 * blown_up(200, 150) + noise
        path = folder / CLASSES[number % len(CLASSES)] / f"{number:05}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


def write_shards(folder: Path, images: Path) -> None:
    """Packs the images into tar files."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for path in sorted(images.rglob("*.jpg"))[shard::SHARDS]:
                archive.add(path, path.relative_to(images).as_posix())


def passes(images: Path, shards: Path, cores: int) -> dict[str, measure.Run]:
    """Returns our runs, each of which is one pass over the images in batches."""
    from flowgen.data import DataConfig, Loader, load, prefetch

    def run(name: str, path: Path, workers: int) -> measure.Run:
        config = DataConfig(name, path=str(path), eval_fraction=0.0, in_memory_bytes=0, workers=workers)
        loader = Loader(load(config, image_size=SIDE, channels=3, split="train"), batch_size=BATCH, seed=0)
        steps = len(loader.dataset) // BATCH

        def read() -> None:
            for batch in prefetch(loader, 0, steps):
                assert batch.x.shape == (BATCH, SIDE, SIDE, 3)

        return lambda: measure.cost(read)

    return {
        "files, threads": run("folder", images, 0),
        "files, processes": run("folder", images, cores),
        "shards, threads": run("tar", shards, 0),
        "shards, processes": run("tar", shards, cores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--torch-python", type=Path, help="interpreter with torchvision, for the baseline")
    parser.add_argument("--cores", type=int, default=2, help="number of processor cores, and of workers on each side")
    parser.add_argument("--images", type=int, default=256, help="number of images")
    parser.add_argument("--rounds", type=int, default=measure.REPEATS)
    options = parser.parse_args()
    if not options.out.parent.is_dir():
        parser.error(f"--out is {options.out}, but its directory does not exist; create it first.")
    if options.images < BATCH:
        parser.error(f"--images is {options.images}; it must be at least {BATCH}.")
    measure.check_cores(parser, "--cores", options.cores)
    measure.confine(options.cores)

    with tempfile.TemporaryDirectory() as folder:
        images, shards = Path(folder) / "images", Path(folder) / "shards"
        images.mkdir()
        shards.mkdir()
        write_images(images, options.images)
        write_shards(shards, images)
        runs, version = passes(images, shards, options.cores), None
        if options.torch_python is not None:
            other = measure.Process(options.torch_python, Path(__file__).with_name("input_published.py"))
            version = other.ask({"path": str(images), "workers": options.cores, "batch": BATCH, "side": SIDE})
            runs[BASELINE] = lambda: measure.Cost(other.ask({}), 0.0)  # most of the work is in other processes
        timings = measure.alternate(runs, options.rounds, slow_rounds=options.rounds)
    baseline = BASELINE if BASELINE in timings else "files, threads"
    count = options.images // BATCH * BATCH
    rows = [
        {
            "name": name,
            "model": f"{count} JPEGs of {SIZE[0]} x {SIZE[1]} to {SIDE} x {SIDE}, batches of {BATCH}",
            "seconds": round(timing.median, 3),
            "fastest": round(timing.fastest, 3),
            "repeats": len(timing.calls),
            "baseline": baseline,
            "ratio": round(timing.median / timings[baseline].median, 4),
            "ratio_fastest": round(timing.fastest / timings[baseline].fastest, 4),
            "images_per_second_per_core": round(count / timing.median / options.cores, 1),
        }
        for name, timing in timings.items()
    ]
    where = measure.environment(options.cores, version)
    measure.save(options.out, [row | where for row in rows])
    for row in rows:
        rate = row["images_per_second_per_core"]
        print(f"{row['name']:30s} {rate:7.1f} images/s per core  {row['ratio']:6.3f} x {baseline}")


if __name__ == "__main__":
    main()
