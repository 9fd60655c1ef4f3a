"""Latents and text features of a dataset, computed once: in memory, or in files that training memory-maps.

<directory>/<split>-<index>/   mean.npy std.npy label.npy; text.npy mask.npy and null.npz where captions were encoded
<directory>/dataset.json       what the folders hold and what made them; written last, so that none is incomplete
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

from flowgen.data.buckets import BucketedDataset
from flowgen.data.classes import class_numbers, renumbered
from flowgen.data.dataset import NO_LABEL, Batch, Dataset, Split
from flowgen.data.media import from_uint8
from flowgen.documents import ARRAY_DAMAGE, check_regular, inside, read_json
from flowgen.printable import composed

INDEX_FILE = "dataset.json"
NULL_FILE = "null.npz"
FORMAT = "flowgen latents 2"
IMAGES_AT_ONCE = 512
MAX_AXES = 8
MAX_NULL_OVERHEAD = 1 << 16  # bytes
SHARD_BYTES = 256 << 20
# Each open array holds a file descriptor; a process usually gets a thousand.
OPEN_SHARDS = 64

Moments = Callable[[Float[np.ndarray, "b *event"]], tuple[Any, Any]]
Texts = Callable[[Sequence[str]], tuple[Any, Any]]


class Shard(NamedTuple):
    """Posterior moments of some images' latents, `height width c`, or clips', with a leading frame axis; their labels,
    and the features of their captions.

    Example:
        shard = Shard(mean, std, labels)
    """

    mean: Float[np.ndarray, "n *event"]
    std: Float[np.ndarray, "n *event"]
    label: Int32[np.ndarray, " n"]
    text: Float[np.ndarray, "n l e"] | None = None
    mask: Bool[np.ndarray, "n l"] | None = None

    @property
    def size(self) -> int:
        return len(self.label)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.mean.shape[1:]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self if array is not None)

    def opened(self) -> Shard:
        """Returns itself; a `ShardFile` is opened by it."""
        return self


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A shard on disk, mapped on demand; the last 64 stay mapped. written: modification time in ns, which detects a
    replaced file.

    Example:
        shard = ShardFile(Path("latents/train-00000"), 4096, (32, 32, 4), has_text=False).opened()
    """

    folder: Path
    size: int
    event_shape: tuple[int, ...]
    has_text: bool
    written: int = 0

    def opened(self) -> Shard:
        """Returns its arrays. Raises FileNotFoundError or ValueError if one is missing or damaged."""
        return _open_shard(self)


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """A dataset of image or clip latents; training samples from their posterior.

    null: features and mask of the empty text, if there are texts. numbers: for each label in the shards, its number in
    `class_names`; empty if they are the same.

    Indexing raises ValueError naming the shard if latents are not finite or their std is negative. Texts are not
    checked; a non-finite loss reveals them.

    Example:
        dataset = LatentDataset((shard,), class_names=("cat", "dog"))
        batch = dataset[np.arange(16)]  # mean, std, label, and text = (features, mask) where there are captions
    """

    shards: tuple[Shard | ShardFile, ...]
    class_names: tuple[str, ...] = ()

    captions: tuple[str, ...] = ()
    null: tuple[np.ndarray, np.ndarray] | None = None
    numbers: tuple[int, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shards[0].event_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        height, width, channels = self.event_shape[-3:]
        return height, width, channels

    def __len__(self) -> int:
        return sum(shard.size for shard in self.shards)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        ends = np.cumsum([shard.size for shard in self.shards])
        holders = np.searchsorted(ends, indices, side="right")
        parts: dict[str, np.ndarray] = {}
        for holder in np.unique(holders):
            chosen = holders == holder
            shard = self.shards[holder].opened()
            inside = indices[chosen] - (ends[holder] - shard.size)
            for name, array in shard._asdict().items():
                if array is not None:
                    out = parts.setdefault(name, np.empty((len(indices), *array.shape[1:]), array.dtype))
                    out[chosen] = array[inside]
            _check_moments(self.shards[holder], parts["mean"][chosen], parts["std"][chosen])
        if self.numbers:
            parts["label"] = renumbered(parts["label"], np.array(self.numbers))
        if "text" in parts:
            parts["text"] = (parts["text"], parts.pop("mask"))  # ty: ignore[invalid-assignment]
        return parts


def _check_moments(shard: Shard | ShardFile, mean: np.ndarray, std: np.ndarray) -> None:
    """Raises ValueError if latents are not finite or have a negative std."""
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        place = f" in '{shard.folder}'" if isinstance(shard, ShardFile) else ""
        raise ValueError(f"latents{place} have a mean or std that is not finite, or a negative std; encode again.")


def encode(
    dataset: Dataset, moments: Moments, texts: Texts | None = None, *, flip: bool = False, size: int = IMAGES_AT_ONCE
) -> Iterator[Shard]:
    """Yields the latents of a dataset, `size` images at a time.

    moments: images in [-1, 1] -> (mean, std) of their latents, such as `Codec.moments`. texts: captions -> (features,
    mask). flip: also encode every image's mirror image, since latents cannot be mirrored afterwards.

    Raises ValueError if there are texts to encode and the dataset has neither captions nor class names, and if latents
    or features are not finite.

    Example:
        shards = encode(dataset, codec.moments, flip=True)
    """
    for start in range(0, len(dataset), size):
        indices = np.arange(start, min(start + size, len(dataset)))
        batch = dataset[indices]
        features = ()
        if texts is not None:
            text, mask = texts(captions_of(dataset, indices, batch["label"]))
            features = (np.asarray(text, np.float16), np.asarray(mask))
        for mirrored in (False, True) if flip else (False,):
            images = batch["image"][..., ::-1, :] if mirrored else batch["image"]
            mean, std = moments(np.asarray(from_uint8(images)))
            shard = Shard(np.asarray(mean, np.float32), np.asarray(std, np.float32), batch["label"], *features)
            if not all(np.isfinite(array).all() for array in shard if array is not None):
                raise ValueError(
                    f"latents or features of images {start} to {indices[-1]} are not finite (features are kept in "
                    "float16); use another autoencoder or text encoder."
                )
            yield shard


def merged(blocks: Iterable[Shard], size: int = SHARD_BYTES) -> Iterator[Shard]:
    """Yields blocks joined to shards of at least `size` bytes, the last one aside.

    Example:
        for shard in merged(encode(dataset, codec.moments)): writer.add("train", shard)
    """
    waiting: list[Shard] = []
    for block in blocks:
        waiting.append(block)
        if sum(part.nbytes for part in waiting) >= size:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[Shard]) -> Shard:
    parts = {name: [getattr(block, name) for block in blocks] for name in Shard._fields}
    return Shard(**{name: np.concatenate(arrays) for name, arrays in parts.items() if arrays[0] is not None})


