"""Inception v3 as an extractor of the 2,048 features from which the FID is computed.

There are two variants. "fid" is the PyTorch port of the network in the original FID code (Heusel et al., arXiv
1706.08500): its average pooling ignores padding, and the pooling branch of its last block takes the maximum.
"torchvision" is the network of Szegedy et al. (arXiv 1512.00567): its average pooling includes padding, also in the
last block. The features of the two variants are not comparable.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.evaluation.networks import resized

Variant = Literal["fid", "torchvision"]
SIDE = 299
Branch = tuple[tuple[str, int, tuple[int, int], int], ...]  # (name, features, kernel, stride) of each convolution


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation with stored statistics, and ReLU."""

    features: int
    kernel: tuple[int, int]
    stride: int = 1
    pad: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns features"]:
        padded = self.pad and self.stride == 1
        padding = [(side // 2, side // 2) if padded else (0, 0) for side in self.kernel]
        x = nn.Conv(
            self.features,
            self.kernel,
            (self.stride,) * 2,
            padding=padding,
            use_bias=False,
            precision="highest",
            name="conv",
        )(x)
        return jax.nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name="bn")(x))


class Mixed(nn.Module):
    """Branches of convolutions on the same input, and a pooled branch; the outputs are concatenated.

    branches: the convolutions of each branch. If the name of a convolution ends in "b", its input is that of the
    convolution before it, and both outputs are kept.
    pooling: "average", "average_with_padding" or "max", followed by a convolution with `pool_features` features; or
    "stride", which is maximum pooling with stride 2 alone.
    """

    branches: tuple[Branch, ...]
    pooling: str
    pool_features: int = 192

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns features"]:
        outputs = []
        for branch in self.branches:
            before = after = x
            for name, features, kernel, stride in branch:
                if name.endswith("b"):
                    after = jnp.concatenate([after, Convolution(features, kernel, stride, name=name)(before)], axis=-1)
                else:
                    before, after = after, Convolution(features, kernel, stride, name=name)(after)
            outputs.append(after)
        if self.pooling == "stride":
            outputs.append(nn.max_pool(x, (3, 3), (2, 2)))
        else:
            outputs.append(Convolution(self.pool_features, (1, 1), name="branch_pool")(_pooled(x, self.pooling)))
        return jnp.concatenate(outputs, axis=-1)


def _pooled(x: Array, pooling: str) -> Array:
    around = ((1, 1), (1, 1))
    if pooling == "max":
        return nn.max_pool(x, (3, 3), padding=around)
    return nn.avg_pool(x, (3, 3), padding=around, count_include_pad=pooling == "average_with_padding")


def _branch(name: str, *convolutions: tuple[int, int, int], stride: int = 1) -> Branch:
    """Returns a branch of convolutions name_1, name_2, ..., each given as (features, rows, columns).

    stride: stride of the last convolution.
    """
    last = len(convolutions)
    return tuple(
        (f"{name}_{number}", features, (rows, columns), stride if number == last else 1)
        for number, (features, rows, columns) in enumerate(convolutions, 1)
    )


def _single(features: int, side: int = 1, stride: int = 1) -> Branch:
    return ((f"branch{side}x{side}", features, (side, side), stride),)


def _split(name: str, before: Branch, number: int) -> Branch:
    """Returns a branch that ends in a horizontal and a vertical convolution of the same input."""
    return (*before, (f"{name}_{number}a", 384, (1, 3), 1), (f"{name}_{number}b", 384, (3, 1), 1))


_TRIPLE = ((64, 1, 1), (96, 3, 3), (96, 3, 3))
_BLOCK_A = (_single(64), _branch("branch5x5", (48, 1, 1), (64, 5, 5)), _branch("branch3x3dbl", *_TRIPLE))
_BLOCK_B = (_single(384, 3, 2), _branch("branch3x3dbl", *_TRIPLE, stride=2))
_BLOCK_D = (
    _branch("branch3x3", (192, 1, 1), (320, 3, 3), stride=2),
    _branch("branch7x7x3", (192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3), stride=2),
)
_BLOCK_E = (
    _single(320),
    _split("branch3x3", _branch("branch3x3", (384, 1, 1)), 2),
    _split("branch3x3dbl", _branch("branch3x3dbl", (448, 1, 1), (384, 3, 3)), 3),
)


def _block_c(width: int) -> tuple[Branch, ...]:
    return (
        _single(192),
        _branch("branch7x7", (width, 1, 1), (width, 1, 7), (192, 7, 1)),
        _branch("branch7x7dbl", (width, 1, 1), (width, 7, 1), (width, 1, 7), (width, 7, 1), (192, 1, 7)),
    )


class InceptionV3(nn.Module):
    """Inception v3 without its classifier.

    Example:
        features = InceptionV3("fid").apply(variables, images, method="of_images")  # `b 2048`
    """

    variant: Variant = "fid"
    num_features: int = 2048

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"]) -> Float[Array, "b 2048"]:
        fid = self.variant == "fid"
        average = "average" if fid else "average_with_padding"
        x = Convolution(32, (3, 3), 2, name="Conv2d_1a_3x3")(x)
        x = Convolution(32, (3, 3), pad=False, name="Conv2d_2a_3x3")(x)
        x = Convolution(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Convolution(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = Convolution(192, (3, 3), pad=False, name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        for letter, pool_features in (("b", 32), ("c", 64), ("d", 64)):
            x = Mixed(_BLOCK_A, average, pool_features, name=f"Mixed_5{letter}")(x)
        x = Mixed(_BLOCK_B, "stride", name="Mixed_6a")(x)
        for letter, width in (("b", 128), ("c", 160), ("d", 160), ("e", 192)):
            x = Mixed(_block_c(width), average, name=f"Mixed_6{letter}")(x)
        x = Mixed(_BLOCK_D, "stride", name="Mixed_7a")(x)
        x = Mixed(_BLOCK_E, average, name="Mixed_7b")(x)
        x = Mixed(_BLOCK_E, "max" if fid else average, name="Mixed_7c")(x)
        return x.mean(axis=(1, 2))

    def of_images(self, images: Float[Array, "b height width c"]) -> Float[Array, "b 2048"]:
        """Returns the features of images in [-1, 1] after resizing them to 299 x 299 pixels."""
        return self(resized(images, SIDE))
