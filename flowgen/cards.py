"""Writes the model card of an exported model: its use, metrics, data and licence."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping
from typing import Any

from flowgen import __version__
from flowgen.data.inventory import name_list
from flowgen.experiments import (
    AutoencoderExperiment,
    Experiment,
    MatchingExperiment,
    PretrainedAutoencoder,
    TokenFlowExperiment,
)
from flowgen.settings import type_name

WIDTH = 120  # characters in a line
_CARD = """\
---
library_name: flowgen
tags: [jax, flax, {tag}]
{licence_field}
---

# {name}

{what}

## Use

```
pip install -e ".[train]"    # in a checkout of flowgen, which is not on PyPI yet
{command}
```

```python
import flowgen

model, params, experiment = flowgen.load("FOLDER")  # the folder of this file, or hf://org/name
```

{how}

## Metrics

{metrics}

## Data

{data}

## Licence

{licence}
"""
# The data sets that need to be credited.
_CREDITS = {
    "digits": "handwritten digits from the UCI repository (CC BY 4.0)",
    "bouncing": "clips of handwritten digits from the UCI repository (CC BY 4.0)",
    "openmoji": "emoji of the OpenMoji project (CC BY-SA 4.0)",
}
_SAFE = (
    "No code in these files is executed. `python -m flowgen info --checkpoint FOLDER` lists every field of the "
    "experiment."
)
_LOADED = {
    "flow": '`model.apply(params, x, cond, method="log_prob")` returns exact log-densities in nats, and '
    "`flowgen.decoding.sample(model, params, key, num, cond)` draws samples.",
    "numbers": "`experiment.log_prob(model, params, x, context)` returns exact log-densities in nats, and "
    "`experiment.draw(model, params, experiment.draw_options())` draws samples, both in the units of the data.",
    "velocity": "`model.apply(params, t, x, cond)` returns velocities, and `flowgen.matching.integrate` draws samples.",
    "autoencoder": "As `codec.path`, the folder makes the latents of a flow.",
}


def model_card(
    experiment: Experiment,
    parameters: int,
    about: Mapping[str, Any],
    metrics: Mapping[str, float],
    *,
    licence: str = "",
    has_codec: bool = False,
) -> str:
    """Returns the model card of an exported model.

    parameters: the number of parameters. about: the checkpoint's "step"; the "dtype" of the stored weights, None if
    they were not converted; whether they are "averaged"; and whether flowgen "trained" them. metrics: the metrics that
    the run recorded at this step. licence: the licence of the weights; if empty, the card says that none is stated.
    has_codec: whether the model's autoencoder is exported with it.

    Example:
        card = model_card(experiment, 412_000, {"step": 300, "averaged": True, "trained": True, "dtype": None}, {})
    """
    kind = _kind(experiment)
    return _CARD.format(
        tag={"flow": "normalizing-flow", "numbers": "normalizing-flow", "velocity": "flow-matching"}.get(
            kind, "autoencoder"
        ),
        licence_field=f"license: {_scalar(licence)}" if licence else "# license: the licence of the weights",
        name=_one_line(experiment.name),
        what=textwrap.fill(" ".join(_what(experiment, parameters, about, has_codec)), WIDTH),
        command=_command(experiment),
        how=textwrap.fill(f"{_LOADED[kind]} {_SAFE}", WIDTH),
        metrics="\n".join(_metrics(metrics, about)),
        data=_data(experiment),
        licence=f"{_one_line(licence)}." if licence else "The author of these weights has not stated a licence yet.",
    )


def _kind(experiment: Experiment) -> str:
    if isinstance(experiment, AutoencoderExperiment):
        return "autoencoder"
    if isinstance(experiment, TokenFlowExperiment):
        return "numbers"
    return "velocity" if isinstance(experiment, MatchingExperiment) else "flow"


def _command(experiment: Experiment) -> str:
    if _kind(experiment) == "autoencoder":
        return "python -m flowgen info --checkpoint FOLDER"
    prompt = ' --prompt "a text"' * bool(getattr(experiment.model, "text_dim", 0))
    return f"python -m flowgen sample --checkpoint FOLDER --num 16{prompt} --out samples.png"


def _what(experiment: Experiment, parameters: int, about: Mapping[str, Any], has_codec: bool) -> list[str]:
    """Returns sentences that describe the model."""
    model = experiment.model
    made = "trained with" if about["trained"] else "imported into"
    said = [f"A {type_name(model)} with {parameters:,} parameters, {made} flowgen {__version__}."]
    if shape := getattr(model, "event_shape", ()):
        said.append(f"Its samples have the shape {' x '.join(map(str, shape))}.")
    if classes := getattr(model, "num_classes", 0):
        said.append(f"It is conditioned on {classes:,} classes; the label -1 means unconditional.")
    said.append(f"The weights are the {'averaged ' * about['averaged']}parameters of step {about['step']:,}.")
    if about["dtype"]:
        said.append(f"They are stored as {about['dtype']} and loaded as float32.")
    if isinstance(getattr(experiment, "codec", None), PretrainedAutoencoder):
        said.append(
            "The folder `codec` contains the autoencoder of its latents."
            if has_codec
            else "It models the latents of an autoencoder that is not in this folder; give its path with --codec.path."
        )
    if getattr(getattr(experiment, "text", None), "encoder", None) == "":
        said.append("Its text encoder is not in this folder; give its path with --text.encoder.")
    return said


def _metrics(metrics: Mapping[str, float], about: Mapping[str, Any]) -> list[str]:
    if not metrics:
        return ["The run recorded no metrics at this step."]
    stored = f", before they were stored as {about['dtype']}" * bool(about["dtype"])
    return [
        f"Recorded by the run at step {about['step']:,} on held-out data{stored}:",
        "",
        "| metric | value |",
        "|---|---|",
        *(f"| {_one_line(name)} | {value:.4g} |" for name, value in metrics.items()),
    ]


def _data(experiment: Experiment) -> str:
    data = experiment.data
    name = getattr(data, "name", None)
    credit = f", {_CREDITS[name]}" if name in _CREDITS else ""
    said = [f"`data.name` of the run: {_one_line(name)}{credit}." if name else f"The kind of data: {type_name(data)}."]
    if classes := getattr(data, "classes", ()):
        said.append(f"Classes: {_one_line(name_list(classes, most=50))}.")
    return " ".join(said)


def _one_line(text: str) -> str:
    """Returns the text on one line, with vertical bars escaped for a table cell."""
    return " ".join(text.split()).replace("|", "\\|")


def _scalar(text: str) -> str:
    """Returns text as a YAML value, in quotes unless it is a plain word such as "apache-2.0"."""
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9.+-]*", text) else json.dumps(text)
