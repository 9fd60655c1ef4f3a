"""Checks the lengths of a video flow's clips, reads the frames that clips begin with, and computes metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from flowgen import backend
from flowgen.batch import Batch, Moments
from flowgen.codecs import Codec
from flowgen.data import ClipsConfig, LatentsConfig, from_uint8
from flowgen.data.dataset import BucketedDataset, Dataset, buckets_of
from flowgen.data.image_files import is_colour, read_image, read_image_size
from flowgen.data.inventory import tell_converted
from flowgen.data.latents import kind_of
from flowgen.data.loader import checked_batch
from flowgen.data.unreadable import Unreadable
from flowgen.data.video import READABLE, frame_times, read_clip, video_size
from flowgen.evaluation import psnr
from flowgen.flows import ClipDenoiser, DenoiserStep, denoiser_variables
from flowgen.flows.batches import batch_input, flow_condition
from flowgen.flows.density import tweedie_step
from flowgen.places import check_local

LEAST_KEPT = 0.75  # fraction of a given image that must remain after cropping it to the clips' shape
GIVEN = 2**32 - 1  # Random stream for the noise on given frames; no numbered sample has this number.


def latent_frames(codec: Codec, frames: int) -> int:
    """Returns the number of latent frames in a clip. Raises ValueError if the codec cannot encode clips of this length.

    Example:
        latent_frames(codec, 81)  # 21 with the codec of the released model
    """
    count, rest = divmod(frames - 1, codec.stride)
    if rest or frames < 1:
        near = 1 + max(0, count) * codec.stride
        raise ValueError(
            f"--frames is {frames}, but the codec needs 1 plus a multiple of {codec.stride} frames; use {near} or "
            f"{near + codec.stride}."
        )
    return 1 + count


def check_length(codec: Codec, most: int, frames: int | None, context: int | None) -> None:
    """Raises ValueError if the codec cannot encode clips of this length, or if the clips are too short for `context`.

    most: the largest number of latent frames that the flow decodes at once. context: number of decoded latent frames
    with which each restart of a longer clip begins.

    Example:
        check_length(codec, 21, frames=81, context=None)
    """
    if (most if frames is None else latent_frames(codec, frames)) <= most and context is not None:
        raise ValueError(
            f"--context is {context}, but it applies only to clips of more than {1 + (most - 1) * codec.stride} "
            "frames; raise --frames, or leave --context out."
        )


def read_given(
    codec: Codec, flow: Any, path: str, *, frames: int | None = None, fps: float | None = None
) -> Float[np.ndarray, "given height width c"]:
    """Returns the frames with which generated clips begin, read from an image or video, with values in [-1, 1].

    The result has one frame for an image and, for a video, the largest number of frames that the codec can encode. fps:
    frames per second to read from a video; by default, its own frame rate.

    frames: number of frames in the clips. A video is cut so that at least one frame is left to generate. If `frames` is
    None, the video is not cut, and it must be shorter than the training clips.

    Raises FileNotFoundError or ValueError if the file cannot be read, if its shape differs too much from the shape of
    the flow's clips, or if no frame is left to generate.

    Example:
        given = read_given(codec, flow, "first.png", frames=17)
    """
    height, width = (length * codec.factor for length in flow.config.image_hw)
    check_local("--given", path)
    if not Path(path).is_file():
        problem = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(f"--given {path} {problem}; give an image or a video.")
    is_video = Path(path).suffix.lower() in READABLE
    with _naming_given():
        known = max(1, len(frame_times(path, fps=fps))) if is_video else 1
    if frames is not None:
        known = min(known, max(1, frames - 1))
    known = 1 + (known - 1) // codec.stride * codec.stride
    total = 1 + (flow.config.frames - 1) * codec.stride if frames is None else frames
    if known >= total:
        raise ValueError(
            f"--given {path} has {known} frame{'s' * (known > 1)}, so none is left to generate in clips of length "
            f"{total}; use --frames {known + codec.stride}."
        )
    with _naming_given():
        if is_video:
            size = video_size(path)
            clip = read_clip(path, known, (height, width), codec.pixel_channels, fps=fps)
        else:
            size = read_image_size(path)
            clip = read_image(path, size=(height, width), channels=codec.pixel_channels, crop="center")[None]
    kept = size[1] / size[0] / (width / height)
    if min(kept, 1 / kept) < LEAST_KEPT:
        raise ValueError(
            f"--given {path} is {size[0]} x {size[1]} pixels (height x width), so fitting it to clips of "
            f"{height} x {width} pixels would cut off much of it; crop it, or give another --aspect."
        )
    if codec.pixel_channels == 1 and (is_video or is_colour(path)):
        tell_converted(f"The colours of --given {path}", codec.pixel_channels)
    return np.asarray(from_uint8(clip))


@contextlib.contextmanager
def _naming_given() -> Generator[None]:
    """Raises an error that names the option --given if the file cannot be read."""
    try:
        yield
    except Unreadable as error:
        raise ValueError(f"--given cannot be read: {error.named}; give another image or video.") from error


def with_noise(
    flow: Any,
    clean: Float[Array | np.ndarray, "1 given height width c"],
    key: Key[Array, ""],
    numbers: Int[np.ndarray, " b"],
) -> Float[Array, "b given height width c"]:
    """Returns one noisy copy of the clean latents per clip number. Each copy has different training noise.

    Example:
        given = with_noise(flow, latents, jax.random.key(0), np.arange(4))
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, GIVEN), i))(jnp.asarray(numbers))
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)
    return jnp.asarray(clean) + flow.config.noise_std * noise


