"""Plans that are measured: which is chosen at which cost, and the file that a run keeps of them."""

import dataclasses
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from commands import outcome_of, refused, succeed

import flowgen
from flowgen import checkpoint, experiments
from flowgen.backend import shards
from flowgen.decoding import (
    DecodePlan,
    Guidance,
    Jacobi,
    Sequential,
    SlidingWindow,
    invert,
    measure_plans,
    tune,
)
from flowgen.experiments import FlowExperiment, Samples, SamplingConfig, tuning
from flowgen.experiments.tuning import TunedPlan, read_tuned_plan, with_tuned_plan
from flowgen.runs import read_plan, write_plan
from flowgen.settings import to_plain
from flowgen.training import TrainConfig

TOL = 1e-2


def width(plan, n):
    """The number of tokens in a pass."""
    return 1 if isinstance(plan, Sequential) else plan.window or n


def flat(block, plan):
    return 1.0


def growing(block, plan):
    return float(width(plan, 100))


def flat_in_block_0(block, plan):
    return flat(block, plan) if block == 0 else growing(block, plan)


@pytest.fixture(scope="module")
def known():
    """A flow, its samples and their labels. Sequential decoding takes 9 passes per block, whole windows fewer."""
    config = laws.FLOWS["starflow added class"]
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.02)
    return flow, params, laws.images(config, jax.random.key(1)), laws.labels(config)


def kinds(plan):
    return [not isinstance(block, Sequential) for block in plan.blocks]


@pytest.mark.parametrize(
    ("cost", "parallel"), [(growing, [False, False]), (flat, [True, True]), (flat_in_block_0, [True, False])]
)
def test_the_choice_follows_the_cost_of_a_pass(known, cost, parallel):
    flow, params, x, cond = known
    tuning = measure_plans(flow, params, x, cond, tol=TOL, windows=(4, None), cost=cost)
    assert kinds(tuning.plan) == parallel
    assert tuning.plan == tune(flow, params, x, cond, tol=TOL, windows=(4, None), cost=cost)
    for block, chosen in enumerate(tuning.chosen):
        measured = tuning.of_block(block)
        assert measured[0].plan == Sequential()
        assert measured[0].passes == 9
        least = min(found.seconds for found in measured if found.error <= 10 * TOL)
        assert least <= chosen.seconds <= 1.05 * least
    # What was measured block by block holds for the whole flow.
    z, _ = laws.apply(flow, params, x, cond)
    r = invert(flow, params, z, cond, plan=tuning.plan)
    assert np.abs(r.x - x).max() < 100 * TOL
    assert int(r.sweeps.sum()) <= sum(chosen.passes for chosen in tuning.chosen) + 2
    assert ["sequential" not in line for line in tuning.lines()[1:3]] == parallel


def test_the_time_of_a_pass_is_measured_where_no_cost_is_given(known):
    flow, params, x, cond = known
    tuning = measure_plans(flow, params, x, cond, tol=TOL, windows=(4, None))
    assert all(0 < found.seconds < 10 for found in tuning.measurements)
    assert len(tuning.plan.blocks) == 2


@pytest.mark.parametrize(("faster", "parallel"), [(1.04, False), (1.07, True)])
def test_near_ties_go_to_the_simpler_plan(known, faster, parallel):
    flow, params, x, cond = known
    passes = [chosen.passes for chosen in measure_plans(*known, tol=TOL, windows=(4, None), cost=flat).chosen]
    assert max(passes) < 9

    def cost(block, plan):
        return 1 / 9 if isinstance(plan, Sequential) else 1 / (passes[block] * faster)

    assert kinds(tune(flow, params, x, cond, tol=TOL, windows=(4, None), cost=cost)) == [parallel, parallel]


