"""The part of a report about data: the number of samples, the classes, and examples."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from flowgen.data import Dataset, LatentsConfig, NumbersConfig, PointsConfig, SimulatedConfig, from_uint8
from flowgen.data.dataset import OWN
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.plots import DRAWABLE_CHANNELS, sample_grid, strips
from flowgen.report.charts import bars, scatter
from flowgen.report.examples import Few, evenly, has_pixels, pixels
from flowgen.report.markup import Markup, Section, element, joined, note, section, table
from flowgen.report.pictures import grid_picture
from flowgen.runs import RunContents

SHOWN, SHOWN_CLIPS, SHOWN_POINTS = 24, 4, 400
COUNTED = 2048  # labels, if they can be read only together with the images
MOST_CLASSES = 24  # bars


def data_section(experiment: Experiment, contents: RunContents, *, opens: bool) -> Section:
    """Returns the summary of a run's data, with a note if the data cannot be opened.

    opens: whether to open the data, for counts of labels and for examples.

    Example:
        part = data_section(experiment, contents, opens=True)
    """
    parts: list[object] = [_summary(experiment, contents)]
    if isinstance(experiment.data, PointsConfig):
        x0, x1 = (np.asarray(side) for side in experiment.data.draw(jax.random.key(0), SHOWN_POINTS))
        parts.append(
            scatter("Points", [(f"x0, {experiment.data.x0}", x0.tolist()), (f"x1, {experiment.data.x1}", x1.tolist())])
        )
    elif not opens:
        parts.append(note("The data were not opened for this page."))
    elif not has_pixels(experiment):
        parts.append(note(_why_without_pixels(experiment)))
    else:
        try:
            parts += _opened(pixels(experiment, held_out=False))
        except (OSError, ValueError, ImportError) as error:
            parts.append(note(f"The data cannot be opened: {error}"))
    return section("Data", "data", *parts)


def _why_without_pixels(experiment: Experiment) -> str:
    if isinstance(experiment.data, LatentsConfig):
        return "The data are cached latents, which do not include the images."
    if isinstance(experiment.data, NumbersConfig | SimulatedConfig):
        return "The data are numbers, which are not shown."
    assert experiment.data.name == OWN
    return "The data were passed to fit in Python, so this command cannot open them."


def _summary(experiment: Experiment, contents: RunContents) -> Markup:
    record = contents.data
    if record is None:
        told = "drawn anew at every step" if isinstance(experiment.data, PointsConfig) else "not recorded by the run"
        return element("p", f"The data are {told}.")
    counts = {name: record.get(name) for name in ("train", "held_out")}
    rows = [(name.replace("_", "-"), f"{count:,}") for name, count in counts.items() if isinstance(count, int)]
    classes = record.get("classes")
    if isinstance(classes, list) and classes:
        rows.append(("classes", f"{len(classes):,}"))
    left_out = record.get("left_out")
    lines = left_out if isinstance(left_out, list) else []
    return joined(
        [
            element("p", str(record.get("found", ""))),
            table("Number of samples", ("split", "count"), rows),
            *(note(f"Left out: {line}") for line in lines),
        ]
    )


def _opened(dataset: Dataset) -> list[Markup]:
    parts = []
    if dataset.class_names:
        parts.append(_histogram(dataset))
    *frames, _, _, channels = dataset.event_shape
    if channels not in DRAWABLE_CHANNELS:
        return [*parts, note(f"The samples have {channels} channels, so they are not shown.")]
    few = Few(dataset, evenly(len(dataset), SHOWN_CLIPS if frames else SHOWN))
    images: Any = np.asarray(from_uint8(few.batch().pixels))
    grid = strips(images) if frames else sample_grid(images, 0)
    what = "clips, one per row" if frames else "images"
    return [*parts, grid_picture(grid, f"{len(few)} training {what}, resized as in training")]


def _histogram(dataset: Dataset) -> Markup:
    labels, told = getattr(dataset, "labels", None), ""
    if labels is None:
        positions = evenly(len(dataset), COUNTED)
        labels = dataset[positions].labels
        told = f" (of {len(positions):,} evenly spaced samples)" if len(positions) < len(dataset) else ""
    labels, names = np.asarray(labels), dataset.class_names
    counts = [(name, int((labels == index).sum())) for index, name in enumerate(names)]
    if missing := int((labels < 0).sum()):
        counts.append(("no class", missing))
    rest = len(counts) - MOST_CLASSES
    if rest > 0:
        counts.sort(key=lambda row: -row[1])
        told += f"; the {MOST_CLASSES} largest of {len(counts)} classes"
    return bars(f"Training samples per class{told}", counts[:MOST_CLASSES])