def captions_of(dataset: Dataset, indices: Int[np.ndarray, " b"], labels: Int[np.ndarray, " b"]) -> list[str]:
    """Returns the texts of images: their captions, or else their class names.

    Raises ValueError if the data have neither.

    Example:
        texts = captions_of(dataset, np.arange(4), dataset[np.arange(4)]["label"])
    """
    if dataset.captions:
        return [dataset.captions[index] for index in indices]
    if dataset.class_names:
        return [dataset.class_names[label] if label >= 0 else "" for label in labels]
    raise ValueError(
        "the data have neither captions nor classes to make texts of; put a .txt beside every image, or "
        "the images into one folder per class."
    )


class LatentWriter:
    """Writes the shards of a dataset into a new directory; `finish` completes it for `read_latents`.

    Example:
        writer = LatentWriter("data/latents")
        writer.add("train", shard)
        writer.finish(class_names=("cat", "dog"), made_by={})
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        self.entries: list[dict[str, Any]] = []
        if self.directory.is_dir() and any(self.directory.iterdir()):
            raise FileExistsError(f"'{directory}' holds files already; give a new directory.")

    def add(self, split: Split, shard: Shard, null: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Writes one shard, and the features and mask of the empty text, which it needs if it has texts."""
        if (shard.text is None) != (null is None):
            raise ValueError("a shard with texts needs the empty text, null, and one without has none; give both.")
        name = f"{split}-{len(self.entries):05d}"
        folder = self.directory / name
        folder.mkdir(parents=True)
        for part, array in shard._asdict().items():
            if array is not None:
                np.save(folder / f"{part}.npy", array, allow_pickle=False)
        if null is not None:
            np.savez(folder / NULL_FILE, text=null[0], mask=null[1])
        entry = {"folder": name, "split": split, "count": shard.size, "shape": shard.event_shape}
        self.entries.append({**entry, "has_text": shard.text is not None})

    def finish(self, *, class_names: Iterable[str], made_by: Mapping[str, Any]) -> None:
        """Writes the index. made_by: JSON of the codec and text encoder, from which training checks that the data fit
        its experiment; empty for latents of other origin, which only experiments without a codec take."""
        index = {"format": FORMAT, "class_names": list(class_names), "made_by": made_by, "shards": self.entries}
        temporary = self.directory / f"{INDEX_FILE}.tmp"
        temporary.write_text(json.dumps(index, indent=1) + "\n")
        os.replace(temporary, self.directory / INDEX_FILE)


