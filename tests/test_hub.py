"""Models on the hub, which a folder replaces here. Calls must fit the hub's own client, whose patterns choose files."""

import inspect
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import huggingface_hub
import pytest
from commands import one_sentence, succeed
from exported_runs import EXPERIMENTS, assert_same, write_trained
from huggingface_hub.utils import filter_repo_objects

import flowgen
from flowgen import exports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained") / "run", EXPERIMENTS["flow"])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The tiny flow's folder, read by tests that change nothing."""
    return exports.export(run, tmp_path_factory.mktemp("exported") / "flow")


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def copied(source, target, patterns):
    """The target folder, with the files of the source that fit the patterns."""
    for name in filter_repo_objects(files_in(source), allow_patterns=patterns):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target / name)
    return target


def fitting(function):
    """The function, which takes only calls that the client's function of this name takes, too."""
    signature = inspect.signature(getattr(huggingface_hub, function.__name__))

    def call(*values, **options):
        signature.bind(*values, **options)
        return function(*values, **options)

    return call


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder, which records what is asked of it."""
    root, asked = tmp_path / "hub", []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        if not (root / repo_id).is_dir():
            raise RuntimeError("404 Client Error:\n repository not found")
        return str(copied(root / repo_id, tmp_path / "cache" / repo_id, allow_patterns))

    def upload_folder(*, repo_id, folder_path, commit_message, allow_patterns, delete_patterns):
        for name in filter_repo_objects(files_in(root / repo_id), allow_patterns=delete_patterns):
            (root / repo_id / name).unlink()
        copied(Path(folder_path), root / repo_id, allow_patterns)
        return f"https://hub/{repo_id}/commit/1"

    def create_repo(repo_id, *, private, exist_ok):
        asked.append((repo_id, private))

    fake: Any = ModuleType("huggingface_hub")
    for function in (snapshot_download, upload_folder, create_repo):
        setattr(fake, function.__name__, fitting(function))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


def test_models_go_to_the_hub_and_come_back(hub, run, exported, tmp_path, monkeypatch):
    assert flowgen.push_to_hub(exported, "org/flow") == "https://hub/org/flow/commit/1"
    assert_same(flowgen.from_pretrained("org/flow", revision="v1")[1], flowgen.load(exported)[1])
    assert "checkpoints: 7" in succeed("info --checkpoint hf://org/flow")
    monkeypatch.chdir(tmp_path)
    assert "Wrote flow.report.html" in succeed("report --no-model hf://org/flow@v1")
    flowgen.push_to_hub(run, "org/raw", private=False, ema=False)
    assert_same(flowgen.load("hf://org/raw", ema=False)[1], flowgen.load(run, ema=False)[1])
    assert hub[:3] == [("org/flow", True), ("org/flow", "v1"), ("org/flow", None)]


def test_only_the_model_goes_to_the_hub_and_replaces_the_last_one(hub, exported, tmp_path):
    folder, stored = shutil.copytree(exported, tmp_path / "model"), tmp_path / "hub" / "org" / "flow"
    model = {"README.md", "config.json", "model.safetensors"}
    shutil.copytree(exported, folder / "codec")
    flowgen.push_to_hub(folder, "org/flow")
    assert set(files_in(stored)) == {*model, *(f"codec/{name}" for name in model)}
    shutil.rmtree(folder / "codec")
    for name in (".env", "notes/plan.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    with pytest.warns(UserWarning, match=r"they are not uploaded: \.env, notes/plan\.txt\.$"):
        flowgen.push_to_hub(folder, "org/flow")
    assert set(files_in(stored)) == model


def test_what_the_hub_lacks_is_told(hub, exported):
    for name, kind, told in (
        ("org/absent", OSError, "could not be downloaded (404 Client Error: repository not found)."),
        ("absent", ValueError, "write hf://org/name"),
    ):
        with pytest.raises(kind, match=re.escape(told)) as error:
            flowgen.from_pretrained(name)
        one_sentence(error)
    with pytest.raises(ValueError, match="ema cannot be set for the exported folder"):
        flowgen.push_to_hub(exported, "org/flow", ema=False)


def test_the_hub_needs_a_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModuleNotFoundError, match="pip install huggingface_hub"):
        flowgen.from_pretrained("org/flow")
