"""An experiment as plain data: what to train, on what, how, and what it is expected to reach."""

from __future__ import annotations

import dataclasses
import functools
import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flowgen import fields
from flowgen.data import DataConfig, Loader, check_classes, image_grid, prefetch, to_uint8
from flowgen.data import load as load_source
from flowgen.decoding import Guidance, Jacobi, sample
from flowgen.decoding.guidance import Parts, Rule
from flowgen.decoding.plan import Plan
from flowgen.evaluation import flow_bits_per_dim, gaussian_bits_per_dim
from flowgen.flows import TARFlow, TARFlowConfig, init
from flowgen.flows.density import nll_objective
from flowgen.training import Job, LogConfig, OptimConfig, TrainConfig

MODELS: dict[str, tuple[type[TARFlowConfig], type[TARFlow]]] = {"TARFlow": (TARFlowConfig, TARFlow)}
# Fields that a resumed run may change: they do not touch what the checkpoint holds or the data it has seen.
RESUMABLE = ("name", "train.steps", "log.", "sampling.", "reference")
GRID_SIDE = 64
DRAWABLE_CHANNELS = (1, 3)


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn, in training and by default in `sample.py`.

    plan, window, tol: see `flowgen.decoding`; window and tol are for "jacobi". guidance to temperature: see
    `Guidance`. denoise: strength of the score step, 0 for none.
    """

    num: int = 64
    plan: Literal["sequential", "jacobi", "auto"] = "auto"
    window: int | None = None
    tol: float = 1e-4
    guidance: float = 0.0
    rule: Rule = "linear"
    parts: Parts = "both"
    anneal: bool = False
    temperature: float = 1.0
    blocks: tuple[int, ...] | None = None
    denoise: float = 1.0

    def __post_init__(self):
        if self.num < 1:
            raise ValueError(f"sampling.num is {self.num}; it must be at least 1.")
        if self.denoise < 0:
            raise ValueError(f"sampling.denoise is {self.denoise}; it must be 0 (off) or positive.")
        try:
            self.to_guidance(), self.to_plan()
        except ValueError as error:
            raise ValueError(f"sampling: {error}") from error

    def to_guidance(self) -> Guidance:
        """Returns the guidance these fields describe."""
        return Guidance(
            scale=self.guidance,
            blocks=self.blocks,
            rule=self.rule,
            parts=self.parts,
            anneal=self.anneal,
            temperature=self.temperature,
        )

    def to_plan(self) -> Plan | str:
        """Returns the plan these fields describe."""
        return Jacobi(window=self.window, tol=self.tol) if self.plan == "jacobi" else self.plan


@dataclass(frozen=True)
class Experiment:
    """A model, its data and its training; JSON round-trips exactly and is saved with every run.

    reference: expected metrics, published or measured, as the config's docstring explains.

    Example:
        experiment = flowgen.config.load("configs/tarflow_digits.py")
    """

    name: str
    model: TARFlowConfig
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    sampling: SamplingConfig = SamplingConfig()
    reference: dict[str, float] = field(default_factory=dict)

    def flow(self) -> TARFlow:
        """Returns the model, without parameters."""
        return MODELS[_type_name(self.model)][1](self.model)

    def source(self, split: Literal["train", "eval", "all"]) -> Any:
        """Returns the data of a split at the model's size. Raises ValueError where they do not fit each other."""
        model = self.model
        source = load_source(self.data, image_size=model.grid_size, channels=model.channels, split=split)
        if model.num_classes:
            check_classes(source, model.num_classes)
        return source

    def job(self) -> Job:
        """Returns what the training loop needs, with the data opened."""
        flow, train_source = self.flow(), self.source("train")
        evaluate = None
        if self.data.eval_fraction > 0:
            evaluate = _evaluator(flow, train_source, self.source("eval"))

        def draw(variables: Any) -> np.ndarray:
            return draw_grid(flow, variables, self.sampling, seed=self.train.seed)

        loader = Loader(
            train_source,
            batch_size=self.train.batch_size,
            seed=self.train.seed,
            flip=self.data.flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return Job(
            init=lambda key: init(flow, key),
            objective=nll_objective(flow, label_dropout=self.train.label_dropout),
            batches=lambda start, stop: prefetch(loader, start, stop),
            evaluate=evaluate,
            sample=draw if self.model.channels in DRAWABLE_CHANNELS else None,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON; `from_json` gives the same experiment back."""
        return to_json(self)

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raises ValueError naming the fields in which a run begun with `saved` does not fit this experiment."""
        lines = fields.differences(to_json(from_json(saved)), to_json(from_json(to_json(self))))
        changed = [line for line in lines if not line.startswith(RESUMABLE)]
        if changed:
            raise ValueError(
                f"the run was begun with another config ({'; '.join(changed)}); undo that, or train in a new --workdir."
            )


def load(path: str | Path) -> Experiment:
    """Returns the experiment of a Python file that defines `config()`.

    Raises FileNotFoundError where there is no such file, ValueError where it does not give an Experiment.

    Example:
        experiment = load("configs/tarflow_digits.py")
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"config {path} does not exist; configs/ has the ones that come with flowgen.")
    make = runpy.run_path(str(path)).get("config")
    experiment = make() if callable(make) else None
    if not isinstance(experiment, Experiment):
        raise ValueError(f"config {path} must define config() that returns a flowgen.Experiment.")
    return experiment


def override(experiment: Experiment, arguments: Sequence[str]) -> Experiment:
    """Returns the experiment with `--group.field value` arguments applied; ValueError names what does not fit.

    Example:
        experiment = override(experiment, ["--optim.lr", "3e-4"])
    """
    return fields.override(experiment, arguments)


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Returns an experiment as plain values, the model tagged with its type.

    Example:
        json.dumps(to_json(experiment))
    """
    plain = fields.to_plain(experiment)
    return {**plain, "model": {"type": _type_name(experiment.model), **plain["model"]}}


def from_json(data: dict[str, Any]) -> Experiment:
    """Returns the experiment of `to_json`; ValueError names an unknown field or a wrong value.

    Example:
        experiment = from_json(json.loads(text))
    """
    model = data.get("model")
    if not isinstance(model, dict):
        raise ValueError(f"model is {model!r}; the config must have a table of the model's fields.")
    model = dict(model)
    name = model.pop("type", None)
    if not isinstance(name, str) or name not in MODELS:
        raise ValueError(f"model.type is {name!r}; this flowgen knows {', '.join(MODELS)}.")
    return fields.from_plain(Experiment, {**data, "model": model})


def shrink(experiment: Experiment) -> Experiment:
    """Returns the experiment made small enough to train and sample in seconds on a CPU, on the built-in digits.

    What is kept is the kind of model: channels, classes (at most 10), transform, noise, attention, precision.

    Example:
        experiment = shrink(load("configs/tarflow_imagenet64.py"))
    """
    model = experiment.model
    patch = min(model.patch_size, 4)
    height, width = model.grid_size
    side, other = 4 * patch, max(patch, 4 * patch * width // height // patch * patch)
    model = dataclasses.replace(
        model,
        image_size=side if height == width else (side, other),
        patch_size=patch,
        width=32,
        head_dim=16,
        num_blocks=min(model.num_blocks, 2),
        layers_per_block=1,
        num_classes=10 if model.num_classes else 0,
    )
    return dataclasses.replace(
        experiment,
        model=model,
        data=DataConfig(flip=experiment.data.flip, eval_fraction=experiment.data.eval_fraction),
        optim=dataclasses.replace(experiment.optim, warmup_steps=min(experiment.optim.warmup_steps, 2)),
        train=dataclasses.replace(experiment.train, steps=8, batch_size=16, accumulation=1),
        log=dataclasses.replace(experiment.log, log_every=2, eval_every=4, sample_every=4, checkpoint_every=4),
        sampling=dataclasses.replace(experiment.sampling, num=4),
    )


def grid_labels(num: int, num_classes: int) -> np.ndarray | None:
    """Returns labels 0, 1, ..., 0, 1, ... for a grid with one class per column, None without classes.

    Example:
        labels = grid_labels(20, 10)
    """
    return np.arange(num, dtype=np.int32) % num_classes if num_classes else None


def picture(images: np.ndarray, classes: int) -> np.ndarray:
    """Returns a grid of uint8 images, small images enlarged; up to 20 classes in turn get one column each.

    Example:
        save_image("samples.png", picture(images, classes=10))
    """
    columns = classes if 1 < classes <= 20 and len(images) >= classes else None
    return image_grid(images, columns=columns, scale=max(1, GRID_SIDE // max(images.shape[1:3])))


def draw_grid(flow: TARFlow, variables: Any, config: SamplingConfig, *, seed: int) -> np.ndarray:
    """Returns a uint8 grid of samples, the same noise for the same seed.

    Example:
        grid = draw_grid(flow, params, SamplingConfig(num=64), seed=0)
    """
    labels = grid_labels(config.num, flow.config.num_classes)
    result = sample(
        flow,
        variables,
        jax.random.key(seed),
        config.num,
        None if labels is None else jnp.asarray(labels),
        plan=config.to_plan(),
        guidance=config.to_guidance(),
        denoise=config.denoise,
    )
    return picture(to_uint8(np.asarray(result.x)), flow.config.num_classes)


def _evaluator(flow: TARFlow, train_source: Any, eval_source: Any) -> Any:
    @functools.cache  # The data do not change, and a run that never evaluates need not read them all.
    def baseline() -> float:
        return gaussian_bits_per_dim(train_source, eval_source, noise_std=flow.config.noise_std)

    def evaluate(variables: Any) -> dict[str, float]:
        bits = flow_bits_per_dim(flow, variables, eval_source, jax.random.key(0))
        return {"bits_per_dim": bits, "gaussian_bits_per_dim": baseline()}

    return evaluate


def _type_name(model: TARFlowConfig) -> str:
    return type(model).__name__.removesuffix("Config")
