"""Exported models: the same parameters to the bit, no folder that is half there, nothing of this machine inside."""

import dataclasses
import json
import re
import shutil
import warnings

import jax
import numpy as np
import pytest
import yaml
from commands import one_sentence, refused, succeed
from exported_runs import EXPERIMENTS, TINY, assert_same, variables_of, write_trained
from fsspec.implementations.memory import MemoryFileSystem

import flowgen
from flowgen import checkpoint, exports
from flowgen.data import DataConfig, LatentsConfig
from flowgen.experiments import (
    FlowExperiment,
    PretrainedAutoencoder,
    TextConfig,
)
from flowgen.flows import STARFlowConfig
from flowgen.runs.exported import without_paths
from flowgen.runs.files import digest_of_file
from flowgen.runs.lock import in_use
from flowgen.safetensors import read_safetensors, write_safetensors
from flowgen.training import InitConfig


@pytest.fixture(scope="module", params=EXPERIMENTS)
def trained(request, tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained") / "run", EXPERIMENTS[request.param])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained") / "run", EXPERIMENTS["flow"])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The tiny flow's folder, read by tests that change nothing."""
    return exports.export(run, tmp_path_factory.mktemp("exported") / "flow")


@pytest.fixture
def copied(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copied")


def test_loading_gives_the_model_of_the_run_bitwise(trained, tmp_path):
    folder = flowgen.export(trained, tmp_path / "folder")
    model, variables, experiment = flowgen.load(trained)
    again, loaded, described = flowgen.load(folder)
    assert (again, described) == (model, experiment)
    assert_same(loaded, variables)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_parameters_that_are_no_average_are_exported_too(run, exported, tmp_path):
    folder = flowgen.export(run, tmp_path / "folder", step="best", ema=False)
    variables = checkpoint.load_on_host(run, ema=False)[1]
    assert_same(checkpoint.load_on_host(folder, "best", ema=False)[1], variables)
    again = flowgen.export(folder, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert variables["params"]["blocks_0"]["proj_in"]["bias"].any()
    assert "averaged parameters" not in (folder / "README.md").read_text()


def test_half_precision_is_stored_and_float32_is_loaded(run, exported, tmp_path):
    folder = flowgen.export(run, tmp_path / "half", dtype="float16")
    whole = flowgen.load(exported)[1]
    assert_same(flowgen.load(folder)[1], jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), whole))
    stored = {path: read_safetensors(path / "model.safetensors") for path in (folder, exported)}
    assert {x.dtype.name for x in stored[folder].values()} == {"float16"}
    assert {x.dtype.name for x in stored[exported].values()} == {"float32"}
    assert "stored as float16" in (folder / "README.md").read_text()


