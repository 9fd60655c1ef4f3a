"""Reads and writes files of cached latents, which are memory-mapped during training.

<directory>/<split>-<index>/   mean.npy std.npy label.npy; text.npy mask.npy and null.npz if captions were encoded
<directory>/dataset.json       what the folders contain and how they were made; written last, once the cache is complete
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from flowgen import settings
from flowgen.arrays import shown
from flowgen.batch import Moments
from flowgen.conditioning import TextCondition
from flowgen.data.classes import checked_names, class_numbers
from flowgen.data.dataset import NO_LABEL, BucketedDataset, Split
from flowgen.data.latents import Kind, LatentDataset, Shard
from flowgen.data.media import naming
from flowgen.documents import ARRAY_DAMAGE, check_regular, inside, read_json
from flowgen.places import check_local
from flowgen.settings import config
from flowgen.settings.ranges import NonNegative, ProperFraction, Within

INDEX_FILE = "dataset.json"
NULL_FILE = "null.npz"
FORMAT = "flowgen latents 3"
MAX_NULL_OVERHEAD = 1 << 16  # bytes
# Each open array uses a file descriptor; a process can usually open about a thousand.
OPEN_SHARDS = 64

Count = Annotated[int, Within(1, 1 << 40)]


@config
class LatentsConfig:
    """Selects latents of images or clips that `python -m flowgen encode` has computed and written to a directory.

    path: directory that contains the latents.
    fps: frames per second of the clips; 0 if the clips have the frame rates of the original videos. Sampled videos are
    written at this rate by default, or at `text.frames_per_second` if that field of the experiment is set.
    drop_first: among the training batches of clips, the fraction whose clips lack their first latent frame, as in
    `ClipsConfig`; if it is above 0, the directory must contain such clips.
    images_fraction: for a model of clips, fraction of the training batches that consist of images; 0 to use all clips
    and images equally often.
    classes: class names, in the order of the integer labels, as in `DataConfig`.

    Example:
        config = LatentsConfig(path="data/latents")
        dataset = read_latents(config.path, "train")
    """

    path: str = ""
    fps: NonNegative = 8.0
    drop_first: ProperFraction = 0.0
    images_fraction: ProperFraction = 0.0
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_names(self.classes))


@config
class TextProvenance:
    """Records how captions were encoded.

    encoder: name of the text encoder. digest: digest of the encoder's weights and tokenizer. length: number of tokens
    per text. dim: number of features per token. noise_level, frames_per_second, aspect: what is added to the captions,
    as in `TextConfig`.
    """

    encoder: str
    digest: str
    length: Count
    dim: Count
    noise_level: bool = False
    frames_per_second: float | int | None = None
    aspect: bool = False


@config
class Provenance:
    """Records how cached latents were made. If this is unknown, the record is empty.

    Only flows without a codec accept latents with an empty record.

    codec: description of the codec; empty for pixels. codec_digest: digest of everything that determines the latents.
    text: how the captions were encoded; None if there are no texts. noise_std: noise level of the flow, which the texts
    may include. data: config of the images or clips, as JSON.
    """

    codec: str = ""
    codec_digest: str = ""
    text: TextProvenance | None = None
    noise_std: float | None = None
    data: dict[str, Any] = dataclasses.field(default_factory=dict)


@config
class ShardEntry:
    """The contents of one folder of the cache: `count` latents of one kind, shape and split."""

    folder: str
    split: Literal["train", "eval"]
    kind: Kind
    count: Count
    shape: tuple[Count, ...]
    has_text: bool

    def __post_init__(self) -> None:
        axes = 3 if self.kind == "image" else 4
        if len(self.shape) != axes:
            raise ValueError(f"shape has {len(self.shape)} axes, but latents of kind '{self.kind}' have {axes}.")


@config
class LatentIndex:
    """The index of a cache of latents."""

    format: Literal["flowgen latents 3"]
    class_names: tuple[str, ...]
    provenance: Provenance
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", checked_names(self.class_names, "class_names"))
        if len({entry.folder for entry in self.shards}) < len(self.shards):
            raise ValueError("shards contains a folder twice; list each folder once.")


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A shard on disk, memory-mapped on demand; the 64 most recently used shards stay mapped.

    written: modification time in nanoseconds, which distinguishes a replaced shard from the old one.

    Example:
        shard = ShardFile(Path("latents/train-00000"), 4096, (32, 32, 4), has_text=False).opened()
    """

    folder: Path
    size: int
    event_shape: tuple[int, ...]
    has_text: bool
    written: int = 0

    def opened(self) -> Shard:
        """Opens the shard's arrays. Raises FileNotFoundError or ValueError if a file is missing or damaged."""
        return _open_shard(self)


