"""The sections of a report about a flow: statistics of its blocks, and the decoding of a few samples."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.conditioning import TextCondition
from flowgen.data import Batch
from flowgen.decoding import Jacobi, sample
from flowgen.experiments.flow import FlowExperiment
from flowgen.experiments.plots import DRAWABLE_CHANNELS, sample_grid, strips
from flowgen.experiments.tuning import read_tuned_plan
from flowgen.experiments.video_flow import VideoFlowExperiment
from flowgen.flows.batches import batch_input, flow_condition
from flowgen.flows.block import AutoregressiveBlock
from flowgen.flows.objective import on_samples_like
from flowgen.flows.orders import without_padding
from flowgen.report.charts import box_plots
from flowgen.report.markup import Markup, Section, element, note, number, section, table
from flowgen.report.pictures import grid_picture
from flowgen.runs import RunContents

AnyFlow = FlowExperiment | VideoFlowExperiment
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
MOST_WINDOWS = 12  # columns of a table of sweeps
SLOW = 60.0  # seconds; a plan whose first call takes longer is not run again to measure its time without compilation


class BlockStatistics(NamedTuple):
    """Statistics of one block on a batch of samples.

    log_scale: the quantiles `QUANTILES` of log_scale over samples, tokens and channels, in nats. spread: the standard
    deviation of log_scale. logdet_per_dim: mean log-determinant in nats per dimension. norm: root mean square of the
    tokens after the block; after the last block, these are the noise.
    """

    log_scale: tuple[float, ...]
    spread: float
    logdet_per_dim: float
    norm: float


def block_statistics(flow: Any, variables: Any, x: Any, cond: Any) -> list[BlockStatistics]:
    """Returns the statistics of each block, data side first, for samples `b *event`.

    Example:
        rows = block_statistics(flow, params, x, labels)
    """
    flow, found = on_samples_like(flow, x), []
    cond = flow.config.check_cond(cond, len(x))
    tokens = without_padding(flow.config.to_tokens(x), cond)
    for index, config in enumerate(flow.config.blocks):
        params = {"params": variables["params"][f"blocks_{index}"]}
        tokens, log_derivative = _through(AutoregressiveBlock(config), params, tokens, cond)
        scales = -np.asarray(log_derivative, np.float64)
        found.append(
            BlockStatistics(
                log_scale=tuple(np.quantile(scales, QUANTILES).tolist()),
                spread=float(scales.std()),
                logdet_per_dim=float(-scales.sum(axis=(1, 2)).mean() / flow.config.num_dims),
                norm=float(np.sqrt(np.square(np.asarray(tokens, np.float64)).mean())),
            )
        )
    return found


@partial(jax.jit, static_argnums=0)
def _through(block: AutoregressiveBlock, params: Any, tokens: jax.Array, cond: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the tokens after a block, and the log-derivative of its map at each value."""
    return block.apply(params, tokens, cond, method="parameters").to_noise(tokens)


def blocks_section(flow: Any, variables: Any, batch: Batch, split: str) -> Section:
    """Returns the section with the statistics of a flow's blocks on a batch of data. split: "held-out" or "training".

    Example:
        part = blocks_section(flow, params, inputs(experiment, 32), "held-out")
    """
    x = batch_input(jax.random.key(0), jax.tree.map(jnp.asarray, batch.x), flow.config.noise_std)
    found = block_statistics(flow, variables, x, flow_condition(flow, batch))
    total = sum(row.logdet_per_dim for row in found)
    sizes = [abs(row.logdet_per_dim) for row in found]
    rows = [
        (
            f"block {index}",
            number(row.logdet_per_dim),
            f"{size / (sum(sizes) or 1):.0%}",
            number(row.spread),
            number(row.norm),
        )
        for index, (row, size) in enumerate(zip(found, sizes, strict=True))
    ]
    norm = float(np.sqrt(np.square(np.asarray(x, np.float64)).mean()))
    rows = [("input", "", "", "", number(norm)), *rows]
    columns = ("block", "log-determinant, nats/dim", "share", "spread of log_scale", "norm of its output")
    about = element(
        "p",
        f"For {batch.size} {split} samples. Block 0 is on the data side; the last block's output is the noise, whose "
        f"norm is near 1 if the flow fits. All blocks together: {number(total)} nats/dim. The share is of the sum of "
        "absolute values; the norm is the root mean square over samples, tokens and channels.",
        class_="lead",
    )
    boxes = box_plots(
        "log_scale: median, quartiles, and 1 and 99 %",
        "nats",
        [(f"block {index}", row.log_scale) for index, row in enumerate(found)],
    )
    return section("Blocks", "blocks", about, boxes, table("Statistics of the blocks", columns, rows))


class Decoded(NamedTuple):
    """The decoding of a batch by one plan. seconds: time of the second call, or of the first if it exceeds SLOW."""

    name: str
    result: Any
    seconds: float
    with_compilation: bool

    @property
    def time(self) -> str:
        """The time as text."""
        return f"{self.seconds:.3g} s" + ", with compilation" * self.with_compilation


