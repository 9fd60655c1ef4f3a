"""Options for drawing samples and for evaluation, and functions that draw samples in batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Float, Int

from flowgen import backend
from flowgen.data.classes import parse_classes
from flowgen.data.dataset import Split
from flowgen.settings import config
from flowgen.settings.ranges import BatchSize, Seed, Within

# (key, sample numbers, cond) -> the samples, and a line that says how they were drawn.
# Sample i depends only on (key, i).
DrawBatch = Callable[[jax.Array, Int[np.ndarray, " b"], Any], tuple[np.ndarray, str]]
# Positions in the data, or sample numbers -> the condition of each.
Conditions = Callable[[Int[np.ndarray, " b"]], Any]

AT_ONCE = 64  # images or clips per compiled call by default


@config
class DrawOptions:
    """Options of the command sample, in addition to those in the experiment's field `sampling`.

    seed: random seed; sample i depends only on the seed and i.
    batch: number of samples to draw at a time; by default, 64 images or clips, 8192 vectors or sequences, or all
    points.
    """

    seed: Seed = 0
    batch: BatchSize | None = None


@config
class EvaluateOptions:
    """Options for evaluating any kind of model.

    split: split of the data to evaluate on. The command evaluate defaults to "all" for data other than the run's own.
    batch: number of samples per compiled call.
    seed: random seed for noise and samples.
    """

    split: Split = "eval"
    batch: BatchSize = 256
    seed: Seed = 0


@config
class CompareOptions(EvaluateOptions):
    """Options for comparing sampled images with data.

    features: features to compare; "auto" means "classifier" if the training images have classes, and otherwise
    "pixels". "classifier" trains a classifier on the training images. "efficientnet" uses ImageNet features from a
    package. For the FID, give a file of Inception v3 weights (.pth, .pt, .bin or .safetensors).
    reference: .npz file of feature statistics (mu and sigma) to compare with instead of the data.
    cache: folder that keeps feature statistics of the data for later evaluations. In the command evaluate, the default
    is RUN/evaluations.
    neighbours: number of samples to show, in a saved image, beside their nearest training images.
    """

    features: str = "auto"
    reference: str = ""
    cache: str = ""
    neighbours: Annotated[int, Within(0, 1 << 10)] = 0


def check_compared(samples: int) -> None:
    """Raises ValueError if `samples` is 1, because a distance needs at least 2; 0 means no comparison.

    Example:
        check_compared(options.samples)
    """
    if samples == 1:
        raise ValueError("samples is 1, but a distance needs at least 2; raise it, or leave it out.")


def check_samples(samples: Float[np.ndarray, "n ..."], first: int = 0) -> None:
    """Raises ValueError if samples have values that are not finite. first: the number of the first sample.

    Example:
        check_samples(samples)
    """
    if bad := np.count_nonzero(~np.isfinite(samples).reshape(len(samples), -1).all(axis=1)):
        raise ValueError(
            f"{bad} of samples {first} to {first + len(samples) - 1} have values that are not finite; lower "
            "--sampling.guidance, draw with --sampling.plan sequential if this is a flow, or evaluate another --step."
        )


def draw_in_batches(
    draw_batch: DrawBatch,
    conditions: Conditions,
    num: int,
    options: DrawOptions,
    say: Callable[[str], None],
    *,
    batch: int = AT_ONCE,
) -> Float[np.ndarray, "num ..."]:
    """Returns samples 0..num-1, and calls `say` with a line about the speed of each batch.

    draw_batch: called only with full batches, so that it is compiled only once. Surplus samples in the last batch are
    dropped. conditions: a function from sample numbers to conditions. batch: the batch size if `options.batch` is None.

    Example:
        samples = draw_in_batches(draw_batch, lambda numbers: labels[numbers], 100, DrawOptions(), print)
    """
    size, parts = min(options.batch or batch, num), []
    for first in range(0, num, size):
        count = min(size, num - first)
        began = time.perf_counter()
        # If the last numbers do not fill a batch, they are repeated, and the surplus samples are dropped.
        numbers = np.resize(np.arange(first, first + count), size)
        samples, line = draw_batch(jax.random.key(options.seed), numbers, conditions(numbers))
        seconds = time.perf_counter() - began
        compiled = " (with compilation)" if first == 0 else ""
        say(f"samples {first}..{first + count - 1}: {per_second(count / seconds)}{compiled}; {line}")
        parts.append(samples[:count])
    return np.concatenate(parts)


def on_devices(variables: Any, rows: int) -> Any:
    """Returns copies of a model's variables on all devices that share a batch of `rows` rows.

    The copies can be used for several batches.

    Example:
        variables = on_devices(variables, rows=AT_ONCE)
    """
    return backend.copies(variables, backend.sharing(rows, variables))


def per_second(rate: float) -> str:
    """Returns a rate as text, such as "12.3 per second" or "0.042 per second".

    Example:
        print(per_second(count / seconds))
    """
    return f"{rate:.1f} per second" if rate >= 1 else f"{rate:.2g} per second"


def drawn_classes(model: Any, data: Any) -> int:
    """Returns the number of classes that a run samples in turn: the named classes or, without names, all classes.

    Example:
        labels = cycled_labels(20, drawn_classes(experiment.model, experiment.data))
    """
    count, names = model.num_classes, getattr(data, "classes", ())
    return min(count, len(names)) if names else count


def asked_labels(model: Any, data: Any, num: int, classes: str) -> Int[np.ndarray, " num"] | None:
    """Returns the labels of `num` samples, cycling through the requested classes; None for a model without classes.

    classes: the value of --classes (see `parse_classes`). If it is empty, all classes are drawn in turn.

    Raises ValueError if the model has no such class.

    Example:
        labels = asked_labels(experiment.model, experiment.data, 20, "cat,dog")
    """
    if not classes:
        return cycled_labels(num, drawn_classes(model, data))
    if model.num_classes == 0:
        raise ValueError(f"--classes is {classes}, but this model has no classes; leave it out.")
    names = getattr(data, "classes", ())
    return np.resize(np.array(parse_classes(classes, names, model.num_classes), np.int32), num)


def cycled_labels(num: int, num_classes: int) -> Int[np.ndarray, " num"] | None:
    """Returns labels 0, 1, ..., 0, 1, ... for a grid with one class per column. Returns None if there are no classes.

    Example:
        labels = cycled_labels(20, 10)
    """
    return np.arange(num, dtype=np.int32) % num_classes if num_classes else None
