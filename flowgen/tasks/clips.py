"""Flows of clips as a task: a STARFlowV and its denoiser trained at once, drawn as strips of frames and as video."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flowgen.codecs import ClipCodec
from flowgen.conditioning import TextCondition
from flowgen.data import ClipsConfig, from_uint8
from flowgen.data.buckets import BucketedSource
from flowgen.data.latents import LatentSource
from flowgen.data.loader import fixed_batches
from flowgen.data.pictures import picture_size, read_picture
from flowgen.data.sources import Batch, Source, Split
from flowgen.data.unreadable import Unreadable
from flowgen.data.video import READABLE, frame_times, read_clip, video_size
from flowgen.decoding import Denoiser, sample_clips
from flowgen.evaluation import flow_bits_per_dim, flow_nats_per_dim
from flowgen.fields import type_name
from flowgen.flows import ClipDenoiser, DenoiserStep, denoiser_variables, flow_score_objective
from flowgen.flows.batches import batch_input, condition_of
from flowgen.flows.density import tweedie_step
from flowgen.flows.objective import nll_objective
from flowgen.tasks import likelihood
from flowgen.tasks.drawing import conditions_of, decoding_line, sampler, steering
from flowgen.tasks.flow_options import LikelihoodConfig
from flowgen.tasks.frozen import clip_codec_of
from flowgen.tasks.images import shrink_run
from flowgen.tasks.latents import flow_source, is_latent, picture_source
from flowgen.tasks.likelihood import (
    best_metric,
    check_flow,
    drawn_channels,
    flow_job,
    has_held_out,
    likelihood_lines,
    shrink_flow,
)
from flowgen.tasks.pictures import strips
from flowgen.training import Job

__all__ = ["best_metric", "check", "draw", "drawn_channels", "evaluate", "job", "pictures", "shrink"]

SAMPLE_OPTIONS = (*likelihood.SAMPLE_OPTIONS, "fps", "frames", "given", "context", "progress")
EVALUATE_OPTIONS = ("noise", "samples")
# Held-out clips whose noise is removed, for the ratio of peak to error.
DENOISED = 64
LEAST_KEPT = 0.75  # of a picture that is given, by cropping it to the shape of clips
GIVEN = 2**32 - 1  # The stream of the noise on given frames, beside those of samples by their numbers.
SMALL_SIDE = 10  # of bouncing digits of 8 pixels
PEAK = 2.0  # of pictures in [-1, 1]


def check(experiment: Any) -> None:
    """Raises ValueError where the parts of an experiment do not belong to a flow of clips."""
    model, kind = experiment.model, type_name(experiment.model)
    if not isinstance(experiment.data, ClipsConfig):
        raise ValueError(f"data is {experiment.data}; a {kind} is trained on clips, so give a ClipsConfig.")
    check_flow(experiment)
    settings = experiment.likelihood or LikelihoodConfig()
    if settings.denoiser is not None and not model.denoiser_layers:
        raise ValueError("likelihood.denoiser is given, and model.denoiser_layers is 0; give the denoiser layers.")
    if model.denoiser_layers and settings.norm_penalty:
        raise ValueError(
            f"likelihood.norm_penalty is {settings.norm_penalty}, which would mix with the score that the denoiser "
            "learns; set it to 0, or model.denoiser_layers."
        )
    if experiment.data.drop_first and model.frames < 3:
        raise ValueError(
            f"data.drop_first is {experiment.data.drop_first}, and clips of model.frames {model.frames} without their "
            "first frame are pictures; set it to 0, or model.frames to 3 or more."
        )
    told = None if experiment.text is None else experiment.text.frames_per_second
    fps = experiment.data.fps if experiment.data.source in ("real", "folder") else 0
    if told and fps and told != fps:
        raise ValueError(
            f"text.frames_per_second is {told}, which texts would say of clips of data.fps {fps:g}; set them alike."
        )
    if model.denoiser_layers and model.noise_std == 0:
        raise ValueError("model.noise_std is 0, so a denoiser has nothing to remove; set it, or model.denoiser_layers.")
    if model.denoiser_layers and experiment.sampling.denoise not in (0, 1):
        raise ValueError(
            f"sampling.denoise is {experiment.sampling.denoise}; a learned denoiser takes the whole step: use 0 or 1."
        )


def shrink(experiment: Any) -> Any:
    """Returns the experiment with a tiny flow of the same kind on bouncing digits."""
    model, changes = shrink_flow(experiment)
    model = dataclasses.replace(
        model,
        image_size=-(-SMALL_SIDE // model.patch_size) * model.patch_size,
        frames=min(model.frames, 3),
        # The deep block keeps its order where one block is above it.
        layers_per_block=(1, 1) if model.order == "reversed" else (0, 1, 1),
        denoiser_layers=min(model.denoiser_layers, 1),
    )
    if experiment.likelihood is not None and (optim := experiment.likelihood.denoiser) is not None:
        optim = dataclasses.replace(optim, warmup_steps=min(optim.warmup_steps, 2))
        changes["likelihood"] = dataclasses.replace(experiment.likelihood, denoiser=optim)
    kept = {name: getattr(experiment.data, name) for name in ("flip", "drop_first", "eval_fraction")}
    data = ClipsConfig(num=200, **kept)
    return shrink_run(dataclasses.replace(experiment, **{**changes, "model": model, "data": data}))


def job(experiment: Any) -> Job:
    """Returns what the training loop needs, with the data opened, and encoded where they were not."""
    flow, source = experiment.flow(), flow_source(experiment, "train")
    held_out = clips_alone(flow_source(experiment, "eval")) if has_held_out(experiment) else None
    settings, has_denoiser = experiment.likelihood or LikelihoodConfig(), flow.config.denoiser_layers > 0
    return flow_job(
        experiment,
        source,
        flow_score_objective if has_denoiser else partial(nll_objective, norm_penalty=settings.norm_penalty),
        held_out=held_out,
        evaluate=None if held_out is None else _evaluator(experiment, flow, held_out),
        sample=sampler(experiment, flow, held_out or clips_alone(source), draw, lambda drawn, classes: strips(drawn)),
        optims={"denoiser": settings.denoiser or experiment.optim} if has_denoiser else {},
    )


def draw(
    experiment: Any,
    flow: Any,
    variables: Any,
    key: jax.Array,
    num: int,
    cond: Any,
    *,
    null: TextCondition | None = None,
    first: int = 0,
    certify: bool = False,
    frames: int | None = None,
    given: Float[np.ndarray, "given height width c"] | None = None,
    context: int | None = None,
    restart_cond: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, str]:
    """Returns clips `num frames height width c` and a line on how they were decoded; clip i depends on (key, i) alone.

    cond: labels, a `TextCondition`, or None. null: the empty text of guidance, encoded here if not given.
    frames: of the clips, in pixels; None is as many as in training. given: pictures in [-1, 1] that all clips begin
    with, which come back as the codec keeps them. context, restart_cond, progress: see `sample_clips`, context in
    frames of latents.
    Latents are decoded to clips by the experiment's codec.

    Raises ValueError where frames are none that the codec makes.
    """
    codec, clean = clip_codec_of(experiment), None
    if given is not None:
        mean, _ = codec.moments(given[None])
        clean = np.broadcast_to(mean, (num, *mean.shape[1:]))
    result = sample_clips(
        flow,
        variables,
        key,
        num,
        **steering(experiment, flow, cond, null),
        frames=None if frames is None else latent_frames(codec, frames),
        given=None if clean is None else _with_noise(flow, clean, key, first),
        context=context,
        restart_cond=restart_cond,
        denoise=_denoiser(flow, variables, experiment.sampling.denoise),
        first=first,
        certify=certify,
        progress=progress,
    )
    latents = np.asarray(result.x)
    if clean is not None:
        latents = np.concatenate([clean, latents[:, clean.shape[1] :]], axis=1)
    return np.asarray(codec.decode(latents)), decoding_line(result)


def latent_frames(codec: ClipCodec, frames: int) -> int:
    """Returns the frames of latents of clips of so many frames. Raises ValueError where the codec makes none.

    Example:
        latent_frames(codec, 81)  # 21, of the codec of the released model
    """
    count, rest = divmod(frames - 1, codec.stride)
    if rest or frames < 1:
        near = 1 + max(0, count) * codec.stride
        raise ValueError(
            f"--frames is {frames}; the codec makes clips of 1 + a multiple of {codec.stride} frames: use {near} or "
            f"{near + codec.stride}."
        )
    return 1 + count


def check_length(experiment: Any, frames: int | None, context: int | None) -> None:
    """Raises ValueError where the codec makes no clips of so many frames, or they are not continued from a context.

    Example:
        check_length(experiment, 81, context=None)
    """
    codec, most = clip_codec_of(experiment), experiment.model.frames
    if (most if frames is None else latent_frames(codec, frames)) <= most and context is not None:
        raise ValueError(
            f"--context is {context}, and clips of up to {1 + (most - 1) * codec.stride} frames are not continued; "
            "give more --frames, or leave it out."
        )


def read_given(
    experiment: Any, flow: Any, path: str, *, frames: int | None = None
) -> Float[np.ndarray, "given height width c"]:
    """Returns the pictures of a file in [-1, 1] that clips of a flow can begin with: one of a picture, of a video as
    many as the codec makes latents of, at the frame rate of the data.

    frames: of the clips, as for `draw`; of a longer video no more is read than can be given. None takes all of a video,
    which must be shorter than in training.

    Raises FileNotFoundError or ValueError where the file cannot be read, is of quite another shape, or leaves no frame
    to draw.

    Example:
        given = read_given(experiment, flow, "first.png", frames=17)
    """
    codec = clip_codec_of(experiment)
    height, width = (length * codec.factor for length in flow.config.image_hw)
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}'; give a picture or a video with --given.")
    is_video, fps = Path(path).suffix.lower() in READABLE, experiment.data.fps or None
    with _naming_given():
        known = max(1, len(frame_times(path, fps=fps))) if is_video else 1
    if frames is not None:
        known = min(known, max(1, frames - 1))
    known = 1 + (known - 1) // codec.stride * codec.stride
    total = 1 + (flow.config.frames - 1) * codec.stride if frames is None else frames
    if known >= total:
        raise ValueError(
            f"--given {path} has {known} picture{'s' * (known > 1)}, and clips of --frames {total} begin with fewer; "
            f"ask for more with --frames {known + codec.stride}."
        )
    with _naming_given():
        if is_video:
            size = video_size(path)
            clip = read_clip(path, known, (height, width), codec.pixel_channels, fps=fps)
        else:
            size = picture_size(path)
            clip = read_picture(path, size=(height, width), channels=codec.pixel_channels, crop="center")[None]
    kept = size[1] / size[0] / (width / height)
    if min(kept, 1 / kept) < LEAST_KEPT:
        raise ValueError(
            f"--given {path} is {size[0]} x {size[1]} pixels (height x width), and clips are {height} x {width}, "
            "for which much of it would be cut off; crop it, or give another --aspect."
        )
    return np.asarray(from_uint8(clip))


@contextlib.contextmanager
def _naming_given() -> Generator[None]:
    """Names the option that brought a file that cannot be read."""
    try:
        yield
    except Unreadable as error:
        raise ValueError(f"--given cannot be read: {error.named}; give a picture or a video.") from error


def _with_noise(flow: Any, clean: np.ndarray, key: jax.Array, first: int) -> jax.Array:
    """Clean latents with the noise that the flow was trained under, of its own for every clip."""
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, GIVEN), i))(first + jnp.arange(len(clean)))
    noise = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:]))(keys)
    return jnp.asarray(clean) + flow.config.noise_std * noise


def evaluate(experiment: Any, flow: Any, variables: Any, options: Any) -> list[str]:
    """Returns lines with the likelihood of the flow on a split, what its noise looks like once removed, and how far
    frames of samples and of data move, as the command's options ask; latents are decoded first."""
    source = clips_alone(flow_source(experiment, options.split))
    lines = likelihood_lines(experiment, flow, variables, source, options)
    key = jax.random.key(options.seed)
    ratios = denoised_psnr(experiment, flow, variables, source, key)
    lines.append("PSNR of noisy clips " + ", ".join(f"{how} {ratio:.2f} dB" for how, ratio in ratios.items()))
    if not options.samples or flow.config.frames == 1:  # One frame has none to move to.
        return lines
    conditions = conditions_of(experiment, source, unconditional=options.unconditional)
    cond = None if conditions is None else conditions(np.arange(options.samples) % len(source))
    clips, _ = draw(experiment, flow, variables, key, options.samples, cond)
    real = clip_codec_of(experiment).decode(_clean(source[np.arange(min(len(source), options.samples))]))
    for name, frames in (("samples", clips), ("data", real)):
        near, far = frame_distances(np.clip(frames, -1, 1))
        lines.append(f"frames of {len(frames)} {name}: distance to the next {near:.4f}, to any other {far:.4f}")
    return lines


