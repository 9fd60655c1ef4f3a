"""Training options: the optimizer, the length of a run and its intervals. Defaults are set only here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from flowgen.packages import missing
from flowgen.runs import on_terminal
from flowgen.settings import config
from flowgen.settings.ranges import BatchSize, Count, CountOrZero, Fraction, NonNegative, Positive, ProperFraction, Seed


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
    """AdamW with warm-up, learning-rate decay, clipping, and an exponential moving average of the parameters.

    lr: learning rate after the warm-up; positive.
    min_lr: learning rate at the start of the warm-up and at the end of cosine decay; at most lr.
    schedule: after the warm-up, "cosine" lowers the learning rate to min_lr, and "constant" keeps it at lr.
    warmup_steps: steps over which the learning rate rises from min_lr to lr; fewer than train.steps.
    weight_decay: AdamW's decoupled weight decay; 0 for no decay.
    b1: decay rate of the running mean of gradients; at least 0 and below 1.
    b2: decay rate of the running mean of squared gradients; at least 0 and below 1.
    eps: constant added to the denominator of AdamW's updates.
    clip_norm: clip the global gradient norm to this value; 0 for no clipping.
    skip_norm: skip updates if the gradient norm before clipping exceeds this value or is not finite; 0 for no skipping.
    skip_after: number of initial updates that are never skipped.
    max_skips: number of consecutive updates that may be skipped before the run stops; at least 1.
    ema_decay: decay rate of the parameter average used for sampling; below 1, or 0 for no average.
    ema_warmup: raise the decay rate gradually, as min(ema_decay, (1 + step) / (10 + step)).
    """

    lr: Positive = 1e-4
    min_lr: NonNegative = 1e-6
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: CountOrZero = 0
    weight_decay: NonNegative = 1e-4
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


@config
class TrainConfig:
    """Length, batch size and seed of a run.

    steps: number of parameter updates; at least 1.
    batch_size: samples per update, over all devices and hosts; a multiple of the number of devices times accumulation.
    seed: seed of initial parameters, data order and noise; a whole number below 2^32.
    label_dropout: fraction of labels or texts to drop, so that guidance can be used in sampling; at most 1.
    accumulation: number of micro-batches into which each device splits its share of a batch, to save memory.
    parallel: "data" copies the parameters to every device; "fsdp" divides them over the devices, for large models.
    mesh: with "fsdp", the numbers of devices that share the batch and the parameters, and that share heads and MLPs;
    null for all devices on the first axis.
    """

    steps: Count = 1000
    batch_size: BatchSize = 64
    seed: Seed = 0
    label_dropout: Fraction = 0.0
    accumulation: BatchSize = 1
    parallel: Literal["data", "fsdp"] = "data"
    mesh: tuple[Count, Count] | None = None

    def __post_init__(self):
        if self.mesh is not None and self.parallel == "data":
            raise ValueError('mesh is set, but parallel is "data"; set parallel to "fsdp", or leave mesh out.')


@config
class LogConfig:
    """The intervals, in steps, at which a run reports and saves. A run always does both at its end.

    log_every: steps between rows of metrics; at least 1.
    eval_every: steps between evaluations on held-out data; 0 to evaluate only at the end.
    sample_every: steps between sample grids; 0 to draw one only at the end.
    checkpoint_every: steps between checkpoints; 0 to save only at the end.
    keep: number of recent checkpoints to keep, in addition to the best one; at least 1.
    tensorboard: write TensorBoard events next to metrics.jsonl.
    progress: show a progress bar if standard error is a terminal; otherwise, print each report as a line.
    """

    log_every: Count = 50
    eval_every: CountOrZero = 0
    sample_every: CountOrZero = 0
    checkpoint_every: CountOrZero = 500
    keep: Count = 3
    tensorboard: bool = True
    progress: bool = True


def check_packages(log: LogConfig) -> None:
    """Raises ImportError if a requested report requires a package that is not installed.

    Example:
        check_packages(LogConfig(tensorboard=True))
    """
    asked = {
        "tensorboardX": (log.tensorboard, "log.tensorboard"),
        "tqdm": (log.progress and on_terminal(), "log.progress"),
    }
    absent = {module: name for module, (wanted, name) in asked.items() if wanted and not _has(module)}
    if absent:
        otherwise = "set " + " ".join(f"--{name} false" for name in absent.values())
        raise missing(f"A run with {' and '.join(absent.values())}", *absent, otherwise=otherwise)


def _has(module: str) -> bool:
    try:
        __import__(module)
    except ImportError:
        return False
    return True
