"""The dataset protocol, the config that selects a dataset, and the split into training and held-out data."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32, UInt8

from flowgen.batch import Batch
from flowgen.data.classes import checked_names
from flowgen.data.image_files import Crop
from flowgen.printable import composed
from flowgen.settings import config, import_object
from flowgen.settings.ranges import Bytes, CountOrZero, OneOf, ProperFraction

Split = Literal["train", "eval", "all"]
NO_LABEL = -1
OWN = "own"
# The names that stand for files at `path`.
OF_FILES = ("folder", "tar")
# The `ImageSet` of each name that needs no path. To add one, write a module and add a row here.
IMAGE_SETS = {
    "digits": "flowgen.data.named:DIGITS",
    "mnist": "flowgen.data.named:MNIST",
    "openmoji": "flowgen.data.openmoji:OPENMOJI",
}
_HOLD_OUT_SEED = 1797
_HOLD_OUT_NAME = b"flowgen hold-out"


@config
class DataConfig:
    """Selects the images to train on. Other fields of the experiment determine the image size and channels.

    name: `digits` or `mnist` for handwritten digits, `openmoji` for emoji; `folder`, `tar` or `npz` for your own images
    at `path`; `own` for a dataset that you pass to `flowgen.fit`.
    path: path or URL of the folder for `folder`, of the .tar file or folder of .tar files for `tar`, of the .npz file
    for `npz`; otherwise empty.
    flip: mirror each training image left to right with probability one half.
    aspects: resize each image of `folder` or `tar` to the nearest of the aspect ratios in `flowgen.text.ASPECTS`, with
    about as many pixels as the image size has; only for a STARFlow. Each batch contains images of one shape.
    crop: "center" scales each image until it covers the image size, and keeps only the centre; "none" stretches the
    image to that size. Ignored for `npz`.
    on_corrupt: "refuse" stops the run if a file is unreadable; "skip" leaves the file out with a warning, but cannot be
    used for images with captions.
    eval_fraction: fraction of the images that is held out for evaluation, the same images on every machine; 0 to hold
    out none.
    in_memory_bytes: if the resized images of `folder` or `tar` need at most this many bytes, they are kept in memory;
    otherwise, they are decoded batch by batch. If the model needs latents of the images, and all latents together need
    more bytes, the run ends with an error.
    workers: number of processes that decode the images of `folder` or `tar`; 0 to use threads instead. "auto" means one
    process per core, at most 32, but threads if the machine has at most eight cores, the data are in cloud storage, or
    the package loky is missing.
    classes: class names, in the order of the integer labels. If empty, a run whose model has classes begins by filling
    in the class names of its training data. If not empty, the classes of the data are matched to these names: a name
    without images causes a warning, and a class without a name an error. The labels of an .npz file without class names
    are positions in `classes`.

    Example:
        config = DataConfig(name="folder", path="photos", flip=True)
        dataset = load(config, image_size=(64, 64), channels=3, split="train")
    """

    name: Annotated[str, OneOf((*IMAGE_SETS, *OF_FILES, "npz", OWN))] = "digits"
    path: str = ""
    flip: bool = False
    aspects: bool = False
    crop: Crop = "center"
    on_corrupt: Literal["refuse", "skip"] = "refuse"
    eval_fraction: ProperFraction = 0.1
    in_memory_bytes: Bytes = 2 << 30
    workers: CountOrZero | Literal["auto"] = "auto"
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_names(self.classes))
        if self.aspects and self.name not in OF_FILES:
            raise ValueError(f"aspects requires name 'folder' or 'tar', not '{self.name}'; set aspects to false.")


@runtime_checkable
class Dataset(Protocol):
    """Samples of one shape: images, clips, the latents of either, or numbers. An array of positions selects a batch.

    Several threads may call `__getitem__` at the same time, so implementations must allow this.

    event_shape: shape of one sample, such as (height, width, channels) for images and (frames, height, width, channels)
    for clips.
    class_names: names of the classes, such that label i belongs to class_names[i]; empty if there are no classes.

    Two attributes are optional. `captions` is empty, or contains one line of text per sample. `file_names` is empty, or
    contains one file name per sample, relative to the path of the data.

    Example:
        dataset = load(DataConfig(), image_size=(8, 8), channels=1, split="train")
        batch = dataset[np.array([0, 5])]  # Batch: x uint8 `2 8 8 1`, context int32 `2`, -1 for none
    """

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch: ...


def captions_in(dataset: Dataset) -> tuple[str, ...]:
    """Returns a dataset's captions, or an empty tuple if it has none.

    Example:
        captions_in(load(DataConfig("openmoji"), image_size=(32, 32), channels=3, split="train"))[0]
    """
    return tuple(getattr(dataset, "captions", ()))


def file_names_in(dataset: Dataset) -> tuple[str, ...]:
    """Returns each image's file name relative to the data's path, or an empty tuple if the names are unknown.

    Example:
        file_names_in(load(DataConfig("folder", path="photos"), image_size=(32, 32), channels=3, split="eval"))[0]
    """
    return tuple(getattr(dataset, "file_names", ()))


@dataclasses.dataclass(frozen=True)
class ArrayDataset:
    """A `Dataset` of images or clips in memory.

    labels: class numbers; -1 for samples without a class. class_names, captions, file_names: as in `Dataset`.

    Example:
        dataset = ArrayDataset(images, labels, class_names=("cat", "dog"))
        batch = dataset[np.arange(16)]
    """

    x: UInt8[np.ndarray, "n *event"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    file_names: tuple[str, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        return Batch(self.x[indices], self.labels[indices])

    def select(self, indices: Int[np.ndarray, " m"]) -> ArrayDataset:
        """Returns a dataset of the samples at `indices`, in the order of `indices`."""
        captions, file_names = (
            tuple(each[i] for i in indices) if each else () for each in (self.captions, self.file_names)
        )
        x, labels = self.x[indices], self.labels[indices]
        return dataclasses.replace(self, x=x, labels=labels, captions=captions, file_names=file_names)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A set of images that `data.name` can select.

    read: a function that returns all images, called as read(config, (height, width)). class_names: names of the classes
    in the order of their labels.
    image_hw: (height, width) of the images before they are resized; None if they have no fixed size.

    Example:
        DIGITS = ImageSet(read_digits, class_names=("0", "1"), image_hw=(8, 8))
    """

    read: Callable[[DataConfig, tuple[int, int]], ArrayDataset]
    class_names: tuple[str, ...]
    image_hw: tuple[int, int] | None = None


