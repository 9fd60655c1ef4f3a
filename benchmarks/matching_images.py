"""Compares velocity networks trained on the built-in digits at several numbers of evaluations, and draws a figure.

for name in cfm otcfm wcfm; do python train.py --config ${name}_digits --workdir runs/$name; done
python train.py --config wcfm_digits_nala --workdir runs/wcfm_digits_nala
python benchmarks/matching_images.py --runs runs/{cfm,otcfm,wcfm,wcfm_digits_nala} \\
    --figure docs/images/matching_digits.png --out benchmarks/results/matching_images.json

The comparison of couplings with NFM (matching_nfm.json):

for seed in 0 1 2; do for name in cfm otcfm wcfm nfm; do \\
    python train.py --config ${name}_digits --workdir runs/$name-$seed --train.seed $seed; done; done
python benchmarks/matching_images.py --runs runs/{cfm,otcfm,wcfm,nfm}-{0,1,2} --evaluations 4 8 16 --guidance 0 0.5 \\
    --figure runs/nfm_digits.png --out benchmarks/results/matching_nfm.json
"""

import argparse
import dataclasses
import itertools
import os
import time
from functools import partial
from pathlib import Path

import jax
import measure
import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from flowgen import checkpoint
from flowgen.data import Dataset, from_uint8, image_grid, save_image, to_uint8
from flowgen.evaluation import frechet_distance
from flowgen.experiments.distances import sample_metrics, train_features

EVALUATIONS = [4, 10, 50]
SAMPLES = 1797  # as many as there are digits
CLASSES = 10
SCALE, LABEL_WIDTH, FONT_SIZE = 4, 155, 15  # of the figure, in pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="run directories, all on the same dataset")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--figure", type=Path, required=True, help="PNG to write: a row for each run and number")
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS, help="evaluations of the network")
    parser.add_argument("--guidance", type=float, nargs="+", help="scales of guidance (default: that of each config)")
    arguments = parser.parse_args()
    runs = [checkpoint.load(path) for path in arguments.runs]
    train, data = runs[0][2].dataset("train"), runs[0][2].dataset("all")
    extractor = train_features(train)
    floor = frechet_distance(*(extractor.features(images_of(runs[0][2].dataset(split))) for split in ("train", "eval")))
    where = measure.environment(len(os.sched_getaffinity(0)), None)
    rows, drawn, names = [], [], []
    for path, (network, variables, experiment) in zip(arguments.runs, runs, strict=True):
        scales = arguments.guidance or [experiment.sampling.guidance]
        for guidance, evaluations in itertools.product(scales, arguments.evaluations):
            one_step = experiment.sampling.method == "mean_flow"
            sampling = dataclasses.replace(
                experiment.sampling,
                guidance=guidance,
                method="mean_flow" if one_step else "heun",
                num_steps=evaluations if one_step else evaluations // 2,
            )
            solved = dataclasses.replace(experiment, sampling=sampling)
            began = time.perf_counter()
            draw = partial(solved.draw_batch, network, variables)
            digits = data[np.arange(len(data))].context
            metrics = sample_metrics(
                draw, extractor, data, SAMPLES, conditions=lambda positions, y=digits: y[positions]
            )
            seconds = time.perf_counter() - began
            labels = np.arange(2 * CLASSES) % CLASSES
            images, _ = draw(jax.random.key(0), np.arange(len(labels)), labels)
            drawn.append(images)
            names.append(f"{experiment.name}, {evaluations}" + (f", {guidance:g}" if arguments.guidance else ""))
            rows.append(
                {
                    "run": path.name,
                    "config": experiment.name,
                    "seed": experiment.train.seed,
                    "attention": experiment.model.attention,
                    "method": sampling.method,
                    "evaluations": evaluations,
                    "guidance": sampling.guidance,
                    **{name: round(value, 3) for name, value in metrics.items()},
                    "frechet_train_to_eval": round(floor, 3),
                    "features": extractor.name,
                    "samples": SAMPLES,
                    "seconds": round(seconds, 2),
                    **where,
                }
            )
            line = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            print(f"{path.name:16s} {evaluations:3d} evaluations, guidance {guidance:g}: {line}")
    measure.save(arguments.out, rows)
    grid = image_grid(to_uint8(np.concatenate(drawn)), columns=2 * CLASSES, scale=SCALE)
    save_image(arguments.figure, with_row_names(grid, names))


def with_row_names(grid: UInt8[np.ndarray, "height width 1"], names: list[str]) -> UInt8[np.ndarray, "height wider 1"]:
    """Returns a grid of images with the names of its rows on its left."""
    height, width, _ = grid.shape
    picture = Image.new("L", (LABEL_WIDTH + width, height), "white")
    picture.paste(Image.fromarray(grid[..., 0]), (LABEL_WIDTH, 0))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(FONT_SIZE)
    for row, name in enumerate(names):
        middle = (row + 0.5) * height / len(names)
        draw.text((LABEL_WIDTH - 8, middle), name, fill="black", font=font, anchor="rm")
    return np.asarray(picture)[..., None]


def images_of(dataset: Dataset) -> np.ndarray:
    return np.asarray(from_uint8(dataset[np.arange(len(dataset))].pixels))


if __name__ == "__main__":
    main()
