"""How flows of pictures and of clips are drawn from alike: conditions, steering, and the pictures of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from flowgen.conditioning import TextCondition
from flowgen.data import Source
from flowgen.data.buckets import BucketedSource
from flowgen.data.latents import LatentSource, captions_of
from flowgen.decoding import DecodeResult
from flowgen.tasks.frozen import codec_of
from flowgen.tasks.images import drawn_classes, holds_latents
from flowgen.tasks.latents import null_texts
from flowgen.tasks.pictures import DRAWABLE_CHANNELS, grid_labels
from flowgen.tasks.texts import empty_text, prompt_condition

# Text models draw these many held-out captions in training, unless sampling.prompts says others.
DRAWN_CAPTIONS = 16


def sampler(
    experiment: Any,
    flow: Any,
    source: Source | BucketedSource,
    draw: Callable[..., tuple[np.ndarray, str]],
    show: Callable[[np.ndarray, int], np.ndarray],
) -> Callable[[Any], np.ndarray] | None:
    """Returns what draws the pictures of a run: of the classes in turn, or of prompts; None where samples are no
    pictures. draw: as a task's. show(samples, classes): their picture.

    Example:
        sample = sampler(experiment, flow, source, draw, picture)
    """
    encoded_without_codec = experiment.data.source == "encoded" and experiment.codec is None
    if encoded_without_codec or codec_of(experiment).pixel_channels not in DRAWABLE_CHANNELS:
        return None
    num, classes = experiment.sampling.num, drawn_classes(experiment)
    bucket = source.buckets[0] if isinstance(source, BucketedSource) else source
    # The captions that are drawn, which may name the aspect, are of pictures of this shape.
    prompts, drawn_as = experiment.sampling.prompts, bucket.image_shape[:2]
    sized = flow if prompts or not holds_latents(source) else flow.with_image_size(*drawn_as)
    null_text = null_texts(source)
    texts = null = None
    if flow.config.text_dim:
        # Prompts are encoded before the first step, so that one that cannot be is told then.
        texts = (
            prompt_condition(experiment, prompts)
            if prompts
            else _captions(bucket, np.arange(min(num, DRAWN_CAPTIONS, len(bucket))))
        )
        if not prompts and null_text is not None and isinstance(bucket, LatentSource):
            null = null_text(bucket.event_shape[:-1])
        null = empty_text(experiment) if null is None and experiment.sampling.guidance else null

    def picture_of(variables: Any) -> np.ndarray:
        key = jax.random.key(experiment.train.seed)
        numbers = np.arange(num)
        cond = grid_labels(num, classes)
        if texts is not None:
            cond = TextCondition(*(part[numbers % len(texts.mask)] for part in texts))
        images, _ = draw(experiment, sized, variables, key, num, cond, null=null)
        return show(images, classes)

    return picture_of


def _captions(source: Source, positions: Int[np.ndarray, " b"]) -> TextCondition:
    """The encoded texts of latents."""
    features, mask = source[positions]["text"]
    return TextCondition(jnp.asarray(features, jnp.float32), jnp.asarray(mask))


def steering(experiment: Any, flow: Any, cond: Any, null: TextCondition | None) -> dict[str, Any]:
    """Returns what `sample` is given of an experiment: cond, plan, guidance and null, the empty text, encoded here if
    it is needed and not given.

    Example:
        r = sample(flow, params, key, 4, **steering(experiment, flow, labels, None))
    """
    sampling = experiment.sampling
    if null is None and sampling.guidance and isinstance(cond, TextCondition):
        null = empty_text(experiment, flow.config.image_hw)
    return {
        "cond": jnp.asarray(cond) if isinstance(cond, np.ndarray) else cond,
        "plan": sampling.to_plan(),
        "guidance": sampling.to_guidance(),
        "null": null if sampling.guidance else None,
    }


def decoding_line(result: DecodeResult) -> str:
    """Returns a line on how samples were decoded.

    Example:
        print(decoding_line(sample(flow, params, key, 4)))
    """
    passes = ", ".join(str(int(block.sum())) for block in result.sweeps)
    line = f"passes per block (data side first) {passes}; residual {float(result.residual.max()):.1e}"
    return line if result.error is None else f"{line}; certified to {float(result.error.max()):.1e}"


def conditions_of(
    experiment: Any, data: Source, *, unconditional: bool = False
) -> Callable[[Int[np.ndarray, " b"]], Any] | None:
    """Returns positions in pictures or latents -> the condition that they have, their labels or the texts of their
    captions; None where samples are drawn without.

    Example:
        cond = conditions_of(experiment, experiment.source("eval"))(np.arange(4))
    """

    def labels(positions):
        return data[positions]["label"]

    def texts(positions):
        if isinstance(data, LatentSource):
            return _captions(data, positions)
        captions = captions_of(data, positions, labels(positions))
        return prompt_condition(experiment, captions, truncate=experiment.text.truncate)

    if experiment.model.text_dim:
        return texts
    return labels if experiment.model.num_classes and not unconditional else None