class LatentWriter:
    """Writes the shards of a dataset to a new directory. After `finish`, `read_latents` can read the directory.

    Example:
        writer = LatentWriter("data/latents")
        writer.add("train", shard, kind="image")
        writer.finish(class_names=("cat", "dog"))
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.entries: list[ShardEntry] = []
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise FileExistsError(f"'{directory}' already contains files; give a new directory.")

    def add(
        self, split: Literal["train", "eval"], shard: Shard, *, kind: Kind, null: TextCondition | None = None
    ) -> None:
        """Writes one shard. null: the encoded empty text; required if the shard has texts."""
        if (shard.texts is None) != (null is None):
            raise ValueError("null, the encoded empty text, is required if the shard has texts; otherwise, omit it.")
        entry = ShardEntry(
            folder=f"{split}-{len(self.entries):05d}",
            split=split,
            kind=kind,
            count=shard.size,
            shape=shard.event_shape,
            has_text=shard.texts is not None,
        )
        folder = self.directory / entry.folder
        folder.mkdir(parents=True)
        for part, array in _arrays(shard).items():
            with naming(file := folder / f"{part}.npy"):
                np.save(file, array, allow_pickle=False)
        if null is not None:
            with naming(file := folder / NULL_FILE):
                np.savez(file, text=null.embeddings[0], mask=null.mask[0])
        self.entries.append(entry)

    def finish(self, *, class_names: Iterable[str], provenance: Provenance | None = None) -> None:
        """Writes the index.

        provenance: how the latents were made; training checks that the flow matches it.
        """
        index = LatentIndex(FORMAT, tuple(class_names), provenance or Provenance(), tuple(self.entries))
        temporary = self.directory / f"{INDEX_FILE}.tmp"
        temporary.write_text(json.dumps(settings.to_plain(index), indent=1) + "\n")
        os.replace(temporary, self.directory / INDEX_FILE)


def _arrays(shard: Shard) -> dict[str, np.ndarray]:
    """Returns the arrays of a shard, keyed by file name without suffix."""
    arrays = {"mean": shard.moments.mean, "std": shard.moments.std, "label": shard.labels}
    if shard.texts is not None:
        arrays |= {"text": shard.texts.embeddings, "mask": shard.texts.mask}
    return {name: np.asarray(array) for name, array in arrays.items()}


def read_index(directory: str | os.PathLike[str]) -> LatentIndex:
    """Returns the index of cached latents.

    Raises:
        FileNotFoundError: the directory does not exist, or does not contain a finished dataset.
        ValueError: the index cannot be read.

    Example:
        read_index("data/latents").provenance
    """
    check_local("data.path", directory)
    path = Path(directory) / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"data.path '{directory}' has no complete cache of latents: {INDEX_FILE}, which is written last, is "
            "missing. Run `python -m flowgen encode`."
        )
    status = path.stat()
    return _parsed_index(path.resolve(), status.st_ino, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=2)
def _parsed_index(path: Path, *version: int) -> LatentIndex:
    """Returns the index in a file. Parses the file again only if `version` has changed."""
    plain = read_json(path, fix="encode the data again")
    if not isinstance(plain, dict) or plain.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not an index in the format '{FORMAT}'; encode the data again.")
    try:
        return settings.from_plain(LatentIndex, plain)
    except ValueError as error:
        raise ValueError(f"'{path}' is damaged or was edited by hand ({error}); encode the data again.") from error


def read_latents(
    directory: str | os.PathLike[str], split: Split, classes: tuple[str, ...] = ()
) -> LatentDataset | BucketedDataset:
    """Returns the latents of one split from a directory that `python -m flowgen encode` has written, memory-mapped.

    If the latents differ in shape or in kind (latents of images, of whole clips, of clips without their first frame, or
    of images as clips of one frame), each combination of kind and shape becomes a bucket of a `BucketedDataset`.

    classes: class names in the order that the returned labels should have; if empty, labels are returned as stored.

    Raises FileNotFoundError or ValueError if a file is missing, is truncated or does not have the shape that the
    directory's index states, if a stored label is not a class number, if a class is not in `classes`, or if the split
    has no latents.

    Example:
        dataset = read_latents("data/latents", "train")
    """
    index = read_index(directory)
    entries = [entry for entry in index.shards if split in ("all", entry.split)]
    if not entries:
        raise ValueError(
            f"data.path '{directory}' has no latents in the split '{split}'; encode the data again"
            + (" with data.eval_fraction above 0." if split == "eval" else ".")
        )
    if len({entry.has_text for entry in entries}) > 1:
        raise ValueError(f"data.path '{directory}' has texts in only some folders; encode the data again.")
    numbers = class_numbers(index.class_names, classes, f"data.path '{directory}'")
    groups: dict[tuple[Kind, tuple[int, ...]], list[ShardEntry]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.shape), []).append(entry)
        inside(directory, entry.folder, what=f"a folder in '{Path(directory) / INDEX_FILE}'")
    datasets = tuple(
        LatentDataset(
            tuple(_checked(Path(directory), entry, index.class_names) for entry in group),
            index.class_names if numbers is None else classes,
            kind=kind,
            numbers=() if numbers is None else tuple(numbers.tolist()),
            null=_read_null(Path(directory) / group[0].folder) if group[0].has_text else None,
        )
        for (kind, _), group in sorted(groups.items())
    )
    return datasets[0] if len(datasets) == 1 else BucketedDataset(datasets)


def _read_null(folder: Path) -> TextCondition:
    """Returns the encoded empty text, read from the folder of a shard that has texts."""
    path = folder / NULL_FILE
    of_texts = [_open_array(folder / f"{part}.npy").shape[1:] for part in ("text", "mask")]
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        # Each number occupies at most eight bytes. The overhead leaves room for headers.
        if size > 8 * sum(map(math.prod, of_texts)) + MAX_NULL_OVERHEAD:
            raise ValueError(f"unpacking it would need {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            null = arrays["text"], arrays["mask"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing; encode the data again.") from error
    except (*ARRAY_DAMAGE, OSError) as error:
        raise ValueError(f"'{path}' is truncated or damaged ({str(error)[:200]}); encode the data again.") from error
    if [part.shape for part in null] != of_texts:
        raise ValueError(f"'{path}' has a different shape from the texts next to it; encode the data again.")
    return TextCondition(*(part[None] for part in null))


def _checked(directory: Path, entry: ShardEntry, class_names: Sequence[str]) -> ShardFile:
    """Checks the files of an index entry, and returns the shard without keeping them open."""
    folder = directory / entry.folder
    shard = ShardFile(folder, entry.count, entry.shape, entry.has_text)
    label = _open_shard.__wrapped__(shard).labels
    if label.dtype.kind != "i" or label.ndim != 1:
        raise ValueError(f"'{folder / 'label.npy'}' is {shown(label)} instead of one integer per sample; encode again.")
    smallest, largest = (int(bound) for bound in (label.min(initial=NO_LABEL), label.max(initial=NO_LABEL)))
    if smallest < NO_LABEL or (class_names and largest >= len(class_names)):
        raise ValueError(
            f"'{folder / 'label.npy'}' has labels out of range for {len(class_names)} classes ({label.dtype} from "
            f"{smallest} to {largest}; -1 means no label); encode the data again."
        )
    return dataclasses.replace(shard, written=(folder / "mean.npy").stat().st_mtime_ns)


def _open_array(path: Path) -> np.ndarray:
    """Returns the array of numbers in a file, memory-mapped."""
    try:
        check_regular(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing; encode the data again.") from error
    except OSError as error:
        raise OSError(f"'{path}' cannot be read ({error}).") from error
    except ARRAY_DAMAGE as error:
        raise ValueError(f"'{path}' is truncated or damaged ({str(error)[:200]}); encode the data again.") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"'{path}' is not an array of numbers; encode the data again.")
    return array


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(shard: ShardFile) -> Shard:
    arrays = {}
    for part in ("mean", "std", "label", *(("text", "mask") if shard.has_text else ())):
        path = shard.folder / f"{part}.npy"
        arrays[part] = _open_array(path)
        if arrays[part].shape[:1] != (shard.size,):
            raise ValueError(
                f"'{path}' has shape {arrays[part].shape}, but there are {shard.size} samples; encode the data again."
            )
        if part == "mask" and arrays[part].dtype != bool:
            raise ValueError(f"'{path}' has the dtype {arrays[part].dtype} instead of bool; encode the data again.")
        if part in ("mean", "std") and arrays[part].shape[1:] != shard.event_shape:
            raise ValueError(f"'{path}' does not have the shape that {INDEX_FILE} states; encode the data again.")
    texts = TextCondition(arrays["text"], arrays["mask"]) if shard.has_text else None
    return Shard(Moments(arrays["mean"], arrays["std"]), arrays["label"], texts)
