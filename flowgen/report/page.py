"""Assembles a report: one HTML page about a run."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Callable
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jax

from flowgen import __version__
from flowgen.data import check_writable, told_once
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.matching import MatchingExperiment
from flowgen.experiments.token_flow import TokenFlowExperiment
from flowgen.report.curves import curves_of, curves_section
from flowgen.report.data import data_section
from flowgen.report.examples import inputs, some_of, split_of
from flowgen.report.facts import checkpoints_section, config_section, head, samples_section, warnings_section
from flowgen.report.fields import latents_section, solving_section, tilt_section
from flowgen.report.flows import AnyFlow, blocks_section, decoding_section
from flowgen.report.markup import Markup, Section, element, joined, note, section
from flowgen.report.numbers import drawing_section, number_blocks_section
from flowgen.runs import RunContents, passing_warnings

GENERATOR = "flowgen report"
_BEGINNING = (
    f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="{GENERATOR}">'
)
BLOCK_SAMPLES = 32  # samples for the statistics of blocks
# What the parts of a page that open data or a codec may raise; the page then says so instead.
UNAVAILABLE = (OSError, ValueError, ImportError, FloatingPointError)

Model = tuple[Any, Any]


class _Part(NamedTuple):
    """A measured section, with a title and anchor in case the measurement fails."""

    title: str
    name: str
    make: Callable[[], Section | None]


def check_report_path(path: Path) -> None:
    """Raises OSError if no file can be written at `path`, or FileExistsError if there is a file that is not a report.

    A report that flowgen has written there earlier is no error, because a new report may replace it.

    Example:
        check_report_path(Path("report.html"))
    """
    check_writable(path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(_BEGINNING)) != _BEGINNING.encode():
                raise FileExistsError(
                    f"{path} exists, but is not a report of flowgen; remove it, or give another --out."
                )


def report_page(
    experiment: Experiment,
    contents: RunContents,
    *,
    parameters: int,
    model: Model | None,
    samples: int,
    missing: str = "",
) -> str:
    """Returns a report about a run, as the text of an HTML page.

    contents: the metrics, checkpoints and sample grids that the run has saved. parameters: the number of parameters of
    the model. model: the model and its variables, with which the page's measurements are made; None to measure nothing
    and to open no data. samples: the number of samples with which decoding or an ODE solver is measured. missing: a
    reason for the page to give if `model` is None because it could not be read; otherwise empty.

    Example:
        page = report_page(experiment, read_contents(run), parameters=417_000, model=(flow, params), samples=8)
    """
    curves, bad = curves_of(contents.metrics)
    told: list[str] = [missing] * bool(missing)
    with passing_warnings(told.append), told_once():
        data = data_section(experiment, contents, opens=model is not None)
        measured = [_made(part) for part in _parts(experiment, contents, model, samples)]
    sections = [
        warnings_section(contents, experiment, bad, told),
        curves_section(curves, experiment.reference, experiment.best_metric),
        samples_section(contents),
        *filter(None, measured),
        data,
        checkpoints_section(contents, experiment.best_metric),
        config_section(experiment),
    ]
    return _document(experiment.name, head(experiment, contents, parameters), sections)


def _parts(experiment: Any, contents: RunContents, model: Model | None, samples: int) -> list[_Part]:
    """Returns the sections that need a model, for this kind of experiment."""
    if model is None:
        return []
    if isinstance(experiment, AnyFlow):
        known = cache(partial(inputs, experiment, max(BLOCK_SAMPLES, samples)))  # encoded once

        def blocks() -> Section:
            return blocks_section(*model, some_of(known(), BLOCK_SAMPLES), split_of(experiment))

        def decoding() -> Section:
            return decoding_section(experiment, contents, *model, some_of(known(), samples))

        return [_Part("Blocks", "blocks", blocks), _Part("Decoding", "decoding", decoding)]
    if isinstance(experiment, TokenFlowExperiment):
        return [
            _Part("Blocks", "blocks", lambda: number_blocks_section(experiment, *model, BLOCK_SAMPLES)),
            _Part("Sampling", "sampling", lambda: drawing_section(experiment, *model)),
        ]
    if isinstance(experiment, MatchingExperiment):
        return [
            _Part("Sampling", "sampling", lambda: solving_section(experiment, *model, samples)),
            _Part("Weights", "weights", lambda: tilt_section(experiment)),
        ]
    return [_Part("Latents", "latents", lambda: latents_section(model[1]))]


def _made(part: _Part) -> Section | None:
    try:
        return part.make()
    except UNAVAILABLE as error:
        return section(part.title, part.name, note(f"Not measured: {error}"))


def _document(title: str, top: Markup, sections: list[Section]) -> str:
    folder = files("flowgen.report")
    style, script = (folder.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    # The page may load nothing, and runs no script but its own.
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    meta = [
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", f"{title}: report"),
        Markup(f"<style>{style}</style>"),
    ]
    time = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    device = jax.devices()[0].device_kind
    footer = element("footer", f"Written by flowgen {__version__} on {time}; measured on {device}.")
    links = (element("li", element("a", part.title, href=f"#{part.name}")) for part in sections)
    nav = element("nav", element("ul", *links), aria_label="Contents")
    main = element("main", *(part.markup() for part in sections))
    body = [top, nav, main, footer, Markup(f"<script>{script}</script>")]
    return f"{_BEGINNING}{joined(meta)}</head><body>{joined(body)}</body></html>\n"
