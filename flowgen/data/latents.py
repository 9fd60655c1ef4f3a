"""Datasets of latents. Images or clips and their contexts are encoded once, and then kept in memory or in files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int, Int32

from flowgen.batch import Batch, Moments
from flowgen.conditioning import TextCondition, is_context
from flowgen.data.classes import renumbered
from flowgen.data.dataset import Dataset, captions_in
from flowgen.data.media import from_uint8

READ_AT_ONCE = 512
SHARD_BYTES = 256 << 20

# What was encoded: images, whole clips, clips without their first frame, or images as clips of one frame.
Kind = Literal["image", "clip", "continued", "still"]
EncodeMoments = Callable[[Float[np.ndarray, "b *event"]], tuple[Any, Any]]
EncodeTexts = Callable[[Sequence[str]], tuple[Any, Any]]


class Shard(NamedTuple):
    """The latents and labels of some images or clips, with their encoded captions and other contexts, if any.

    Example:
        shard = Shard(Moments(mean, std), labels)
    """

    moments: Moments
    labels: Int32[np.ndarray, " n"]
    texts: TextCondition | None = None
    context: Any = None

    @property
    def size(self) -> int:
        return len(self.labels)

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.moments.mean.shape[1:]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def opened(self) -> Shard:
        """Returns this shard, whose arrays are already in memory."""
        return self


@runtime_checkable
class ClosedShard(Protocol):
    """A shard that must be opened before it can be read, such as a shard on disk."""

    @property
    def size(self) -> int: ...

    @property
    def event_shape(self) -> tuple[int, ...]: ...

    def opened(self) -> Shard:
        """Opens the shard's arrays."""
        ...


@dataclasses.dataclass(frozen=True)
class LatentDataset:
    """A dataset of latents, each stored as the mean and std of a posterior from which training draws a sample.

    kind: what was encoded. null: the encoded empty text; None if there are no texts. numbers: maps the labels in the
    shards to indices into `class_names`; empty if labels need no mapping. use_texts: whether to prefer texts to labels
    as contexts.

    Indexing raises ValueError if latents or texts are not finite, or if a std is negative.

    Example:
        dataset = LatentDataset((shard,), class_names=("cat", "dog"))
        batch = dataset[np.arange(16)]  # x: Moments; context: labels `16`, or a TextCondition
    """

    shards: tuple[Shard | ClosedShard, ...]
    class_names: tuple[str, ...] = ()

    captions: tuple[str, ...] = ()
    kind: Kind = "image"
    null: TextCondition | None = None
    numbers: tuple[int, ...] = ()
    use_texts: bool = True

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.shards[0].event_shape

    def __len__(self) -> int:
        return sum(shard.size for shard in self.shards)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        ends = np.cumsum([shard.size for shard in self.shards])
        holders = np.searchsorted(ends, indices, side="right")
        whole: Shard | None = None
        for holder in np.unique(holders):
            chosen = holders == holder
            shard = self.shards[holder].opened()
            inside = indices[chosen] - (ends[holder] - shard.size)
            part = jax.tree.map(lambda array, inside=inside: array[inside], shard)
            _check_finite(self.shards[holder], part)
            if whole is None:
                whole = jax.tree.map(lambda x: np.empty((len(indices), *x.shape[1:]), x.dtype), part)
            for array, values in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
                array[chosen] = values
        assert whole is not None  # `indices` is not empty
        if whole.texts is not None and self.use_texts:
            return Batch(whole.moments, whole.texts)
        if whole.context is not None:
            return Batch(whole.moments, whole.context)
        labels = renumbered(whole.labels, np.array(self.numbers)) if self.numbers else whole.labels
        return Batch(whole.moments, labels)


def kind_of(dataset: Dataset) -> Kind:
    """Returns the kind of a dataset's samples or, for latents, of the samples that were encoded.

    Example:
        kind_of(StillClips(images))  # "still"
    """
    return getattr(dataset, "kind", None) or ("clip" if len(dataset.event_shape) > 3 else "image")


def _check_finite(holder: Shard | ClosedShard, part: Shard) -> None:
    """Raises ValueError if latents or texts are not finite, or latents have a negative std."""
    folder = getattr(holder, "folder", None)
    place = "" if folder is None else f" in '{folder}'"
    mean, std = part.moments
    if not (np.isfinite(mean).all() and np.isfinite(std).all() and (std >= 0).all()):
        raise ValueError(
            f"latents{place} have a mean or std that is not finite, or a negative std; encode the data again."
        )
    if part.texts is not None and not np.isfinite(part.texts.embeddings).all():
        raise ValueError(f"texts{place} have features that are not finite; encode the data again.")


def encode(
    dataset: Dataset,
    moments: EncodeMoments,
    texts: EncodeTexts | None = None,
    *,
    flip: bool = False,
    size: int = READ_AT_ONCE,
) -> Iterator[Shard]:
    """Encodes a dataset. Yields the latents of up to `size` images or clips at a time.

    moments: a function that maps images in [-1, 1] to the (mean, std) of their latents, such as `Codec.moments`. texts:
    a function that maps captions to (features, mask). flip: whether to encode mirror images too, because latents cannot
    be mirrored.

    Raises ValueError if `texts` is given but the dataset has neither captions nor class names, or if latents or
    features are not finite.

    Example:
        shards = encode(dataset, codec.moments, flip=True)
    """
    for start in range(0, len(dataset), size):
        indices = np.arange(start, min(start + size, len(dataset)))
        batch = dataset[indices]
        pixels, labels, features = batch.pixels, np.asarray(batch.labels, np.int32), None
        context = batch.context if is_context(batch.context) or isinstance(batch.context, TextCondition) else None
        if texts is not None:
            embeddings, mask = texts(captions_of(dataset, indices, labels))
            features = TextCondition(np.asarray(embeddings, np.float16), np.asarray(mask))
        for x in (pixels, pixels[..., ::-1, :]) if flip else (pixels,):
            mean, std = moments(np.asarray(from_uint8(x)))
            latents = Moments(np.asarray(mean, np.float32), np.asarray(std, np.float32))
            if not all(np.isfinite(array).all() for array in jax.tree.leaves((latents, features))):
                raise ValueError(
                    f"samples {start} to {indices[-1]} have latents or text features that are not finite (features are "
                    "stored as float16); use another autoencoder or text encoder."
                )
            yield Shard(latents, labels, features, context)


def merged(blocks: Iterable[Shard], size: int = SHARD_BYTES) -> Iterator[Shard]:
    """Joins shards into shards of at least `size` bytes. The last shard may be smaller.

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
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *blocks)


def captions_of(dataset: Dataset, indices: Int[np.ndarray, " b"], labels: Int[np.ndarray, " b"]) -> list[str]:
    """Returns the texts of images or clips: their captions or, if there are none, their class names.

    Raises ValueError if the data have neither.

    Example:
        texts = captions_of(dataset, np.arange(4), dataset[np.arange(4)].labels)
    """
    if captions := captions_in(dataset):
        return [captions[index] for index in indices]
    if dataset.class_names:
        return [dataset.class_names[label] if label >= 0 else "" for label in labels]
    raise ValueError(
        "the data have neither captions nor class names to use as texts; add a .txt file next to each image, or "
        "sort the images into one folder per class."
    )
