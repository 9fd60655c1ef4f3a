"""Draws line charts, bars and box plots as SVG, in the colours of the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowgen.report.markup import Markup, element

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 40
MOST_POINTS = 300  # of a line, which is about as wide in pixels; longer lines are thinned
MOST_MARKERS = 40  # of a line
LOG_RATIO = 100.0  # positive values that span more than this ratio get a logarithmic axis
# The first values of a run may be much larger than all others. If leaving out this share of the steps shrinks the axis
# by more than STEEP, the axis covers only the rest.
BEGINNING, STEEP = 0.1, 3.0
ENOUGH = 10  # values that such an axis must have

Number = int | float
Point = tuple[Number, Number]


@dataclass(frozen=True)
class Series:
    """A line of a chart.

    kind: "train" for a solid line, "held" for a dashed line with markers, "reference" for a dotted line. colour: 0 to
    7, the number of a colour of the style sheet.
    """

    name: str
    points: Sequence[Point]
    kind: str = "train"
    colour: int = 0


@dataclass(frozen=True)
class Axis:
    """A scale from values to pixels; logarithmic if `log` is true."""

    low: Number
    high: Number
    start: Number
    stop: Number
    log: bool = False

    def at(self, value: Number) -> float:
        """Returns the pixel of a value, clipped to the axis."""
        low, high, value = (math.log10(x) if self.log else x for x in (self.low, self.high, max(value, self.floor)))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return round(self.start + share * (self.stop - self.start), 1)

    @property
    def floor(self) -> Number:
        return self.low if self.log else -math.inf

    def ticks(self, count: int = 5) -> list[Number]:
        """Returns about `count` round values on the axis."""
        if not self.log:
            return ticks(self.low, self.high, count)
        first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
        inside = [10.0**power for power in range(first, last + 1) if self.low <= 10.0**power <= self.high]
        return inside[:: math.ceil(len(inside) / count) or 1] or [self.low, self.high]


def ticks(low: Number, high: Number, count: int) -> list[float]:
    """Returns about `count` round values between low and high.

    Example:
        ticks(0.0, 1.0, 5)  # [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def line_chart(title: str, unit: str, series: Sequence[Series]) -> Markup:
    """Returns a figure with a chart of values over steps. Points must be finite; series without points are left out.

    Example:
        line_chart("Loss", "nats", [Series("training", [(50, 1.0), (100, 0.5)])])
    """
    series = [line for line in series if line.points]
    steps = [step for line in series for step, _ in line.points]
    x = Axis(min(steps), max(steps) if max(steps) > min(steps) else min(steps) + 1, LEFT, WIDTH - RIGHT)
    y, is_cut = _vertical(series, x)
    parts = [_grid(x, y), *(_drawn(line, x, y) for line in series)]
    words = f"{title}{f' in {unit}' if unit else ''} over training steps: " + "; ".join(
        f"{line.name} from {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in series
    )
    labels = [
        _text(WIDTH - RIGHT, HEIGHT - 6, "step", anchor="end"),
        _text(LEFT, HEIGHT - 6, ", ".join(filter(None, [unit, "log scale" if y.log else ""])), anchor="start"),
    ]
    drawing = _drawing(words, *parts, *labels)
    legend = element("ul", *(_entry(line) for line in series), class_="legend")
    cut = element("p", "The first values are outside the axis.", class_="note") if is_cut else ""
    return element("figure", element("figcaption", title), drawing, legend, cut, class_="chart")


def _vertical(series: Sequence[Series], x: Axis) -> tuple[Axis, bool]:
    """Returns the axis of the values, and whether the first values are outside it."""
    late = x.low + BEGINNING * (x.high - x.low)
    every = [value for line in series for _, value in line.points]
    rest = [value for line in series for step, value in line.points if step >= late or line.kind == "reference"]
    low, high = min(every), max(every)
    log = low > 0 and high / low > LOG_RATIO
    is_cut = len(rest) >= ENOUGH and not log and 0 < STEEP * (max(rest) - min(rest)) < high - low
    if is_cut:
        low, high = min(rest), max(rest)
    if log:
        return Axis(low / 1.2, high * 1.2, HEIGHT - BOTTOM, TOP, log=True), False
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP), is_cut


