"""Converts row-major tokens to images and back, for convolutions. Sharding over a mesh is preserved."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Array, Float

from flowgen.backend import keep_axes


def check_grid(grid: tuple[int, int] | None, num_tokens: int) -> tuple[int, int]:
    """Returns the grid; raises ValueError if it is missing or does not match the number of tokens."""
    if grid is None:
        raise ValueError(f"grid is None, but this layer needs the (height, width) of its {num_tokens} tokens.")
    if grid[0] * grid[1] != num_tokens:
        raise ValueError(f"grid is {tuple(grid)}, but height times width must be the number of tokens, {num_tokens}.")
    return grid


def as_image(x: Float[Array, "b n d"], height: int, width: int) -> Float[Array, "b height width d"]:
    """Returns images whose pixels are the given tokens, in row-major order."""

    def run(x):
        return rearrange(x, "b (i j) d -> b i j d", i=height, j=width)

    return keep_axes(run, x, named=[(x, "b n d")], out="b i j d")


def as_tokens(image: Float[Array, "b height width d"]) -> Float[Array, "b n d"]:
    """Returns the pixels of images as tokens, in row-major order."""

    def run(image):
        return rearrange(image, "b i j d -> b (i j) d")

    return keep_axes(run, image, named=[(image, "b i j d")], out="b n d")


def fold(x: Float[Array, "b n h k"], height: int, width: int) -> Float[Array, "bh height width k"]:
    """Returns one image per sample and head, whose pixels are the given tokens in row-major order."""

    def run(x):
        return rearrange(x, "b (i j) h k -> (b h) i j k", i=height, j=width)

    return keep_axes(run, x, named=[(x, "b n h k")], out="b i j k")


def unfold(images: Float[Array, "bh height width k"], like: Float[Array, "b n h k"]) -> Float[Array, "b m h k"]:
    """Returns the tokens `b m h k` of images from `fold`, sharded like the array `like`."""
    heads = like.shape[2]

    def run(images):
        return rearrange(images, "(b h) i j k -> b (i j) h k", h=heads)

    return keep_axes(run, images, named=[(like, "b n h k")], out="b m h k")
