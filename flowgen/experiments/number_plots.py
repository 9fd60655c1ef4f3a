"""Plots samples of vectors, sequences and sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from flowgen.experiments.plots import matplotlib

MOST_ENTRIES = 8  # rows and columns of a plot of pairs
MOST_LINES = 64  # sequences
MOST_POINTS = 2000
MOST_NAMED = 6  # entries of a context in a title
BINS = 40
_SAMPLE, _DATA = "tab:blue", "tab:orange"


def number_plot(
    samples: Float[np.ndarray, "num *event"],
    mask: Bool[np.ndarray, "num n"] | None = None,
    reference: Float[np.ndarray, "m d"] | None = None,
    title: str = "",
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image that shows samples as points or lines.

    Vectors of two entries, and sequences and sets with two channels, are drawn as points in the plane. Longer vectors
    are drawn as scatter plots of all pairs of the first eight entries, with histograms on the diagonal. Other sequences
    are drawn as lines, with one plot for each of the first eight channels. Axes are named after the entries of vectors
    or the channels of sequences, which are counted from 0.

    mask: which rows of padded samples are not padding. reference: other vectors to draw behind the samples, such as
    reference samples of the posterior. title: a title, such as that of `observation_title`; "" for none.

    Raises ModuleNotFoundError if matplotlib is missing.

    Example:
        save_image("samples.png", number_plot(samples))
    """
    if samples.ndim == 3 and samples.shape[2] == 2:
        points = samples[mask] if mask is not None else samples.reshape(-1, 2)
        return _pairs_plot(points, None, "channel", title)
    if samples.ndim == 3:
        return _lines_plot(samples if mask is None else np.where(mask[:, :, None], samples, np.nan), title)
    return _pairs_plot(samples, reference, "entry", title)


def observation_title(sampling: Any, model: Any, *, of_file: bool) -> str:
    """Returns the title of a plot of samples: their context, or where it is from; "" if the model has no context.

    sampling: a `TokenSamplingConfig`. model: the config of the flow. of_file: whether the contexts are from a file, not
    from a simulator.

    Example:
        title = observation_title(TokenSamplingConfig(context=(0.1, 0.2)), model, of_file=True)  # "context 0.1, 0.2"
    """
    if model.context is None and not model.padded:
        return ""
    if not sampling.context:
        return f"{'context of sample' if of_file else 'observation'} {sampling.observation}"
    entries = [f"{entry:g}" for entry in sampling.context[:MOST_NAMED]]
    return ", ".join([f"context {entries[0]}", *entries[1:], *["..."] * (len(sampling.context) > MOST_NAMED)])


def _pairs_plot(samples: np.ndarray, reference: np.ndarray | None, name: str, title: str) -> np.ndarray:
    layers = [("reference", reference, _DATA)] if reference is not None else []
    layers = [*layers, ("sample", samples, _SAMPLE)]
    count = min(samples.shape[1], MOST_ENTRIES)
    if count == 2:
        figure, canvas = _figure(5, 5, title)
        axes = figure.subplots()
        _scatter(axes, layers, 0, 1)
        axes.set(xlabel=f"{name} 0", ylabel=f"{name} 1")
        return _drawn(figure, canvas)
    side = 2 * count if count > 1 else 5
    figure, canvas = _figure(side, side, title)
    panels = figure.subplots(count, count, squeeze=False)
    for row, column in np.ndindex(count, count):
        if row == column:
            for label, values, colour in layers:
                panels[row, row].hist(values[:, row], BINS, density=True, alpha=0.6, color=colour, label=label)
        elif column < row:
            _scatter(panels[row, column], layers, column, row)
        else:
            panels[row, column].set_axis_off()
    for number in range(count):
        panels[-1, number].set_xlabel(f"{name} {number}")
        panels[number, 0].set_ylabel(f"{name} {number}" if number else "density")
    return _drawn(figure, canvas)


def _scatter(axes: Any, layers: list[tuple[str, np.ndarray, str]], first: int, second: int) -> None:
    for label, values, colour in layers:
        shown = values[:MOST_POINTS]
        axes.scatter(shown[:, first], shown[:, second], s=3, alpha=0.6, color=colour, label=label)


def _lines_plot(samples: np.ndarray, title: str) -> np.ndarray:
    count = min(samples.shape[2], MOST_ENTRIES)
    figure, canvas = _figure(6, 2.5 * count, title)
    for channel, axes in enumerate(figure.subplots(count, squeeze=False)[:, 0]):
        axes.plot(samples[:MOST_LINES, :, channel].T, color=_SAMPLE, alpha=0.4, linewidth=0.8, marker=".", markersize=3)
        axes.set(xlabel="row", ylabel=f"channel {channel}")
    return _drawn(figure, canvas)


def _figure(width: int | float, height: int | float, title: str) -> tuple[Any, Any]:
    figure_class, canvas_class = matplotlib()
    figure = figure_class(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title)
    return figure, canvas_class(figure)


def _drawn(figure: Any, canvas: Any) -> np.ndarray:
    labelled = [axes for axes in figure.axes if len(axes.get_legend_handles_labels()[1]) > 1]
    if labelled:
        labelled[0].legend(loc="upper right", markerscale=3)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
