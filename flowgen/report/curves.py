"""The part of a report about metrics: charts over steps, and a table of values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flowgen.report.charts import Number, Point, Series, line_chart
from flowgen.report.markup import Markup, Section, element, note, number, section, table
from flowgen.runs import EVAL, SPEED

# The title and the unit of the chart of each metric; other metrics have their name as title and no unit.
TITLES = {
    "loss": ("Loss", ""),
    "bits_per_dim": ("Likelihood: bits per dimension", "bits/dim"),
    "nats_per_dim": ("Likelihood: nats per dimension", "nats/dim"),
    "w2": ("2-Wasserstein distance to the data", "data units"),
    "frechet": ("Fréchet distance of samples", ""),
    "class_accuracy": ("Samples that show their class", "fraction"),
    "psnr": ("PSNR", "dB"),
    "mean_square_error": ("Mean square error", ""),
    "divergence": ("KL divergence of the latents", "nats/latent"),
    "unweighted_loss": ("Loss without weights", ""),
    "ess": ("Effective sample size of the weights", "fraction of the batch"),
    "mean_square/": ("Mean square of the tokens after each block", ""),
    "logdet_per_dim": ("Log-determinant", "nats/dim"),
    "grad_norm": ("Norm of the gradient", ""),
    "lr": ("Learning rate", ""),
    "skipped": ("Skipped updates", "fraction"),
    "flow_loss": ("Loss of the flow", ""),
    "denoiser_loss": ("Loss of the denoiser", ""),
    "score_square": ("Mean square of the score", ""),
    "path_energy": ("Energy of the paths", ""),
    "signed_npe": ("Signed path energy", ""),
    "curvature": ("Curvature of the paths", ""),
    "steps_per_second": ("Steps per second", "1/s"),
    "samples_per_second": ("Samples per second", "1/s"),
    "tokens_per_second": ("Tokens per second", "1/s"),
    "flop_per_second": ("Model FLOP per second", "FLOP/s"),
    "flop_per_step": ("Model FLOP per step", "FLOP"),
    "mfu": ("Model FLOP utilisation", "fraction"),
    "data_wait": ("Time spent waiting for data", "fraction"),
    "peak_memory_bytes": ("Peak memory of a device", "bytes"),
}
# Metrics that share a chart with another one.
JOINED = {
    "gaussian_bits_per_dim": "bits_per_dim",
    "w2_floor": "w2",
    **dict.fromkeys(("euler_1", "euler_4", "euler_10"), "w2"),
    **dict.fromkeys(("psnr_score", "psnr_denoiser"), "psnr"),
}
NAMES = {
    "gaussian_bits_per_dim": "a Gaussian, held-out",
    "w2": "100 steps of rk4",
    "w2_floor": "two samples of the data",
    "euler_1": "1 Euler step",
    "euler_4": "4 Euler steps",
    "euler_10": "10 Euler steps",
    "psnr_score": "by the score",
    "psnr_denoiser": "by the denoiser",
}
REFERENCES = ("gaussian_bits_per_dim", "w2_floor")
BLOCKS = "mean_square/"
LARGEST = float(np.finfo(np.float32).max)  # metrics are computed in float32; charts of larger values would overflow
HELD_OUT_COLOUR = 1

MOST_SHOWN = 24  # charts; the others, of metrics that most runs do not have, can be opened

Curves = dict[str, list[Point]]


def curves_of(rows: Sequence[Mapping[str, Any]]) -> tuple[Curves, dict[str, int]]:
    """Returns the points (step, value) of each metric, and how many values of each metric are not finite in float32.

    If a step was evaluated more than once, its last value is used.

    Example:
        curves, bad = curves_of(read_metrics("runs/digits"))
    """
    points: dict[str, dict[int, float]] = {}
    bad: dict[str, int] = {}
    for row in rows:
        for name, value in row.items():
            if name == "step" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if abs(value) <= LARGEST and abs(row["step"]) <= LARGEST:
                points.setdefault(name, {})[row["step"]] = float(value)
            else:
                bad[name] = bad.get(name, 0) + 1
    return {name: sorted(known.items()) for name, known in points.items()}, bad


def curves_section(curves: Curves, reference: Mapping[str, float], best: str) -> Section:
    """Returns the charts of all metrics and the table of their values.

    reference: expected values by metric. best: the metric that ranks checkpoints; its chart comes first.

    Example:
        part = curves_section(curves, experiment.reference, experiment.best_metric)
    """
    if not curves:
        return section("Metrics", "metrics", note("The run has no metrics yet."))
    charts = {name: _chart(name, parts, reference) for name, parts in _grouped(curves).items()}
    order = sorted(charts, key=lambda name: (JOINED.get(best, best) != name, name != "loss", _rank(name)))
    main = [charts[name] for name in order if name not in SPEED]
    speed = [charts[name] for name in order if name in SPEED]
    about = element(
        "p",
        "Solid lines: training, each point the mean since the previous report. Dashed lines with circles: held-out data"
        " or samples, at evaluations. Dotted lines: values to compare with.",
        class_="lead",
    )
    return section(
        "Metrics",
        "metrics",
        about,
        element("div", *main[:MOST_SHOWN], class_="charts"),
        _closed("Other metrics", main[MOST_SHOWN:]),
        _closed("Speed and memory", speed),
        _table(curves),
    )


def _closed(title: str, charts: Sequence[Markup]) -> Markup | str:
    """Returns the charts in a box that is closed at first; "" if there are no charts."""
    if not charts:
        return ""
    return element("details", element("summary", title), element("div", *charts, class_="charts"))


def _rank(name: str) -> int:
    return list(TITLES).index(name) if name in TITLES else len(TITLES)


def _grouped(curves: Curves) -> dict[str, dict[str, list[Point]]]:
    """Returns the curves of each chart. The mean square of the noise is left out if each block has a curve."""
    groups: dict[str, dict[str, list[Point]]] = {}
    for name, points in curves.items():
        bare = name.removeprefix(EVAL)
        if bare == "mean_square_z" and f"{BLOCKS}0" in curves:
            continue
        chart = BLOCKS if bare.startswith(BLOCKS) else JOINED.get(bare, bare)
        groups.setdefault(chart, {})[name] = points
    return groups


def _chart(chart: str, parts: Mapping[str, list[Point]], reference: Mapping[str, float]) -> Markup:
    title, unit = TITLES.get(chart, (chart, ""))
    steps = [step for points in parts.values() for step, _ in points]
    series, others = [], 0
    for name, points in sorted(parts.items(), key=lambda part: (part[0].startswith(EVAL), part[0])):
        bare, held = name.removeprefix(EVAL), name.startswith(EVAL)
        is_main = bare == chart or (chart not in parts and f"{EVAL}{chart}" not in parts and len(parts) == 1)
        others += not is_main
        colour = (HELD_OUT_COLOUR if held else 0) if is_main else HELD_OUT_COLOUR + others
        if chart == BLOCKS:
            series.append(Series(f"block {bare.removeprefix(BLOCKS)}", points, colour=others - 1))
        elif bare in REFERENCES:  # It does not change, so one evaluation gives a line, too.
            series.append(_level(NAMES[bare], points[-1][1], steps, colour))
        else:
            named = NAMES.get(bare, "held-out" if held else "training")
            series.append(Series(named, points, "held" if held else "train", colour))
    if (expected := reference.get(chart)) is not None and math.isfinite(expected):
        series.append(_level("expected", expected, steps, 7))
    return line_chart(title, unit, series)


def _level(name: str, value: float, steps: Sequence[Number], colour: int) -> Series:
    return Series(name, [(min(steps), value), (max(steps), value)], "reference", colour)


def _table(curves: Curves) -> Markup:
    rows = []
    for name, points in curves.items():
        low, high = (choose(points, key=lambda point: point[1]) for choose in (min, max))
        last = points[-1]
        cells = [f"{number(value)} (step {step:,})" for step, value in (last, low, high)]
        rows.append((name, "held-out" if name.startswith(EVAL) else "training", *cells))
    columns = ("metric", "measured in", "last", "lowest", "highest")
    return element("details", element("summary", "All values"), table("Values of all metrics", columns, rows))