def frame_distances(clips: Float[np.ndarray, "n frames height width c"]) -> tuple[float, float]:
    """Returns the root mean square distance of consecutive frames, and of all pairs of frames of a clip.

    Where time means something the first is smaller; of frames in random order the two are equal.

    Example:
        near, far = frame_distances(clips)
    """
    flat = clips.reshape(*clips.shape[:2], -1)
    pairs = np.square(flat[:, :, None] - flat[:, None]).mean(axis=(0, 3))
    frames = len(pairs)
    near = np.diagonal(pairs, 1).mean()
    return math.sqrt(near), math.sqrt(pairs.sum() / (frames * (frames - 1)))


def denoised_psnr(experiment: Any, flow: Any, variables: Any, source: Source, key: jax.Array) -> dict[str, float]:
    """Returns the ratio of peak to error in dB of held-out clips with noise, and with it removed by a Tweedie step and,
    where there is one, by the denoiser; latents are decoded first.

    Example:
        denoised_psnr(experiment, flow, params, source, key)  # {"as they are": 14.1, "by the score": 20.3, ...}
    """
    codec = clip_codec_of(experiment)
    batch = next(fixed_batches(source, min(DENOISED, len(source))))
    data = {name: jnp.asarray(batch[name]) for name in ("image", "mean", "std") if name in batch}
    noisy, cond = batch_input(key, data, flow.config.noise_std), condition_of(flow, batch)
    cleaned: dict[str, Any] = {"as they are": noisy, "by the score": _tweedie_step(flow, variables, noisy, cond)}
    if flow.config.denoiser_layers:
        cleaned["by the denoiser"] = _denoised(_denoising(flow), denoiser_variables(variables), noisy, cond)
    expected = np.clip(codec.decode(_clean(batch)), -1, 1)

    def ratio(x):
        return 10 * math.log10(PEAK**2 / np.square(np.clip(codec.decode(np.asarray(x)), -1, 1) - expected).mean())

    return {how: ratio(x) for how, x in cleaned.items()}