def image_set(name: str) -> ImageSet | None:
    """Returns the built-in image set with this name, or None if there is none.

    Example:
        image_set("digits").class_names
    """
    return import_object(IMAGE_SETS[name]) if name in IMAGE_SETS else None


@dataclasses.dataclass(frozen=True)
class BucketedDataset:
    """A dataset that consists of buckets: datasets that share their classes but differ in the shape of their samples.

    A `Loader` takes all samples of a batch from one bucket.

    shares: for each bucket, the number of samples that a `Loader` takes from it per pass over the data; it may exceed
    the size of the bucket. None stands for the sizes of the buckets, so that all samples are used equally often.

    Example:
        dataset = BucketedDataset((square, wide))
        loader = Loader(dataset, batch_size=64, seed=0)
    """

    buckets: tuple[Dataset, ...]
    shares: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("buckets is empty; give at least one dataset.")
        if self.shares is not None and (len(self.shares) != len(self.buckets) or min(self.shares) < 1):
            raise ValueError(
                f"shares is {self.shares}; give a number of at least 1 for each of the {len(self.buckets)} buckets."
            )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.buckets[0].class_names

    def __len__(self) -> int:
        return sum(map(len, self.buckets))


def buckets_of(dataset: Dataset | BucketedDataset) -> tuple[Dataset, ...]:
    """Returns the buckets of a `BucketedDataset`; any other dataset is returned as the only bucket.

    Example:
        shapes = {bucket.event_shape for bucket in buckets_of(dataset)}
    """
    return dataset.buckets if isinstance(dataset, BucketedDataset) else (dataset,)


