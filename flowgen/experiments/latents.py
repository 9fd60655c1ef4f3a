"""The data of a flow: pixels, or the outputs of its codec and its text encoder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowgen import settings
from flowgen.codecs.video_codec import ClipCodec
from flowgen.conditioning import TextCondition
from flowgen.data import DataConfig, Dataset, check_classes, load
from flowgen.data.buckets import BucketedDataset
from flowgen.data.clip_views import CONTINUED, ContinuedClips, StillClips
from flowgen.data.clips import ClipDataset, ClipsConfig, load_clips
from flowgen.data.dataset import Split
from flowgen.data.latents import LatentDataset, Moments, Shard, encode, read_index, read_latents
from flowgen.experiments.codecs import codec_digest
from flowgen.experiments.encoding import Encoding
from flowgen.flows import STARFlowConfig, STARFlowVConfig

# Settings of encoded texts that are not fields of `text`.
_TEXT_FIELDS = {"length": "model.text_length", "dim": "model.text_dim"}


def is_latent(data: DataConfig | ClipsConfig, encoding: Encoding) -> bool:
    """Returns whether an experiment's flow is trained on encoded data: latents, or images with texts.

    Example:
        metric = "nats_per_dim" if is_latent(data, encoding) else "bits_per_dim"
    """
    return data.name == "encoded" or encoding.codec is not None or encoding.text is not None


def flow_dataset(
    data: DataConfig | ClipsConfig, encoding: Encoding, split: Split, *, labelled: bool = True
) -> Dataset | BucketedDataset:
    """Returns the data a flow is trained on: images, or the outputs of its codec and text encoder.

    Data that are not yet encoded are encoded here, once, into memory. labelled: whether a class model needs the labels.

    Raises ValueError if encoded data were made by another codec or text encoder, or do not fit the model.

    Example:
        dataset = flow_dataset(data, encoding, "train")
    """
    model = encoding.model
    num_classes = model.num_classes if labelled else 0
    if data.name == "encoded":
        dataset = read_latents(data.path, split, data.classes)
        if isinstance(data, ClipsConfig) and isinstance(model, STARFlowVConfig) and split != "eval":
            buckets = dataset.buckets if isinstance(dataset, BucketedDataset) else (dataset,)
            dataset = _as_often(buckets, data, model.frames)
        _check_encoded(data, encoding, dataset)
        check_classes(dataset, num_classes)
        return dataset
    dataset = pixel_dataset(data, encoding, split)
    check_classes(dataset, num_classes)
    return as_taken(dataset, data, encoding, flip=data.flip and split == "train")


def as_taken(
    dataset: Dataset | BucketedDataset, data: DataConfig | ClipsConfig, encoding: Encoding, *, flip: bool
) -> Dataset | BucketedDataset:
    """Returns images as a flow takes them: themselves, or encoded into memory.

    flip: encode them mirrored, too.

    Example:
        dataset = as_taken(images, data, encoding, flip=False)
    """
    if not is_latent(data, encoding):
        return dataset
    _check_memory(data, encoding, dataset, flip=flip)
    if isinstance(dataset, BucketedDataset):
        buckets = tuple(_encoded(encoding, bucket, flip=flip) for bucket in dataset.buckets)
        return BucketedDataset(buckets, dataset.shares)
    return _encoded(encoding, dataset, flip=flip)


def pixel_dataset(data: DataConfig | ClipsConfig, encoding: Encoding, split: Split) -> Dataset | BucketedDataset:
    """Returns the images of a split at the size that the codec encodes to the model's.

    Example:
        dataset = pixel_dataset(data, encoding, "eval")
    """
    model, codec = encoding.model, encoding.open_codec()
    if data.name == "encoded":
        raise ValueError("data.name is 'encoded', which holds no images; give the data it was made of.")
    height, width = (length * codec.factor for length in model.image_hw)
    if isinstance(data, ClipsConfig):
        assert isinstance(codec, ClipCodec)
        assert isinstance(model, STARFlowVConfig)
        frames = 1 + (model.frames - 1) * codec.stride
        shape: dict[str, Any] = {"image_size": (height, width), "channels": codec.pixel_channels, "split": split}
        clips = load_clips(data, frames=frames, **shape)
        if split == "eval":
            return clips
        buckets: list[Dataset] = [clips]
        if data.drop_first:
            buckets.append(ContinuedClips(clips))
        if data.images is not None:
            buckets.append(_stills(clips, data.images, **shape))
        return _as_often(buckets, data, model.frames)
    return load(
        data,
        image_size=(height, width),
        channels=codec.pixel_channels,
        split=split,
        multiple=codec.factor * model.patch_size,
    )


def _stills(clips: Dataset, data: DataConfig, **shape: Any) -> StillClips:
    """Images as clips of one frame, with the clips' class numbers."""
    dataset = load(dataclasses.replace(data, classes=data.classes or clips.class_names), **shape)
    assert isinstance(dataset, Dataset)  # the config refuses several shapes
    return StillClips(dataset)


