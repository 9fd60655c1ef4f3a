"""The codec of an experiment: its config, opened and told apart; and its frozen networks as a run keeps them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen import fields
from flowgen.codecs import (
    Autoencoder,
    AutoencoderCodec,
    AutoencoderConfig,
    Codec,
    LatentNormalisation,
    PixelCodec,
    VideoAutoencoder,
    VideoAutoencoderCodec,
    VideoAutoencoderConfig,
)
from flowgen.codecs import init as init_autoencoder
from flowgen.codecs.video_codec import ClipCodec, FrameCodec
from flowgen.convert import is_video_autoencoder, load_autoencoder, load_video_autoencoder
from flowgen.data.latents import read_index
from flowgen.flows import STARFlowVConfig
from flowgen.prompts import aspect_size
from flowgen.ranges import Within, check_ranges
from flowgen.runs import CHECKPOINTS, CheckpointReader, check_layout, is_run, layout, read_config
from flowgen.tasks.texts import TextConfig, encoder_of, remembered, text_fingerprint, version_of
from flowgen.typed import typed

# The collection of an autoencoder's state in which the mean and variance of its latents live.
STATISTICS = "latents"


@dataclass(frozen=True)
@typed
class PixelBlocks:
    """A codec without a network: factor x factor pixels of c channels are one latent of factor² c channels.

    factor: side of the squares of pixels; at least 1.
    """

    factor: Annotated[int, Within(1, 1 << 8)] = 2

    def __post_init__(self):
        check_ranges(self, "codec")


@dataclass(frozen=True)
@typed
class TrainedCodec:
    """A frozen autoencoder.

    path: run directory of one trained by flowgen, or folder of a published AutoencoderKL or, of clips,
    AutoencoderKLWan.
    digest: of all that its latents depend on, set when a flow is trained on them, so that no other is taken for it.
    temporal_scale: of clips' latents behind the first frame; published: 0.6, 1 for none.
    """

    path: str
    digest: str | None = None
    temporal_scale: float = 1.0

    def __post_init__(self):
        if not 0 < self.temporal_scale < float("inf"):
            raise ValueError(f"codec.temporal_scale is {self.temporal_scale}; it must be positive, 1 for none.")


CodecConfig = PixelBlocks | TrainedCodec


def codec_of(experiment: Any) -> Codec | ClipCodec:
    """Returns the codec of an experiment, opened once; without one the identity. Clips have a codec of clips.

    Raises FileNotFoundError or ValueError where it is missing, damaged, or has other latents than the model.

    Example:
        pictures = codec_of(experiment).decode(latents)
    """
    codec = _codec_of(experiment)
    if isinstance(experiment.model, STARFlowVConfig):
        return codec if isinstance(codec, ClipCodec) else FrameCodec(codec)
    return codec


def clip_codec_of(experiment: Any) -> ClipCodec:
    """Returns the codec of an experiment on clips. Raises as `codec_of`.

    Example:
        clips = clip_codec_of(experiment).decode(latents)
    """
    codec = codec_of(experiment)
    assert isinstance(codec, ClipCodec)  # that of a flow of clips
    return codec


def _codec_of(experiment: Any) -> Codec | ClipCodec:
    model = experiment.model
    if experiment.codec is None:
        return PixelCodec(pixel_channels=model.channels)
    if isinstance(experiment.codec, PixelBlocks):
        factor = experiment.codec.factor
        if model.channels % factor**2:
            raise ValueError(
                f"model.channels is {model.channels}; blocks of {factor} x {factor} pixels make {factor**2} channels "
                f"of grey pictures and {3 * factor**2} of colour ones: change it or codec.factor."
            )
        return PixelCodec(pixel_channels=model.channels // factor**2, factor=factor)
    codec = open_autoencoder(experiment.codec.path, experiment.codec.temporal_scale)
    if isinstance(codec, ClipCodec) and not isinstance(model, STARFlowVConfig):
        raise ValueError(
            f"codec.path '{experiment.codec.path}' is an autoencoder of clips, and the model is a "
            f"{fields.type_name(model)}; give one of pictures."
        )
    if experiment.codec.digest not in (None, fingerprint(codec)):
        raise ValueError(
            f"the autoencoder at codec.path '{experiment.codec.path}' is not the one that the flow was trained on; put "
            "that one back, or say where it is (--codec.path to train, else --autoencoder)."
        )
    if codec.channels != model.channels:
        raise ValueError(
            f"model.channels is {model.channels}, but the autoencoder at codec.path '{experiment.codec.path}' has "
            f"latents of {codec.channels} channels; set model.channels to {codec.channels}."
        )
    return codec


def sealed(experiment: Any) -> Any:
    """Returns the experiment with the digests of its autoencoder and text encoder, to be kept with what is trained on
    them. A text encoder of the name that encoded data give theirs is taken for it, and not opened. One
    whose place is not known gets no digest.

    Example:
        experiment = sealed(experiment)
    """
    codec, text = experiment.codec, experiment.text
    if isinstance(codec, TrainedCodec) and codec.digest is None and codec.path:
        codec = dataclasses.replace(codec, digest=fingerprint(codec_of(experiment)))
    if text is not None and text.digest is None and text.encoder:
        encoded = experiment.data.source == "encoded"
        made = read_index(experiment.data.path)["made_by"].get("text") if encoded else None
        if made is not None and Path(made["encoder"]).name == Path(text.encoder).name:
            text = dataclasses.replace(text, digest=made["digest"])
        elif made is not None or not encoded:
            text = dataclasses.replace(text, digest=text_fingerprint(encoder_of(experiment)))
    return dataclasses.replace(experiment, codec=codec, text=text)


def open_autoencoder(path: str, temporal_scale: float = 1.0) -> AutoencoderCodec | VideoAutoencoderCodec:
    """Returns the autoencoder of a run directory or of a published folder, with the normalisation of its latents.

    temporal_scale: of an autoencoder of clips, see `VideoAutoencoderCodec`.

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
    return _open_autoencoder(path, temporal_scale, *version_of(path))


