"""The results of evaluations: metrics with their standard errors, printed lines and files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float


class Estimate(NamedTuple):
    """An estimate of a metric, with its standard error.

    standard_error: the standard deviation that `value` would have over datasets of the same size; None if unknown.
    count: the number of samples from which `value` was computed; None if unknown.

    Example:
        estimate = Estimate(2.98, standard_error=0.01, count=10_000)
        print(f"bits/dim {estimate}")  # bits/dim 2.9800 ± 0.0100
        print(f"bits/dim {estimate:.2f}")  # bits/dim 2.98 ± 0.01
    """

    value: float
    standard_error: float | None = None
    count: int | None = None

    def __str__(self) -> str:
        return format(self, "")

    def __format__(self, form: str) -> str:
        form = form or ".4f"
        error = "" if self.standard_error is None else f" ± {self.standard_error:{form}}"
        return f"{self.value:{form}}{error}"


def mean_of(values: Float[np.ndarray, " n"]) -> Estimate:
    """Returns the mean of n independent values, and its standard error: their standard deviation divided by √n.

    The standard error is None if there is a single value, or if all values are equal. If a value is NaN, the mean and
    its standard error are NaN.

    Raises ValueError if there are no values.

    Example:
        estimate = mean_of(np.array([2.9, 3.1]))
    """
    values = np.asarray(values, np.float64)
    if not len(values):
        raise ValueError("values is empty, and has no mean; give at least one value.")
    error = None if values.min() == values.max() else float(values.std(ddof=1) / math.sqrt(len(values)))
    return Estimate(float(values.mean()), error, len(values))


def ratio_of(values: Float[np.ndarray, " n"], sizes: Float[np.ndarray, " n"]) -> Estimate:
    """Returns Σ values / Σ sizes over independent samples, and its standard error by the delta method.

    The standard error is that of the mean of (value - ratio · size) / mean size.

    Example:
        nats_per_dim = ratio_of(nats, dims)  # of samples of different lengths
    """
    values, sizes = np.asarray(values, np.float64), np.asarray(sizes, np.float64)
    ratio = float(values.sum() / sizes.sum())
    return mean_of((values - ratio * sizes) / sizes.mean())._replace(value=ratio)


@dataclass(frozen=True)
class Evaluation:
    """The metrics of an evaluation, the lines to print, and the files to save.

    lines: the lines of text that the command `evaluate` prints.
    metrics: the metrics by name.
    about: values that JSON can represent and that describe how the metrics were measured, such as the noise and the
        feature extractor.
    files: the contents of files to save beside the metrics: a uint8 image `height width c`, or a dict of arrays. Each
        key is the end of a file's name: if the metrics are saved as a.json, "neighbours.png" becomes a.neighbours.png.

    The operator `+` appends the lines of the second evaluation to those of the first, and merges the other fields. If
    both evaluations have an entry of the same name, the result contains that of the second.

    Example:
        evaluation = Evaluation(("bits/dim 2.9800",), {"bits_per_dim": Estimate(2.98)})
    """

    lines: tuple[str, ...] = ()
    metrics: Mapping[str, Estimate] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Any] = field(default_factory=dict)

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(
            self.lines + other.lines,
            {**self.metrics, **other.metrics},
            {**self.about, **other.about},
            {**self.files, **other.files},
        )

    def record(self) -> dict[str, Any]:
        """Returns a dict that JSON can represent, with the keys "metrics" and "lines" and all entries of `about`.

        Floats that are not finite become None.

        Example:
            json.dumps(evaluation.record(), allow_nan=False)
        """
        metrics = {name: one._asdict() for name, one in self.metrics.items()}
        return _plain({"metrics": metrics, **self.about, "lines": self.lines})


def _plain(value: Any) -> Any:
    """Returns a copy with None in place of floats that JSON cannot represent: NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
