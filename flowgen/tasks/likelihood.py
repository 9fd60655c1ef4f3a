"""Autoregressive flows as a task: maximum likelihood on pictures or latents, sampling by decoding, likelihoods."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from flowgen.conditioning import TextCondition
from flowgen.data import DataConfig, Source, take_inventory
from flowgen.data.buckets import BucketedSource
from flowgen.data.latents import read_index
from flowgen.data.sources import Split
from flowgen.decoding import sample
from flowgen.evaluation import flow_bits_per_dim, flow_nats_per_dim, gaussian_bits_per_dim
from flowgen.fields import type_name
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.flows.objective import nll_objective
from flowgen.models import init
from flowgen.tasks.drawing import conditions_of, decoding_line, sampler, steering
from flowgen.tasks.flow_options import LikelihoodConfig, SamplingConfig
from flowgen.tasks.frozen import PixelBlocks, codec_of
from flowgen.tasks.images import check_foreign, image_batches, shrink_images
from flowgen.tasks.latents import flow_source, is_latent, null_texts, picture_source
from flowgen.tasks.pictures import DRAWABLE_CHANNELS, picture
from flowgen.tasks.samples import sample_lines, sample_metrics, train_judge
from flowgen.tasks.texts import release_text_encoders
from flowgen.training import Job, OptimConfig

# Options of `sample` and `evaluate` that mean something here, by their names in the command.
SAMPLE_OPTIONS = ("plan", "window", "tol", "init", "denoise", "certify", "prompt", "prompts", "aspect")
EVALUATE_OPTIONS = ("noise", "samples")


# What makes a model of each kind tiny.
_TINY: dict[type, Callable[[Any], dict[str, Any]]] = {
    TARFlowConfig: lambda model: {
        "width": 32,
        "head_dim": 16,
        "num_blocks": min(model.num_blocks, 2),
        "layers_per_block": 1,
    },
    STARFlowConfig: lambda model: {
        "width": 40,
        "deep_width": None,
        "head_dim": 20,
        "num_kv_heads": None if model.num_kv_heads is None else 1,
        "layers_per_block": (1,) * min(model.num_blocks, 2),
    },
}


def check(experiment: Any) -> None:
    """Raises ValueError where the parts of an experiment do not belong to a flow."""
    kind = type_name(experiment.model)
    if not isinstance(experiment.data, DataConfig):
        raise ValueError(f"data is {experiment.data}; a {kind} is trained on pictures, so give a DataConfig.")
    if experiment.data.aspects and not hasattr(experiment.model, "with_image_size"):
        raise ValueError(f"data.aspects is set, but a {kind} has one size, as its parameters do; use a STARFlow.")
    if experiment.likelihood is not None and experiment.likelihood.denoiser is not None:
        raise ValueError(f"likelihood.denoiser is given, but a {kind} has no denoiser; leave it out.")
    check_flow(experiment)


def check_flow(experiment: Any) -> None:
    """Raises ValueError where the parts that flows of pictures and of clips have alike do not belong together.

    Example:
        check_flow(experiment)
    """
    kind = type_name(experiment.model)
    if bool(experiment.model.text_dim) != (experiment.text is not None):
        has = "missing" if experiment.text is None else "given"
        raise ValueError(
            f"text is {has} and model.text_dim is {experiment.model.text_dim}; give both for texts, or neither."
        )
    if not experiment.model.text_dim and getattr(experiment.sampling, "prompts", ()):
        raise ValueError(f"sampling.prompts is {experiment.sampling.prompts}, but the model takes no texts; leave it.")
    if is_latent(experiment) and experiment.model.noise_std == 0:
        raise ValueError("model.noise_std is 0, which dequantises pictures; latents need noise, such as 0.3.")
    check_foreign(experiment, kind, "maximum likelihood", ("matching", "autoencoding"))
    if not isinstance(experiment.sampling, SamplingConfig):
        raise ValueError(f"sampling is {experiment.sampling}; a {kind} is decoded, so give a SamplingConfig.")


def best_metric(experiment: Any) -> str:
    """Returns the evaluated metric by which checkpoints are compared; lower is better."""
    return "nats_per_dim" if is_latent(experiment) else "bits_per_dim"


def shrink(experiment: Any) -> Any:
    """Returns the experiment with a tiny flow of the same kind on the built-in digits, whose blocks of pixels stand
    for latents and random features of words for texts."""
    model, changes = shrink_flow(experiment)
    return shrink_images(experiment, model, **changes)


def shrink_flow(experiment: Any) -> tuple[Any, dict[str, Any]]:
    """Returns a tiny flow of the same kind, and what else of the experiment changes with it.

    Example:
        model, changes = shrink_flow(experiment)
    """
    model = experiment.model
    patch = min(model.patch_size, 4)
    height, width = model.image_hw
    side, other = 4 * patch, max(patch, 4 * patch * width // height // patch * patch)
    changes: dict[str, Any] = {"codec": None}
    if experiment.codec is not None:
        factors = (factor for factor in (8, 4, 2) if model.channels // factor**2 in DRAWABLE_CHANNELS)
        changes["codec"] = PixelBlocks(next(factors, 2))
        model = dataclasses.replace(model, channels=max(model.channels, changes["codec"].factor ** 2))
    if model.text_dim:
        changes["text"] = dataclasses.replace(experiment.text, encoder="words", digest=None)
        changes["sampling"] = dataclasses.replace(experiment.sampling, prompts=())
        model = dataclasses.replace(model, text_dim=16, text_length=min(model.text_length, 16))
    tiny = next(tiny for kind, tiny in _TINY.items() if isinstance(model, kind))
    model = dataclasses.replace(
        model,
        image_size=side if height == width else (side, other),
        patch_size=patch,
        num_classes=10 if model.num_classes else 0,
        **tiny(model),
    )
    return model, changes


def job(experiment: Any) -> Job:
    """Returns what the training loop needs, with the data opened, and encoded where they were not."""
    flow, source = experiment.flow(), flow_source(experiment, "train")
    held_out = flow_source(experiment, "eval") if has_held_out(experiment) else None
    return flow_job(
        experiment,
        source,
        partial(nll_objective, norm_penalty=(experiment.likelihood or LikelihoodConfig()).norm_penalty),
        held_out=held_out,
        evaluate=None if held_out is None else _evaluator(experiment, flow, source, held_out),
        sample=sampler(experiment, flow, held_out or source, draw, picture),
    )


def flow_job(
    experiment: Any,
    source: Source | BucketedSource,
    objective: Callable[..., Any],
    *,
    held_out: Source | BucketedSource | None,
    evaluate: Callable[[Any], dict[str, float]] | None,
    sample: Callable[[Any], np.ndarray] | None,
    optims: Mapping[str, OptimConfig] | None = None,
) -> Job:
    """Returns what the training loop needs for a flow on opened data, whose text encoder is not needed any more.

    objective(flow, label_dropout=, loss_scale=, null_text=): as `nll_objective`. held_out: opened too, if there are
    such data. The rest: see `Job`.

    Example:
        job = flow_job(experiment, source, nll_objective, held_out=None, evaluate=None, sample=None)
    """
    flow, settings = experiment.flow(), experiment.likelihood or LikelihoodConfig()
    made = Job(
        init=lambda key: init(flow, key),
        objective=objective(
            flow,
            label_dropout=experiment.train.label_dropout,
            loss_scale=settings.loss_scale(flow.config.noise_std),
            null_text=null_texts(source),
        ),
        batches=image_batches(experiment, source),
        evaluate=evaluate,
        sample=sample,
        best_metric=best_metric(experiment),
        optims=optims or {},
        inventory=take_inventory(experiment.data, source, held_out),
    )
    release_text_encoders()
    return made


def has_held_out(experiment: Any) -> bool:
    """Returns whether an experiment has data to be evaluated on.

    Example:
        held_out = flow_source(experiment, "eval") if has_held_out(experiment) else None
    """
    if experiment.data.source == "encoded":
        return any(shard["split"] == "eval" for shard in read_index(experiment.data.path)["shards"])
    return experiment.data.eval_fraction > 0


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
) -> tuple[np.ndarray, str]:
    """Returns images `num height width c` and a line on how they were decoded; image i depends on (key, i) alone.

    cond: labels, a `TextCondition`, or None. null: the empty text of guidance, encoded here if not given.
    Latents are decoded to pictures by the experiment's codec.
    """
    how, denoise = steering(experiment, flow, cond, null), experiment.sampling.denoise
    result = sample(flow, variables, key, num, **how, denoise=denoise, first=first, certify=certify)
    return np.asarray(codec_of(experiment).decode(result.x)), decoding_line(result)


def evaluate(experiment: Any, flow: Any, variables: Any, options: Any) -> list[str]:
    """Returns lines with the likelihood of the flow and of a Gaussian on a split, and the distance of samples, as the
    command's options ask."""
    compared = _compared(experiment, options.split) if options.samples else None
    source = flow_source(experiment, options.split)
    lines = likelihood_lines(experiment, flow, variables, source, options)
    if not is_latent(experiment):
        lines += _baseline_lines(experiment, flow, source, options)
    return lines if compared is None else lines + _sample_lines(experiment, flow, variables, options, *compared)