def _as_often(buckets: Sequence[Dataset], data: ClipsConfig, frames: int) -> Dataset | BucketedDataset:
    """Clips, clips without their first frame, and images, each as often as the config says."""
    of_latents = [bucket.event_shape[0] for bucket in buckets if isinstance(bucket, LatentDataset)]

    def is_continued(bucket: Dataset) -> bool:
        if isinstance(bucket, LatentDataset):  # of encoded data by their shape
            return bucket.event_shape[0] == frames - 1 > 1 and frames in of_latents
        return isinstance(bucket, ContinuedClips)

    def is_still(bucket: Dataset) -> bool:
        return (
            bucket.event_shape[0] == 1 < frames if isinstance(bucket, LatentDataset) else isinstance(bucket, StillClips)
        )

    if not data.drop_first:
        buckets = [bucket for bucket in buckets if not is_continued(bucket)]
    kinds = [is_continued(bucket) for bucket in buckets], [is_still(bucket) for bucket in buckets]
    what = ("drop_first", "clips without their first frame"), ("images_fraction", "images")
    shares = [len(bucket) for bucket in buckets]
    for (name, missing), chosen in zip(what, kinds, strict=True):
        fraction = getattr(data, name)
        if fraction and not any(chosen):
            raise ValueError(
                f"data.{name} is {fraction}, and data.path '{data.path}' has no {missing}; encode again with them, or "
                "set it to 0."
            )
        if fraction:
            # Of clips, or of all.
            others = sum(share for share, here, still in zip(shares, chosen, kinds[1], strict=True) if not here | still)
            part = max(1, round(others * fraction / (1 - fraction)))
            shares = [part if here else share for share, here in zip(shares, chosen, strict=True)]
    if len(buckets) == 1:
        return buckets[0]
    asked = data.drop_first or data.images_fraction
    return BucketedDataset(tuple(buckets), tuple(shares) if asked else None)


def encoded_shards(encoding: Encoding, dataset: Dataset, *, flip: bool) -> Iterator[Shard]:
    """Yields the latents of a dataset, and the features of its captions if the model takes texts.

    Example:
        for shard in encoded_shards(encoding, dataset, flip=False): ...
    """
    texts, moments = None, encoding.open_codec().moments
    mark = ""
    if isinstance(dataset, ContinuedClips):
        dataset, moments, mark = dataset.dataset, _without_first(moments), CONTINUED
    if encoding.model.text_dim:
        assert encoding.text is not None
        truncate, grid = encoding.text.truncate, dataset.image_shape[:2]
        still = isinstance(dataset, StillClips)

        def texts(captions):
            marked = [f"{mark}{caption}" for caption in captions]
            return encoding.condition(marked, grid, truncate=truncate, still=still)

    return encode(dataset, moments, texts, flip=flip)


def _without_first(moments: Moments) -> Moments:
    """Moments of clips without their first latent frame."""

    def rest(clips):
        mean, std = moments(clips)
        return mean[:, 1:], std[:, 1:]

    return rest


