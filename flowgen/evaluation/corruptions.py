"""Corruptions that turn images into anomalies, for tests of anomaly detection."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import UInt8

Images = UInt8[np.ndarray, "n height width c"]
NOISE_STD = 0.15 * 255


def noisy(images: Images, random: np.random.Generator) -> Images:
    """Returns the images with added Gaussian noise; its standard deviation is 15 % of the range of pixel values."""
    return _levels(images + NOISE_STD * random.standard_normal(images.shape))


def blurred(images: Images, random: np.random.Generator) -> Images:
    """Returns the images blurred along both sides with the filter (1/4, 1/2, 1/4).

    The filter is applied once for every 16 pixels of the side, but at least once.
    """
    x = images.astype(np.float64)
    for axis in (1, 2):
        for _ in range(max(1, images.shape[axis] // 16)):
            width = [(1, 1) if other == axis else (0, 0) for other in range(4)]
            padded = np.moveaxis(np.pad(x, width, mode="edge"), axis, 0)
            x = np.moveaxis(0.25 * padded[:-2] + 0.5 * padded[1:-1] + 0.25 * padded[2:], 0, axis)
    return _levels(x)


def occluded(images: Images, random: np.random.Generator) -> Images:
    """Returns the images with a randomly placed rectangle of half their height and width in their mean colour."""
    out, sides = images.copy(), images.shape[1:3]
    for index in range(len(images)):
        top, left = (int(random.integers(0, side - side // 2 + 1)) for side in sides)
        colour = _levels(images[index].mean(axis=(0, 1)))
        out[index, top : top + sides[0] // 2, left : left + sides[1] // 2] = colour
    return out


def shuffled(images: Images, random: np.random.Generator) -> Images:
    """Returns the images with diagonally opposite quarters exchanged."""
    return np.roll(images, (images.shape[1] // 2, images.shape[2] // 2), axis=(1, 2))


def inverted(images: Images, random: np.random.Generator) -> Images:
    """Returns the negatives of the images."""
    return 255 - images


CORRUPTIONS: Mapping[str, Callable[[Images, np.random.Generator], Images]] = MappingProxyType(
    {"noise": noisy, "blur": blurred, "occlusion": occluded, "shuffle": shuffled, "inversion": inverted}
)


def _levels(x: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(x), 0, 255).astype(np.uint8)
