"""Checkpoints come back bit for bit or not at all, and what is wrong with a directory is said in one sentence."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from commands import one_sentence

from flowgen import checkpoint
from flowgen.experiments import FlowExperiment, from_json
from flowgen.flows import TARFlowConfig
from flowgen.nn import init
from flowgen.runs import flatten
from flowgen.training import CheckpointReader, CheckpointStore

MODEL = TARFlowConfig(
    image_size=4, channels=1, patch_size=2, width=8, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=2
)
EXPERIMENT = FlowExperiment(name="tiny", model=MODEL)
CONFIG = {"toy": [1, 2.5, "ü", None]}


def make_state(seed=0):
    """A tree with every kind of leaf that a run may hold."""
    rng = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "params": {
            "wide": rng.normal(size=(300, 7)).astype(np.float32),
            "half": rng.normal(size=(5,)).astype(ml_dtypes.bfloat16),
            "none": np.zeros((0, 3), np.float32),
            "one": rng.normal(size=()),
        },
        "opt_state": (rng.integers(0, 9, size=4), [{"flag": np.array([True, False])}]),
        "collections": {"log_weights": np.array([-np.inf, 0.5], np.float32)},
    }


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, leaf in flatten(a).items():
        other = flatten(b)[name]
        assert np.asarray(leaf).dtype == np.asarray(other).dtype, name
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(other), err_msg=name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps, read by tests that change nothing."""
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with CheckpointStore(directory) as store:
        store.save(3, make_state(3), config=CONFIG)
        store.save(7, make_state(7), config=CONFIG, metrics={"bits_per_dim": 2.5, "other": 1.0})
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    """The same two steps, to be damaged."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


@pytest.fixture(scope="module")
def weights():
    """Perturbed, so that an array in another's place is seen."""
    leaves, tree = jax.tree.flatten(jax.tree.map(np.asarray, init(EXPERIMENT.build(), jax.random.key(0))))
    rng = np.random.default_rng(0)
    noisy = [leaf + rng.normal(size=leaf.shape).astype(leaf.dtype) for leaf in leaves]
    return jax.tree.unflatten(tree, noisy)


