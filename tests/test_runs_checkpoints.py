"""Folders of checkpoints as they are found: what is none is passed over, what is damaged or out of place is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import one_sentence

from flowgen import checkpoint
from flowgen.experiments import FlowExperiment
from flowgen.flows import TARFlowConfig
from flowgen.nn import init
from flowgen.runs import CheckpointReader, CheckpointStore, check_workdir, read_config, write_config

MODEL = TARFlowConfig(image_size=4, channels=1, patch_size=2, width=8, head_dim=8, num_blocks=2, layers_per_block=1)
ROOT = Path(__file__).parent.parent
EXPERIMENT = FlowExperiment(name="tiny", model=MODEL)


def state_of(step):
    rng = np.random.default_rng(step)
    groups = ("params", "ema", "opt_state", "collections")
    return {"step": np.int32(step), **{name: {"w": rng.normal(size=(40, 40))} for name in groups}}


def restored(reader, step):
    return reader.restore(step, jax.tree.map(np.asarray, state_of(step)))["params"]["w"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "checkpoints"
    with CheckpointStore(directory) as store:
        for step in (100, 200):
            store.save(step, state_of(step), config={"a": 1})
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def listening(path):
    place = os.getcwd()
    os.chdir(path.parent)  # The name of a socket must be short.
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(place)


def without(name):
    """A copy of a checkpoint in which one file, or the files of one folder, are gone, as in a deletion cut short."""

    def make(path):
        shutil.copytree(path.parent / "200", path)
        gone = path / name
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()

    return make


# What may stand in a folder of checkpoints, by its name and how it is made.
ODD = {
    "empty": ("150", lambda path: path.mkdir()),
    "file": ("250", lambda path: path.write_text("mine")),
    "padded": ("0300", lambda path: shutil.copytree(path.parent / "200", path)),
    "negative": ("-5", lambda path: path.mkdir()),
    "other digits": ("\u0663\u0660\u0660", lambda path: shutil.copytree(path.parent / "200", path)),
    "huge": ("9" * 30, lambda path: shutil.copytree(path.parent / "200", path)),
    "exponent": ("1e3", lambda path: path.mkdir()),
    "link": ("300", lambda path: path.symlink_to("200")),
    "dangling": ("300", lambda path: path.symlink_to("nowhere")),
    "loop": ("300", lambda path: path.symlink_to("300")),
    "pipe": ("300", os.mkfifo),
    "socket": ("300", listening),
    "pipe by another name": ("notes", os.mkfifo),
    "other programs": ("300.orbax-checkpoint-tmp", lambda path: path.mkdir()),
    "hidden": (".DS_Store", lambda path: path.write_bytes(b"\0")),
    "without meta": ("300", without("meta.json")),
    "without params": ("300", without("params")),
    "without a file of the average": ("300", without("ema/_METADATA")),
    "foreign files": ("300", lambda path: (path.mkdir(), (path / "x").write_text("mine"))),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_checkpoint_is_passed_over_and_told(copied, kind):
    name, make = ODD[kind]
    make(copied / name)
    reader = CheckpointReader(copied)
    assert reader.steps() == [100, 200]
    assert list(reader.passed_over()) == [name]
    np.testing.assert_array_equal(restored(reader, 200), state_of(200)["params"]["w"])


@pytest.mark.parametrize("kind", ["empty", "file", "dangling", "pipe", "socket", "without meta", "without params"])
def test_what_stands_in_the_place_of_a_new_checkpoint_is_moved_aside(copied, kind):
    _, make = ODD[kind]
    make(copied / "300")
    told = []
    with CheckpointStore(copied, say=told.append) as store:
        store.save(300, state_of(300), config={})
    assert CheckpointReader(copied).steps() == [100, 200, 300]
    assert os.path.lexists(copied / "300.aside")
    assert len(told) == 1
    assert "300.aside" in told[0]


def test_what_a_save_or_a_deletion_left_is_cleared(copied, tmp_path):
    for name in ("300.saving", "100.deleted", "100.deleted-1", "7.saving-3"):
        shutil.copytree(copied / "200", copied / name)
    (copied / "8.saving").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (copied / "200" / ".evaluation.json.17-0123abcd.tmp").write_text("{")
    assert CheckpointReader(copied).passed_over() == {}
    with CheckpointStore(copied):
        pass
    assert sorted(path.name for path in copied.iterdir()) == ["100", "200"]
    assert sorted(path.name for path in (copied / "200").iterdir()) == [
        "ema",
        "meta.json",
        "opt_state",
        "other",
        "params",
    ]
    assert (tmp_path / "elsewhere").is_dir()


def test_a_deletion_begins_with_a_name_that_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # As if killed before anything was removed.
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        for step in (1, 2):
            store.save(step, state_of(step), config={})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1.deleted", "2"]


FULL = """
import resource, sys
import numpy as np
from flowgen.runs import CheckpointStore
with CheckpointStore(sys.argv[1]) as store:
    store.save(1, {"params": {"w": np.ones(9)}}, config={})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    rng = np.random.default_rng(0)
    try:
        store.save(2, {"params": {str(i): rng.normal(size=(100, 100)) for i in range(20)}}, config={})
        store.wait()
    except OSError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_one_sentence_whatever_orbax_says(tmp_path):
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.count("\n") == 1
    assert "Checkpoint 2 could not be saved" in ended.stdout
    assert "(File too large)" in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    assert CheckpointReader(tmp_path).arrays(1)["params/w"].sum() == 9