def decoding_section(experiment: AnyFlow, contents: RunContents, flow: Any, variables: Any, batch: Batch) -> Section:
    """Returns a section that compares the run's plan with Jacobi decoding, for the conditions of a batch.

    Example:
        part = decoding_section(experiment, contents, flow, params, inputs(experiment, 8))
    """
    flow, cond, num = on_samples_like(flow, jax.tree.leaves(batch.x)[0]), flow_condition(flow, batch), batch.size
    draw = partial(
        sample,
        *(flow, variables, jax.random.key(0), num, cond),
        guidance=experiment.guidance(flow, _null(experiment, flow, cond)),
        denoise=experiment.denoiser(flow, variables),
        certify=True,
    )
    decoded = [_timed(name, partial(draw, plan=plan)) for name, plan in _plans(experiment, contents).items()]
    told = f" with guidance {experiment.sampling.guidance:g}" if experiment.sampling.guidance else ""
    about = element(
        "p",
        f"{num} samples, drawn{told} from the latest parameters. The time is measured on this machine, with the "
        "certificate and, unless the table says otherwise, without compilation. The error is the largest difference in "
        "noise after a forward pass; the estimate is that of the largest error in the data. Both are measured before "
        "the step that removes the training noise.",
        class_="lead",
    )
    parts = [about, _plans_table(decoded, num), *(_sweeps_table(found) for found in decoded)]
    return section("Decoding", "decoding", *parts, _drawn(experiment, decoded[0].result.x))


def _timed(name: str, draw: Callable[[], Any]) -> Decoded:
    result, first = _measured(draw)
    if first > SLOW:
        return Decoded(name, result, first, with_compilation=True)
    return Decoded(name, *_measured(draw), with_compilation=False)


def _measured(draw: Callable[[], Any]) -> tuple[Any, float]:
    """Returns the result of a call as host arrays, and the seconds that it took."""
    began = time.perf_counter()
    result = jax.device_get(draw())
    return result, time.perf_counter() - began


def _plans(experiment: AnyFlow, contents: RunContents) -> dict[str, Any]:
    """Returns the plan of the run and a parallel plan, by name; only one of them if they are the same."""
    sampling = experiment.sampling
    plans: dict[str, Any] = {}
    if sampling.plan != "tuned":
        plans[f"the run's plan ({sampling.plan if isinstance(sampling.plan, str) else 'one per block'})"] = (
            sampling.to_plan()
        )
    else:
        plans["the run's plan (tuned)"] = dataclasses.replace(
            sampling, plan=read_tuned_plan(contents.shown).plan
        ).to_plan()
    parallel = Jacobi(window=sampling.window, tol=sampling.tol or Jacobi().tol, init=sampling.init)
    if parallel not in plans.values():
        plans["Jacobi"] = parallel
    return plans


def _null(experiment: AnyFlow, flow: Any, cond: Any) -> TextCondition | None:
    if not (isinstance(cond, TextCondition) and experiment.sampling.guidance):
        return None
    return experiment.encoding.empty_text(flow.config.image_hw)


def _plans_table(decoded: list[Decoded], num: int) -> Markup:
    rows = []
    for found in decoded:
        result = found.result
        estimate = float(result.error_estimate.max())
        rows.append(
            (
                found.name,
                f"{int(result.sweeps.sum()):,}",
                found.time,
                f"{num / found.seconds:.3g}",
                f"{float(result.residual.max()):.1e}",
                f"{float(result.error.max()):.1e}",
                f"{estimate:.1e}" if np.isfinite(estimate) else "not bounded",
                f"{int(result.unsolved.sum())}",
            )
        )
    columns = ("plan", "passes", "wall time", "samples/s", "residual", "error", "error estimate", "unsolved windows")
    return table("Decoding of the samples by plan", columns, rows)


def _sweeps_table(found: Decoded) -> Markup:
    """Returns a table of the network passes of each block, in total and per window."""
    sweeps = np.asarray(found.result.sweeps)
    shown = min(sweeps.shape[1], MOST_WINDOWS)
    more = sweeps.shape[1] > shown
    rows = [
        (f"block {index}", f"{int(row.sum()):,}", *(f"{int(count)}" for count in row[:shown]), *["…"] * more)
        for index, row in enumerate(sweeps)
    ]
    windows = [f"window {index}" for index in range(shown)] + ["…"] * more
    return element(
        "details",
        element("summary", f"Passes per block and window: {found.name}"),
        table(f"Network passes until the slowest sample was solved, {found.name}", ("block", "all", *windows), rows),
    )


def _drawn(experiment: AnyFlow, samples: Any) -> Markup:
    """Returns a picture of a flow's samples, after the codec has decoded any latents."""
    codec = experiment.encoding.open_codec()
    if codec.pixel_channels not in DRAWABLE_CHANNELS:
        return note(f"The samples have {codec.pixel_channels} channels, so they are not shown.")
    images = np.asarray(codec.decode(samples))
    grid = strips(images) if images.ndim == 5 else sample_grid(images, 0)
    return grid_picture(grid, f"{len(samples)} samples drawn from the latest parameters")
