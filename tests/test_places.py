"""Paths and URLs: which of them name a place in a bucket, and which are refused."""

from pathlib import Path

import pytest
from commands import one_sentence
from scripts import toy
from scripts.toy import TEN

from flowgen.places import Destination, RemoteFolder, is_remote, is_same_place
from flowgen.runs import CheckpointReader, RunWriter, read_config

pytestmark = pytest.mark.usefixtures("staging")


@pytest.mark.parametrize("path", ["gs:/b/run", "file:/tmp/x", Path("memory://b/run")], ids=str)
def test_a_url_that_has_lost_a_slash_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    for call in (is_remote, lambda path: toy.run(toy.make_job(), path, log=TEN)):
        with pytest.raises(ValueError, match=r"lost a slash; write '[a-z]+://") as error:
            call(path)
        one_sentence(error)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("use", [CheckpointReader, read_config, lambda url: RunWriter(url, keep=1, best_metric="x")])
def test_what_reads_a_disk_makes_no_folder_of_a_url(use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"memory://a.*must be on this machine") as error:
        use("memory://a")
    one_sentence(error)
    assert [path.name for path in tmp_path.iterdir()] == ["staging"]


@pytest.mark.parametrize("path", ["runs/digits", "/tmp/a:b", "C:/runs", "a:b/c", "x:/y"])
def test_paths_on_this_machine_are_no_urls(path):
    assert not is_remote(path)


@pytest.mark.parametrize(
    ("url", "error", "words"),
    [
        ("gs://bucket/run", ModuleNotFoundError, ["gs://", "pip install gcsfs"]),
        ("s3://bucket/run", ModuleNotFoundError, ["s3://", "pip install s3fs"]),
        ("nowhere://bucket/run", ValueError, ["nowhere://", "gs://"]),
        ("simplecache::gs://bucket/run", ValueError, ["::"]),
        ("file://relative/run", ValueError, ["file://relative/run", "three slashes"]),
        ("file://localhost/p", ValueError, ["file://localhost/p", "three slashes"]),
    ],
)
def test_urls_that_cannot_be_opened(url, error, words, monkeypatch):
    for module in ("gcsfs", "s3fs"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(error) as raised:
        toy.run(toy.make_job(), url, log=TEN)
    assert all(word in one_sentence(raised) for word in words)


def test_schemes_are_written_in_any_case(tmp_path):
    RemoteFolder(f"FILE://{tmp_path}/a/").write("b", b"c")
    assert (tmp_path / "a" / "b").read_bytes() == b"c"


@pytest.mark.parametrize("url", ["file:///tmp/", "memory://bucket", "memory://"])
def test_a_destination_without_a_name_is_refused(url, staging):
    with pytest.raises(ValueError, match="no name of a file") as error:
        Destination(url)
    one_sentence(error)
    assert not list(staging.iterdir())


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("file:///tmp/r", "/tmp/r", True),
        ("/tmp/x/../r", "FILE:///tmp/r/", True),
        ("gs://b/r", "gs://b/r/", True),
        ("gs://b/r", "s3://b/r", False),
        ("file:///tmp/r", "/tmp/q", False),
    ],
)
def test_places_that_are_the_same(a, b, same):
    assert is_same_place(a, b) == same
