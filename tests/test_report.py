"""The page that `report` writes: what it shows of each kind of run, and that nothing in a run can break or leave it."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import outcome_of, refused, succeed
from laws import drawn
from PIL import Image

from flowgen import checkpoint, experiments
from flowgen.conditioning import TextCondition
from flowgen.data import Batch, DataConfig, Moments
from flowgen.nn import init
from flowgen.report.charts import MOST_MARKERS, Axis, Series, bars, label, line_chart, scatter, thinned, ticks
from flowgen.report.curves import MOST_SHOWN, curves_of, curves_section
from flowgen.report.examples import some_of
from flowgen.report.facts import REQUIRED, default_values
from flowgen.report.flows import block_statistics
from flowgen.report.markup import element, table
from flowgen.runs import write_config

EMPTY = {"meta", "img", "input", "br"}
ROWS = [
    {"step": 10, "loss": 2.5, "bits_per_dim": 7.125, "grad_norm": 900.0, "steps_per_second": 3.0},
    {"step": 20, "loss": 1.25, "bits_per_dim": 6.5, "grad_norm": 1.0, "skipped": 0.25, "steps_per_second": 4.0},
    {"step": 20, "eval/bits_per_dim": 6.75, "eval/gaussian_bits_per_dim": 7.5},
    {"step": 30, "loss": math.nan, "bits_per_dim": 6.375, "grad_norm": 2.0},
]
HISTORY = [
    {"event": "start", "time": "2026-01-02T03:04:05+00:00", "id": "a", "step": 0, "device": "cpu", "devices": 2}
    | {"versions": {"flowgen": "9.9", "jax": "0.0"}},
    {"event": "warning", "time": "2026-01-02T03:05:05+00:00", "step": 20, "text": "a window <b>is</b> unsolved"},
    {"event": "end", "time": "2026-01-02T03:06:08+00:00", "step": 30, "error": "FloatingPointError"},
]


class Page(HTMLParser):
    """The elements and the text of a page. Fails if an element is not closed, or if the page loads anything."""

    def __init__(self, content):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        for name, value in attributes:
            assert not name.startswith("on"), "a handler of events"
            if name in ("src", "href"):
                assert value.startswith(("data:image/", "#")), value
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            assert "url(" not in data
            assert "@import" not in data
        elif self.open and self.open[-1] != "script":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def tiny(config="tarflow_digits", **changes):
    return dataclasses.replace(experiments.load_config(config).debug(), **changes)


def write_run(path, experiment, *, rows=ROWS, history=HISTORY):
    """A run directory as if the experiment had been trained."""
    checkpoint.write_run(path, experiment, drawn(init, experiment.build(), jax.random.key(0)))
    (path / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (path / "history.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in history))
    (path / "samples").mkdir()
    for step in (10, 30):
        Image.fromarray(np.full((4, 4), step, np.uint8)).save(path / "samples" / f"{step:07d}.png")
    return path


def page_of(run, *words):
    succeed("report", run, *words)
    return Page((run / "report.html").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    experiment = tiny(name="<script>alert(1)</script>", reference={"bits_per_dim": 6.25})
    return write_run(tmp_path_factory.mktemp("report") / "a&b <i>", experiment)


def test_a_page_shows_the_run_and_runs_nothing_of_it(run):
    page = page_of(run, "--no-model")
    scripts = page.named("script")
    assert len(scripts) == 1
    assert "<script>alert(1)</script>" in page.text, "as text"
    for told in (
        *("TARFlow", "30 of 8", "flowgen 9.9, jax 0.0", "cpu (2 devices)"),
        *("2026-01-02 03:04 UTC", "2 min 3 s", "adamw", "a&b <i>"),
        *("Step 20: a window <b>is</b> unsolved", "training ended early (FloatingPointError)"),
        *("1 values of loss are not finite", "Updates were skipped, at most 25%"),
        *("7.125 (step 10)", "6.375 (step 30)", "6.75 (step 20)", "held-out", "training", "expected"),
        *("bits/dim", "log scale", "step", "The data were not opened"),
    ):
        assert told in page.text, told
    images = page.named("img")
    assert [image["alt"] for image in images] == ["Samples drawn at step 10", "Samples drawn at step 30"]
    assert {"train.steps", "model.width", "optim.lr"} <= set(page.texts)
    marked = page.elements[[tag for tag, _ in page.elements].index("mark") :]
    assert marked, "values that are not defaults"


def test_a_page_is_readable_by_all(run):
    page = page_of(run, "--no-model")
    assert page.named("html")[0]["lang"] == "en"
    assert all(image.get("alt") for image in page.named("img"))
    assert all(head.get("scope") for head in page.named("th"))
    assert all(drawing.get("role") == "img" or drawing.get("aria-hidden") for drawing in page.named("svg"))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {link["href"].removeprefix("#") for link in page.named("a")} <= set(ids)
    policy = next(meta["content"] for meta in page.named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")


OFTEN = ("tarflow_digits", "starflow_v_bouncing", "cfm_moons", "autoencoder_digits")
RARELY = ("starflow_openmoji", "starflow_t2i_256", "wcfm_digits", "meanflow_digits", "autoencoder_bouncing")


@pytest.mark.parametrize("config", [*OFTEN, *(pytest.param(name, marks=pytest.mark.slow) for name in RARELY)])
def test_each_kind_of_run_has_a_page_without_a_checkpoint(tmp_path, config):
    experiment = tiny(config)
    write_config(tmp_path, experiment.to_json())
    page = page_of(tmp_path)
    assert experiment.name in page.text
    assert "The run has no checkpoint yet" in page.text
    assert "The run has no metrics yet." in page.text
    assert f"0 of {experiment.train.steps} (unfinished)" in page.text


@pytest.mark.slow  # trains and decodes; pages without measurements are quick
def test_a_flow_is_measured(tmp_path):
    run = write_run(tmp_path / "run", tiny())
    page = page_of(run, "--samples", "2")
    for told in ("Blocks", "For 32 held-out samples", "block 1", "Decoding", "Jacobi", "error estimate", "Passes per"):
        assert told in page.text, told
    assert "Not measured" not in page.text
    assert "Training samples per class" in page.text
    alts = [image["alt"] for image in page.named("img")]
    assert "2 samples drawn from the latest parameters" in alts
    assert "24 training images, resized as in training" in alts


@pytest.mark.slow  # compiles each network
@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("starflow_v_bouncing", ("Blocks", "Decoding", "4 training clips, one per row")),
        ("starflow_openmoji", ("Blocks", "Decoding", "24 training images")),
        ("cfm_moons", ("Sampling", "Samples and data", "heun")),
        ("wcfm_digits", ("Sampling", "Gibbs weights", "effective sample size")),
    ],
)
def test_other_kinds_are_measured(tmp_path, config, told):
    page = page_of(write_run(tmp_path / "run", tiny(config)), "--samples", "2")
    assert "Not measured" not in page.text
    assert all(word in page.text or any(word in i["alt"] for i in page.named("img")) for word in told)


def test_data_that_are_gone_are_told_in_a_sentence(tmp_path):
    run = write_run(tmp_path / "run", tiny(data=DataConfig("folder", path=str(tmp_path / "gone"), classes=("a", "b"))))
    page = page_of(run, "--samples", "1")
    assert "The data cannot be opened" in page.text
    assert "Not measured" in page.text
    assert "7.125 (step 10)" in page.text


def test_statistics_of_blocks_are_those_of_the_density():
    experiment = tiny()
    flow = experiment.build()
    variables = jax.tree.map(jnp.asarray, drawn(init, flow, jax.random.key(0)))
    x = jax.random.uniform(jax.random.key(1), (5, *experiment.model.event_shape))
    labels = jnp.arange(5, dtype=jnp.int32)
    z, logdet = flow.apply(variables, x, labels, method="forward")
    rows = block_statistics(flow, variables, x, labels)
    assert len(rows) == experiment.model.num_blocks
    # Sums of float32 in another order.
    np.testing.assert_allclose(
        sum(row.logdet_per_dim for row in rows), float(logdet.mean()) / flow.config.num_dims, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(rows[-1].norm, float(np.sqrt(np.square(z).mean())), rtol=1e-5)
    for row in rows:
        assert list(row.log_scale) == sorted(row.log_scale)


def test_parts_of_a_page_share_samples_of_the_data():
    mask = np.ones((10, 3), bool)
    batch = Batch(
        Moments(np.arange(40.0).reshape(10, 2, 2, 1), np.ones((10, 2, 2, 1))),
        TextCondition(mask[..., None] * 1.0, mask),
    )
    few = some_of(batch, 4)
    assert few.size == 4
    assert list(few.x.mean[:, 0, 0, 0]) == [0.0, 8.0, 20.0, 28.0], "evenly spaced"
    assert few.context.mask.shape == (4, 3)
    assert some_of(Batch(batch.x), 20).size == 10


def test_only_reports_are_written_over(run, tmp_path):
    out = tmp_path / "new" / "page.html"
    succeed("report --no-model", run, "--out", out)
    first = out.read_bytes()
    succeed("report --no-model", run, "--out", out)
    assert len(out.read_bytes()) == len(first)
    assert [path.name for path in out.parent.iterdir()] == ["page.html"], "no unfinished file"
    other = tmp_path / "mine.html"
    other.write_text("<!DOCTYPE html><p>mine")
    assert "is not a report of flowgen" in refused("report --no-model", run, "--out", other)
    assert other.read_text() == "<!DOCTYPE html><p>mine"


def test_what_is_no_run_is_refused(tmp_path):
    assert "is not a flowgen run" in refused("report", tmp_path)
    assert "is not a directory" in refused("report", tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_report_takes_the_new_place_of_data(run):
    assert "optim.lr" in refused("report", run, "--optim.lr 1")
    assert outcome_of("report --no-model", run, "--data.workers", "0").code == 0


def test_text_is_escaped_and_markup_is_not():
    inner = element("b", "1 < 2", title='"&"')
    assert inner == '<b title="&quot;&amp;&quot;">1 &lt; 2</b>'
    assert element("p", inner, "\x1b[2J<i>") == f"<p>{inner}\\x1b[2J&lt;i&gt;</p>"
    assert element("input", hidden=True, disabled=False, min=None) == "<input hidden>"
    Page(table("a < b", ("x<", "y"), [("<r>", "<c>")]))


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, -3.1), (1e-7, 3e-7), (12.0, 90_000.0)])
def test_ticks_are_round_and_inside(low, high):
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 11
    assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in found)
    assert all(len(label(tick)) <= 8 for tick in found)


def test_an_axis_maps_its_ends_to_its_pixels():
    axis = Axis(1.0, 1000.0, 200.0, 0.0, log=True)
    assert [axis.at(value) for value in (1.0, 1000.0, 0.0)] == [200.0, 0.0, 200.0]
    assert axis.at(10**1.5) == 100.0
    assert axis.ticks() == [1.0, 10.0, 100.0, 1000.0]
    assert Axis(2.0, 5.0, 0.0, 1.0, log=True).ticks() == [2.0, 5.0]


def test_long_lines_keep_their_extremes_and_ends():
    points = [(float(step), math.sin(step)) for step in range(10_000)]
    points[5_000] = (5_000.0, 99.0)
    points[7_000] = (7_000.0, -99.0)
    for most in (400, 41, 4):
        kept = thinned(points, most)
        assert len(kept) <= most
        assert {points[0], points[5_000], points[7_000], points[-1]} <= set(kept)
        assert kept == sorted(kept)
    assert thinned(points[:10]) == points[:10]


def test_a_chart_is_small_however_long_its_lines_are():
    line = [(step, math.sin(step)) for step in range(50_000)]
    chart = line_chart("Loss", "nats", [Series("training", line), Series("held-out", line, "held", 1)])
    assert len(chart) < 20_000
    assert 0 < chart.count("<circle") <= MOST_MARKERS + 1, "and that of the legend"


def test_charts_of_many_metrics_are_closed():
    names = [f"mine_{number}" for number in range(2 * MOST_SHOWN)]
    curves = {name: [(1, 0.0), (2, 1.0)] for name in [*names, "loss", "bits_per_dim", "steps_per_second"]}
    content = curves_section(curves, {}, "bits_per_dim").content
    shown, closed = content.split("<summary>Other metrics</summary>")
    assert shown.count("<figure") == MOST_SHOWN
    assert all(title in shown for title in ("bits per dimension", "Loss", "mine_0"))
    assert closed.split("<summary>Speed and memory")[0].count("<figure") == MOST_SHOWN + 2
    assert "Other metrics" not in curves_section({"loss": [(1, 0.0)]}, {}, "loss").content


def test_large_first_values_do_not_flatten_a_chart():
    line = [(float(step), 1000.0 if step == 1 else -step / 100) for step in range(1, 101)]
    chart = line_chart("Loss", "nats", [Series("training", line)])
    assert "outside the axis" in chart
    assert "1k" not in re.findall(r">([^<]*)</text>", chart)


def test_charts_of_little_are_drawn():
    for chart in (
        line_chart("One", "", [Series("training", [(1.0, 0.0)]), Series("empty", [])]),
        bars("None", [("a", 0), ("b", 0)]),
        scatter("Bad", [("x", [(math.nan, 1.0)]), ("y", [(1.0, 1.0)])]),
    ):
        assert "nan" not in Page(chart).text
        assert "<svg" in chart


def test_curves_keep_the_last_finite_value_of_a_step():
    rows = [{"step": 1, "loss": 1.0}, {"step": 1, "loss": 2.0, "note": "x"}, {"step": 2, "loss": math.inf, "ok": True}]
    assert curves_of(rows) == ({"loss": [(1, 2.0)]}, {"loss": 1})


def test_numbers_beyond_float32_count_as_not_finite():
    rows = [{"step": 1, "loss": 1e308, "w2": 1.0}, {"step": 10**400, "w2": 2.0}, {"step": 2, "w2": -(10**400)}]
    assert curves_of(rows) == ({"w2": [(1, 1.0)]}, {"loss": 1, "w2": 2})


def test_a_metric_of_another_type_does_not_stop_a_report(run):
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "skipped": "x", "loss": 1e308}\n{"step": 41, "skipped": NaN}\n')
    succeed("report --no-model", run)
    assert "Updates were skipped, at most 25% of" in (run / "report.html").read_text()


def test_a_shipped_model_has_a_report_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("digits", "digits-cfm"):
        succeed("report --no-model", name)
    assert {path.name for path in tmp_path.iterdir()} == {"digits.report.html", "digits-cfm.report.html"}


def test_defaults_are_those_of_the_type_of_a_group():
    experiment = tiny(name="mine")
    defaults = default_values(experiment)
    assert defaults["name"] is REQUIRED
    assert defaults["optim.lr"] == type(experiment.optim).lr
    assert defaults["data.eval_fraction"] == DataConfig.eval_fraction
