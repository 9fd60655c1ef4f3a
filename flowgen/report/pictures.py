"""Turns arrays into pictures for a report."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import UInt8

from flowgen.data.media import as_pillow
from flowgen.report.markup import Markup, element, picture


def grid_picture(image: UInt8[np.ndarray, "height width c"], caption: str) -> Markup:
    """Returns a figure of an image with 1 or 3 channels. Raises ModuleNotFoundError if Pillow is missing.

    Example:
        figure = grid_picture(sample_grid(images, 10), "Training images")
    """
    file = io.BytesIO()
    as_pillow(image).save(file, format="PNG", optimize=True)
    return element("figure", picture(file.getvalue(), caption), element("figcaption", caption))
