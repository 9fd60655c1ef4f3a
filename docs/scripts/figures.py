"""Draws the figures of the pages on concepts: `python docs/scripts/figures.py` writes docs/images/*.svg."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

IMAGES = Path(__file__).parent.parent / "images"
RESULTS = IMAGES.parents[1] / "benchmarks" / "results"
BLUE, ORANGE, GREY, LIGHT, INK = "#3b6fd4", "#e08a1e", "#9aa3ad", "#e8ecf1", "#1f2933"
QUALITY = {"tarflow": ("flowgen", BLUE), "published": ("published PyTorch code", ORANGE)}


def text(x: float, y: float, words: str, size: int = 15, anchor: str = "middle", colour: str = INK) -> str:
    """Returns a line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{colour}">{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", radius: int = 4) -> str:
    """Returns a rectangle."""
    size = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {size} rx="{radius}" fill="{fill}" stroke="{stroke}" stroke-width="1.5"/>'


def line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float = 1.5, arrow: bool = False) -> str:
    """Returns a line, perhaps with an arrowhead."""
    end = ' marker-end="url(#head)"' if arrow else ""
    place = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width:.2f}"{end}/>'


def picture(width: int, height: int, *parts: str) -> str:
    """Returns an SVG file on white."""
    head = '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    head = f'<defs>{head}<path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>'
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" font-family="sans-serif"'
    body = "\n".join([head, box(0, 0, width, height, "#ffffff", radius=8), *parts])
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{body}\n</svg>\n'


def flow_block() -> str:
    """A block: token 3 is shifted and scaled by numbers that depend on tokens 0 to 2."""
    step, side, chosen = 100, 44, 3
    parts = [text(24, 50, "x", 20, "start"), text(24, 266, "z", 20, "start")]
    parts.append(box(70, 112, 5 * step - 30, 40, LIGHT))
    parts.append(text(70 + (5 * step - 30) / 2, 138, "causal transformer"))
    for token in range(5):
        x = 84 + token * step
        before = token < chosen
        fill = BLUE if before else ORANGE if token == chosen else "#ffffff"
        parts += [box(x, 22, side, side, fill, GREY), box(x, 238, side, side, "#ffffff", GREY)]
        parts.append(text(x + side / 2, 49, str(token), 15, colour="#ffffff" if token <= chosen else GREY))
        parts.append(text(x + side / 2, 265, str(token), 15, colour=INK if token == chosen else GREY))
        if before:
            parts.append(line(x + side / 2, 68, x + side / 2, 110, BLUE, 2))
    x = 84 + chosen * step
    parts.append(line(x + 10, 154, x + 10, 234, INK, 1.5, arrow=True))
    parts.append(text(x, 188, "shift, log_scale", 15, "end"))
    parts.append(f'<path d="M{x + side} 44 C{x + 76} 60 {x + 76} 200 {x + side - 8} 234" fill="none" ')
    parts[-1] += f'stroke="{ORANGE}" stroke-width="2" marker-end="url(#head)"/>'
    parts.append(text(84 + 2 * step, 318, "z = (x - shift) · exp(-log_scale)", 16))
    return picture(600, 336, *parts)


def sweeps(kind: str, tokens: int = 12, window: int = 4) -> list[list[str]]:
    """The state of each token after each pass: "solved", "swept" or "waiting". Jacobi needs 2 passes per 4 tokens."""
    rows, done = [], 0
    while done < tokens:
        match kind:
            case "sequential":
                rows.append((done, done + 1))
                done += 1
            case "fixed":
                rows += [(done, done + window), (done, done + window)]
                done += window
            case "sliding":
                rows.append((done, min(done + window, tokens)))
                done = min(done + (2 if len(rows) % 2 else 3), tokens)
            case "all":
                rows += [(0, tokens)] * 5
                done = tokens
    return [
        ["solved" if token < start else "swept" if token < stop else "waiting" for token in range(tokens)]
        for start, stop in rows
    ]


def plans() -> str:
    """Passes of four decoding plans over twelve tokens."""
    names = {
        "sequential": "Sequential()",
        "fixed": "Jacobi(window=4)",
        "sliding": "SlidingWindow(4)",
        "all": "Jacobi()",
    }
    colours = {"solved": "#b9cdf2", "swept": ORANGE, "waiting": LIGHT}
    parts, cell = [], 15
    for index, (kind, name) in enumerate(names.items()):
        left = 30 + index * 215
        parts.append(text(left, 34, name, 15, "start"))
        rows = sweeps(kind)
        for pass_, row in enumerate(rows):
            for token, state in enumerate(row):
                parts.append(box(left + token * cell, 50 + pass_ * cell, cell - 2, cell - 2, colours[state], radius=2))
        parts.append(text(left, 50 + len(rows) * cell + 16, f"{len(rows)} passes", 13, "start", GREY))
    legend = ((colours["solved"], "solved, in the cache"), (ORANGE, "computed in this pass"), (LIGHT, "waiting"))
    for index, (colour, words) in enumerate(legend):
        parts += [box(30 + index * 215, 270, 13, 13, colour, radius=2), text(50 + index * 215, 282, words, 13, "start")]
    return picture(880, 300, *parts)


