"""Debug versions of experiments: a tiny model of the same kind, few steps, and data that ship with flowgen."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from flowgen.data import ClipsConfig, DataConfig, LatentsConfig
from flowgen.experiments.autoregressive import AutoregressiveExperiment
from flowgen.experiments.codecs import SpaceToDepth
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.plots import DRAWABLE_CHANNELS
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig

E = TypeVar("E", bound=Experiment)
SAMPLES = 4


def debug_run(experiment: E, **changes: Any) -> E:
    """Returns the experiment with the given fields replaced, and with few steps, small batches and frequent reports.

    Example:
        small = debug_run(experiment, model=dataclasses.replace(experiment.model, width=16))
    """
    small = {
        "optim": dataclasses.replace(experiment.optim, warmup_steps=min(experiment.optim.warmup_steps, 2)),
        "train": dataclasses.replace(experiment.train, steps=8, batch_size=16, accumulation=1),
        "log": dataclasses.replace(experiment.log, log_every=2, eval_every=4, sample_every=4, checkpoint_every=4),
    }
    return dataclasses.replace(experiment, **small, **changes)


def debug_images(data: DataConfig | LatentsConfig) -> DataConfig:
    """Returns a config for the built-in digits, with the same `flip` and `eval_fraction` as `data`.

    Example:
        data = debug_images(experiment.data)
    """
    if isinstance(data, LatentsConfig):
        return DataConfig()
    return DataConfig(flip=data.flip, eval_fraction=data.eval_fraction)


def debug_clips(data: ClipsConfig | LatentsConfig) -> ClipsConfig:
    """Returns a config for a few bouncing digits, with the same `flip`, `drop_first` and `eval_fraction` as `data`.

    Example:
        data = debug_clips(experiment.data)
    """
    small = ClipsConfig(num=200, drop_first=data.drop_first)
    if isinstance(data, LatentsConfig):
        return small
    return dataclasses.replace(small, flip=data.flip, eval_fraction=data.eval_fraction)


def debug_flow(experiment: AutoregressiveExperiment) -> dict[str, Any]:
    """Returns the fields model, codec, text, sampling and likelihood for a tiny flow of the experiment's kind.

    Example:
        small = debug_run(experiment, **debug_flow(experiment))
    """
    model, codec, text = experiment.model, experiment.codec, experiment.text
    sampling, likelihood = dataclasses.replace(experiment.sampling, num=SAMPLES), experiment.likelihood
    # The tiny flow may have fewer blocks than the plans or the penalty name.
    if isinstance(sampling.plan, tuple):
        sampling = dataclasses.replace(sampling, plan="auto")
    if likelihood.jacobi is not None:
        likelihood = dataclasses.replace(likelihood, jacobi=dataclasses.replace(likelihood.jacobi, blocks=None))
    patch = min(model.patch_size, 4)
    height, width = model.image_hw
    side, other = 4 * patch, max(patch, 4 * patch * width // height // patch * patch)
    if codec is not None:
        factors = (factor for factor in (8, 4, 2) if model.channels // factor**2 in DRAWABLE_CHANNELS)
        codec = SpaceToDepth(next(factors, 2))
        model = dataclasses.replace(model, channels=max(model.channels, codec.factor**2))
    if text is not None:
        text = dataclasses.replace(text, encoder="words", digest=None)
        sampling = dataclasses.replace(sampling, prompts=())
        assert isinstance(model, STARFlowConfig)  # Only STARFlow accepts texts.
        model = dataclasses.replace(model, text_dim=16, text_length=min(model.text_length, 16))
    model = dataclasses.replace(
        model,
        image_size=side if height == width else (side, other),
        patch_size=patch,
        num_classes=10 if model.num_classes else 0,
        **_tiny(model),
    )
    return {"model": model, "codec": codec, "text": text, "sampling": sampling, "likelihood": likelihood}


def _tiny(model: TARFlowConfig | STARFlowConfig) -> dict[str, Any]:
    """Returns values for the fields of a flow's config that make its network tiny."""
    blocks = min(model.num_blocks, 2)
    if isinstance(model, TARFlowConfig):
        return {"width": 32, "head_dim": 16, "num_blocks": blocks, "layers_per_block": 1}
    heads = None if model.num_kv_heads is None else 1
    layers = (1,) * blocks
    if isinstance(model, STARFlowVConfig):  # The deep block keeps its token order, which is forwards in time.
        layers = (1, 1) if model.order == "reversed" else (0, 1, 1)
    return {"width": 40, "deep_width": None, "head_dim": 20, "num_kv_heads": heads, "layers_per_block": layers}