def of_whole_clips(data: ClipsConfig | LatentsConfig) -> ClipsConfig | LatentsConfig:
    """Returns the config restricted to whole clips, leaving out images and clips that lack their first frame.

    Example:
        clips = flow_dataset(of_whole_clips(data), encoding, "eval")
    """
    unused = {"images": None, "drop_first": 0.0, "images_fraction": 0.0}
    return dataclasses.replace(data, **{name: value for name, value in unused.items() if hasattr(data, name)})


def clips_alone(dataset: Dataset | BucketedDataset) -> Dataset:
    """Returns the whole clips of a dataset, leaving out images and clips that lack their first frame.

    Raises ValueError if there are no whole clips, or if the whole clips have several shapes.

    Example:
        clips = clips_alone(experiment.flow_dataset("train"))
    """
    whole = [bucket for bucket in buckets_of(dataset) if kind_of(bucket) == "clip"]
    if len(whole) != 1:
        shapes = ", ".join(str(bucket.event_shape) for bucket in whole) or "none"
        raise ValueError(
            f"data.path must contain whole clips of exactly one shape, but contains {shapes}; encode only one shape."
        )
    return whole[0]


def frame_distances(clips: Float[np.ndarray, "n frames height width c"]) -> tuple[float, float]:
    """Returns two root mean square distances: between consecutive frames, and between all pairs of frames in a clip.

    The first distance is smaller than the second if consecutive frames resemble each other. If the frames are in
    random order, the two distances are equal on average.

    Example:
        near, far = frame_distances(clips)
    """
    flat = clips.reshape(*clips.shape[:2], -1)
    pairs = np.square(flat[:, :, None] - flat[:, None]).mean(axis=(0, 3))
    frames = len(pairs)
    near = np.diagonal(pairs, 1).mean()
    return math.sqrt(near), math.sqrt(pairs.sum() / (frames * (frames - 1)))


def denoised_psnr(
    codec: Codec, flow: Any, variables: Any, dataset: Dataset, key: jax.Array, *, most: int
) -> dict[str, float]:
    """Returns the PSNR in dB of up to `most` clips with training noise, before and after the noise is removed.

    A Tweedie step removes the noise. If the flow has a denoiser, the PSNR of clips that the denoiser cleans is
    returned, too. Latents are decoded before the comparison.

    Example:
        denoised_psnr(codec, flow, params, dataset, key, most=64)  # {"as they are": 14.1, "by the score": 20.3, ...}
    """
    batch = checked_batch(dataset[np.arange(min(most, len(dataset)))])
    noisy = batch_input(key, jax.tree.map(jnp.asarray, batch.x), flow.config.noise_std)
    cond = flow_condition(flow, batch)
    cleaned: dict[str, Any] = {
        "as they are": noisy,
        "by the score": backend.by_rows(_tweedie_step, variables, noisy, cond, flow=flow),
    }
    if flow.config.denoiser_layers:
        step = denoising_step(flow)
        cleaned["by the denoiser"] = backend.by_rows(_denoised, denoiser_variables(variables), noisy, cond, step=step)
    expected = np.clip(codec.decode(of_batch(batch)), -1, 1)

    def ratio(x):
        return psnr(float(np.square(np.clip(codec.decode(np.asarray(x)), -1, 1) - expected).mean()))

    return {how: ratio(x) for how, x in cleaned.items()}


def of_batch(batch: Batch) -> np.ndarray:
    """Returns the clean data of a batch: pixels in [-1, 1], or latents.

    Example:
        latents = of_batch(dataset[np.arange(4)])
    """
    return np.asarray(batch.x.mean if isinstance(batch.x, Moments) else from_uint8(batch.pixels))


def _tweedie_step(variables, noisy, cond, *, flow):
    return tweedie_step(flow, variables, noisy, cond)


def _denoised(variables, noisy, cond, *, step):
    return step(variables, noisy, cond)


def denoising_step(flow: Any) -> DenoiserStep:
    """Returns the flow's denoiser step. The step processes clips in chunks that have the length of the training clips.

    Example:
        denoise = Denoiser(denoising_step(flow), denoiser_variables(params))
    """
    return DenoiserStep(ClipDenoiser(flow.config), flow.config.noise_std, flow.config.frames)