@pytest.fixture(scope="module")
def written(weights, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("written") / "run"
    checkpoint.write_run(run_dir, EXPERIMENT, weights)
    return run_dir


def test_arrays_come_back_bit_for_bit(saved):
    reader = CheckpointReader(saved)
    assert reader.steps() == [3, 7]
    assert reader.latest_step() == 7
    for step in (3, 7):
        assert_same(reader.restore(step, jax.tree.map(np.asarray, make_state(step))), make_state(step))
    meta = reader.meta(7)
    assert meta["config"] == CONFIG
    assert meta["metrics"] == {"bits_per_dim": 2.5, "other": 1.0}
    assert meta["arrays"]["params/half"] == [[5], "bfloat16"]
    chosen = reader.arrays(3, lambda path: path.startswith("params/o"))
    assert list(chosen) == ["params/one"]


def test_reading_an_absent_directory_finds_no_steps(tmp_path):
    assert CheckpointReader(tmp_path / "absent").steps() == []
    assert CheckpointReader(tmp_path / "absent").latest_step() is None


def _flip(path):
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(byte ^ 0xFF for byte in content[middle : middle + 8])
    path.write_bytes(bytes(content))


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


def _largest(directory):
    return max((path for path in directory.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("damage", [_flip, _truncate, lambda path: path.unlink()], ids=["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "choose",
    [
        lambda step: _largest(step / "params"),
        lambda step: step / "opt_state" / "_METADATA",
        lambda step: _largest(step / "other"),
        lambda step: step / "meta.json",
    ],
    ids=["data", "tree", "rest", "meta"],
)
def test_a_damaged_file_is_refused(copied, damage, choose):
    path = choose(copied / "7")
    damage(path)
    like = jax.tree.map(np.asarray, make_state())
    with pytest.raises(ValueError, match=r"Checkpoint 7 in .* is damaged") as error:
        CheckpointReader(copied).restore(7, like)
    message = one_sentence(error)
    assert path.name in message
    assert message.endswith("remove that folder to resume from step 3.")
    shutil.rmtree(copied / "7")
    assert_same(CheckpointReader(copied).restore(3, like), make_state(3))


def test_every_file_of_a_checkpoint_is_covered(copied):
    for path in sorted((copied / "7").rglob("*")):
        if path.is_file() and path.name not in ("meta.json", "evaluation.json"):
            before = path.read_bytes()
            _flip(path)
            with pytest.raises(ValueError, match="is damaged"):
                CheckpointReader(copied).arrays(7)
            path.write_bytes(before)
    CheckpointReader(copied).arrays(7)


def test_changed_values_in_the_meta_file_are_refused(copied):
    for name in ("meta.json", "evaluation.json"):
        path = copied / "7" / name
        before = path.read_text()
        assert "2.5" in before
        path.write_text(before.replace("2.5", "2.4"))
        with pytest.raises(ValueError, match=f"Checkpoint 7 .*{name}") as error:
            CheckpointReader(copied).meta(7)
        one_sentence(error)
        path.write_text(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["params"].pop("one"), "params/one is not expected"),
        (lambda tree: tree["params"].update(two=np.zeros(2, np.float32)), "params/two is missing"),
        (
            lambda tree: tree["params"].update(wide=np.zeros((7, 300), np.float32)),
            "params/wide is float32(300, 7) instead of float32(7, 300)",
        ),
        (
            lambda tree: tree["params"].update(half=np.zeros(5, np.float16)),
            "params/half is bfloat16(5,) instead of float16(5,)",
        ),
    ],
)
def test_another_layout_is_refused_by_name(saved, change, message):
    like = jax.tree.map(np.asarray, make_state())
    change(like)
    with pytest.raises(ValueError, match="does not fit the model") as error:
        CheckpointReader(saved).restore(7, like)
    assert one_sentence(error) == f"Checkpoint 7 does not fit the model: {message}."


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_not_saved(tmp_path, value):
    state = make_state()
    state["params"]["wide"][3, 4] = value
    with CheckpointStore(tmp_path / "checkpoints") as store:
        with pytest.raises(FloatingPointError, match="params/wide is not finite after step 5") as error:
            store.save(5, state, config=CONFIG)
        assert store.steps() == []
    one_sentence(error)


def test_keeps_the_latest_and_the_best(tmp_path):
    scores = {1: 3.0, 2: 1.0, 3: None, 4: 2.0, 5: float("nan"), 6: 4.0}
    kept = {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 5, 6]}
    for step, score in scores.items():
        # Reopened each time: what is best is remembered by the checkpoints, not by the process.
        with CheckpointStore(tmp_path / "checkpoints", keep=2) as store:
            metrics = {} if score is None else {"bits_per_dim": score}
            store.save(step, {"a": np.float32(step)}, config=CONFIG, metrics=metrics)
        assert CheckpointReader(tmp_path / "checkpoints").steps() == kept[step]
    with CheckpointStore(tmp_path / "checkpoints", keep=2) as store:
        assert store.best() == (2, 1.0)


def test_of_equal_scores_the_later_is_best(tmp_path):
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        for step in (1, 2, 3):
            store.save(step, {"a": np.float32(step)}, config=CONFIG, metrics={"bits_per_dim": float(step != 1)})
        store.wait()
        assert store.best() == (1, 0.0)
        store.save(4, {"a": np.float32(4)}, config=CONFIG, metrics={"bits_per_dim": 0.0})
        store.wait()
        assert store.best() == (4, 0.0)
        assert store.steps() == [4]


def test_weights_written_as_a_run_are_loaded(written, weights):
    flow, variables, experiment = checkpoint.load(written)
    assert experiment == EXPERIMENT
    assert flow.config == MODEL
    assert_same(jax.tree.map(np.asarray, variables), weights)
    config = json.loads((written / "config.json").read_text())
    assert from_json(config) == EXPERIMENT
    assert {**EXPERIMENT.to_json(), "sha256": config["sha256"]} == config
    assert_same(checkpoint.load(written, 0, ema=False)[1], variables)


def test_nothing_is_overwritten(written, weights, tmp_path):
    before = sorted(written.rglob("*"))
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (written, file):
        with pytest.raises(FileExistsError, match="already exists") as error:
            checkpoint.write_run(path, EXPERIMENT, weights)
        one_sentence(error)
    assert sorted(written.rglob("*")) == before
    assert file.read_text() == "mine"


def _run_with(tmp_path, weights, steps):
    """A run whose steps hold (params, ema, score)."""
    checkpoint.write_config(tmp_path, EXPERIMENT.to_json())
    with CheckpointStore(tmp_path / "checkpoints") as store:
        for step, score in steps.items():
            params = jax.tree.map(lambda leaf, step=step: leaf + step, weights["params"])
            state = {"params": params, "ema": jax.tree.map(np.negative, params), "step": np.int32(step)}
            metrics = {} if score is None else {"bits_per_dim": score}
            store.save(step, state, config=EXPERIMENT.to_json(), metrics=metrics)


def test_load_chooses_step_and_average(weights, tmp_path):
    _run_with(tmp_path, weights, {4: 2.0, 8: 3.0, 12: None})
    for step, at in ((None, 12), (4, 4), (8, 8), ("best", 4)):
        expected = jax.tree.map(lambda leaf, at=at: leaf + at, weights["params"])
        plain = checkpoint.load(tmp_path, step, ema=False)[1]["params"]
        averaged = checkpoint.load(tmp_path, step)[1]["params"]
        assert_same(jax.tree.map(np.asarray, plain), expected)
        assert_same(jax.tree.map(np.asarray, averaged), jax.tree.map(np.negative, expected))


def test_load_says_what_is_missing(weights, tmp_path):
    messages = {}

    def refused(name, path, step=None):
        with pytest.raises(FileNotFoundError, match=re.escape(str(path))) as error:
            checkpoint.load(path, step)
        messages[name] = one_sentence(error)

    refused("missing", tmp_path / "absent")
    file = tmp_path / "file"
    file.write_text("")
    refused("file", file)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    refused("foreign", foreign)
    begun = tmp_path / "begun"
    begun.mkdir()
    checkpoint.write_config(begun, EXPERIMENT.to_json())
    refused("begun", begun)
    run = tmp_path / "run"
    run.mkdir()
    _run_with(run, weights, {4: None})
    refused("step", run, 5)
    refused("best", run, "best")
    assert "is not a directory" in messages["missing"]
    assert "is not a directory" in messages["file"]
    assert "is not a flowgen run" in messages["foreign"]
    assert "has no checkpoint yet" in messages["begun"]
    assert "has no checkpoint 5; choose one of 4." in messages["step"]
    assert "has no evaluated checkpoint" in messages["best"]


def test_weights_of_another_model_are_refused(weights, tmp_path):
    other = dataclasses.replace(EXPERIMENT, model=dataclasses.replace(MODEL, width=16))
    checkpoint.write_run(tmp_path / "run", other, weights)
    with pytest.raises(ValueError, match=r"Checkpoint 0 does not fit the model: params/|: block") as error:
        checkpoint.load(tmp_path / "run")
    one_sentence(error)


def test_a_damaged_run_is_refused(written, tmp_path):
    run = shutil.copytree(written, tmp_path / "run")
    _flip(_largest(run / "checkpoints" / "0" / "params"))
    with pytest.raises(ValueError, match="has changed since it was saved") as error:
        checkpoint.load(run)
    assert one_sentence(error).endswith("restore it from a copy.")


def test_loaded_variables_are_device_arrays(written):
    assert all(isinstance(leaf, jnp.ndarray) for leaf in jax.tree.leaves(checkpoint.load(written)[1]))