def pictures(experiment: Any, split: Split) -> Source | BucketedSource:
    """Returns the pictures of a split, at the size that the codec makes the model's latents of."""
    return picture_source(experiment, split)


def drawn_channels(experiment: Any) -> int:
    """Returns the channels of the pictures that samples are."""
    return codec_of(experiment).pixel_channels


def _compared(experiment: Any, split: Split) -> tuple[Source, Source]:
    """The pictures that samples are compared with, and those that the judge is trained on."""
    data = picture_source(experiment, split)
    train = picture_source(experiment, "train" if split == "eval" else split)
    if isinstance(data, BucketedSource) or isinstance(train, BucketedSource):
        raise ValueError("--samples compares pictures of one size, and data.aspects gives several; leave one out.")
    return data, train


def _sample_lines(experiment: Any, flow: Any, variables: Any, options: Any, data: Source, train: Source) -> list[str]:
    conditions = conditions_of(experiment, data, unconditional=options.unconditional)
    judge = train_judge(train)
    of_samples = partial(draw, experiment, flow, variables)
    metrics = sample_metrics(of_samples, judge, data, options.samples, seed=options.seed, conditions=conditions)
    return sample_lines(metrics, judge, options.samples, f"guidance {experiment.sampling.guidance:g}")


def likelihood_lines(experiment: Any, flow: Any, variables: Any, source: Any, options: Any) -> list[str]:
    """Returns lines with the likelihood of a flow on a source, as the command's options ask.

    Example:
        lines = likelihood_lines(experiment, flow, params, flow_source(experiment, "eval"), options)
    """
    key, conditional = jax.random.key(options.seed), not options.unconditional
    if is_latent(experiment):
        if options.noise == "uniform":
            raise ValueError("--noise is uniform, which dequantises pictures; this flow is on latents: leave it out.")
        nats = flow_nats_per_dim(flow, variables, source, key, batch_size=options.batch, conditional=conditional)
        noise = f"Gaussian noise of std {flow.config.noise_std:g}"
        return [f"{len(source)} latents ({options.split}), {noise}", f"nats/dim {nats:.4f}"]
    sigma = 0.0 if options.noise == "uniform" else flow.config.noise_std
    bits = flow_bits_per_dim(
        flow, variables, source, key, noise_std=sigma, batch_size=options.batch, conditional=conditional
    )
    noise = f"Gaussian noise of std {sigma:g}" if sigma else "uniform dequantisation"
    what = "clips" if flow.config.event_shape[:-3] else "images"
    return [f"{len(source)} {what} ({options.split}), {noise}", f"bits/dim {bits:.4f}"]


