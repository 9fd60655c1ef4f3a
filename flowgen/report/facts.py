"""The parts of a report that need only the files of a run: head, warnings, samples, checkpoints and config."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from flowgen.experiments.experiment import Experiment
from flowgen.report.markup import Markup, Section, element, joined, note, number, picture, section, table
from flowgen.runs import RunContents
from flowgen.settings import settings, type_name
from flowgen.settings.annotations import hints_of

# Limits on the sample grids in a page. If a run has more, some of them are chosen, always including the last.
MOST_GRIDS, MOST_BYTES = 24, 12 << 20
MOST_WARNINGS = 50
LONG = 16  # characters of a fact that takes two columns


def head(experiment: Experiment, contents: RunContents, parameters: int) -> Markup:
    """Returns the title of the page and the most important facts about the run.

    Example:
        top = head(experiment, contents, parameters=417_000)
    """
    steps, done = experiment.train.steps, last_step(contents)
    starts = [row for row in contents.history if row["event"] == "start"]
    facts = {
        "model": type_name(experiment.model),
        "parameters": f"{parameters:,}",
        "data": _data_line(experiment, contents),
        "steps": f"{done:,} of {steps:,}" + ("" if done >= steps else " (unfinished)"),
        "batch size": f"{experiment.train.batch_size:,}",
        "optimizer": experiment.optim.name if isinstance(experiment.optim.name, str) else "a function of your own",
        "kind": type(experiment).__name__,
    }
    facts |= _of_starts(starts)
    if starts and (seconds := _seconds(contents.history)) is not None:
        facts["time"] = _duration(seconds)
    items = [
        element("div", element("dt", name), element("dd", value), class_="wide" if len(value) > LONG else None)
        for name, value in facts.items()
        if value
    ]
    return joined(
        [
            element("h1", experiment.name),
            element("p", f"A run of flowgen in {contents.shown}", class_="lead"),
            element("dl", *items, class_="facts"),
        ]
    )


def last_step(contents: RunContents) -> int:
    """Returns the last step in a run's metrics and checkpoints."""
    return max([0, *contents.steps, *(row["step"] for row in contents.metrics)])


def _data_line(experiment: Experiment, contents: RunContents) -> str:
    found = (contents.data or {}).get("found")
    if isinstance(found, str):
        return found
    data = experiment.data
    return ", ".join(f"{name} {value}" for name in ("name", "path", "x0", "x1") if (value := getattr(data, name, "")))


