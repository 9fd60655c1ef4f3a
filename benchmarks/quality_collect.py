"""The command `collect` of benchmarks/quality.py: writes results, the tables of docs/quality.md, and pictures."""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measure

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = {
    "tarflow": "TARFlow, flowgen",
    "published": "TARFlow, published code",
    "starflow": "STARFlow on latents",
    "icfm": "DiT, I-CFM",
    "otcfm": "DiT, OT-CFM",
    "wcfm": "DiT, W-CFM",
    "corrected": "DiT, corrected W-CFM",
    "openmoji": "TARFlow, OpenMoji 32 x 32",
}
PAIR = ("tarflow", "published")
SHOWN = (*PAIR, "starflow", "otcfm")  # whose samples the page shows
DIGITS = {"steps": 0, "bits_per_dim": 3, "frechet": 2, "kernel": 3, "precision": 3, "recall": 3, "class_accuracy": 3}
COLUMNS = {
    "steps": "steps",
    "steps_per_second": "steps/s",
    "bits_per_dim": "bits/dim",
    "frechet": "Fréchet",
    "kernel": "kernel",
    "precision": "precision",
    "recall": "recall",
    "class_accuracy": "class shown",
}
SECONDS = {"seconds_per_256_samples": "s per 256 samples"}  # Not for the pair: flowgen draws the samples of both sides.

SINGLE = """## Other models, one seed

The models in this section have 3.2 to 3.4 million parameters, and the same budget, batches and learning rates as the
TARFlows above. Unlike the TARFlows, they are evaluated with a moving average of their parameters. Each row is **a
single run**, so small differences are not significant. The STARFlow is a [flow on latents](starflow.md). The DiTs
(diffusion transformers on patches of 4 x 4 pixels) are trained by [flow matching](matching.md) with different
[couplings](concepts/couplings.md) of noise and data. I-CFM pairs noise and data at random, OT-CFM pairs them by optimal
transport within each class of a batch, and W-CFM gives weights to random pairs. Corrected W-CFM also applies Sinkhorn
sweeps to these weights. The samples of the DiTs are drawn in 25 steps of Heun's method. The budget of the STARFlow
includes training the autoencoder (a fifth of the budget) and encoding the images. The last column is the processor
time, in seconds, for drawing 256 samples.

Likelihoods of different kinds of models (STARFlow, DiT, and TARFlow above) are not comparable. The likelihood of a DiT
is measured on 100 test images with uniform noise. The likelihood of the STARFlow is measured on the latents of all test
images.

"""


def collect(work: Path, out: Path) -> list[dict[str, Any]]:
    """Writes the results of all evaluated runs, and the tables and pictures of the documentation."""
    rows = [row_of(folder) for folder in sorted(work.iterdir()) if (folder / "evaluation.json").exists()]
    order = list(NAMES)
    rows.sort(key=lambda row: (order.index(row["name"]), row["seed"]))
    measure.save(out, rows)
    for row in rows:
        if row["seed"] == 0 and row["name"] in SHOWN:
            shutil.copyfile(work / f"{row['name']}-0" / "samples.png", DOCS / "images" / f"quality_{row['name']}.png")
    page = DOCS / "quality.md"
    if page.exists():
        text = page.read_text()
        for name, table in {"pair": pair_table(rows), "single": single_table(rows)}.items():
            text = re.sub(f"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", lambda _, new=table: new, text, flags=re.S)
        page.write_text(text)
    for script in ("figures.py", "reference.py"):
        subprocess.run([sys.executable, str(DOCS / "scripts" / script)], check=True)
    return rows


def row_of(folder: Path) -> dict[str, Any]:
    """Returns the row of one run: its record, its evaluation and the conditions."""
    record, evaluation = (json.loads((folder / name).read_text()) for name in ("record.json", "evaluation.json"))
    now = measure.environment(1, None)
    versions = now["versions"] | {name: record.pop(name) for name in now["versions"] if name in record}
    where = {"device": now["device"], "threads": 1, "cores": os.cpu_count(), "versions": versions}
    return {"name": record.pop("kind"), **record, **evaluation, **where}


def pair_table(rows: list[dict[str, Any]]) -> str:
    """Returns the table of both sides: means over the seeds, and standard deviations if there are several seeds."""
    lines = [["", "seeds", *COLUMNS.values()]]
    for name in PAIR:
        found = [row for row in rows if row["name"] == name]
        if found:
            lines.append([NAMES[name], str(len(found)), *(spread([row[x] for row in found], x) for x in COLUMNS)])
    return markdown(lines)


def single_table(rows: list[dict[str, Any]]) -> str:
    """Returns the section on the runs with one seed; empty if there are none."""
    columns = {name: title for name, title in COLUMNS.items() if name != "bits_per_dim"} | SECONDS
    lines = [["one seed", "likelihood", *columns.values()]]
    for row in rows:
        if row["name"] not in PAIR and "frechet" in row:
            values = [spread([row[name]], name) for name in columns]
            lines.append([NAMES[row["name"]], likelihood(row), *values])
    return f"{SINGLE}{markdown(lines)}\n" if len(lines) > 1 else ""


def likelihood(row: dict[str, Any]) -> str:
    """Returns a likelihood with its unit."""
    name = "bits_per_dim" if "bits_per_dim" in row else "nats_per_dim"
    return f"{row[name]:.3f} ± {row['standard_error']:.3f} {name.replace('_per_', '/')}"


def spread(values: list[float], column: str) -> str:
    """Returns the mean of values, and their standard deviation (n - 1) if there are several."""
    digits = DIGITS.get(column, 2)
    shown = f"{statistics.mean(values):,.{digits}f}"
    return f"{shown} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown


def markdown(lines: Iterable[list[str]]) -> str:
    """Returns a table in Markdown; the first of its lines is the head."""
    head, *rest = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * (head.count("|") - 1) + "|", *rest]) + "\n"
