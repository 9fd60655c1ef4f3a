"""Runs that start from another run: they resume, freeze and record as other runs, and refuse what does not fit."""

import dataclasses

import jax
import numpy as np
import pytest
import reference_weights as rw
from commands import one_sentence, outcome_of, refused, succeed
from fine_tuning_cases import TAR, experiment_of, perturbed, run_of, started
from published_files import write_safetensors

import flowgen
from flowgen.places import RemoteFolder
from flowgen.runs import CHECKPOINTS, CheckpointReader, RunReader, flatten
from flowgen.training import InitConfig, OptimConfig, TrainConfig
from flowgen.training.step import init_state

CONFIG = """
from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig

def config():
    return FlowExperiment(
        name="digits",
        model=TARFlowConfig(image_size=8, channels=1, patch_size=4, width=8, head_dim=8, num_blocks=2,
                            layers_per_block=1, num_classes=10, noise_std=0.1),
        data=DataConfig(eval_fraction=0.0),
        optim=OptimConfig(lr=1e-2, weight_decay=0.1, schedule="constant", ema_decay=0.9),
        train=TrainConfig(steps=6, batch_size=8, label_dropout=0.1),
        log=LogConfig(log_every=2, checkpoint_every=0, progress=False, tensorboard=False),
        sampling=SamplingConfig(num=1),
    )
"""
CHANGED = "--model.num_classes 20 --init.allow classes --train.frozen blocks_0/*,*/proj_in/*"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The directories of a run of ten digits and of a run that makes them twenty, and the command of the latter."""
    folder = tmp_path_factory.mktemp("tuned")
    (folder / "digits.py").write_text(CONFIG)
    old = flowgen.load_config(folder / "digits.py").with_provenance()
    path = run_of(folder, old, jax.tree.map(lambda x: x / 3, perturbed(old)))
    command = f"train --config {folder / 'digits.py'} --init-from {path}"
    message = refused(f"{command} --model.num_classes 20 --workdir {folder / 'tuned'}")
    assert "(model.num_classes: 10 -> 20); set these fields as in that run, or add --init.allow classes." in message
    assert not (folder / "tuned").exists()
    command = f"{command} {CHANGED}"
    succeed(f"{command} --workdir {folder / 'tuned'}")
    config = (folder / "tuned" / "config.json").read_bytes()
    moved = outcome_of(f"{command} --workdir {folder / 'tuned'}".replace(str(path), str(folder / "moved")))
    assert moved.code == 0, moved
    assert f"init.path '{folder / 'moved'}' is not read, because" in moved.err
    assert (folder / "tuned" / "config.json").read_bytes() == config
    return path, folder / "tuned", command


def test_a_fine_tuned_run_is_a_run(tuned):
    path, run, _ = tuned
    model, _, experiment = flowgen.load(run)
    assert (experiment.init.path, experiment.init.allow) == (str(path), ("classes",))
    assert model.config.num_classes == 20
    told = (run / "start.txt").read_text().splitlines()
    assert told[0] == f"Starting from {path}, step 0, parameters:"
    assert "blocks_0-1/class_embed (10 classes by name, 10 new at the mean)" in told[2]


@pytest.mark.slow
def test_a_run_in_a_bucket_starts_from_a_run_in_a_bucket(tuned):
    path, run, command = tuned
    url = "memory://tuned/run"
    succeed(f"{command.replace(str(path), f'file://{path}')} --workdir {url}")
    old, new = CheckpointReader(run / CHECKPOINTS), RunReader(url).checkpoints
    assert old.steps() == new.steps()
    for name, array in new.arrays(6).items():
        np.testing.assert_array_equal(array, old.arrays(6)[name], err_msg=name)
    assert RemoteFolder(url).read("start.txt").startswith(f"Starting from file://{path}, step 0".encode())
    names = {name.split("/")[0] for name in RemoteFolder(url).sizes()}
    assert names == {file.name for file in run.iterdir() if file.name != "lock"}


def test_frozen_parts_stay_as_they_are(tuned):
    path, run, _ = tuned
    before, after = CheckpointReader(path / CHECKPOINTS).arrays(0), CheckpointReader(run / CHECKPOINTS).arrays(6)
    params = [name for name in after if name.startswith("params/")]
    frozen = [name for name in params if "blocks_0" in name or "proj_in" in name]
    for name in params:
        average, has_moments = name.replace("params/", "ema/"), any(f"/mu/{name[7:]}" in other for other in after)
        assert has_moments == (name not in frozen)
        if name.endswith("class_embed"):  # This is mapped, and may then be frozen.
            kept = bool((after[name][:10] == before[name]).all())
            assert kept == (name in frozen)
        else:
            assert bool((after[name] == before[name]).all()) == (name in frozen), name
        assert bool((after[average] == after[name]).all()) == (name in frozen), name


@pytest.mark.slow
def test_a_resumed_run_does_not_read_the_run_that_it_started_from(tuned, tmp_path):
    path, whole, command = tuned
    command = f"{command} --workdir {tmp_path / 'run'}"
    succeed(f"{command} --steps 3")
    path.rename(tmp_path / "moved")
    succeed(command)
    (tmp_path / "moved").rename(path)
    arrays, others = (CheckpointReader(folder / CHECKPOINTS).arrays(6) for folder in (tmp_path / "run", whole))
    assert arrays.keys() == others.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


NEAREST = r"has the pattern 'block_1/\*', which matches no parameter; the nearest names are blocks_1/\*"


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"train": TrainConfig(steps=1, frozen=("block_1/*",))}, {}, f"train.frozen {NEAREST}"),
        ({"train": TrainConfig(steps=1, frozen=("*",))}, {}, "freezes all parameters"),
        ({"optim": OptimConfig(not_decayed=("block_1/*",))}, {}, f"optim.not_decayed {NEAREST}"),
        ({}, {"devices": 0}, r"devices is 0; give a list of this process's devices"),
        ({}, {"devices": []}, r"devices is an empty list; give"),
        ({}, {"devices": ["cpu"]}, r"devices is a list; give"),
    ],
    ids=["frozen", "all frozen", "not decayed", "no devices", "empty devices", "names of devices"],
)
def test_what_fits_no_parameter_or_device_is_refused(changes, options, message, tmp_path, untyped):
    with pytest.raises(ValueError, match=message) as error:
        flowgen.fit(dataclasses.replace(experiment_of(TAR), **changes), tmp_path / "run", **options)
    one_sentence(error)
    assert not (tmp_path / "run").exists()


def test_patterns_are_checked_without_fit_too():
    params = {"layer": {"kernel": jax.numpy.zeros((2, 2))}}
    with pytest.raises(ValueError, match=r"optim.not_decayed has the pattern 'lair/\*'"):
        init_state({"params": params}, OptimConfig(not_decayed=("lair/*",)), 10)


def test_the_layout_is_checked_before_the_other_run_is_read(tmp_path):
    path = run_of(tmp_path, experiment_of(TAR))
    for file in (path / CHECKPOINTS / "0").rglob("d/*"):
        file.write_bytes(b"")
    for length, message in (
        (TrainConfig(steps=1, batch_size=8, parallel="fsdp", mesh=(1, 4)), r"train.mesh .* a layer has 1 heads"),
        (TrainConfig(steps=1, batch_size=9), r"train.batch_size is 9"),
    ):
        with pytest.raises(ValueError, match=message):
            flowgen.fit(experiment_of(TAR, path=path, train=length), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_does_not_start_from_its_own_directory(tmp_path):
    path = run_of(tmp_path, experiment_of(TAR))
    before = sorted(path.rglob("*"))
    absent = tmp_path / "absent"
    for origin, workdir in ((path, path), (absent, absent), (f"file://{path}", path)):
        with pytest.raises(ValueError, match=r"init.path '.*' is the workdir itself; give another --workdir") as error:
            flowgen.fit(experiment_of(TAR, path=origin), workdir)
        one_sentence(error)
    assert sorted(path.rglob("*")) == before


def test_a_debug_run_as_origin_is_named_as_such(tmp_path):
    digits = flowgen.load_config("tarflow_digits")
    path = run_of(tmp_path, digits.debug())
    with pytest.raises(ValueError, match=r"init.path '.*' was trained with --debug.* or add --debug") as error:
        started(dataclasses.replace(digits, init=InitConfig(str(path))))
    one_sentence(error)
    assert len(str(error.value)) < 300 + len(str(path))
    small = digits.debug()
    wider = dataclasses.replace(small.model, width=48)
    with pytest.raises(ValueError, match=r"does not fit this model \(.*model\.width: 32 -> 48\)") as error:
        started(dataclasses.replace(small, model=wider, init=InitConfig(str(path))))
    assert "--debug" not in one_sentence(error)


@pytest.mark.slow
def test_converted_weights_are_an_origin(tmp_path):
    shape = rw.Shape(image_size=8, patch_size=2, channels=1, num_blocks=2, layers_per_block=1, num_classes=3)
    file = write_safetensors(tmp_path / "published.safetensors", rw.state_dict(shape))
    succeed("convert", file, "--to", tmp_path / "converted", *["--image-size", "8", "--channels", "1"],
            *["--patch-size", "2", "--noise-std", "0.1"])  # fmt: skip
    _, variables, experiment = flowgen.load(tmp_path / "converted")
    new = experiment_of(dataclasses.replace(experiment.model, num_classes=5), path=tmp_path / "converted")
    with pytest.raises(ValueError, match=r"model.num_classes: 3 -> 5.* --init.allow classes\."):
        started(new)
    made, lines = started(dataclasses.replace(new, init=InitConfig(new.init.path, ("classes",))))
    before, after = flatten(variables), flatten(made)
    for name in before:
        np.testing.assert_array_equal(after[name][: len(before[name])] if "class_embed" in name else after[name],
                                      before[name])  # fmt: skip
    assert lines[0].endswith("step 0, parameters:")
    assert any("3 classes by number, 2 new at the mean" in line for line in lines)