def _of_starts(starts: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not starts:
        return {}
    last = starts[-1]
    versions = last.get("versions")
    told = ", ".join(f"{name} {version}" for name, version in versions.items()) if isinstance(versions, dict) else ""
    devices = last.get("devices")
    times = f" ({devices} devices)" if isinstance(devices, int) and devices > 1 else ""
    resumed = f", resumed {len(starts) - 1} time{'s' * (len(starts) > 2)}" if len(starts) > 1 else ""
    return {
        "device": f"{last.get('device', '')}{times}",
        "versions": told,
        "started": f"{starts[0]['time'].replace('T', ' ')[:16]} UTC{resumed}",
    }


def _seconds(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the total running time of the processes that have ended; None if there are none."""
    total, begun, ended = 0.0, None, False
    for row in history:
        try:
            time = datetime.datetime.fromisoformat(row["time"])
            if row["event"] == "start":
                begun = time
            elif row["event"] == "end" and begun is not None:
                total, begun, ended = total + (time - begun).total_seconds(), None, True
        except (ValueError, TypeError):
            continue
    return total if ended else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def warnings_section(contents: RunContents, experiment: Experiment, bad: Mapping[str, int], more: list[str]) -> Section:
    """Returns the warnings of the run, and notes on anything unusual in its files.

    bad: number of values that are not finite, by metric. more: further warnings.

    Example:
        part = warnings_section(contents, experiment, bad={}, more=[])
    """
    done, steps = last_step(contents), experiment.train.steps
    lines = []
    if done < steps:
        lines.append(f"The run is unfinished: it has reached step {done:,} of {steps:,}.")
    lines += [f"{count} values of {name} are not finite." for name, count in bad.items()]
    fractions = [value for row in contents.metrics if isinstance(value := row.get("skipped"), float)]
    if skipped := max(filter(math.isfinite, fractions), default=0):
        lines.append(f"Updates were skipped, at most {skipped:.0%} of those between two reports.")
    lines += [f"Not a checkpoint: {name} ({why})." for name, why in contents.ignored.items()]
    for row in contents.history:
        if row["event"] == "warning":
            lines.append(f"Step {row.get('step', 0)}: {row.get('text', '')}")
        elif row["event"] == "end" and row.get("error"):
            lines.append(f"Step {row.get('step', 0)}: training ended early ({row['error']}).")
    lines += more
    if not lines:
        return section("Warnings", "warnings", element("p", "None."))
    rest = note(f"{len(lines) - MOST_WARNINGS} more are left out.") if len(lines) > MOST_WARNINGS else ""
    items = element("ul", *(element("li", line) for line in lines[:MOST_WARNINGS]), class_="warnings")
    return section("Warnings", "warnings", items, rest)


def samples_section(contents: RunContents) -> Section:
    """Returns the run's sample grids with a slider over steps.

    Example:
        part = samples_section(contents)
    """
    chosen = _chosen(contents)
    if not chosen:
        return section("Samples during training", "samples", note("The run has saved no sample grids."))
    figures = []
    for step in chosen:
        image = picture(contents.samples[step].read_bytes(), f"Samples drawn at step {step}")
        caption = element("figcaption", f"step {step:,}")
        figures.append(element("figure", image, caption, data_step=f"step {step:,}"))
    left = len(contents.samples) - len(chosen)
    return section(
        "Samples during training",
        "samples",
        element("div", *figures, class_="shots", data_slides=True, tabindex="0", role="group", aria_label="Samples"),
        note(f"{left} other sample grids are left out.") if left else "",
    )


def _chosen(contents: RunContents) -> list[int]:
    """Returns evenly spaced steps, including the last, whose sample grids fit the limits."""
    steps = sorted(contents.samples)
    for count in range(min(MOST_GRIDS, len(steps)), 0, -1):
        places = {round(i * (len(steps) - 1) / max(count - 1, 1)) for i in range(count)} if count > 1 else {-1}
        chosen = sorted(steps[place] for place in places)
        if count == 1 or sum(contents.samples[step].stat().st_size for step in chosen) <= MOST_BYTES:
            return chosen
    return []


def checkpoints_section(contents: RunContents, best_metric: str) -> Section:
    """Returns a table of the checkpoints and their evaluations.

    Example:
        part = checkpoints_section(contents, "bits_per_dim")
    """
    if not contents.steps:
        return section("Checkpoints", "checkpoints", note("The run has no checkpoint yet."))
    scores = {step: found[best_metric] for step, found in contents.evaluations.items() if best_metric in found}
    best = min(sorted(scores, reverse=True), key=scores.__getitem__, default=None)
    names = sorted({name for found in contents.evaluations.values() for name in found})
    rows = []
    for step in contents.steps:
        found = contents.evaluations.get(step, {})
        rows.append((f"{step:,}", *(number(found[n]) if n in found else "" for n in names), "best" * (step == best)))
    start = element("pre", contents.start, class_="scroll") if contents.start else ""
    return section("Checkpoints", "checkpoints", table("Complete checkpoints", ("step", *names, "note"), rows), start)


def config_section(experiment: Experiment) -> Section:
    """Returns a table of all fields of the config, with marks on values that differ from the defaults.

    Example:
        part = config_section(experiment)
    """
    defaults, rows, changed = default_values(experiment), [], 0
    for field in settings(experiment):
        value, default = _shown(field.value), defaults.get(field.name, REQUIRED)
        differs = default is not REQUIRED and _shown(default) != value
        changed += differs
        told = "none" if default is REQUIRED else _shown(default)
        rows.append((field.name, element("mark", value) if differs else value, told if differs else "", field.about))
    about = f"{changed} of {len(rows)} fields differ from their defaults; they are marked."
    fields = table("Fields of the config", ("field", "value", "default", "meaning"), rows)
    return section(
        "Config",
        "config",
        element("p", about, class_="lead"),
        element("details", element("summary", "All fields"), fields, open=True),
    )


REQUIRED = object()  # in place of the default of a field that has none


def default_values(config: Any, path: str = "") -> dict[str, Any]:
    """Returns the default of each field by its dotted name; `REQUIRED` for fields without a default.

    A group has the defaults of its current type.

    Example:
        default_values(experiment)["optim.lr"]  # 0.0001
    """
    found: dict[str, Any] = {}
    known = {field.name: field for field in dataclasses.fields(config)}
    for name in hints_of(type(config)):
        if name not in known:
            continue
        field, value, full = known[name], getattr(config, name), f"{path}.{name}" if path else name
        default: Any = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        missing = default is dataclasses.MISSING
        if is_dataclass(value) and not isinstance(value, type):
            found[full] = REQUIRED if missing or not is_dataclass(default) else type_name(default)
            found |= default_values(value, full)
        else:
            found[full] = REQUIRED if missing else default
    return found


def _shown(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items()) or "none"
    if is_dataclass(value) and not isinstance(value, type):
        return type_name(value)
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value is None else "empty" if value == "" else str(value)
