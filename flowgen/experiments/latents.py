"""The data that a flow is trained on: pixels, or the outputs of its codec and text encoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from flowgen import settings
from flowgen.conditioning import TextCondition
from flowgen.data import ClipsConfig, DataConfig, Dataset, check_classes, load, load_clips
from flowgen.data.clip_views import CONTINUED, ContinuedClips, StillClips
from flowgen.data.dataset import BucketedDataset, Split, buckets_of, of_one_shape
from flowgen.data.latent_files import LatentsConfig, Provenance, TextProvenance, read_index, read_latents
from flowgen.data.latents import EncodeMoments, LatentDataset, Shard, encode, kind_of
from flowgen.experiments.codecs import CodecConfig, PretrainedAutoencoder, codec_digest
from flowgen.experiments.encoding import Encoding
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig

FlowData = DataConfig | ClipsConfig | LatentsConfig
# Fields of `TextProvenance` that are not fields of the group `text`.
_TEXT_FIELDS = {"length": "model.text_length", "dim": "model.text_dim"}
_CLIPS = ("clip", "continued")


def is_latent(data: FlowData, encoding: Encoding) -> bool:
    """Returns whether an experiment's flow trains on encoded data: latents, or images with texts.

    Example:
        metric = "nats_per_dim" if is_latent(data, encoding) else "bits_per_dim"
    """
    return isinstance(data, LatentsConfig) or encoding.codec is not None or encoding.text is not None


def flow_dataset(
    data: FlowData, encoding: Encoding, split: Split, *, labelled: bool = True
) -> Dataset | BucketedDataset:
    """Returns the data that a flow is trained on: images or clips, or the outputs of its codec and text encoder.

    If the flow needs encoded data that are not cached, they are encoded in memory.

    labelled: whether the data must have labels if the model is class-conditional.

    Raises ValueError if cached latents were made by another codec or text encoder, or do not fit the model, or if data
    encoded in memory would need more than `data.in_memory_bytes`.

    Example:
        dataset = flow_dataset(data, encoding, "train")
    """
    num_classes = encoding.model.num_classes if labelled else 0
    if isinstance(data, LatentsConfig):
        dataset = _cached(data, encoding, split)
        check_classes(dataset, num_classes)
        return dataset
    pixels = pixel_dataset(data, encoding, split)
    check_classes(pixels, num_classes)
    return as_taken(pixels, data, encoding, flip=data.flip and split == "train")


def as_taken(
    dataset: Dataset | BucketedDataset, data: DataConfig | ClipsConfig, encoding: Encoding, *, flip: bool
) -> Dataset | BucketedDataset:
    """Returns images or clips in the form that a flow is trained on: unchanged, or encoded in memory.

    flip: whether to encode flipped copies too.

    Example:
        dataset = as_taken(images, data, encoding, flip=False)
    """
    if not is_latent(data, encoding):
        return dataset
    _check_memory(data, encoding, dataset, flip=flip)
    buckets = tuple(_encoded(encoding, bucket, flip=flip) for bucket in buckets_of(dataset))
    return BucketedDataset(buckets, dataset.shares) if isinstance(dataset, BucketedDataset) else buckets[0]


def pixel_dataset(data: FlowData, encoding: Encoding, split: Split) -> Dataset | BucketedDataset:
    """Returns the images or clips in a split, resized so that their latents have the size the model expects.

    Raises ValueError if the data are latents.

    Example:
        dataset = pixel_dataset(data, encoding, "eval")
    """
    model, codec = encoding.model, encoding.open_codec()
    if isinstance(data, LatentsConfig):
        raise ValueError(
            "data are cached latents, which do not include the images; give the data that they were encoded from."
        )
    height, width = (length * codec.factor for length in model.image_hw)
    shape: dict[str, Any] = {"image_size": (height, width), "channels": codec.pixel_channels, "split": split}
    if isinstance(data, DataConfig):
        return load(data, multiple=codec.factor * model.patch_size, **shape)
    assert isinstance(model, STARFlowVConfig)
    clips = load_clips(data, frames=1 + (model.frames - 1) * codec.stride, **shape)
    if split == "eval":
        return clips
    buckets = [clips]
    if data.drop_first:
        buckets.append(ContinuedClips(clips))
    if data.images is not None:
        buckets.append(_stills(clips, data.images, **shape))
    return _as_often(buckets, data)


def _stills(clips: Dataset, data: DataConfig, **shape: Any) -> StillClips:
    """Returns images as clips of one frame. Images and clips of the same class have the same class number."""
    images = load(dataclasses.replace(data, classes=data.classes or clips.class_names), **shape)
    return StillClips(of_one_shape(images, "a video flow"))


def _as_often(buckets: Sequence[Dataset], data: ClipsConfig | LatentsConfig) -> Dataset | BucketedDataset:
    """Mixes whole clips, clips without their first frame, and images in the proportions that the config sets."""
    if not data.drop_first:
        buckets = [bucket for bucket in buckets if kind_of(bucket) != "continued"]
    kinds = [kind_of(bucket) for bucket in buckets]
    shares = [len(bucket) for bucket in buckets]
    if "clip" not in kinds:
        raise ValueError(f"data.path '{data.path}' has no whole clips; encode some.")
    # drop_first is a fraction of all clips, and images_fraction a fraction of all data.
    for name, kind, others in (("drop_first", "continued", ("clip",)), ("images_fraction", "still", _CLIPS)):
        fraction = getattr(data, name)
        if fraction and kind not in kinds:
            missing = "clips without their first frame" if kind == "continued" else "images"
            raise ValueError(
                f"data.{name} is {fraction}, but data.path '{data.path}' contains no {missing}; encode the data "
                f"again with some, or set data.{name} to 0."
            )
        if fraction:
            beside = sum(share for share, of in zip(shares, kinds, strict=True) if of in others)
            part = max(1, round(beside * fraction / (1 - fraction)))
            shares = [part if of == kind else share for share, of in zip(shares, kinds, strict=True)]
    if len(buckets) == 1:
        return buckets[0]
    asked = data.drop_first or data.images_fraction
    return BucketedDataset(tuple(buckets), tuple(shares) if asked else None)


def encoded_shards(encoding: Encoding, dataset: Dataset, *, flip: bool) -> Iterator[Shard]:
    """Yields the latents of a dataset, with its encoded captions if the model accepts texts.

    Example:
        for shard in encoded_shards(encoding, dataset, flip=False): ...
    """
    texts, moments = None, encoding.open_codec().moments
    mark = ""
    if isinstance(dataset, ContinuedClips):
        dataset, moments, mark = dataset.dataset, _without_first(moments), CONTINUED
    if encoding.model.text_dim:
        assert encoding.text is not None
        truncate, image_hw = encoding.text.truncate, _image_hw(dataset)
        still = kind_of(dataset) == "still"

        def texts(captions):
            marked = [f"{mark}{caption}" for caption in captions]
            return encoding.condition(marked, image_hw, truncate=truncate, still=still)

    return encode(dataset, moments, texts, flip=flip)


def _image_hw(dataset: Dataset) -> tuple[int, int]:
    height, width, _ = dataset.event_shape[-3:]
    return height, width


def _without_first(moments: EncodeMoments) -> EncodeMoments:
    """Returns a function that computes the moments without the first latent frame."""

    def rest(clips):
        mean, std = moments(clips)
        return mean[:, 1:], std[:, 1:]

    return rest


def null_features(encoding: Encoding, dataset: Dataset) -> TextCondition | None:
    """Returns the encoded empty text to save with a dataset's latents; None if the model accepts no texts.

    Example:
        null = null_features(encoding, pixel_dataset(data, encoding, "train"))
    """
    if not encoding.model.text_dim:
        return None
    embeddings, mask = encoding.empty_text(_image_hw(dataset), still=kind_of(dataset) == "still")
    return TextCondition(np.asarray(embeddings, np.float16), np.asarray(mask))


def null_texts(dataset: Dataset | BucketedDataset) -> Callable[[tuple[int, ...]], TextCondition] | None:
    """Returns a function from a latent shape, ([frames,] height, width), to the encoded empty text for that shape.

    Returns None if the data have no texts.

    Example:
        objective = nll_objective(flow, null_text=null_texts(dataset))
    """
    buckets = [bucket for bucket in buckets_of(dataset) if isinstance(bucket, LatentDataset)]
    known = {bucket.event_shape[:-1]: bucket.null for bucket in buckets if bucket.null is not None}
    if not known:
        return None

    def null_text(shape):
        embeddings, mask = known[shape]
        return TextCondition(jnp.asarray(embeddings, jnp.float32), jnp.asarray(mask))

    return null_text


def _encoded(encoding: Encoding, dataset: Dataset, *, flip: bool) -> LatentDataset:
    shards = tuple(encoded_shards(encoding, dataset, flip=flip))
    null = null_features(encoding, dataset)
    return LatentDataset(shards, dataset.class_names, kind=kind_of(dataset), null=null)


def _check_memory(
    data: DataConfig | ClipsConfig, encoding: Encoding, dataset: Dataset | BucketedDataset, *, flip: bool
) -> None:
    """Raises ValueError if encoding a dataset into memory would exceed the config's limit."""
    model, codec, needed = encoding.model, encoding.open_codec(), 0
    texts = model.text_length * model.text_dim if isinstance(model, STARFlowConfig) else 0
    for bucket in buckets_of(dataset):
        *frames, height, width, _ = bucket.event_shape
        floats = 2 * height * width // codec.factor**2 * model.channels
        if frames:
            floats *= -(-frames[0] // codec.stride)
        needed += len(bucket) * (1 + flip) * (4 * floats + 2 * texts)
    if needed > data.in_memory_bytes:
        what = "images" if isinstance(data, DataConfig) else "clips"
        raise ValueError(
            f"the latents of {len(dataset)} {what} need {needed:,} bytes, more than data.in_memory_bytes; write them "
            "to files first with python -m flowgen encode, or raise the limit."
        )


def provenance(data: DataConfig | ClipsConfig, encoding: Encoding) -> Provenance:
    """Returns the provenance to save with an experiment's latents.

    Example:
        writer.finish(class_names=dataset.class_names, provenance=provenance(data, encoding))
    """
    return Provenance(
        codec=_words(encoding.codec),
        codec_digest=codec_digest(encoding.open_codec()),
        text=_text_provenance(encoding),
        noise_std=encoding.model.noise_std,
        data=settings.to_plain(data),
    )


def _words(codec: CodecConfig | None) -> str:
    """Returns a description of a codec, or "" for None."""
    if isinstance(codec, PretrainedAutoencoder):
        return f"the autoencoder at '{codec.path}'"
    return "" if codec is None else f"blocks of {codec.factor} x {codec.factor} pixels"


def _text_provenance(encoding: Encoding) -> TextProvenance | None:
    text, model = encoding.with_digests().text, encoding.model
    if text is None or not isinstance(model, STARFlowConfig):
        return None
    return TextProvenance(
        encoder=text.encoder,
        digest=text.digest or "",
        length=model.text_length,
        dim=model.text_dim,
        noise_level=text.noise_level,
        frames_per_second=text.frames_per_second,
        aspect=text.aspect,
    )


def _cached(data: LatentsConfig, encoding: Encoding, split: Split) -> Dataset | BucketedDataset:
    """Returns a split of cached latents. Raises ValueError if they do not fit the flow or its encoders."""
    model, path = encoding.model, data.path
    if not path:
        raise ValueError("data.path is empty; give a directory of cached latents, made with python -m flowgen encode.")
    made = read_index(path).provenance
    _check_codec(made, path, encoding)
    _check_texts(made, path, encoding)
    buckets = [
        dataclasses.replace(bucket, use_texts=model.text_dim > 0)
        for bucket in buckets_of(read_latents(path, split, data.classes))
        if isinstance(bucket, LatentDataset)
    ]
    for bucket in buckets:
        _check_shape(model, path, bucket)
    if isinstance(model, STARFlowVConfig) and split != "eval":
        return _as_often(buckets, data)
    return buckets[0] if len(buckets) == 1 else BucketedDataset(tuple(buckets))


def _check_codec(made: Provenance, path: str, encoding: Encoding) -> None:
    if encoding.codec is None and made.codec:
        raise ValueError(f"codec is missing, but data.path '{path}' was encoded by {made.codec}; give it with --codec.")
    if encoding.codec is not None and made.codec_digest != codec_digest(encoding.open_codec()):
        raise ValueError(
            f"data.path '{path}' was encoded by {made.codec or 'no codec'}, which differs from the current "
            f"codec, {_words(encoding.codec)}; give the original with --codec, or encode again."
        )


def _check_texts(made: Provenance, path: str, encoding: Encoding) -> None:
    model, by, text = encoding.model, made.text, _text_provenance(encoding)
    if model.text_dim and by is None:
        raise ValueError(
            f"data.path '{path}' has no texts, but model.text_dim is {model.text_dim}; encode again with texts."
        )
    if text is None or by is None:
        return
    if by.digest != text.digest:
        raise ValueError(
            f"data.path '{path}' has texts from the encoder '{by.encoder}', which differs from text.encoder "
            f"'{text.encoder}'; set text.encoder to the original, or encode again."
        )
    for field in dataclasses.fields(text):
        before, now = getattr(by, field.name), getattr(text, field.name)
        if field.name != "encoder" and before != now:
            raise ValueError(
                f"data.path '{path}' has texts encoded with {_TEXT_FIELDS.get(field.name, f'text.{field.name}')} "
                f"{before!r}, but this experiment uses {now!r}; set it to {before!r}, or encode again."
            )
    if text.noise_level and made.noise_std != model.noise_std:
        raise ValueError(
            f"model.noise_std is {model.noise_std}, but the texts at data.path '{path}' state the noise level "
            f"{made.noise_std}; encode again."
        )


def _check_shape(model: TARFlowConfig | STARFlowConfig, path: str, bucket: LatentDataset) -> None:
    """Raises ValueError if a model cannot process latents of this kind and shape, even with another image size."""
    *frames, height, width, channels = bucket.event_shape
    whole = list(model.event_shape[:-3])
    expected = {"image": [], "clip": whole, "continued": [count - 1 for count in whole], "still": [1]}[bucket.kind]
    of_kind = (bucket.kind == "image") == (not whole)
    sized = isinstance(model, STARFlowConfig) and not any(length % model.patch_size for length in (height, width))
    sized |= (height, width) == model.image_hw
    if not (of_kind and frames == expected and channels == model.channels and sized):
        raise ValueError(
            f"data.path '{path}' has latents of shape {bucket.event_shape} ({bucket.kind}), but the model expects "
            f"{model.event_shape}; "
            f"set model.image_size{', model.frames' * (len(frames) > 0)} and model.channels to match."
        )
