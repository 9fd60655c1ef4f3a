"""The sections of a report about flows for vectors, sequences and sets."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np

from flowgen.data import Batch
from flowgen.experiments.token_flow import TokenFlowExperiment
from flowgen.experiments.token_options import TokenDrawOptions
from flowgen.experiments.units import to_flow
from flowgen.report.examples import evenly
from flowgen.report.flows import blocks_section
from flowgen.report.markup import Section, element, number, section, table
from flowgen.report.pictures import grid_picture

DRAWN = 1000


def number_blocks_section(experiment: TokenFlowExperiment, flow: Any, variables: Any, num: int) -> Section:
    """Returns the statistics of a flow's blocks for `num` standardised samples.

    Example:
        part = number_blocks_section(experiment, flow, variables, 32)
    """
    split = "held-out" if experiment.data.eval_fraction else "training"
    dataset = experiment.dataset("eval" if experiment.data.eval_fraction else "train")
    few = dataset[evenly(len(dataset), num)]
    x, context, _ = to_flow(variables, np.asarray(few.x), few.context, experiment.box)
    return blocks_section(flow, variables, Batch(x, context), split)


def drawing_section(experiment: TokenFlowExperiment, flow: Any, variables: Any) -> Section:
    """Returns a section with samples of the flow, and the time needed to draw them.

    Example:
        part = drawing_section(experiment, flow, variables)
    """
    sampling = dataclasses.replace(experiment.sampling, num=min(DRAWN, experiment.sampling.num))
    drawn, options = dataclasses.replace(experiment, sampling=sampling), TokenDrawOptions()
    drawn.draw(flow, variables, options)  # compiles
    began = time.perf_counter()
    samples = drawn.draw(flow, variables, options)
    seconds = time.perf_counter() - began
    num = len(samples.arrays)
    columns = ("plan", "samples", "wall time", "samples/s", "finite")
    finite = int(np.isfinite(samples.arrays.reshape(num, -1)).all(axis=1).sum())
    rows = [(sampling.plan, f"{num:,}", f"{number(seconds)} s", number(num / seconds), f"{finite:,}")]
    about = element("p", "The time is measured on this machine, without compilation.", class_="lead")
    picture = grid_picture(drawn.plot(samples), f"{num:,} samples drawn from the latest parameters")
    return section("Sampling", "sampling", about, table("Drawing samples", columns, rows), picture)
