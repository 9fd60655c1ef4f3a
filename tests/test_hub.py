"""Models on the hub, which a folder replaces here."""

import re
import shutil
import sys
from types import ModuleType
from typing import Any

import pytest
from commands import one_sentence, succeed
from exported_runs import EXPERIMENTS, assert_same, write_trained

import flowgen
from flowgen import exports


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_trained(tmp_path_factory.mktemp("trained") / "run", EXPERIMENTS["flow"])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The tiny flow's folder, read by tests that change nothing."""
    return exports.export(run, tmp_path_factory.mktemp("exported") / "flow")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub in a folder, which records what is asked of it."""
    root, asked = tmp_path / "hub", []

    def snapshot_download(repo_id, *, revision, allow_patterns):
        asked.append((repo_id, revision))
        if not (root / repo_id).is_dir():
            raise RuntimeError("404 Client Error:\n repository not found")
        return str(root / repo_id)

    def upload_folder(*, repo_id, folder_path, commit_message):
        shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    fake: Any = ModuleType("huggingface_hub")
    fake.snapshot_download, fake.upload_folder = snapshot_download, upload_folder
    fake.create_repo = lambda name, *, private, exist_ok: asked.append((name, private))
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return asked


def test_models_go_to_the_hub_and_come_back(hub, run, exported, tmp_path):
    assert flowgen.push_to_hub(exported, "org/flow") == "https://hub/org/flow/commit/1"
    assert_same(flowgen.from_pretrained("org/flow", revision="v1")[1], flowgen.load(exported)[1])
    assert "checkpoints: 7" in succeed("info --checkpoint hf://org/flow")
    flowgen.push_to_hub(run, "org/raw", private=False, ema=False)
    assert_same(flowgen.load("hf://org/raw", ema=False)[1], flowgen.load(run, ema=False)[1])
    assert hub[:3] == [("org/flow", True), ("org/flow", "v1"), ("org/flow", None)]


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