@pytest.mark.parametrize("make", [shutil.copytree, os.rename], ids=["copied", "renamed"])
def test_a_folder_that_holds_another_step_is_refused(copied, make):
    make(copied / "200", copied / "202")
    reader = CheckpointReader(copied)
    for read in (reader.meta, reader.arrays, lambda step: restored(reader, step)):
        with pytest.raises(ValueError, match=r"Checkpoint 202 .* contains step 200") as error:
            read(202)
        one_sentence(error)


def test_a_state_of_another_step_is_refused(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(3, state_of(4), config={})
    with pytest.raises(ValueError, match=r"Checkpoint 3 .*its arrays belong to step 4") as error:
        restored(CheckpointReader(tmp_path), 3)
    one_sentence(error)


def test_an_evaluation_of_another_checkpoint_is_refused(copied):
    with CheckpointStore(copied) as store:
        store.score(200, {"bits_per_dim": 1.0, "broken": float("nan")})
    assert CheckpointReader(copied).evaluation(200) == {"bits_per_dim": 1.0}
    assert CheckpointReader(copied).evaluation(100) is None
    shutil.copy(copied / "200" / "evaluation.json", copied / "100")
    with pytest.raises(ValueError, match=r"Checkpoint 100 .* evaluation\.json of another checkpoint") as error:
        CheckpointReader(copied).meta(100)
    assert "remove evaluation.json" in one_sentence(error)


def test_reading_verifies_only_the_files_that_it_reads(copied):
    for group in ("opt_state", "params"):
        for path in (copied / "200" / group).rglob("*"):
            if path.is_file():
                path.write_bytes(b"damaged")
    reader = CheckpointReader(copied)
    read = reader.arrays(200, lambda path: path.startswith(("ema/", "collections/")))
    np.testing.assert_array_equal(read["ema/w"], state_of(200)["ema"]["w"])
    with pytest.raises(ValueError, match=r"is damaged \(opt_state/"):
        reader.arrays(200)


@pytest.mark.parametrize("kind", ["pipe", "socket", "extra", "extra pipe"])
def test_files_of_another_kind_in_a_checkpoint_are_refused_without_waiting(copied, kind):
    path = copied / "200" / "params" / ("_METADATA" if "extra" not in kind else "extra")
    path.unlink(missing_ok=True)
    {"pipe": os.mkfifo, "socket": listening, "extra": lambda p: p.write_text(""), "extra pipe": os.mkfifo}[kind](path)
    with pytest.raises(ValueError, match=rf"Checkpoint 200 .* (is damaged|has a file) .*params/{path.name}\b") as error:
        CheckpointReader(copied).arrays(200)
    one_sentence(error)


# Contents of JSON files that flowgen did not write.
STRANGE = {
    "nested lists": b"[" * 100_000 + b"]" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "open lists": b"[" * 100_000,
    "number": b"5",
    "list": b"[]",
    "text": b'"a"',
    "null": b"null",
    "empty": b"",
    "not utf-8": b"\xff\xfe{}",
    "NaN": b'{"step": NaN}',
    "long number": b'{"step": ' + b"9" * 5000 + b"}",
    "empty object": b"{}",
    "nulls": b"\0" * 100,
}


@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("name", ["config.json", "meta.json", "evaluation.json"])
def test_strange_json_is_refused_in_one_sentence(copied, name, kind):
    run_dir = copied.parent
    write_config(run_dir, EXPERIMENT.to_json())
    path = run_dir / name if name == "config.json" else copied / "200" / name
    path.write_bytes(STRANGE[kind])

    def read():
        read_config(run_dir)
        CheckpointReader(copied).meta(200)

    with pytest.raises(ValueError, match=name) as error:
        read()
    one_sentence(error)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../secret": "0"}},
        {"files": {"/etc/passwd": "0"}},
        {"files": []},
        {"arrays": {"params/w": [[10**9, -1], "float32"]}},
        {"arrays": {"params/w": [[2], "no dtype"]}},
        {"arrays": {"params/w": 5}},
        {"step": "200"},
        {"step": True},
    ],
    ids=str,
)
def test_a_meta_file_that_flowgen_would_not_write_is_refused(copied, change):
    from flowgen.runs.files import signed

    path = copied / "200" / "meta.json"
    saved = {name: value for name, value in json.loads(path.read_text()).items() if name != "sha256"}
    path.write_text(json.dumps(signed({**saved, **change})))
    with pytest.raises(ValueError, match="Checkpoint 200") as error:
        CheckpointReader(copied).arrays(200)
    one_sentence(error)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("written") / "run"
    checkpoint.write_run(run_dir, EXPERIMENT, init(EXPERIMENT.build(), jax.random.key(0)))
    return run_dir


