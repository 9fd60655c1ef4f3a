"""Options of training: optimizer, run length, initial parameters and reports. Defaults are set only here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from flowgen.optimizers import OPTIMIZERS, check_options, options_of
from flowgen.packages import missing
from flowgen.runs import on_terminal
from flowgen.settings import config
from flowgen.settings.ranges import (
    BatchSize,
    Count,
    CountOrZero,
    Fraction,
    NonNegative,
    OneOf,
    Positive,
    ProperFraction,
    Seed,
)

MOMENTS = ("b1", "b2", "eps")
OF_MATRICES = ("muon", "auon", "conda")  # AdamW updates all parameters that are not matrices

# The kinds of differences that `InitConfig.allow` accepts.
ALLOWED = ("classes", "size", "text", "frames", "other")


def check_warmups(warmups: Mapping[str, int], steps: int) -> None:
    """Raises ValueError if any warm-up is at least as long as the run; the message names every such warm-up.

    Example:
        check_warmups({"optim.warmup_steps": 100}, steps=2000)
    """
    late = {name: count for name, count in warmups.items() if count >= steps}
    if late:
        told = " and ".join(f"{name} is {count}" for name, count in late.items())
        fitting = " ".join(f"--{name} {steps // 10}" for name in late)
        must = "it must" if len(late) == 1 else "both must"
        raise ValueError(f"{told}; {must} be below train.steps, which is {steps}, so add {fitting}.")


@config
class OptimConfig:
    """An optimizer with warm-up, learning-rate decay, clipping, and an exponential moving average of the parameters.

    name: the optimizer, or a function (learning_rate, **options) that returns an optax optimizer.
        With "muon", "auon" and "conda", AdamW updates all parameters that are not weight matrices.
    options: further options of the optimizer, set as in --optim.options.momentum 0.9; options that are left out keep
        their defaults.
    lr: learning rate after the warm-up; positive.
    min_lr: learning rate at the start of the warm-up and at the end of the decay; at most lr.
    adam_lr: with "muon", "auon" and "conda", the value that replaces lr for parameters that are not weight matrices; 0
        for the same value as lr.
    schedule: course of the learning rate after the warm-up: "cosine" lowers it to min_lr along a cosine, "constant"
        keeps it at lr, and "wsd" keeps it at lr until the last decay_steps steps, in which it falls linearly to min_lr.
    warmup_steps: number of steps in which the learning rate rises linearly from min_lr to lr; fewer than train.steps, 0
        for no warm-up.
    decay_steps: for "wsd", number of steps at the end of the run in which the learning rate falls to min_lr; 0 for a
        tenth of the run.
    weight_decay: factor λ of weight decay: each update subtracts λ w, times the learning rate, from a parameter w;
        "adadelta", "adamp", "lamb" and "lars" scale λ w further. 0 for no decay.
    decayed: whether weight decay applies to "all" parameters or to weight "matrices" only.
    not_decayed: patterns of the names of parameters that do not decay, such as "*/proj_out/*", where * stands for any
        text.
    keep_norms: scale each weight matrix that is not initially 0 back to its initial Frobenius norm after every update.
    b1: decay rate of the running mean of gradients, for "adamw", "adamp", "conda" and the parameters that "muon" and
        "auon" update by AdamW; at least 0 and below 1. Set other decay rates in options.
    b2: decay rate of the running mean of squared gradients, for the same parameters as b1; at least 0 and below 1.
    eps: constant added to the denominator of the updates, for the same parameters as b1; at least 0.
    clip_norm: maximum norm of the gradient over all parameters that the optimizer updates; a gradient with a larger
        norm is scaled down to this norm. 0 for no clipping.
    skip_norm: skip an update if the norm of its gradient, before clipping, exceeds this value or is not finite; 0 for
        no skipping.
    skip_after: with skip_norm, number of updates at the start of the run that are skipped only if their gradient norm
        is not finite.
    max_skips: with skip_norm, number of updates in a row that may be skipped; the run stops if more are skipped. At
        least 1.
    ema_decay: decay rate of the moving average of the parameters, which is used for evaluation and sampling; below 1,
        or 0 for no average.
    ema_warmup: let the decay rate of the average rise from step to step, as min(ema_decay, (1 + step) / (10 + step)).
    """

    name: Annotated[str, OneOf(tuple(OPTIMIZERS))] | Callable[..., Any] = "adamw"
    options: dict[str, bool | int | float | str | None] = dataclasses.field(default_factory=dict)
    lr: Positive = 1e-4
    min_lr: NonNegative = 1e-6
    adam_lr: NonNegative = 0.0
    schedule: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup_steps: CountOrZero = 0
    decay_steps: CountOrZero = 0
    weight_decay: NonNegative = 1e-4
    decayed: Literal["all", "matrices"] = "all"
    not_decayed: tuple[str, ...] = ()
    keep_norms: bool = False
    b1: ProperFraction = 0.9
    b2: ProperFraction = 0.95
    eps: NonNegative = 1e-8
    clip_norm: NonNegative = 1.0
    skip_norm: NonNegative = 0.0
    skip_after: CountOrZero = 100
    max_skips: Count = 50
    ema_decay: ProperFraction = 0.9999
    ema_warmup: bool = True

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, above lr {self.lr}; lower min_lr.")
        if self.decay_steps and self.schedule != "wsd":
            raise ValueError(
                f"decay_steps is {self.decay_steps}, but only schedule 'wsd' has them; set it or remove them."
            )
        if self.adam_lr and self.name not in OF_MATRICES:
            raise ValueError(f"adam_lr is {self.adam_lr}, but only {', '.join(OF_MATRICES)} have it; set lr.")
        for name in self.options:
            if name in self._moments:
                raise ValueError(f"options.{name} is not one of the options; set the field {name} instead.")
        if self.options or not isinstance(self.name, str):
            check_options(self.optimizer, self.options)

    @property
    def optimizer(self) -> Callable[..., Any]:
        """The function (learning_rate, **options) that returns the optimizer."""
        return OPTIMIZERS[self.name] if isinstance(self.name, str) else self.name

    @property
    def all_options(self) -> dict[str, Any]:
        """The keyword arguments of `optimizer`: `options` and, if the optimizer uses them, the fields b1, b2 and
        eps."""
        return {**self._moments, **self.options}

    @property
    def _moments(self) -> dict[str, float]:
        adam = self.name in ("adamw", "adamp", *OF_MATRICES)
        return {name: getattr(self, name) for name in MOMENTS} if adam else {}


def check_unused(optim: OptimConfig) -> None:
    """Raises ValueError if a field that the optimizer does not use differs from its default.

    A saved run with such a field can still be loaded.

    Example:
        check_unused(OptimConfig(name="sgd"))
    """
    known = options_of(optim.optimizer) or {}
    chosen = optim.name if isinstance(optim.name, str) else "this optimizer"
    for name in MOMENTS:
        value, default = getattr(optim, name), getattr(OptimConfig, name)
        if name not in optim._moments and value != default:
            option = f", and set optim.options.{name} instead" if name in known else ""
            fix = f"set it to its default, {default}{option}"
            raise ValueError(f"optim.{name} is {value}, but {chosen} does not use it; {fix}.")


@config
class TrainConfig:
    """The length, batch size, seed and parallelism of a run.

    steps: number of parameter updates; at least 1.
    batch_size: number of samples per update, over all devices and hosts together; must be a multiple of the number of
    devices over which the batch is divided, multiplied by `accumulation`.
    seed: random seed of the initial parameters, the order of the data and the noise; at least 0 and below 2^32.
    label_dropout: fraction of the samples whose label, text or context is dropped in training, at most 1; should be
    above 0 if sampling uses guidance.
    accumulation: number of micro-batches into which each device splits its share of a batch; they are processed one
    after another, to save memory.
    frozen: patterns of the names of parameters that training leaves unchanged, such as "blocks_0/*"; see
    docs/training.md in the repository.
    parallel: "data" copies the parameters to every device; "fsdp" divides them over the devices, for large models.
    mesh: with "fsdp", the number of devices over which the batch and the parameters are divided, and the number over
    which attention heads and MLPs are divided; None to divide only the batch and the parameters.
    """

    steps: Count = 1000
    batch_size: BatchSize = 64
    seed: Seed = 0
    label_dropout: Fraction = 0.0
    accumulation: BatchSize = 1
    frozen: tuple[str, ...] = ()
    parallel: Literal["data", "fsdp"] = "data"
    mesh: tuple[Count, Count] | None = None

    def __post_init__(self):
        if self.mesh is not None and self.parallel == "data":
            raise ValueError('mesh is set, but parallel is "data"; set parallel to "fsdp", or leave mesh out.')


@config
class InitConfig:
    """The model that provides the initial parameters of a run, and how the run's model may differ from it.

    path: directory or URL of a run, of an exported model, or of weights that `python -m flowgen convert` has imported;
    or the name of a model that ships with flowgen. Empty for new parameters. A resumed run ignores this field.
    allow: kinds of differences to allow between the run's model and the one at `path`: classes, size, text, frames or
    other; see docs/training.md in the repository.
    """

    path: str = ""
    allow: tuple[str, ...] = ()

    def __post_init__(self):
        unknown = [name for name in self.allow if name not in ALLOWED]
        if unknown:
            raise ValueError(f"allow has the entry {unknown[0]!r}; choose from {', '.join(ALLOWED)}.")
        if self.allow and not self.path:
            raise ValueError(f"allow is {self.allow}, but path is empty; give the run to start from with --init-from.")


@config
class LogConfig:
    """The intervals, in steps, at which a run reports and saves. A run always does both at its end.

    log_every: steps between reports of the training metrics; at least 1.
    eval_every: steps between evaluations on held-out data; 0 to evaluate only at the end.
    sample_every: steps between sample grids (images of samples); 0 to draw one only at the end.
    checkpoint_every: steps between checkpoints; 0 to save only at the end.
    keep: number of latest checkpoints to keep, in addition to the one with the best evaluation; at least 1.
    tensorboard: write metrics and sample grids as TensorBoard events too, into the directory of the run.
    tracker: also send metrics and sample grids to "wandb" (Weights & Biases) or "trackio"; "none" for neither.
    progress: show a progress bar if standard error is a terminal; otherwise, print each report as a line.
    """

    log_every: Count = 50
    eval_every: CountOrZero = 0
    sample_every: CountOrZero = 0
    checkpoint_every: CountOrZero = 500
    keep: Count = 3
    tensorboard: bool = True
    tracker: Literal["none", "wandb", "trackio"] = "none"
    progress: bool = True


def check_packages(log: LogConfig) -> None:
    """Raises ImportError if a requested report requires a package that is not installed.

    Example:
        check_packages(LogConfig(tensorboard=True))
    """
    asked = {
        "tensorboardX": (log.tensorboard, "log.tensorboard"),
        "tqdm": (log.progress and on_terminal(), "log.progress"),
        log.tracker: (log.tracker != "none", "log.tracker"),
    }
    absent = {module: name for module, (wanted, name) in asked.items() if wanted and not _has(module)}
    if absent:
        off = {"log.tracker": "none"}
        otherwise = "set " + " ".join(f"--{name} {off.get(name, 'false')}" for name in absent.values())
        raise missing(f"A run with {' and '.join(absent.values())}", *absent, otherwise=otherwise)


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True