def height(value: float) -> float:
    """Returns where a coordinate is drawn."""
    return 155 - 46 * value


def couplings() -> str:
    """Noise and data joined at random, with weights, and by an optimal plan."""
    rng = np.random.default_rng(3)
    count = 14
    noise = np.stack([np.full(count, 30.0), rng.normal(0, 1, count).clip(-2, 2)], axis=1)
    data = np.stack(
        [np.full(count, 210.0), np.where(np.arange(count) % 2, 1.0, -1.0) + rng.normal(0, 0.2, count)], axis=1
    )
    cost = (noise[:, None, 1] - data[None, :, 1]) ** 2
    _, optimal = linear_sum_assignment(cost)
    weight = np.exp(-np.diagonal(cost) / 3)
    panels = (
        ("Independent()", np.arange(count), np.ones(count)),
        ("GibbsWeights(): W-CFM", np.arange(count), weight / weight.max()),
        ("MinibatchOT()", optimal, np.ones(count)),
    )
    parts = []
    for index, (name, order, weights) in enumerate(panels):
        left = 20 + index * 260
        parts.append(text(left + 120, 30, name, 15))
        for source, target, strength in zip(noise, data[order], weights, strict=True):
            shade = f"rgba(59,111,212,{0.08 + 0.72 * strength:.2f})"
            x0, x1 = left + source[0], left + target[0]
            parts.append(line(x0, height(source[1]), x1, height(target[1]), shade, 0.5 + 2 * strength))
        for points, colour in ((noise, GREY), (data, ORANGE)):
            parts += [f'<circle cx="{left + x:.1f}" cy="{height(y):.1f}" r="4" fill="{colour}"/>' for x, y in points]
        parts += [text(left + 30, 272, "noise x0", 13, colour=GREY), text(left + 210, 272, "data x1", 13, colour=GREY)]
    return picture(800, 290, *parts)


def passes(flow: str = "MNIST", batch: int = 8) -> str:
    """Passes per token and the largest error of each plan, as benchmarks/plans.py measured them without guidance."""
    rows = [
        row for row in json.loads((RESULTS / "plans.json").read_text()) if (row["flow"], row["batch"]) == (flow, batch)
    ]
    rows = [row for row in rows if not row["guidance"] and row["name"] not in ("tuned on this CPU",)]
    parts = [text(262, 34, "passes per token", 14, "start"), text(690, 34, "token-passes", 14, "end")]
    parts.append(text(790, 34, "error", 14, "end"))
    for number, row in enumerate(rows):
        y, width = 48 + 30 * number, 320 * row["passes_per_token"] / 1.2
        parts.append(text(250, y + 16, row["name"].replace(", if all passes cost the same", ""), 14, "end"))
        parts.append(box(262, y, width, 22, ORANGE if row["error"] > 0.1 else BLUE, radius=2))
        parts.append(text(262 + width + 8, y + 16, f"{row['passes_per_token']:.2f}", 14, "start"))
        parts.append(text(690, y + 16, f"{row['token_passes_per_token']:.1f}", 14, "end"))
        parts.append(text(790, y + 16, f"{row['error']:.0e}" if row["error"] else "exact", 14, "end"))
    return picture(812, 60 + 30 * len(rows), *parts)


def quality_curve() -> str:
    """Held-out bits/dim against processor time, as benchmarks/quality.py measured it: a thin line per seed."""
    rows = [row for row in json.loads((RESULTS / "quality.json").read_text()) if row["name"] in QUALITY]
    left, top, width, tall = 80, 24, 560, 300
    points = [point for row in rows for point in row["curve"]]
    most = max(row["budget_seconds"] for row in rows)
    low = min(point["value"] for point in points) // 0.1 * 0.1
    high = max(point["value"] for point in points) // 0.1 * 0.1 + 0.1

    def place(point: dict[str, float]) -> tuple[float, float]:
        return left + width * point["seconds"] / most, top + tall * (high - point["value"]) / (high - low)

    parts = []
    for step in range(round((high - low) / 0.1) + 1):
        x, y = place({"seconds": 0, "value": low + step * 0.1})
        parts += [line(x, y, x + width, y, LIGHT), text(x - 10, y + 5, f"{low + step * 0.1:.1f}", 13, "end")]
    for minutes in range(0, round(most / 60) + 1, 5):
        parts.append(text(place({"seconds": 60 * minutes, "value": low})[0], top + tall + 22, str(minutes), 13))
    parts.append(text(left + width / 2, top + tall + 46, "minutes of processor time on one core", 14))
    parts.append(text(left, 16, "bits/dim of 500 test images", 13, "start"))
    for row in rows:
        colour = QUALITY[row["name"]][1]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, row["curve"]))
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
    for number, (words, colour) in enumerate(QUALITY.values()):
        y = top + 24 + 24 * number
        parts += [line(left + 330, y, left + 360, y, colour, 3), text(left + 370, y + 5, words, 14, "start")]
    return picture(left + width + 30, top + tall + 60, *parts)


FIGURES = {
    "flow_block": flow_block,
    "decoding_plans": plans,
    "couplings": couplings,
    "passes": passes,
    "quality_curve": quality_curve,
}


def main() -> None:
    """Writes every figure."""
    for name, draw in FIGURES.items():
        (IMAGES / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