def test_weights_beyond_float16_are_refused(tmp_path):
    variables = jax.tree.map(lambda x: x + np.float32(1e6), variables_of(EXPERIMENTS["flow"]))
    checkpoint.write_run(tmp_path / "run", EXPERIMENTS["flow"], variables)
    with pytest.raises(ValueError, match="the largest float16; leave out dtype") as error:
        flowgen.export(tmp_path / "run", tmp_path / "out", dtype="float16")
    one_sentence(error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_the_card_tells_what_the_model_is_and_how_good(exported, tmp_path, run):
    card = (exported / "README.md").read_text()
    for told in ("# flow", "A TARFlow with", "averaged parameters of step 7", "| bits_per_dim | 2.5 |", "digits"):
        assert told in card
    assert "has not stated a licence" in card
    licensed = exports.export(run, tmp_path / "out", licence="mit")
    assert "\nlicense: mit\n" in (licensed / "README.md").read_text()


def test_nothing_of_this_machine_is_in_the_folder(tmp_path):
    place = f"{tmp_path}/secret"
    words = {"model": dataclasses.replace(STAR, text_dim=4, text_length=2, num_classes=0)}
    for changes in (
        {"data": DataConfig(name="folder", path=place), "init": InitConfig(place, allow=("classes",))},
        {"data": LatentsConfig(place), "codec": PretrainedAutoencoder(place, digest="0")},
        {**words, "text": TextConfig(place)},
    ):
        experiment = FlowExperiment(**{"name": "star", "model": STAR, **changes})
        assert "secret" not in json.dumps(without_paths(experiment.to_json()))
        experiment.from_json(without_paths(experiment.to_json()))


STAR = STARFlowConfig(image_size=4, channels=4, width=40, head_dim=20, layers_per_block=(1, 1), num_classes=10)


def test_a_config_that_was_edited_is_told(copied):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flowgen.load(copied)
        path = copied / "config.json"
        path.write_text(path.read_text().replace('"flow"', '"mine"', 1))
        with pytest.raises(UserWarning, match=r"config.json' was changed after the export"):
            flowgen.load(copied)
        whole = json.loads(path.read_text())
        del whole["sha256"]  # as in exports of earlier versions
        path.write_text(json.dumps(whole))
        flowgen.load(copied)


def test_a_folder_above_a_missing_one_is_named(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert f"Wrote {tmp_path / 'new'} (" in succeed("export", run, "--out", "missing/../new")


def test_a_foreign_folder_names_no_files_to_read(copied):
    _edit("experiment", "data", "path", value="gs://stranger/data")(copied)
    assert flowgen.load(copied)[2].data.path == ""


def test_an_autoencoder_of_flowgen_goes_with_its_flow(tmp_path, monkeypatch):
    autoencoder = write_trained(tmp_path / "autoencoder", EXPERIMENTS["autoencoder"])
    codec = PretrainedAutoencoder(str(autoencoder))
    experiment = FlowExperiment(name="star", model=STAR, codec=codec).with_provenance()
    run = write_trained(tmp_path / "run", experiment)
    folder = flowgen.export(run, tmp_path / "folder", dtype="float16")
    codec = experiment.encoding.open_codec()
    for path in (run, autoencoder):
        shutil.rmtree(path)
    moved = folder.rename(tmp_path / "moved")
    loaded = flowgen.load(moved)[2]
    again = loaded.encoding.open_codec()
    assert_same(again.variables, codec.variables)
    for name in ("shift", "scale"):
        np.testing.assert_array_equal(getattr(again.normalisation, name), getattr(codec.normalisation, name))
    assert str(tmp_path) not in (moved / "config.json").read_text()


def test_a_published_autoencoder_stays_outside(tmp_path):
    codec = PretrainedAutoencoder(str(tmp_path / "sd-vae"))
    run = write_trained(tmp_path / "run", FlowExperiment(name="star", model=STAR, codec=codec))
    with pytest.warns(UserWarning, match="give its path with --codec.path"):
        folder = flowgen.export(run, tmp_path / "folder")
    assert "--codec.path" in (folder / "README.md").read_text()
    assert "codec.path is empty" in refused("sample --checkpoint", folder, "--out", tmp_path / "x.npz")


# What is refused.


def test_existing_files_are_kept(exported, run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(FileExistsError, match="already exists") as error:
        flowgen.export(run, tmp_path / "out")
    one_sentence(error)
    assert "is not an option" in refused("export", run, "--out", tmp_path / "new", "--steps", "3")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        flowgen.export(run, tmp_path / "new", dtype="int8")
    with pytest.raises(ValueError, match="'gs://bucket/model', but it must be on this machine"):
        flowgen.export(run, "gs://bucket/model")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_to_an_empty_folder_stays_a_link(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to("there")
    assert flowgen.export(run, tmp_path / "link") == tmp_path / "link"
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there" / "config.json").is_file()


def test_a_licence_that_is_no_word_is_quoted_in_the_card(run, tmp_path):
    card = flowgen.export(run, tmp_path / "out", licence='mine: "x"\n---') / "README.md"
    assert yaml.safe_load(card.read_text().split("---\n")[1])["license"] == 'mine: "x"\n---'


def test_an_interrupted_export_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(exports, "model_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        flowgen.export(run, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_removed_by_the_next(run, tmp_path):
    """An unfinished folder that is still written, those of other folders and files of other names are kept."""
    left, running, others, foreign = (
        tmp_path / name
        for name in (".out.9-0a1b2c3d.tmp", ".out.8-0a1b2c3d.tmp", ".out.b.9-0a1b2c3d.tmp", ".out.old.tmp")
    )
    for folder in (left, running, others, foreign):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".out.7-0a1b2c3d.tmp").symlink_to(foreign)
    with in_use(running):
        flowgen.export(run, tmp_path / "out")
        assert not left.exists()
        assert all((folder / "model.safetensors").exists() for folder in (running, others, foreign))
    flowgen.export(run, tmp_path / "out2")
    assert running.exists()


def _flip(folder):
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def _truncate(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-1])


def _edit(*path, value):
    def edit(folder):
        config = json.loads((folder / "config.json").read_text())
        part = config
        for name in path[:-1]:
            part = part[name]
        part[path[-1]] = value
        (folder / "config.json").write_text(json.dumps(config))

    return edit


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (_flip, "SHA-256 differs"),
        (_truncate, "is damaged or not a safetensors file"),
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "truncated or not a safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json; copy or download"),
        (lambda folder: (folder / "config.json").write_text('{"format": 1'), "export the run again"),
        (lambda folder: (folder / "config.json").write_text("[]"), "does not describe a model of flowgen"),
        (_edit("format", value=2), "reads format 1; install the flowgen that wrote it"),
        (_edit("weights", value=None), "does not describe the weights"),
        (_edit("weights", value={}), "does not describe the weights"),
        (_edit("weights", "step", value=-1), "does not describe the weights"),
        (_edit("metrics", value={"loss": "small"}), "does not describe the weights"),
        (_edit("experiment", "model", "width", value=16), "model.safetensors' does not fit the model"),
        (_edit("experiment", "model", "depth", value=16), "depth"),
        (_edit("experiment", "type", value="os:system"), "type is 'os:system'"),
    ],
)
def test_damage_is_told_in_one_sentence(copied, damage, told):
    damage(copied)
    with pytest.raises((ValueError, OSError), match=re.escape(told)) as error:
        flowgen.load(copied)
    one_sentence(error)


