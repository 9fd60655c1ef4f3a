"""What a run is asked to do: optimizer, length, and how often it reports. Defaults live here alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from flowgen.ranges import Batch, Every, Steps, check_ranges

SEEDS = 1 << 32  # Larger seeds would be cut to 32 bits.


def check_at_least(group: str, config: object, bounds: Mapping[str, float | int]) -> None:
    """Raises ValueError where a field is below its bound, naming field, value and bound.

    group: where the config stands; empty where it may stand in several places, and `fields` names the one.

    Example:
        check_at_least("train", config, {"steps": 1})
    """
    for name, bound in bounds.items():
        value = getattr(config, name)
        if not bound <= value < float("inf"):
            raise ValueError(f"{group}{'.' * bool(group)}{name} is {value}; it must be at least {bound}.")


@dataclass(frozen=True)
class OptimConfig:
    """AdamW with warm-up and decay, clipping and an exponential moving average of the parameters.

    schedule: after a linear warm-up from min_lr to lr, "cosine" decays to min_lr, "constant" stays.
    clip_norm: bound on the global gradient norm, 0 = none. ema_decay: 0 = no average.
    skip_norm: leave out updates whose gradient norm before clipping is above it, after the first skip_after updates,
    and those whose gradient is not finite; 0 = none. More than max_skips in a row stop the run.
    ema_warmup: let the average follow closely at first, decay min(ema_decay, (1 + step) / (10 + step)).
    """

    lr: float = 1e-4
    min_lr: float = 1e-6
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Every = 0
    weight_decay: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    skip_norm: float = 0.0
    skip_after: Every = 100
    max_skips: Every = 50
    ema_decay: float = 0.9999
    ema_warmup: bool = True

    def __post_init__(self):
        numbers = [field.name for field in fields(self) if field.name not in ("ema_warmup", "schedule")]
        check_at_least("", self, dict.fromkeys(numbers, 0))
        check_ranges(self)
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f"schedule is {self.schedule!r}; choose 'cosine' or 'constant'.")
        for name in ("b1", "b2", "ema_decay"):
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be below 1.")
        if self.max_skips < 1:
            raise ValueError(f"max_skips is {self.max_skips}; it must be at least 1.")
        if not self.lr > 0:
            raise ValueError(f"lr is {self.lr}; it must be positive.")
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, above lr {self.lr}; lower it.")


@dataclass(frozen=True)
class TrainConfig:
    """Length and batch of a run. batch_size is over all devices and hosts; accumulation cuts each device's share."""

    steps: Steps = 1000
    batch_size: Batch = 64
    seed: int = 0
    label_dropout: float = 0.0
    accumulation: Batch = 1

    def __post_init__(self):
        check_ranges(self, "train")
        check_at_least("train", self, {"seed": 0, "label_dropout": 0})
        if self.seed >= SEEDS:
            raise ValueError(f"train.seed is {self.seed}; it must be below {SEEDS}.")
        if self.label_dropout > 1:
            raise ValueError(f"train.label_dropout is {self.label_dropout}; it is a probability, at most 1.")


@dataclass(frozen=True)
class LogConfig:
    """How often a run reports, in steps; 0 switches a report off. It always reports and saves at its end.

    keep: latest checkpoints to keep, beside the best one. tensorboard: write events next to metrics.jsonl.
    """

    log_every: Steps = 50
    eval_every: Every = 0
    sample_every: Every = 0
    checkpoint_every: Every = 500
    keep: Steps = 3
    tensorboard: bool = True
    progress: bool = True

    def __post_init__(self):
        check_ranges(self, "log")