def _grid(x: Axis, y: Axis) -> Markup:
    lines = []
    for tick in y.ticks():
        at = y.at(tick)
        lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=at, y2=at, class_="grid"))
        lines.append(_text(LEFT - 6, at + 4, label(tick), anchor="end"))
    for tick in x.ticks(4):
        at = x.at(tick)
        lines.append(element("line", x1=at, x2=at, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4, class_="axis"))
        lines.append(_text(at, HEIGHT - BOTTOM + 17, label(tick), anchor="middle"))
    lines.append(element("line", x1=LEFT, x2=WIDTH - RIGHT, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM, class_="axis"))
    return element("g", *lines)


def _drawn(line: Series, x: Axis, y: Axis) -> Markup:
    inside = [(step, value) for step, value in thinned(line.points) if y.low <= value <= y.high]
    points = [(x.at(step), y.at(value)) for step, value in inside]
    path = element("polyline", points=" ".join(f"{a:g},{b:g}" for a, b in points), class_=f"line {line.kind}")
    markers = []
    if line.kind == "held" or len(points) == 1:
        for step, value in thinned(inside, MOST_MARKERS):
            told = element("title", f"{line.name}, step {label(step)}: {value:.4g}")
            markers.append(element("circle", told, cx=x.at(step), cy=y.at(value), r=3.2, class_="dot"))
    return element("g", path, *markers, class_=f"c{line.colour % 8}")


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Returns at most `most` points: the first, the last, and the extremes of equal groups of points between them.

    Example:
        thinned(points, 300)
    """
    if len(points) <= most:
        return list(points)
    kept, inner, parts = [points[0]], points[1:-1], (most - 2) // 2
    for part in range(parts):
        near = inner[part * len(inner) // parts : (part + 1) * len(inner) // parts]
        kept += sorted({min(near, key=lambda point: point[1]), max(near, key=lambda point: point[1])})
    return [*kept, points[-1]]


def box_plots(title: str, unit: str, rows: Sequence[tuple[str, Sequence[Number]]]) -> Markup:
    """Returns a figure with one box plot per row. Each row has five values: the 1, 25, 50, 75 and 99 % quantiles.

    Example:
        box_plots("Log-scales", "nats", [("block 0", (-2.0, -1.0, -0.5, 0.0, 0.3))])
    """
    row, left = 26, 74
    low, high = min(min(values) for _, values in rows), max(max(values) for _, values in rows)
    margin = 0.05 * (high - low) or 1.0
    x = Axis(low - margin, high + margin, left, WIDTH - RIGHT)
    height = TOP + row * len(rows) + BOTTOM
    parts = []
    for tick in x.ticks(5):
        parts.append(element("line", x1=x.at(tick), x2=x.at(tick), y1=TOP, y2=height - BOTTOM, class_="grid"))
        parts.append(_text(x.at(tick), height - BOTTOM + 16, label(tick), anchor="middle"))
    for index, (name, values) in enumerate(rows):
        at = TOP + row * index + row / 2
        a, b, c, d, e = (x.at(value) for value in values)
        parts += [
            _text(left - 8, at + 4, name, anchor="end"),
            element("line", x1=a, x2=e, y1=at, y2=at, class_="line"),
            element("rect", x=b, y=at - 7, width=max(d - b, 1), height=14, class_="box"),
            element("line", x1=c, x2=c, y1=at - 7, y2=at + 7, class_="middle"),
        ]
    words = f"{title} in {unit}: " + "; ".join(f"{name} median {values[2]:.3g}" for name, values in rows)
    parts.append(_text(WIDTH - RIGHT, height - 6, unit, anchor="end"))
    drawing = _drawing(words, element("g", *parts, class_="c0"), height=height)
    return element("figure", element("figcaption", title), drawing, class_="chart")


def bars(title: str, rows: Sequence[tuple[str, Number]]) -> Markup:
    """Returns a figure with one horizontal bar per row, labelled with its value.

    Example:
        bars("Images per class", [("cat", 120), ("dog", 80)])
    """
    row, left, right = 20, 100, 56
    height, most = 2 * TOP + row * len(rows), max(value for _, value in rows) or 1
    parts = []
    for index, (name, value) in enumerate(rows):
        at = TOP + row * index
        width = round(max((WIDTH - left - right) * value / most, 0.5), 1)
        short = name if len(name) <= 14 else f"{name[:13]}…"
        parts += [
            _text(left - 6, at + 14, short, anchor="end"),
            element("rect", element("title", f"{name}: {value:,g}"), x=left, y=at + 3, width=width, height=row - 6),
            _text(left + width + 5, at + 14, f"{value:,g}", anchor="start"),
        ]
    words = f"{title}: " + ", ".join(f"{name} {value:,g}" for name, value in rows)
    drawing = _drawing(words, element("g", *parts, class_="c0 bars"), height=height)
    return element("figure", element("figcaption", title), drawing, class_="chart")


def label(value: Number) -> str:
    """Returns a short text for a tick of an axis, such as "20k", "0.05" or "3e-5".

    Example:
        label(20_000)  # "20k"
    """
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    text = f"{value:.4g}"
    if "e" not in text:
        return text
    mantissa, _, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}"


def _drawing(words: str, *parts: Markup, height: int = HEIGHT) -> Markup:
    size = {"viewBox": f"0 0 {WIDTH} {height}"}
    return element("svg", element("title", words), *parts, role="img", **size)


def _text(x: Number, y: Number, text: str, *, anchor: str) -> Markup:
    return element("text", text, x=round(x, 1), y=round(y, 1), text_anchor=anchor)


def _entry(line: Series) -> Markup:
    sample = element("line", x1=1, x2=27, y1=6, y2=6, class_=f"line {line.kind}")
    dot = element("circle", cx=14, cy=6, r=3.2, class_="dot") if line.kind == "held" else ""
    size = {"viewBox": "0 0 28 12"}
    swatch = element("svg", sample, dot, class_=f"swatch c{line.colour % 8}", aria_hidden="true", **size)
    return element("li", swatch, line.name)


def scatter(title: str, groups: Sequence[tuple[str, Sequence[Sequence[Number]]]]) -> Markup:
    """Returns a scatter plot with equal scales on both axes. Points that are not finite are left out.

    Example:
        scatter("Samples", [("data", [(0.0, 1.0)]), ("samples", [(0.1, 0.9)])])
    """
    kept = [(name, [p for p in points if all(map(math.isfinite, p))]) for name, points in groups]
    xs, ys = ([p[axis] for _, points in kept for p in points] or [0.0] for axis in (0, 1))
    half = 0.55 * max(max(xs) - min(xs), max(ys) - min(ys), 1e-6)
    (a, b), side = ((max(xs) + min(xs)) / 2, (max(ys) + min(ys)) / 2), 320
    left = (WIDTH - side) / 2
    x, y = Axis(a - half, a + half, left, left + side), Axis(b - half, b + half, TOP + side, TOP)
    parts = [element("rect", x=left, y=TOP, width=side, height=side, class_="frame")]
    for tick in x.ticks(4):
        parts.append(_text(x.at(tick), TOP + side + 16, label(tick), anchor="middle"))
    for tick in y.ticks(4):
        parts.append(_text(left - 6, y.at(tick) + 4, label(tick), anchor="end"))
    for index, (_, points) in enumerate(kept):
        dots = (element("circle", cx=x.at(px), cy=y.at(py), r=2) for px, py in points)
        parts.append(element("g", *dots, class_=f"points c{index}"))
    words = f"{title}: " + ", ".join(f"{len(points)} points of {name}" for name, points in kept)
    legend = [_dot_entry(name, index) for index, (name, _) in enumerate(kept)]
    drawing = _drawing(words, *parts, height=TOP + side + 26)
    return element(
        "figure", element("figcaption", title), drawing, element("ul", *legend, class_="legend"), class_="chart"
    )


def _dot_entry(name: str, colour: int) -> Markup:
    size = {"viewBox": "0 0 28 12"}
    dot = element("circle", cx=14, cy=6, r=4)
    return element("li", element("svg", dot, class_=f"swatch points c{colour}", aria_hidden="true", **size), name)