def null_features(encoding: Encoding, dataset: Dataset) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the features `l e` and mask `l` of the empty text for a dataset's images; None without texts.

    Example:
        null = null_features(encoding, pixel_dataset(data, encoding, "train"))
    """
    if not encoding.model.text_dim:
        return None
    features, mask = encoding.empty_text(dataset.image_shape[:2], still=isinstance(dataset, StillClips))
    return np.asarray(features[0], np.float16), np.asarray(mask[0])


def null_texts(dataset: Dataset | BucketedDataset) -> Callable[[tuple[int, ...]], TextCondition] | None:
    """Returns the empty text for latents of ([frames,] height, width) from encoded data; None if they have no texts.

    Example:
        objective = nll_objective(flow, null_text=null_texts(dataset))
    """
    buckets = dataset.buckets if isinstance(dataset, BucketedDataset) else (dataset,)
    known = {b.event_shape[:-1]: b.null for b in buckets if isinstance(b, LatentDataset) and b.null is not None}
    if not known:
        return None

    def null_text(shape):
        features, mask = known[shape]
        return TextCondition(jnp.asarray(features[None], jnp.float32), jnp.asarray(mask[None]))

    return null_text


def _encoded(encoding: Encoding, dataset: Dataset, *, flip: bool) -> LatentDataset:
    shards = tuple(encoded_shards(encoding, dataset, flip=flip))
    return LatentDataset(shards, dataset.class_names, null=null_features(encoding, dataset))


def _check_memory(
    data: DataConfig | ClipsConfig, encoding: Encoding, dataset: Dataset | BucketedDataset, *, flip: bool
) -> None:
    """Raises ValueError if encoding a dataset into memory would exceed the config's limit."""
    model, codec, needed = encoding.model, encoding.open_codec(), 0
    texts = model.text_length * model.text_dim if isinstance(model, STARFlowConfig) else 0
    for bucket in dataset.buckets if isinstance(dataset, BucketedDataset) else (dataset,):
        floats = 2 * math.prod(bucket.image_shape[:2]) // codec.factor**2 * model.channels
        if isinstance(codec, ClipCodec) and isinstance(bucket, ClipDataset):
            floats *= -(-bucket.frames // codec.stride)
        needed += len(bucket) * (1 + flip) * (4 * floats + 2 * texts)
    if needed > data.in_memory_bytes:
        raise ValueError(
            f"the latents of {len(dataset)} images would take {needed:,} bytes, more than data.in_memory_bytes; "
            "write them to files first, with python -m flowgen encode, or raise it."
        )


def made_by(data: DataConfig | ClipsConfig, encoding: Encoding) -> dict[str, Any]:
    """Returns the codec, text encoder and data of an experiment as JSON, to keep with the encoded data.

    Example:
        writer.finish(class_names=dataset.class_names, made_by=made_by(data, encoding))
    """
    return {
        "codec": None if encoding.codec is None else settings.to_plain(encoding.codec),
        "fingerprint": codec_digest(encoding.open_codec()),
        "text": _text_plain(encoding),
        "noise_std": encoding.model.noise_std,
        "data": settings.to_plain(data),
    }


def _text_plain(encoding: Encoding) -> dict[str, Any] | None:
    """The settings that caption features depend on, and the encoder's name, for messages."""
    text, model = encoding.with_digests(None).text, encoding.model
    if text is None or not isinstance(model, STARFlowConfig):
        return None
    return {
        "encoder": text.encoder,
        "digest": text.digest,
        "length": model.text_length,
        "dim": model.text_dim,
        "noise_level": text.noise_level,
        "frames_per_second": text.frames_per_second,
        "aspect": text.aspect,
    }


def _check_encoded(data: DataConfig | ClipsConfig, encoding: Encoding, dataset: Dataset | BucketedDataset) -> None:
    model, path = encoding.model, data.path
    made = read_index(path)["made_by"]
    if encoding.codec is None and made.get("codec") is not None:
        raise ValueError(
            f"codec is missing, and data.path '{path}' was encoded by {_codec_words(made['codec'])}; give it (--codec)."
        )
    if encoding.codec is not None and made.get("fingerprint") != codec_digest(encoding.open_codec()):
        raise ValueError(
            f"data.path '{path}' was encoded by {_codec_words(made.get('codec'))}, and codec is another one, "
            f"{_codec_words(settings.to_plain(encoding.codec))}; give that one (--codec), or encode again."
        )
    by = made.get("text")
    if model.text_dim and by is None:
        raise ValueError(f"data.path '{path}' has no texts, and model.text_dim is {model.text_dim}; encode again.")
    text = _text_plain(encoding) or {}
    for name in text.keys() - {"encoder"}:
        if by.get(name) != text[name]:
            if name == "digest":
                raise ValueError(
                    f"data.path '{path}' has texts of another encoder, '{by.get('encoder')}', than text.encoder "
                    f"'{text['encoder']}' is now; give that one, or encode again."
                )
            raise ValueError(
                f"data.path '{path}' has texts encoded with {_TEXT_FIELDS.get(name, f'text.{name}')} {by.get(name)!r}, "
                f"and this experiment has another, {text[name]!r}; set it, or encode again."
            )
    if encoding.text is not None and encoding.text.noise_level and made.get("noise_std") != model.noise_std:
        raise ValueError(
            f"model.noise_std is {model.noise_std}, but the texts at data.path '{path}' say {made.get('noise_std')}; "
            "encode again."
        )
    buckets = dataset.buckets if isinstance(dataset, BucketedDataset) else (dataset,)
    shapes = [bucket.event_shape for bucket in buckets if isinstance(bucket, LatentDataset)]
    continued = getattr(data, "drop_first", 0) > 0 and len(shapes) > 1
    taken = [
        shape == model.event_shape
        or (hasattr(model, "with_image_size") and _is_size_of(model, shape, continued=continued))
        for shape in shapes
    ]
    if not all(taken):
        wrong = shapes[taken.index(False)]
        raise ValueError(
            f"data.path '{path}' holds latents of shape {wrong}, but the model takes {model.event_shape}; "
            f"set model.image_size{', model.frames' * (len(wrong) > 3)} and model.channels."
        )


def _codec_words(plain: dict[str, Any] | None) -> str:
    """A codec in the words of its config."""
    if plain is None:
        return "none"
    if "path" in plain:
        return f"the autoencoder at '{plain['path']}'"
    return f"blocks of {plain['factor']} x {plain['factor']} pixels"


def _is_size_of(model: Any, shape: tuple[int, ...], *, continued: bool) -> bool:
    """Whether a model of any size takes latents of this size. continued: also clips without their first frame."""
    *frames, height, width, channels = shape
    whole = list(model.event_shape[:-3])
    taken = [whole, [1] * len(whole), *([[count - 1 for count in whole]] if continued else [])]
    same = channels == model.channels and frames in taken
    return same and not any(length % model.patch_size for length in (height, width))