def _baseline_lines(experiment: Any, flow: Any, source: Any, options: Any) -> list[str]:
    """The likelihood of a Gaussian under the same noise, where pictures have one size."""
    sigma = 0.0 if options.noise == "uniform" else flow.config.noise_std
    fitted = flow_source(experiment, "train" if options.split == "eval" else options.split)
    if isinstance(source, BucketedSource) or isinstance(fitted, BucketedSource):
        return []
    return [f"bits/dim of a Gaussian fit {gaussian_bits_per_dim(fitted, source, noise_std=sigma):.4f}"]


def _evaluator(experiment: Any, flow: Any, train_source: Any, eval_source: Any) -> Callable[[Any], dict[str, float]]:
    if is_latent(experiment):
        return lambda variables: {"nats_per_dim": flow_nats_per_dim(flow, variables, eval_source, jax.random.key(0))}

    @functools.cache  # The data do not change, and a run that never evaluates need not read them all.
    def baseline() -> dict[str, float]:
        if isinstance(eval_source, BucketedSource):
            return {}
        bits = gaussian_bits_per_dim(train_source, eval_source, noise_std=flow.config.noise_std)
        return {"gaussian_bits_per_dim": bits}

    def evaluated(variables: Any) -> dict[str, float]:
        bits = flow_bits_per_dim(flow, variables, eval_source, jax.random.key(0))
        return {"bits_per_dim": bits, **baseline()}

    return evaluated
