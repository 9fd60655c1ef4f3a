"""Validation of fields that the configs of several models share. Each error states the field, its value and a fix."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, SupportsIndex

# A side in pixels, or (height, width).
ImageSize = SupportsIndex | Sequence[SupportsIndex]


def image_sides(image_size: object, name: str = "image_size") -> tuple[int, int]:
    """Returns (height, width) for an image size, which is one side of a square or a pair of sides.

    The sides may be integers of any type. Raises ValueError unless both are at least 1.

    name: the name of the field in the error message.
    """
    sides = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
    whole = [_whole(side) for side in sides]
    if len(whole) == 2 and min(whole) >= 1:
        return whole[0], whole[1]
    raise ValueError(f"{name} is {image_size!r}, but must be a side of at least 1 pixel, or (height, width).")


def _whole(value: Any) -> int:
    """Returns an integer of any type as a Python int, and 0 for any other value."""
    try:
        return 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return 0


def check_patches(image_size: object, patch_size: int) -> None:
    """Raises ValueError unless images of this size can be divided into patches of this size."""
    sides = dict(zip(("height", "width"), image_sides(image_size), strict=True))
    odd = [f"{side} {length}" for side, length in sides.items() if length < patch_size or length % patch_size]
    if odd:
        raise ValueError(
            f"image_size has {' and '.join(odd)}, which patch_size {patch_size} does not divide; "
            f"use a multiple of {patch_size} or another patch_size."
        )


def check_heads(width: int, head_dim: int, name: str = "width") -> None:
    """Raises ValueError unless head_dim divides the width. name: the name of the width in the error message."""
    if width % head_dim:
        raise ValueError(f"{name} is {width}, which is not a multiple of head_dim {head_dim}; change one of them.")


def check_implementation(implementation: str, attention: object) -> None:
    """Raises ValueError unless `implementation` is "auto" or `attention` is "softmax"."""
    if implementation != "auto" and not (isinstance(attention, str) and attention == "softmax"):
        raise ValueError(
            f"attention_implementation is {implementation!r}, which applies only to softmax attention, but attention "
            f"is {attention!r:.80}; leave it at 'auto'."
        )