def _clean(batch: Batch) -> np.ndarray:
    """What a flow models of a batch, without the noise."""
    return batch["mean"] if "mean" in batch else np.asarray(from_uint8(batch["image"]))


def pictures(experiment: Any, split: Split) -> Source:
    """Returns the clips of a split, at the size that the codec makes the model's latents of."""
    return clips_alone(picture_source(experiment, split))


def clips_alone(source: Source | BucketedSource) -> Source:
    """Returns the clips of a source, without the pictures and the clips without their first frame that it may have
    beside them. Raises ValueError where there are clips of several shapes.

    Example:
        clips = clips_alone(flow_source(experiment, "train"))
    """
    if not isinstance(source, BucketedSource):
        return source
    buckets: tuple[Any, ...] = source.buckets
    frames = [bucket.event_shape[0] if isinstance(bucket, LatentSource) else bucket.frames for bucket in buckets]
    whole = [bucket for bucket, count in zip(buckets, frames, strict=True) if count == max(frames)]
    if len(whole) != 1:
        raise ValueError(f"data.path holds clips of shapes {source.image_shapes}; encode those of one shape.")
    return whole[0]


# Compiled once for all evaluations of a run.
_tweedie_step = jax.jit(tweedie_step, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def _denoised(step, variables, noisy, cond):
    return step(variables, noisy, cond)


def _denoising(flow: Any) -> DenoiserStep:
    """The step of the flow's own denoiser, in chunks of the clips it was trained on."""
    return DenoiserStep(ClipDenoiser(flow.config), flow.config.noise_std, flow.config.frames)


def _denoiser(flow: Any, variables: Any, strength: float) -> float | Denoiser:
    """What `sample` denoises with: the learned denoiser where the flow has one, else the Tweedie step."""
    if not flow.config.denoiser_layers or strength == 0:
        return strength
    return Denoiser(_denoising(flow), denoiser_variables(variables))


def _evaluator(experiment: Any, flow: Any, held_out: Any) -> Callable[[Any], dict[str, float]]:
    def evaluated(variables):
        key = jax.random.key(0)
        density = flow_nats_per_dim if is_latent(experiment) else flow_bits_per_dim
        metrics = {best_metric(experiment): density(flow, variables, held_out, key, batch_size=DENOISED)}
        ratios = denoised_psnr(experiment, flow, variables, held_out, key)
        names = {"by the score": "psnr_score", "by the denoiser": "psnr_denoiser"}
        return metrics | {names[how]: ratio for how, ratio in ratios.items() if how in names}

    return evaluated