def read_index(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the index of encoded data.

    Raises:
        FileNotFoundError: no such directory, or one without a finished dataset.
        ValueError: an index that cannot be read.

    Example:
        read_index("data/latents")["made_by"]
    """
    path = Path(directory) / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"data.path '{directory}' holds no encoded data ({INDEX_FILE} is missing, which is written last); "
            "make them with: python -m flowgen encode."
        )
    index = read_json(path, fix="encode the data again")
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError(f"'{path}' is not an index of '{FORMAT}'; encode the data again.")
    if not _is_whole(index):
        raise ValueError(f"'{path}' is damaged, or was written by hand; encode the data again.")
    return {**index, "class_names": [composed(name) for name in index["class_names"]]}


def _is_whole(index: dict[str, Any]) -> bool:
    """Whether an index has all required entries, of the right types."""
    try:
        made_by = index["made_by"]
        codec, text = made_by.get("codec"), made_by.get("text")
        whole = codec is None or (isinstance(codec, dict) and ("path" in codec or "factor" in codec))
        whole &= text is None or (isinstance(text["encoder"], str) and "digest" in text)
        whole &= isinstance(index["class_names"], list) and isinstance(index["shards"], list)
        whole &= all(isinstance(name, str) for name in index["class_names"])
        for entry in index["shards"]:
            whole &= isinstance(entry["folder"], str) and entry["split"] in ("train", "eval")
            whole &= isinstance(entry["has_text"], bool) and 3 <= len(entry["shape"]) <= MAX_AXES
            whole &= all(type(size) is int and 0 < size < 1 << 40 for size in (entry["count"], *entry["shape"]))
    except (KeyError, TypeError, AttributeError, ValueError):
        return False
    return whole


def read_latents(
    directory: str | os.PathLike[str], split: Split, classes: tuple[str, ...] = ()
) -> LatentDataset | BucketedDataset:
    """Returns a split of encoded data, memory-mapped; if it has several shapes, a bucket for each.

    classes: the classes that labels are mapped to by name; empty for those of the data.

    Raises FileNotFoundError or ValueError if files are missing, truncated or of another shape than the index says, if a
    label is not a valid class number, or a class is not among `classes`.

    Example:
        dataset = read_latents("data/latents", "train")
    """
    index = read_index(directory)
    entries = [entry for entry in index["shards"] if split in ("all", entry["split"])]
    if not entries:
        raise ValueError(
            f"data.path '{directory}' has nothing in the split '{split}'; encode again"
            + (" with data.eval_fraction above 0." if split == "eval" else ".")
        )
    if len({entry["has_text"] for entry in entries}) > 1:
        raise ValueError(f"data.path '{directory}' has texts in some of its parts alone; encode the data again.")
    found = tuple(index["class_names"])
    numbers = class_numbers(found, classes, f"data.path '{directory}'")
    groups: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry["shape"]), []).append(entry)
    for entry in entries:
        inside(directory, entry["folder"], what=f"a folder in '{Path(directory) / INDEX_FILE}'")
    datasets = tuple(
        LatentDataset(
            tuple(_checked(Path(directory), entry, found) for entry in group),
            found if numbers is None else classes,
            numbers=() if numbers is None else tuple(numbers.tolist()),
            null=_read_null(Path(directory) / group[0]["folder"]) if group[0]["has_text"] else None,
        )
        for _, group in sorted(groups.items())
    )
    return datasets[0] if len(datasets) == 1 else BucketedDataset(datasets)


def _read_null(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """The features and mask of the empty text beside a shard that has texts."""
    path = folder / NULL_FILE
    of_texts = [_open_array(folder / f"{part}.npy").shape[1:] for part in ("text", "mask")]
    try:
        check_regular(path)
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        # Headers, beside numbers of at most eight bytes.
        if size > 8 * sum(map(math.prod, of_texts)) + MAX_NULL_OVERHEAD:
            raise ValueError(f"it unpacks to {size:,} bytes")
        with np.load(path, allow_pickle=False) as arrays:
            null = arrays["text"], arrays["mask"]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"'{path}' is missing; encode the data again.") from error
    except (*ARRAY_DAMAGE, OSError) as error:
        raise ValueError(f"'{path}' is truncated or damaged ({str(error)[:200]}); encode the data again.") from error
    if [part.shape for part in null] != of_texts:
        raise ValueError(f"'{path}' is of another shape than the texts beside it; encode the data again.")
    return null


def _checked(directory: Path, entry: Mapping[str, Any], class_names: Sequence[str]) -> ShardFile:
    """The shard of an index entry, its files checked and closed again."""
    folder = directory / entry["folder"]
    shard = ShardFile(folder, entry["count"], tuple(entry["shape"]), entry["has_text"])
    label = _open_shard.__wrapped__(shard).label
    smallest, largest = (int(bound) for bound in (label.min(initial=NO_LABEL), label.max(initial=NO_LABEL)))
    if label.dtype.kind != "i" or smallest < NO_LABEL or (class_names and largest >= len(class_names)):
        raise ValueError(
            f"'{folder / 'label.npy'}' holds labels that are not numbers of the {len(class_names)} classes, or -1 for "
            f"none ({label.dtype} from {smallest} to {largest}); encode again."
        )
    return dataclasses.replace(shard, written=(folder / "mean.npy").stat().st_mtime_ns)


def _open_array(path: Path) -> np.ndarray:
    """A memory-mapped array of numbers."""
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
        raise ValueError(f"'{path}' holds no array of numbers; encode the data again.")
    return array


@functools.lru_cache(maxsize=OPEN_SHARDS)
def _open_shard(shard: ShardFile) -> Shard:
    arrays = {}
    for part in Shard._fields:
        if part in ("text", "mask") and not shard.has_text:
            continue
        path = shard.folder / f"{part}.npy"
        arrays[part] = _open_array(path)
        if arrays[part].shape[:1] != (shard.size,):
            raise ValueError(
                f"'{path}' has shape {arrays[part].shape} instead of {shard.size} entries; encode the data again."
            )
        if part in ("mean", "std") and arrays[part].shape[1:] != shard.event_shape:
            raise ValueError(f"'{path}' holds latents of another shape than {INDEX_FILE} says; encode the data again.")
    return Shard(**arrays)
