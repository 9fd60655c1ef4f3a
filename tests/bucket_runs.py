"""Runs in buckets, for tests: a bucket whose calls a test can watch, and copies of a run."""

import json
import time

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from flowgen.places import RemoteFolder
from flowgen.runs import RunReader, remote_lock

# Files of a checkpoint that have the same names in every save, unlike those of arrays.
REST = ("opt_state/_METADATA", "meta.json")


class Watched(MemoryFileSystem):
    """A bucket in memory that calls a function before each change."""

    protocol = "watched"
    store, pseudo_dirs = {}, [""]
    before = staticmethod(lambda what, path: None)

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("watched://", "memory://"))

    def put_file(self, lpath, rpath, **options):
        Watched.before("put", rpath)
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path, value, **options):
        Watched.before("write", path)
        super().pipe_file(path, value, **options)

    def rm_file(self, path):
        Watched.before("delete", path)
        super().rm_file(path)


fsspec.register_implementation("watched", Watched, clobber=True)


def copy(source, target):
    """Copies a run, as a machine that dies at this moment leaves it."""
    source, target = RemoteFolder(source), RemoteFolder(target)
    for name in source.sizes():
        target.write(name, source.read(name))
    return target


def put(path, url):
    folder = RemoteFolder(url)
    for file in path.rglob("*"):
        if file.is_file() and file.name != "lock":
            folder.write(file.relative_to(path).as_posix(), file.read_bytes())
    return folder


def age(folder, seconds=remote_lock.EXPIRES, name="lock"):
    """Makes the lock of a folder older."""
    lock = json.loads(folder.read(name))
    folder.write(name, json.dumps({**lock, "time": lock["time"] - seconds}).encode())


def rows_of(url):
    return [json.loads(line) for line in RemoteFolder(url).read("metrics.jsonl").splitlines()]


def saved(url, step):
    while step not in RunReader(url).checkpoints.steps():
        time.sleep(0.01)


def contents(url):
    folder = RemoteFolder(url)
    return {name: folder.read(name) for name in folder.sizes()}
