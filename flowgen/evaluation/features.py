"""Image features without a download, from a small classifier that is trained on the dataset itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, Int, Key

from flowgen.arrays import check_floating
from flowgen.data.dataset import Dataset
from flowgen.data.loader import Loader, fixed_batches
from flowgen.data.media import from_uint8

WIDTH = 16
FEATURES = 64
BATCH = 64
LEARNING_RATE = 5e-3
MAX_NOISE = 0.2
READ_AT_ONCE = 512


class _ConvNet(nn.Module):
    """Three convolutions, global average pooling, a dense layer for the features, and another for the class logits."""

    num_classes: int

    @nn.compact
    def __call__(self, x: Float[Array, "b height width c"]) -> tuple[Array, Array]:
        for index, stride in enumerate((1, 2, 2)):
            x = nn.Conv(WIDTH << index, (3, 3), (stride, stride))(x)
            x = jax.nn.silu(nn.GroupNorm(8)(x))
        features = jax.nn.silu(nn.Dense(FEATURES)(x.mean(axis=(1, 2))))
        return features, nn.Dense(self.num_classes)(features)


@dataclass(frozen=True)
class Classifier:
    """A trained classifier for images in [-1, 1], which also computes features for distances between sets of images.

    Example:
        classifier = train_classifier(dataset, jax.random.key(0))
        accuracy = (classifier.classes(images) == labels).mean()
    """

    network: _ConvNet
    variables: Any

    def features(self, images: Float[np.ndarray, "n height width c"]) -> Float[np.ndarray, "n features"]:
        """Returns the features of each image: the inputs of the last layer."""
        return self._run(images, 0)

    def classes(self, images: Float[np.ndarray, "n height width c"]) -> Int[np.ndarray, " n"]:
        """Returns the label of the most probable class of each image."""
        return self._run(images, 1).argmax(axis=1)

    def _run(self, images, output):
        check_floating("images", images)
        parts = [images[start : start + READ_AT_ONCE] for start in range(0, len(images), READ_AT_ONCE)]
        return np.concatenate([np.asarray(_apply(self.network, self.variables, part)[output]) for part in parts])


def train_classifier(dataset: Dataset, key: Key[Array, ""], *, steps: int = 200) -> Classifier:
    """Trains a classifier to predict the dataset's labels. Images with the label -1 have no class, and are left out.

    Noise is added to the training images, so that the classifier also works on noisy samples.

    Raises ValueError if no image has a label.

    Example:
        classifier = train_classifier(experiment.dataset("train"), jax.random.key(0))
    """
    if not has_labels(dataset):
        raise ValueError("the dataset has no labels to train the classifier on; give a dataset with classes.")
    network = _ConvNet(len(dataset.class_names))
    init_key, noise_key = jax.random.split(key)
    variables = jax.jit(network.init)(init_key, jnp.zeros((1, *dataset.event_shape)))
    state = _optimizer(steps).init(variables)
    loader = Loader(dataset, batch_size=min(BATCH, len(dataset)), seed=0)
    for step in range(steps):
        step_key = jax.random.fold_in(noise_key, step)
        variables, state = _update(network, steps, variables, state, loader.batch(step), step_key)
    return Classifier(network, variables)


def has_labels(dataset: Dataset) -> bool:
    """Returns whether any image of a dataset has a class. Reads images until it finds one.

    Example:
        has_labels(experiment.dataset("train"))
    """
    if not dataset.class_names:
        return False
    return any((np.asarray(batch.labels) >= 0).any() for batch, _ in fixed_batches(dataset, min(BATCH, len(dataset))))


def _optimizer(steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps))


@partial(jax.jit, static_argnums=(0, 1))
def _update(network, steps, variables, state, batch, key):
    level_key, key = jax.random.split(key)
    images = from_uint8(batch.pixels)
    level = MAX_NOISE * jax.random.uniform(level_key, (len(images), 1, 1, 1))
    labelled = batch.labels >= 0
    noised = images + level * jax.random.normal(key, images.shape)

    def loss(variables):
        logits = network.apply(variables, noised)[1]
        # Optax reads the label -1 as the last class.
        terms = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(batch.labels, 0))
        return jnp.where(labelled, terms, 0).sum() / jnp.maximum(labelled.sum(), 1)

    updates, state = _optimizer(steps).update(jax.grad(loss)(variables), state)
    return optax.apply_updates(variables, updates), state


@partial(jax.jit, static_argnums=0)
def _apply(network, variables, images):
    return network.apply(variables, images)