def of_one_shape(dataset: Dataset | BucketedDataset, user: str) -> Dataset:
    """Returns the dataset. Raises ValueError if its samples differ in shape.

    user: noun phrase for the component that requires a single shape, used in the error message.

    Example:
        dataset = of_one_shape(load(config, image_size=8, channels=1, split="train"), "an Autoencoder")
    """
    if isinstance(dataset, BucketedDataset):
        raise ValueError(f"data.aspects is set, but {user} needs images of one shape; set data.aspects to false.")
    return dataset


def check_opens(name: str) -> None:
    """Raises ValueError if the name is `own`, because only the caller of `fit` can provide such a dataset.

    Example:
        check_opens(config.name)
    """
    if name == OWN:
        raise ValueError(
            "data.name is 'own', which stands for a dataset passed to `fit` in Python; pass it again, or choose other "
            "data with --data.name and --data.path."
        )


def hold_out(size: int, fraction: float, split: Split) -> Int[np.ndarray, " m"]:
    """Returns the positions, from 0 to `size` - 1, of the samples that belong to `split`, in ascending order.

    If `fraction` is above 0, the first max(1, round(fraction · size)) entries of a fixed permutation of the positions
    are held out: they form the split "eval", and the others form "train". "all" contains every position. The
    permutation depends only on `size`, not on a seed or the NumPy version, so the split is the same in all runs and on
    all machines.

    Raises:
        ValueError: the split is "eval" and `fraction` is 0, or no samples are left to train on.

    Example:
        test = images[hold_out(len(images), 0.1, "eval")]
    """
    order = permutation(np.random.Philox(np.random.SeedSequence(_HOLD_OUT_SEED)), size)
    return _cut(order, fraction, split)


def hold_out_files(names: Sequence[str], fraction: float, split: Split) -> Int[np.ndarray, " m"]:
    """Returns the positions of the files in a split, in ascending order. Digests of the names determine the split.

    The number of held-out files is the same as in `hold_out`. If a file is added or removed, at most one other file
    moves between the splits.

    names: paths relative to the data folder, so that the split does not depend on where the data are stored.

    Example:
        test = hold_out_files(("cat/1.png", "dog/2.png"), 0.5, "eval")
    """
    if split == "all":
        return np.arange(len(names))
    digests = [
        hashlib.blake2b(
            composed(name).encode("utf-8", "surrogateescape"), digest_size=16, person=_HOLD_OUT_NAME
        ).digest()
        for name in names
    ]
    order = np.array(sorted(range(len(names)), key=digests.__getitem__), np.int64)
    return _cut(order, fraction, split)


def _cut(order: Int[np.ndarray, " size"], fraction: float, split: Split) -> Int[np.ndarray, " m"]:
    """Returns the positions of a split in ascending order. The first positions in `order` are held out."""
    size = len(order)
    if split == "all" or (fraction == 0 and split == "train"):
        return np.arange(size)
    if fraction == 0:
        raise ValueError("data.eval_fraction is 0, so nothing is held out for evaluation; set it to 0.1, for example.")
    held = max(1, round(fraction * size))
    if held >= size:
        raise ValueError(
            f"data.eval_fraction is {fraction}, which leaves none of the {size} images to train on; "
            f"add images, or set data.eval_fraction to 0."
        )
    return np.sort(order[:held] if split == "eval" else order[held:])


def permutation(bits: np.random.Philox, size: int) -> Int[np.ndarray, " size"]:
    """Returns a random permutation of range(size) that is the same in every NumPy version.

    NumPy keeps the streams of its bit generators stable across versions, but not the results of
    `Generator.permutation`. This function therefore sorts raw 64-bit draws.

    Example:
        order = permutation(np.random.Philox(np.random.SeedSequence(0)), len(dataset))
    """
    return np.argsort(bits.random_raw(size), kind="stable")


def check_choice(field: str, value: object, choices: tuple[str, ...]) -> None:
    """Raises ValueError if `value` is not one of the choices.

    Example:
        check_choice("data.crop", "center", ("center", "none"))
    """
    if value not in choices:
        raise ValueError(f"{field} is {value!r}; choose one of {', '.join(map(repr, choices))}.")