def test_a_changed_digit_of_the_config_is_refused_by_name(written, tmp_path):
    run = shutil.copytree(written, tmp_path / "run")
    path = run / "config.json"
    path.write_text(path.read_text().replace('"warmup_steps": 0', '"warmup_steps": 7'))
    for read in (checkpoint.load, lambda run: check_workdir(run, EXPERIMENT.check_resumable)):
        with pytest.raises(ValueError, match=r"config\.json .*optim\.warmup_steps: 0 -> 7") as error:
            read(run)
        one_sentence(error)


def test_the_config_of_another_run_is_refused_by_name(written, tmp_path):
    run = shutil.copytree(written, tmp_path / "run")
    write_config(run, {**EXPERIMENT.to_json(), "train": {**EXPERIMENT.to_json()["train"], "seed": 5}})
    with pytest.raises(ValueError, match=r"Checkpoint 0 .*config\.json.*train\.seed") as error:
        checkpoint.load(run)
    one_sentence(error)


def test_what_a_resumed_run_may_change_does_not_stop_loading(written, tmp_path):
    run = shutil.copytree(written, tmp_path / "run")
    changed = {**EXPERIMENT.to_json(), "train": {**EXPERIMENT.to_json()["train"], "steps": 5000}}
    write_config(run, changed)
    assert checkpoint.load(run)[2].train.steps == 5000


def test_files_beside_a_config_are_not_written_to(written, tmp_path):
    run, mine = shutil.copytree(written, tmp_path / "run"), tmp_path / "mine"
    mine.write_text("mine")
    for name in ("config.json.tmp", "metrics.tmp", ".config.json.1.tmp"):
        (run / name).symlink_to(mine)
    write_config(run, EXPERIMENT.to_json())
    (run / "config.json").unlink()
    (run / "config.json").symlink_to(mine)
    write_config(run, EXPERIMENT.to_json())
    assert mine.read_text() == "mine"
    assert read_config(run) == EXPERIMENT.to_json()


@pytest.mark.parametrize("junk", ["copy", "damaged"])
def test_what_somebody_puts_there_while_training_deletes_no_checkpoint_of_the_run(tmp_path, junk):
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(4, state_of(4), config={})
        store.wait()
        if junk == "copy":
            shutil.copytree(tmp_path / "4", tmp_path / "400")
        else:
            (tmp_path / "400").mkdir()
            (tmp_path / "400" / "meta.json").write_text("{}")
        store.save(8, state_of(8), config={})
        store.wait()
        assert (tmp_path / "8" / "meta.json").exists()
        assert (tmp_path / "400").exists()


def test_a_best_checkpoint_that_is_gone_is_best_no_more(tmp_path):
    with CheckpointStore(tmp_path, keep=1, best_metric="loss") as store:
        for step, loss in ((2, 1.0), (4, 5.0), (6, 4.0), (8, 6.0)):
            store.save(step, state_of(step), config={}, metrics={"loss": loss})
            store.wait()
            if step == 2:
                shutil.rmtree(tmp_path / "2")
        assert store.steps() == [6, 8]


def test_files_that_systems_leave_in_folders_harm_nothing(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(4, state_of(4), config={})
    (tmp_path / "4" / "params" / ".DS_Store").write_bytes(b"x")
    assert CheckpointReader(tmp_path).arrays(4)
    (tmp_path / "4" / "params" / "more").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"remove params/more"):
        CheckpointReader(tmp_path).arrays(4)