def copying():
    """A flow whose tokens are x_t = x_{t-1} + z_t: an error moves on by one token per sweep, however small it is."""
    config = flowgen.TARFlowConfig(
        image_size=8, channels=1, patch_size=2, width=32, num_blocks=1, layers_per_block=1, head_dim=16
    )
    flow = config.build()
    params = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(lambda: flowgen.init(flow, jax.random.key(0)))
    )
    block, channels = params["params"]["blocks_0"], jnp.arange(config.token_dim)
    block["proj_in"]["kernel"] = block["proj_in"]["kernel"].at[channels, channels].set(1.0)
    block["proj_out"]["kernel"] = block["proj_out"]["kernel"].at[channels, channels + config.token_dim].set(1.0)
    return flow, params


def test_a_plan_that_stops_too_early_is_refused():
    flow, params = copying()
    steps = 0.95 * TOL * jnp.arange(16.0)[None, :, None] * jnp.ones((1, 1, 4))
    x = flow.config.to_images(steps)
    z, _ = laws.apply(flow, params, x)
    assert np.abs(z[:, 1:] - 0.95 * TOL).max() < 1e-5
    tuning = measure_plans(flow, params, x, tol=TOL, windows=(None,), cost=flat)
    whole = next(found for found in tuning.measurements if isinstance(found.plan, Jacobi))
    assert whole.passes < 3
    assert whole.error > 10 * TOL
    assert tuning.plan == DecodePlan((Sequential(),))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classes", "starflow text", "starflow video", "starflow nala"])
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_every_flow_can_be_tuned(name, scale):
    flow, params, x, cond = laws.case(name)
    null = jax.tree.map(lambda part: part[:1], cond) if flow.config.text_dim else None
    guidance = Guidance(scale=scale, null=null)
    tuning = measure_plans(flow, params, x, cond, guidance=guidance, tol=TOL, windows=(2, None), cost=flat)
    for block in range(flow.config.num_blocks):
        assert tuning.of_block(block)[0].error < 1e-4
    assert any(isinstance(found.plan, SlidingWindow) for found in tuning.measurements)
    assert all(found.error <= 10 * TOL + 1e-4 for found in tuning.chosen)


@pytest.mark.slow
def test_frames_can_start_from_the_frame_before():
    flow, params, x, cond = laws.case("starflow video")
    still = jnp.tile(x[:, :1], (1, 4, 1, 1, 1)) + 1e-3 * x
    tuning = measure_plans(flow, params, still, cond, tol=TOL, windows=(2, None), cost=flat)
    inits = [{getattr(found.plan, "init", None) for found in tuning.of_block(block)} for block in (0, 1)]
    assert "previous_frame" not in inits[0]
    assert "previous_frame" in inits[1]


