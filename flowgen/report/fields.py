"""The sections of a report about velocity networks and autoencoders."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.data import PointsConfig, from_uint8
from flowgen.experiments.codecs import STATISTICS
from flowgen.experiments.drawing import cycled_labels, drawn_classes
from flowgen.experiments.matching import MatchingExperiment
from flowgen.experiments.plots import DRAWABLE_CHANNELS, sample_grid
from flowgen.matching import GibbsWeights, fit_epsilon, weight_report
from flowgen.report.charts import scatter
from flowgen.report.examples import Few, evenly, has_pixels, pixels
from flowgen.report.markup import Section, element, note, number, section, table
from flowgen.report.pictures import grid_picture

PAIRS = 1024
POINTS = 400


def solving_section(experiment: MatchingExperiment, network: Any, variables: Any, num: int) -> Section:
    """Returns a section with samples that the run's solver draws, and the time it needs.

    Example:
        part = solving_section(experiment, network, variables, num=8)
    """
    points = isinstance(experiment.data, PointsConfig)
    num = POINTS if points else num
    classes = drawn_classes(experiment.model, experiment.data)
    key, labels = jax.random.key(0), cycled_labels(num, classes)
    experiment.draw_batch(network, variables, key, np.arange(num), labels)
    began = time.perf_counter()
    drawn, how = experiment.draw_batch(network, variables, key, np.arange(num), labels)
    seconds = time.perf_counter() - began
    rows = [(experiment.sampling.method, how, f"{num:,}", f"{seconds:.3g} s", f"{num / seconds:.3g}")]
    columns = ("method", "how", "samples", "wall time", "samples/s")
    shown: object
    if points:
        assert isinstance(experiment.data, PointsConfig)
        _, data = experiment.data.draw(key, POINTS)
        shown = scatter("Samples and data", [("data", np.asarray(data).tolist()), ("samples", drawn.tolist())])
    elif experiment.drawn_channels in DRAWABLE_CHANNELS:
        shown = grid_picture(sample_grid(drawn, classes), f"{num} samples drawn from the latest parameters")
    else:
        shown = note(f"The samples have {experiment.drawn_channels} channels, so they are not shown.")
    about = element("p", "The time is measured on this machine, without compilation.", class_="lead")
    return section("Sampling", "sampling", about, table("Drawing samples", columns, rows), shown)


def tilt_section(experiment: MatchingExperiment) -> Section | None:
    """Returns a section on the effect of Gibbs weights on noise and data; None if the run does not use Gibbs weights.

    Raises OSError or ValueError if the data cannot be opened.

    Example:
        part = tilt_section(experiment)
    """
    coupling = experiment.matching.coupling
    if not isinstance(coupling, GibbsWeights):
        return None
    x0, x1 = _pairs(experiment)
    fitted = fit_epsilon(coupling, x0, x1)
    assert fitted.epsilon is not None
    report = weight_report(x0, x1, fitted.epsilon, fitted.cost)
    limit = "should be less than that from the pairing"
    tilt = "relative variance of the factor that re-weights it, with plain weights; 0 without tilt"
    rows = [
        ("epsilon", number(float(fitted.epsilon)), "divisor of the cost" + " (chosen)" * (coupling.epsilon is None)),
        ("effective sample size", f"{float(report.ess):.1%}", "of all pairs of noise and data, with plain weights"),
        ("std of log w from the noise", number(float(report.row_std)), f"tilts the noise; {limit}"),
        ("std of log w from the data", number(float(report.column_std)), f"tilts the data; {limit}"),
        ("std of log w from the pairing", number(float(report.interaction_std)), "couples noise and data"),
        ("tilt of the noise", number(float(report.noise_tilt)), tilt),
        ("tilt of the data", number(float(report.data_tilt)), tilt),
    ]
    largest = max(float(report.row_std), float(report.column_std))
    tilts = largest > float(report.interaction_std)
    told = f"The weights {'tilt noise or data more than they couple' if tilts else 'couple more than they tilt'} them."
    if coupling.sinkhorn_sweeps:
        told = f"The run corrects the weights with {coupling.sinkhorn_sweeps} Sinkhorn sweeps, which remove most tilt."
    about = element("p", f"{told} Estimated from {len(x0):,} samples of noise and data.", class_="lead")
    return section("Weights", "weights", about, table("Gibbs weights", ("quantity", "value", "meaning"), rows))


def _pairs(experiment: MatchingExperiment) -> tuple[Any, Any]:
    key = jax.random.key(experiment.train.seed)
    if isinstance(experiment.data, PointsConfig):
        return experiment.data.draw(key, PAIRS)
    if not has_pixels(experiment):
        raise ValueError("the data were passed to fit in Python, so this command cannot open them.")
    dataset = pixels(experiment, held_out=False)
    few = Few(dataset, evenly(len(dataset), PAIRS))
    x1 = jnp.asarray(from_uint8(few.batch().pixels))
    return jax.random.normal(key, x1.shape), x1


def latents_section(variables: Any) -> Section:
    """Returns the running mean and variance of each latent channel of an autoencoder.

    Example:
        part = latents_section(variables)
    """
    mean, variance = (np.asarray(variables[STATISTICS][name], np.float64) for name in ("mean", "variance"))
    rows = [
        (f"channel {index}", number(float(m)), number(float(v)), number(float(v) ** 0.5))
        for index, (m, v) in enumerate(zip(mean, variance, strict=True))
    ]
    about = element(
        "p",
        "Running statistics of the latents, with which flows normalise them.",
        class_="lead",
    )
    columns = ("latent", "mean", "variance", "standard deviation")
    return section("Latents", "latents", about, table("Statistics of the latents", columns, rows))
