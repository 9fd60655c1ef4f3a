"""Writes the pages that list what the code already says: `python docs/scripts/reference.py`.

docs/fields.md lists the fields of all configs. docs/reproducibility.md lists the recorded numbers.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flowgen
from flowgen.settings import help_of, type_name
from flowgen.settings.annotations import configs_of, describe, hints_of, members

PROJECT = Path(__file__).parents[2]
RESULTS = PROJECT / "benchmarks" / "results"
EXPERIMENTS = (
    flowgen.FlowExperiment,
    flowgen.VideoFlowExperiment,
    flowgen.TokenFlowExperiment,
    flowgen.MatchingExperiment,
    flowgen.AutoencoderExperiment,
)


def configs() -> Iterator[type]:
    """Yields the experiments, and the configs that their fields may have, each once."""
    queue, seen = list(EXPERIMENTS), set()
    while queue:
        cls = queue.pop(0)
        if cls not in seen:
            seen.add(cls)
            yield cls
            queue += [kind for annotation in hints_of(cls).values() for kind in configs_of(annotation).values()]


def cell(text: str) -> str:
    """Returns text that fits into a cell of a table."""
    return text.replace("|", "\\|").replace("*", "\\*")


def default_of(field: dataclasses.Field) -> str:
    """Returns a field's default as Python code; configs are named."""
    if field.default_factory is not dataclasses.MISSING:
        return "empty"
    if field.default is dataclasses.MISSING:
        return "required"
    if dataclasses.is_dataclass(field.default):
        return f"`{type_name(field.default)}`"
    return f"`{field.default!r}`"


def allowed_by(annotation: Any) -> str:
    """Returns what an annotation allows, with the names of configs as code."""
    if not configs_of(annotation):
        return cell(describe(annotation))
    kinds = members(annotation)
    return " or ".join(f"`{one.__name__}`" if dataclasses.is_dataclass(one) else cell(describe(one)) for one in kinds)