MISTAKES = {
    "a window of no tokens": ({"windows": (0,)}, "windows is 0; give a whole number of at least 1"),
    "a negative tolerance": ({"tol": -1.0}, "tol is -1.0; it must be 0 or more"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_what_cannot_be_measured_is_refused(known, name):
    options, sentence = MISTAKES[name]
    with pytest.raises(ValueError, match=sentence):
        tune(*known, **options)


def test_samples_of_another_shape_are_refused(known):
    flow, params, x, cond = known
    with pytest.raises(ValueError, match="x has shape"):
        tune(flow, params, x[:, :4], cond)


# Plans in a config and in a run.

MODEL = flowgen.TARFlowConfig(
    image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=10
)
EXPERIMENT = FlowExperiment(name="flow", model=MODEL, sampling=SamplingConfig(num=4))
PLAN = (Jacobi(window=2, tol=1e-3), SlidingWindow(window=3, init="zeros"))


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "run"
    checkpoint.write_run(path, EXPERIMENT, laws.drawn(flowgen.init, EXPERIMENT.build(), jax.random.key(0)))
    return path


def tuned(**changes):
    now = {"device": "cpu", "batch": 4, "guidance": 0.0, "tol": 1e-4, "time": "", "versions": {}}
    return TunedPlan(**{"plan": PLAN, **now, **changes})


def test_a_plan_per_block_is_a_value_of_a_config(tmp_path):
    experiment = dataclasses.replace(EXPERIMENT, sampling=SamplingConfig(num=4, plan=PLAN))
    assert experiment.sampling.to_plan() == DecodePlan(PLAN)
    assert experiments.from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
    assert experiment.debug().sampling.plan == "auto"
    words = "[{'type': 'Jacobi', 'window': 2, 'tol': 1e-3}, {'type': 'SlidingWindow', 'window': 3, 'init': 'zeros'}]"
    assert experiments.override(EXPERIMENT, ["--sampling.plan", words]) == experiment
    with pytest.raises(ValueError, match=r"sampling\.plan has plans for 1 blocks, but the model has 2"):
        dataclasses.replace(EXPERIMENT, sampling=SamplingConfig(plan=(Sequential(),)))


def test_a_saved_plan_is_read_again_and_used(run):
    write_plan(run, to_plain(tuned()))
    assert read_tuned_plan(run) == tuned()
    assert with_tuned_plan(EXPERIMENT, run, {}, num=4).sampling.plan == PLAN


OTHERS = {
    "device": ("TPU v5", "device TPU v5 instead of cpu"),
    "batch": (8, "batch 8 instead of 4"),
    "guidance": (1.5, "guidance 1.5 instead of 0.0"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_plan_for_something_else_is_used_with_a_warning(run, name):
    value, told = OTHERS[name]
    write_plan(run, to_plain(tuned(**{name: value})))
    with pytest.warns(UserWarning, match=f"plan.json was measured for {told}, so another plan may be faster"):
        assert with_tuned_plan(EXPERIMENT, run, {}, num=4).sampling.plan == PLAN


def change(path, name, value):
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, name: value}))


DAMAGED = {
    "none": (lambda path: path.unlink(), "plan.json does not exist; measure a plan first with sample --tune"),
    "changed": (lambda path: change(path, "batch", 5), "plan.json has changed since it was saved; delete it"),
    "no JSON": (lambda path: path.write_text("{"), "plan.json is not valid JSON .*; delete it"),
    "a list": (lambda path: path.write_text("[]"), "plan.json does not contain a JSON object; delete it"),
    "a folder": (lambda path: (path.unlink(), path.mkdir()), "plan.json.*"),
    "no plan": (lambda path: write_plan(path.parent, {"plan": 3}), "plan.json does not contain a plan"),
    "an unknown plan": (
        lambda path: write_plan(path.parent, {**to_plain(tuned()), "plan": [{"type": "Newton"}]}),
        "plan.json does not contain a plan .*Newton",
    ),
    "another flow's": (
        lambda path: write_plan(path.parent, to_plain(tuned(plan=(*PLAN, Sequential())))),
        "plan.json has plans for 3 blocks, but the flow has 2; measure it again",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_plan_that_cannot_be_used_is_refused_in_one_sentence(run, tmp_path, name):
    damage, sentence = DAMAGED[name]
    write_plan(run, to_plain(tuned()))
    damage(run / "plan.json")
    for command in ("sample --out", "evaluate --samples 4 --data.name digits"):
        words = (tmp_path / "x.npz",) if command.startswith("sample") else ()
        assert re.search(sentence, refused(command, *words, "--plan", "tuned", "--checkpoint", run))
    assert not (tmp_path / "x.npz").exists()


REFUSED = {
    "--tune --plan jacobi": "--tune chooses the plan; leave --plan out",
    "--tune --window 4": "--window, --tol and --init need --plan",
}


@pytest.mark.parametrize("words", REFUSED)
def test_options_that_contradict_tuning_are_refused(run, tmp_path, words):
    assert REFUSED[words] in refused(f"sample {words} --out", tmp_path / "x.npz", "--checkpoint", run)


def test_a_run_that_cannot_keep_a_plan_is_refused_before_it_is_measured(run, tmp_path):
    (run / "plan.json").mkdir()
    told = refused("sample --tune --out", tmp_path / "x.npz", "--checkpoint", run)
    assert "plan.json': it is a folder" in told


def test_a_run_in_a_bucket_has_no_tuned_plan(run):
    told = refused(f"sample --plan tuned --checkpoint file://{run}")
    assert "it must be on this machine" in told


@pytest.mark.parametrize("where", ["shipped", "bucket"])
def test_a_plan_that_cannot_be_saved_is_used_once(run, tmp_path, monkeypatch, where):
    drawn_with = []
    measured = SimpleNamespace(plan=DecodePlan(PLAN), lines=lambda: ["a table"])
    monkeypatch.setattr(tuning, "sample", lambda *arguments, **options: SimpleNamespace(x=None))
    monkeypatch.setattr(tuning, "measure_plans", lambda *arguments, **options: measured)
    monkeypatch.setattr(tuning, "SHIPPED", run.parent if where == "shipped" else tmp_path)

    def draw(experiment, *arguments):
        drawn_with.append(experiment.sampling.plan)
        return Samples(np.zeros((4, 8, 8, 1), np.float32), {})

    monkeypatch.setattr(FlowExperiment, "draw", draw)
    place = run if where == "shipped" else f"file://{run}"
    out = succeed("sample --num 4 --tune --out", tmp_path / "x.npz", "--checkpoint", place)
    reason = f"{run.name} ships with flowgen" if where == "shipped" else "the run is in a bucket"
    assert f"a table\nThe plan is used for these samples but not saved, because {reason}; " in out
    assert drawn_with == [PLAN]
    assert not (run / "plan.json").exists()


@pytest.mark.slow
def test_parameters_that_devices_share_can_be_tuned(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MIN_SIZE", 1)
    experiment = dataclasses.replace(EXPERIMENT, train=TrainConfig(parallel="fsdp"))
    variables = laws.drawn(flowgen.init, experiment.build(), jax.random.key(0))
    checkpoint.write_run(tmp_path / "run", experiment, variables)
    succeed("sample --tune --num 4 --out", tmp_path / "x.npz", "--checkpoint", tmp_path / "run")
    assert read_tuned_plan(tmp_path / "run").batch == 4


def test_training_takes_no_tuned_plan(tmp_path):
    told = refused("train --debug --config tarflow_digits --sampling.plan tuned --workdir", tmp_path / "run")
    assert "sampling.plan is 'tuned', which only sample and evaluate accept" in told


def test_training_refuses_sampling_that_the_flow_cannot_do(tmp_path):
    words = "--model.attention elu_plus_one --sampling.guidance 1 --sampling.temperature 2"
    told = refused(f"train --debug --config tarflow_digits {words} --workdir", tmp_path / "run")
    assert "guidance.temperature must be 1, not 2.0" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_is_tuned_and_sampled_with_its_plan(run, tmp_path):
    def draw(words):
        outcome = outcome_of(f"sample --num 4 {words} --out", tmp_path / "x.npz", "--checkpoint", run)
        assert outcome.code == 0, outcome
        with np.load(tmp_path / "x.npz") as file:
            return file[file.files[0]], outcome

    plain, _ = draw("--plan sequential")
    first, outcome = draw("--tune --tol 1e-3")
    assert outcome.err == ""
    assert f"Saved {run / 'plan.json'}" in outcome.out.splitlines()
    assert read_plan(run)["tol"] == 1e-3
    again, outcome = draw("--plan tuned")
    assert outcome.err == ""
    np.testing.assert_array_equal(again, first)
    np.testing.assert_allclose(first, plain, atol=0.1)
    _, outcome = draw("--plan tuned --guidance 0.5")
    assert "was measured for guidance 0.0 instead of 0.5" in outcome.err
    assert "plan.json: " in succeed("info --checkpoint", run)
