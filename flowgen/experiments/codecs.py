"""The codec of a latent flow: its config, its digest, and the functions that open it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from flowgen import settings
from flowgen.codecs import (
    AutoencoderCodec,
    AutoencoderConfig,
    Codec,
    LatentNormalisation,
    PixelCodec,
    VideoAutoencoder,
    VideoAutoencoderCodec,
    VideoAutoencoderConfig,
)
from flowgen.convert import is_video_autoencoder, load_autoencoder, load_video_autoencoder
from flowgen.experiments.texts import version_of, weakly_cached
from flowgen.nn import init as init_autoencoder
from flowgen.places import RemoteFolder, is_remote
from flowgen.runs import CHECKPOINTS, RunReader, is_exported, is_run
from flowgen.settings import config
from flowgen.settings.ranges import Positive, Within

# The collection of an autoencoder's variables that contains the mean and variance of its latents.
STATISTICS = "latents"


@config
class SpaceToDepth:
    """A codec that needs no network: it rearranges each square of factor x factor pixels with c channels into one
    latent with factor² · c channels. A flow with this codec models the latents.

    factor: side of the squares in pixels; at least 1.
    """

    factor: Annotated[int, Within(1, 1 << 8)] = 2


@config
class PretrainedAutoencoder:
    """A codec that is a frozen autoencoder. A flow with this codec models the latents of the autoencoder.

    path: directory or URL of the run of an autoencoder that flowgen has trained, its exported folder, or the folder of
    a published autoencoder in the format of the package diffusers: an AutoencoderKL (images) or an AutoencoderKLWan
    (video).
    digest: digest of everything in the autoencoder that affects the latents, as a string; None to accept any
    autoencoder. When a flow is trained, the digest is saved in the config of its run. If `path` later contains an
    autoencoder with another digest, opening it raises an error.
    temporal_scale: for video autoencoders, the factor by which all latent frames of a clip except the first are
    multiplied; 0.6 in the published STARFlow-V, 1 for no change.
    """

    path: str
    digest: str | None = None
    temporal_scale: Positive = 1.0


CodecConfig = SpaceToDepth | PretrainedAutoencoder


def open_codec(config: CodecConfig | None, channels: int) -> Codec:
    """Returns the codec of a config. If the config is None, the codec leaves pixels unchanged.

    The two autoencoders opened last stay in memory for later calls.

    channels: number of latent channels that the model expects.

    Raises FileNotFoundError or ValueError if the codec is missing or damaged, or does not match the digest or the
    channels.

    Example:
        images = open_codec(SpaceToDepth(2), channels=12).decode(latents)
    """
    if config is None:
        return PixelCodec(pixel_channels=channels)
    if isinstance(config, SpaceToDepth):
        factor = config.factor
        if channels % factor**2:
            raise ValueError(
                f"model.channels is {channels}, but blocks of {factor} x {factor} pixels make {factor**2} channels "
                f"from grey images and {3 * factor**2} from colour images; change model.channels or codec.factor."
            )
        return PixelCodec(pixel_channels=channels // factor**2, factor=factor)
    codec = open_autoencoder(config.path, config.temporal_scale)
    if config.digest not in (None, codec_digest(codec)):
        raise ValueError(
            f"the autoencoder at codec.path '{config.path}' is not the one that the flow was trained with; restore "
            "the original, or give its path with --codec.path."
        )
    if codec.channels != channels:
        raise ValueError(
            f"model.channels is {channels}, but the autoencoder at codec.path '{config.path}' makes latents "
            f"with {codec.channels} channels; set model.channels to {codec.channels}."
        )
    return codec


def open_autoencoder(path: str, temporal_scale: float = 1.0) -> AutoencoderCodec | VideoAutoencoderCodec:
    """Returns a trained or published autoencoder as a codec that normalises latents.

    temporal_scale: used only for video autoencoders; see `VideoAutoencoderCodec`.

    Raises FileNotFoundError or ValueError if the autoencoder is missing or damaged.

    Example:
        codec = open_autoencoder("runs/autoencoder")
    """
    if not path:
        raise ValueError(
            "codec.path is empty; give the run directory or published folder of an autoencoder with --codec.path."
        )
    if is_remote(path):
        # The files' names and sizes tell whether the run has changed. Those of checkpoints contain random words.
        return _open_run(path, temporal_scale, hash(tuple(RemoteFolder(path).sizes(CHECKPOINTS).items())))
    if not Path(path).is_dir():
        raise FileNotFoundError(
            f"There is no autoencoder at codec.path '{path}'; train one first, or give another path with --codec.path."
        )
    return _open_autoencoder(path, temporal_scale, *version_of(path))


@functools.lru_cache(maxsize=2)
def _open_autoencoder(
    path: str, temporal_scale: float, place: str, version: int
) -> AutoencoderCodec | VideoAutoencoderCodec:
    if not is_run(path) and not is_exported(path):
        if is_video_autoencoder(path):
            return load_video_autoencoder(path, temporal_scale=temporal_scale)
        return load_autoencoder(path)
    return _read_run(path, temporal_scale, RunReader(path))


@functools.lru_cache(maxsize=2)
def _open_run(url: str, temporal_scale: float, version: int) -> AutoencoderCodec | VideoAutoencoderCodec:
    run = RunReader(url)
    with run.named():
        if not is_run(run.directory) and not is_exported(run.directory):
            raise FileNotFoundError(
                f"There is no run of flowgen at codec.path '{url}'; give the URL of an autoencoder's run, or copy a "
                "published folder to this machine."
            )
        return _read_run(url, temporal_scale, run)


def _read_run(path: str, temporal_scale: float, run: RunReader) -> AutoencoderCodec | VideoAutoencoderCodec:
    plain = run.config()["model"]
    kind = plain.get(settings.TYPE)
    if kind not in ("Autoencoder", "VideoAutoencoder"):
        raise ValueError(f"codec.path '{path}' is the run of a {kind!s:.80}; give the run of an autoencoder.")
    autoencoder = settings.check(AutoencoderConfig | VideoAutoencoderConfig, plain, path="model").build()
    reader = run.checkpoints
    step = reader.latest_step()
    if step is None:
        reader.check_not_broken()
        raise FileNotFoundError(f"codec.path '{path}' has no checkpoint yet; train the autoencoder first.")
    expected = jax.eval_shape(lambda: init_autoencoder(autoencoder, jax.random.key(0)))
    saved = reader.variables(step, expected["params"])
    variables = {"params": jax.tree.map(jnp.asarray, saved["params"])}
    mean, variance = (saved[STATISTICS][name] for name in ("mean", "variance"))
    if not (np.isfinite(mean).all() and np.isfinite(variance).all() and (variance > 0).all()):
        raise ValueError(
            f"codec.path '{path}' has a mean of latents that is not finite, or a variance that is not positive and "
            "finite; give another autoencoder."
        )
    normalisation = LatentNormalisation(shift=mean, scale=1 / np.sqrt(np.asarray(variance, np.float64)))
    if isinstance(autoencoder, VideoAutoencoder):
        return VideoAutoencoderCodec(autoencoder, variables, normalisation, temporal_scale)
    return AutoencoderCodec(autoencoder, variables, normalisation)


@weakly_cached
def codec_digest(codec: Codec) -> str:
    """Returns a digest of everything that affects a codec's latents. The decoder is not included.

    Example:
        same = codec_digest(codec) == read_index("data/latents").provenance.codec_digest
    """
    digest = hashlib.sha256(repr((type(codec).__name__, codec.factor, codec.channels)).encode())
    if isinstance(codec, VideoAutoencoderCodec):
        digest.update(repr(codec.temporal_scale).encode())
    if isinstance(codec, AutoencoderCodec | VideoAutoencoderCodec):
        shape = dataclasses.replace(codec.autoencoder.config, dtype="float32", remat=False)
        digest.update(repr(shape).encode())
        params = codec.variables["params"]
        for leaf in jax.tree.leaves((params["encoder"], params["quant_conv"])):
            digest.update(np.ascontiguousarray(np.asarray(leaf)).tobytes())
        # The mean and variance are hashed in float32, the form in which training saves them.
        variance = 1 / np.square(np.asarray(codec.normalisation.scale, np.float64))
        for value in (codec.normalisation.shift, variance):
            digest.update(np.full(codec.channels, value, np.float32).tobytes())
    return digest.hexdigest()