def _with_tensors(folder, **changed):
    """Replaces tensors of an exported folder, as another program might."""
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in read_safetensors(path).items()} | changed
    path.unlink()
    write_safetensors(path, tensors)
    _edit("weights", "sha256", value=digest_of_file(path))(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(copied, tmp_path, value):
    name = "params/blocks_0/proj_in/bias"
    bias = read_safetensors(copied / "model.safetensors")[name].copy()
    bias[-1] = value
    _with_tensors(copied, **{name: bias})
    for use in (lambda: flowgen.load(copied), lambda: flowgen.export(copied, tmp_path / "again")):
        with pytest.raises(ValueError, match=rf"model.safetensors' has values in {name} that are not finite") as error:
            use()
        one_sentence(error)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("name", ["opt_state/x", "params/blocks_0", "collections/params/x", "x"])
def test_tensors_that_no_model_has_are_refused(copied, name):
    _with_tensors(copied, **{name: np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="which no exported model has") as error:
        flowgen.load(copied)
    one_sentence(error)


def test_a_folder_without_trained_parameters_says_so(exported):
    with pytest.raises(ValueError, match="only the averaged parameters") as error:
        flowgen.load(exported, ema=False)
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match="no checkpoint 3; choose one of 7"):
        flowgen.load(exported, step=3)


def test_an_exported_folder_is_not_a_workdir(exported):
    told = refused("train --debug --config tarflow_digits --workdir", exported)
    assert f"train in a new --workdir with --init-from {exported}" in told


# Commands and places.


def test_commands_read_an_exported_folder(exported, run, tmp_path):
    assert "checkpoints: 7" in succeed("info --checkpoint", exported)
    succeed("sample --num 2 --checkpoint", exported, "--out", tmp_path / "a.npz")
    succeed("sample --num 2 --checkpoint", run, "--out", tmp_path / "b.npz")
    drawn_from = [np.load(tmp_path / name)["images"] for name in ("a.npz", "b.npz")]
    np.testing.assert_array_equal(*drawn_from)
    folder = tmp_path / "folder"
    told = succeed("export --no-ema", run / "checkpoints" / "7", "--out", folder)
    assert re.match(rf"Wrote {re.escape(str(folder))} \(\d\.\d\d MB\)", told)
    assert_same(flowgen.load(folder, ema=False)[1], flowgen.load(run, ema=False)[1])


@pytest.mark.slow
def test_training_starts_from_an_exported_folder(exported, tmp_path):
    model = " ".join(
        f"--model.{name} {getattr(TINY, name)}"
        for name in ("patch_size", "width", "head_dim", "num_blocks", "layers_per_block", "num_classes", "activation")
    )
    words = "train --config tarflow_digits --steps 1 --optim.warmup_steps 0 --batch_size 4 --sampling.guidance 0 "
    words += "--sampling.num 1 --log.tensorboard false --optim.lr 1e-9 --optim.min_lr 0 --train.label_dropout 0 "
    succeed(words + model, "--init-from", exported, "--workdir", tmp_path / "run")
    one_step, start = flowgen.load(tmp_path / "run", ema=False)[1], flowgen.load(exported)[1]
    # A step of Adam moves a parameter by about its learning rate.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-8), one_step, start)


def test_a_folder_in_a_bucket_is_loaded(exported, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    for path in exported.iterdir():
        MemoryFileSystem().pipe_file(f"/bucket/flow/{path.name}", path.read_bytes())
    assert_same(flowgen.load("memory://bucket/flow")[1], flowgen.load(exported)[1])


# The files.


def test_safetensors_come_back_bitwise(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        f"{dtype}/{shape}": rng.integers(0, 2, shape).astype(jax.numpy.dtype(dtype))
        for dtype in ("float64", "float32", "float16", "bfloat16", "int32", "uint8", "bool")
        for shape in ((), (3,), (2, 0), (2, 5))
    }
    tensors["strided"] = np.arange(6, dtype=np.float32).reshape(2, 3).T
    path = tmp_path / "model.safetensors"
    write_safetensors(path, tensors, {"format": "flax"})
    read = read_safetensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(read[name], tensor)
    with pytest.raises(FileExistsError):
        write_safetensors(path, tensors)
    with pytest.raises(ValueError, match="x is complex64"):
        write_safetensors(tmp_path / "other", {"x": np.ones(2, np.complex64)})