def fields_of(cls: Any) -> str:
    """Returns a section with a table of a config's fields."""
    about, hints = help_of(cls), hints_of(cls)
    first = (cls.__doc__ or "").split("\n\n")[0]
    lines = [f"## {cls.__name__}", "", " ".join(first.split()), ""]
    lines += ["| field | default | allowed | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        if field.name in hints:
            allowed = allowed_by(hints[field.name])
            meaning = cell(about.get(field.name, "").rstrip("."))
            lines.append(f"| `{field.name}` | {cell(default_of(field))} | {allowed} | {meaning} |")
    return "\n".join(lines)


def fields_page() -> str:
    """Returns the page of all fields."""
    head = """# Fields of configs

This page lists the fields of all experiments and of the configs in them. Most fields of an experiment are configs:
`--optim.lr 1e-3` on the command line sets the field `lr` of the `OptimConfig` in the experiment's field `optim`.
`python -m flowgen info --config NAME` prints the values of one experiment. If a field accepts several types, choose one
by its name without "Config", as in `--data Latents`.

In the column "default", a name such as `Optim` means an `OptimConfig` with the default of each field. On the command
line, write `none` for None, `4,1` for the tuple (4, 1), and [`module:object`](extend.md#by-name) for a function or
another object of your own. These pages explain the terms: [Flows](concepts/flows.md),
[Decoding plans](concepts/plans.md), [Guidance](decoding.md#guidance), [Couplings](concepts/couplings.md),
[Attention kernels](attention.md#kernels), [Data](data.md) and [Optimizers](training.md#optimizers).
"""
    return "\n\n".join([head.rstrip(), *map(fields_of, configs())]) + "\n"


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file of results, which is a JSON list or has one JSON object per line."""
    text = path.read_text()
    return json.loads(text) if text.lstrip().startswith("[") else list(map(json.loads, text.splitlines()))


def commands_of(path: Path) -> str:
    """Returns the commands in a file's docstring, each as code."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").replace("\\\n", " ")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    starts = ("python ", "GLIBC_TUNABLES", "for name", "for seed")
    return "<br>".join(f"`{line}`" for line in lines if line.startswith(starts) and "sample.py" not in line)


def of_file(name: str) -> str:
    """Returns the commands that write a file of results, from the docstring of the benchmark that names the file."""
    for script in sorted((PROJECT / "benchmarks").glob("*.py")):
        group: list[str] = []
        for command in commands_of(script).split("<br>"):
            group.append(command)
            if f"/{name}" in command:
                return "<br>".join(group)
            group = [] if "--out" in command else group
    return ""


def results() -> Iterator[list[str]]:
    """Yields the cells of a row for each file of results."""
    for path in sorted(RESULTS.glob("*.json")):
        rows = rows_of(path)
        devices = sorted({f"{row['device']}, threads {row['threads']}" for row in rows if "threads" in row})
        versions = sorted({row["versions"]["jax"] for row in rows if "versions" in row})
        seeds = sorted({str(row["seed"]) for row in rows if "seed" in row})
        told = f"{len(rows)} rows; jax {', '.join(versions)}" + (f"; seeds {', '.join(seeds)}" if seeds else "")
        command = of_file(path.name)
        yield [f"`{path.stem}.json`", command, "; ".join(devices), told]


def record_of(config: str, doc: str) -> str:
    """Returns where the values of a config are recorded, and how long its training steps took on which machine."""
    for row in rows_of(RESULTS / "configs.json"):
        if row["config"] == config:
            minutes = f"{row['step_seconds'] / 60:.1f} minutes"
            return f"`configs.json`: {minutes}, {row['device']}, threads {row['threads']}"
    found = re.search(r"benchmarks/(\w+)\.py", doc)
    return f"`{found[1]}.json`" if found else "–"


def references() -> Iterator[tuple[bool, list[str]]]:
    """Yields for each config with a reference whether we measured it, and the cells of a row."""
    for path in sorted((PROJECT / "configs").glob("*.py")):
        experiment = flowgen.load_config(path)
        doc = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
        if experiment.reference:
            values = ", ".join(f"{name} {value:g}" for name, value in experiment.reference.items())
            measured = not re.search(r"[Ww]e have not (measured|reproduced)", doc)
            seed = "three seeds" if "over three seeds" in doc else str(experiment.train.seed)
            yield measured, [f"`{path.stem}`", commands_of(path), seed, values, record_of(path.stem, doc)]


def table(*rows: list[str]) -> str:
    """Returns a table in Markdown; the first row is its head."""
    first, *others = (f"| {' | '.join(row)} |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others])


def numbers_page() -> str:
    """Returns the page of recorded numbers."""
    head = ["config", "command", "seed", "expected"]
    ours = [row for measured, row in references() if measured]
    published = [[*row[:2], row[3]] for measured, row in references() if not measured]
    parts = (
        "# Reproducibility",
        """This page lists numbers that we measured, with commands to reproduce them, and numbers that we quote from
others. On one kind of device, the config, the seed and the versions of the packages determine the result of a run. By
default, the number of devices changes the result only by rounding. The file `config.json` in the directory of a run
records the config and the seed.""",
        "## Results of configs",
        """We measured the values in the following table with jax 0.10.2 on one or two CPU cores, mostly of an AMD EPYC.
Training prints the values at its end; if a row contains an `evaluate` command, this command prints them, except
`nats_per_dim` of `starflow_digits`, which only training measures on held-out images. The [glossary](glossary.md)
explains the metrics. A Fréchet distance depends on the number of samples. In the configs for flow matching on digits,
training draws 500 samples, whereas `evaluate` without `--samples` draws one per held-out image, so the two print
different distances. All values also depend on the seed; those of three seeds are means.

The last column names the file in `benchmarks/results` that records the metrics; for `starflow_digits`, it records only
the nats/dim of seed 0. With `configs.json`, the column also gives the duration of the training steps, without
compilation, evaluation and sampling. During our runs, other processes used the same cores, so your runs may be faster.
A dash means that we measured an earlier version of flowgen and recorded only the values.""",
        table([*head, "record"], *ours),
        "## Published values",
        """The values in the following table are from papers and from reproductions by others. We have not reproduced
them. The commands only train or import the models; [Evaluation](evaluation.md#samples) explains how to measure an FID.
The [glossary](glossary.md#samples-and-autoencoders) explains the metrics.""",
        table([*head[:2], head[3]], *published),
        "## Benchmarks",
        """A row of a file in `benchmarks/results` usually records one measurement, with its device, number of threads
and package versions. Rows that compare times also record the load of the machine and the time of a baseline, such as
the published code, in the same run. The README in `benchmarks` explains the measurements and the shape A of the models.
The inputs of a model come from a dataset, or are drawn with a fixed seed or computed by a formula, as are its initial
parameters, so every run uses the same values. `configs.json` records training runs
from the first table of this page. The table in the main README shows medians from these rows:

* sampling 16 images: `decode.json`, row `sequential` of shape A, and its baseline `published sequential, processes 2`
* a training step: `train_step.json`, row `library step` of shape A, and its baseline
  `published forward backward adamw, threads 2`
* flow matching: `matching.json`, row `I-CFM` in the form `jitted step` with one thread (0.866 ms), and its baseline
  `torchcfm I-CFM, eager, threads 1` (3.059 ms). The form `scan` runs many steps in one program (0.419 ms per step).""",
        table(["results", "command", "device", "what"], *results()),
        "## Other numbers",
        """[Quality at an equal budget](quality.md) explains how to repeat the comparison on that page.
[Decoding](decoding.md#all-plans-side-by-side) shows the commands that train the MNIST flows compared there. The
[log](log.md) and the examples on other pages state the conditions of their numbers, but not always a command.""",
    )
    return "\n\n".join(parts) + "\n"


PAGES = {"fields.md": fields_page, "reproducibility.md": numbers_page}


def main() -> None:
    """Writes the pages."""
    for name, page in PAGES.items():
        (PROJECT / "docs" / name).write_text(page())


if __name__ == "__main__":
    main()