@functools.lru_cache(maxsize=2)
def _open_autoencoder(
    path: str, temporal_scale: float, place: str, version: int
) -> AutoencoderCodec | VideoAutoencoderCodec:
    if not is_run(path):
        if is_video_autoencoder(path):
            return load_video_autoencoder(path, temporal_scale=temporal_scale)
        return load_autoencoder(path)
    saved = read_config(path)
    kinds: dict[Any, Any] = {
        "Autoencoder": (Autoencoder, AutoencoderConfig),
        "VideoAutoencoder": (VideoAutoencoder, VideoAutoencoderConfig),
    }
    kind = saved["model"].get(fields.TYPE)
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"codec.path '{path}' is the run of a {kind!s:.80}; give that of an Autoencoder.")
    module, config = kinds[kind]
    plain = {name: value for name, value in saved["model"].items() if name != fields.TYPE}
    autoencoder = module(fields.from_plain(config, plain, path="model"))
    reader = CheckpointReader(Path(path) / CHECKPOINTS)
    step = reader.latest_step()
    if step is None:
        reader.check_not_broken()
        raise FileNotFoundError(f"codec.path '{path}' has no checkpoint yet; train the autoencoder first.")
    group = "ema" if any(name.startswith("ema/") for name in reader.manifest(step)["arrays"]) else "params"
    arrays = reader.arrays(step, lambda name: name.startswith((f"{group}/", "collections/")))
    expected = jax.eval_shape(lambda: init_autoencoder(autoencoder, jax.random.key(0)))["params"]
    params = {name.removeprefix(f"{group}/"): x for name, x in arrays.items() if name.startswith(f"{group}/")}
    check_layout(step, layout(params), layout(expected))
    tree = jax.tree.unflatten(jax.tree.structure(expected), [jnp.asarray(params[name]) for name in layout(expected)])
    mean, variance = (arrays[f"collections/{STATISTICS}/{name}"] for name in ("mean", "variance"))
    normalisation = LatentNormalisation(shift=mean, scale=1 / np.sqrt(np.asarray(variance, np.float64)))
    if isinstance(autoencoder, VideoAutoencoder):
        return VideoAutoencoderCodec(autoencoder, {"params": tree}, normalisation, temporal_scale)
    return AutoencoderCodec(autoencoder, {"params": tree}, normalisation)


def fingerprint(codec: Codec | ClipCodec) -> str:
    """Returns a digest of all that the latents of a codec depend on, the decoder not among it.

    Example:
        same = fingerprint(codec) == index["made_by"]["fingerprint"]
    """
    # What is remembered is of the network, which lives longer than what applies it to frames.
    return _fingerprint(codec.codec if isinstance(codec, FrameCodec) else codec)


@remembered
def _fingerprint(codec: Codec | ClipCodec) -> str:
    digest = hashlib.sha256(repr((type(codec).__name__, codec.factor, codec.channels)).encode())
    if isinstance(codec, VideoAutoencoderCodec):
        digest.update(repr(codec.temporal_scale).encode())
    if isinstance(codec, AutoencoderCodec | VideoAutoencoderCodec):
        shape = dataclasses.replace(codec.autoencoder.config, dtype="float32", remat=False)
        digest.update(repr(shape).encode())
        params = codec.variables["params"]
        for leaf in jax.tree.leaves((params["encoder"], params["quant_conv"])):
            digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
        # As mean and variance in float32, which is how training keeps them.
        variance = 1 / np.square(np.asarray(codec.normalisation.scale, np.float64))
        for value in (codec.normalisation.shift, variance):
            digest.update(np.full(codec.channels, value, np.float32).tobytes())
    return digest.hexdigest()


def latent_grid(experiment: Any, aspect: str) -> tuple[int, int]:
    """Returns (height, width) of the latents of pictures in an aspect ratio, of about the model's area.

    Raises ValueError where the aspect is not one of the nine, or the model has one size.

    Example:
        flow = flow.with_image_size(*latent_grid(experiment, "16:9"))
    """
    model, factor = experiment.model, codec_of(experiment).factor
    side = round(math.sqrt(math.prod(model.image_hw)) * factor)
    height, width = aspect_size(aspect, side, factor * model.patch_size)
    return height // factor, width // factor


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
