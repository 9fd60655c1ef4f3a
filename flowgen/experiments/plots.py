"""Images that runs save: grids of samples, and plots of points and their paths."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from flowgen.data import image_grid, to_uint8
from flowgen.packages import missing

GRID_SIDE = 64
DRAWABLE_CHANNELS = (1, 3)
MAX_COLUMNS = 20
DRAWN_PATHS = 128


def sample_grid(
    images: Float[np.ndarray, "n height width c"], classes: int, *, columns: int | None = None
) -> UInt8[np.ndarray, "rows columns c"]:
    """Returns a grid of images with values in [-1, 1]; small images are enlarged.

    If the images cycle through up to 20 classes, each column shows one class. If there are few classes, each has
    several columns, which keeps the grid roughly square. columns: number of columns; by default, as described.

    Example:
        save_image("samples.png", sample_grid(images, classes=10))
    """
    if columns is None and 1 < classes <= MAX_COLUMNS and len(images) >= classes:
        columns = classes * max(1, round(math.sqrt(len(images)) / classes))
    return image_grid(to_uint8(images), columns=columns, scale=max(1, GRID_SIDE // max(images.shape[1:3])))


def strips(clips: Float[np.ndarray, "n frames height width c"]) -> UInt8[np.ndarray, "rows columns c"]:
    """Returns an image in which each row shows the frames of one clip from left to right. Small frames are enlarged.

    clips: values in [-1, 1].

    Example:
        save_image("samples.png", strips(clips))
    """
    frames = clips.reshape(-1, *clips.shape[2:])
    return image_grid(to_uint8(frames), columns=clips.shape[1], scale=max(1, GRID_SIDE // max(frames.shape[1:3])))


def side_by_side(clips: Float[np.ndarray, "n frames height width c"]) -> UInt8[np.ndarray, "frames rows columns c"]:
    """Returns the frames of a video that shows all clips in a grid.

    clips: values in [-1, 1].

    Example:
        write_video("samples.mp4", side_by_side(clips))
    """
    return np.stack([sample_grid(frame, 0) for frame in clips.swapaxes(0, 1)])


def path_plot(
    paths: Float[np.ndarray, "times n 2"], samples: Float[np.ndarray, "m 2"], data: Float[np.ndarray, "k 2"]
) -> UInt8[np.ndarray, "height width 3"]:
    """Returns an image of two plots: paths from noise to samples, and samples on top of the data.

    Raises ModuleNotFoundError if matplotlib is missing.

    Example:
        save_image("samples.png", path_plot(paths, samples, data))
    """
    figure_class, canvas_class = matplotlib()
    figure = figure_class(figsize=(10, 5), layout="constrained")
    canvas = canvas_class(figure)
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    lines = paths[:, :DRAWN_PATHS]
    left.plot(lines[:, :, 0], lines[:, :, 1], color="tab:gray", alpha=0.4, linewidth=0.7)
    left.scatter(*lines[0].T, s=6, color="black", label="x0", zorder=2)
    left.scatter(*lines[-1].T, s=6, color="tab:blue", label="sample", zorder=2)
    right.scatter(*data.T, s=3, color="tab:orange", alpha=0.6, label="data")
    right.scatter(*samples.T, s=3, color="tab:blue", alpha=0.6, label="sample")
    for axes in (left, right):
        axes.set_aspect("equal")
        axes.legend(loc="upper right", markerscale=3)
    canvas.draw()
    return np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])


def matplotlib() -> tuple[Any, Any]:
    """Returns matplotlib's `Figure`, and the canvas class that draws it in memory.

    Raises ModuleNotFoundError if matplotlib is missing.

    Example:
        figure_class, canvas_class = matplotlib()
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise missing("Plotting points", "matplotlib") from error
    return Figure, FigureCanvasAgg
