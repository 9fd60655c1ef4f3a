"""An experiment as plain data: the model, its data, its training and the expected result.

`Experiment` is the base class of all kinds of experiment. Each kind is a frozen dataclass in a separate module. A
config file defines a function `config()` that returns an experiment. Every run saves its experiment as JSON, from which
the same experiment can be restored.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np

from flowgen import settings
from flowgen.data import Dataset
from flowgen.data.inventory import name_list
from flowgen.evaluation.estimate import Evaluation
from flowgen.experiments.drawing import DrawOptions, EvaluateOptions
from flowgen.training import InitConfig, Job, LogConfig, OptimConfig, TrainConfig
from flowgen.training.options import check_warmups
from flowgen.training.step import Objective

# Fields that a resumed run may change, because they do not affect the contents of the checkpoint or the data seen so
# far. Frozen networks are compared by digest, not by path. Class names are compared separately.
RESUMABLE = (
    "name",
    "train.steps",
    "train.parallel",
    "train.mesh",
    "init.",
    "log.",
    "sampling.",
    "reference",
    "codec.path",
    "text.encoder",
    "data.classes",
    "data.workers",
    "data.in_memory_bytes",
    "data.on_corrupt",
    "data.images.workers",
    "data.images.in_memory_bytes",
    "data.images.on_corrupt",
    "model.attention_implementation",
    "model.remat",
)


class Samples(NamedTuple):
    """The samples that `Experiment.draw` returns.

    arrays: images `num height width c`, clips `num frames height width c`, or other samples `num *event`. In images and
    clips, -1 is the darkest value and 1 the brightest; sampled values may lie slightly outside.
    conditions: the conditions of the samples by name, such as "labels" (-1 for unconditional samples), "prompts" or
    "context", as arrays with one entry per sample; empty if the model accepts no conditions, as for points.
    """

    arrays: np.ndarray
    conditions: dict[str, np.ndarray]


class Rehearsal(NamedTuple):
    """Everything that is needed to trace a training step without data.

    init: a function (key) -> variables. objective: see `flowgen.training.make_step`. batch: the shapes and dtypes of a
    batch.
    """

    init: Callable[[jax.Array], Any]
    objective: Objective
    batch: Any


class SamplingCost(NamedTuple):
    """The FLOP and memory of sampling, counted from shapes; the parameters are not included.

    flop: FLOP of one sample; None if the number depends on the data. cache: bytes of one sample's decoding cache, or 0.
    memory: peak bytes for all samples together. weights: bytes of the copy of the parameters that decoding uses, or 0.
    read: bytes of weights that a pass through all blocks reads, by the dtype of the weights; empty if not known.
    """

    flop: float | None
    cache: int
    memory: int
    weights: int = 0
    read: Mapping[str, int] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Experiment(abc.ABC):
    """A model, its data and its training. Each kind of experiment is a subclass that adds fields, such as `sampling`.

    name: title of the experiment.
    model: the config of the model to train.
    data: the config that selects the data to train on.
    optim: the optimizer, its learning rate, and the moving average of the parameters.
    train: length, batch size, seed and parallelism of the run.
    log: when the run reports and saves checkpoints.
    init: the run or model that provides the initial parameters; by default, they are random.
    reference: expected values of some metrics, by name. For the configs that ship with flowgen, docs/reproducibility.md
    in the repository says whether they are published or measured.

    Example:
        experiment = flowgen.load_config("configs/tarflow_digits.py")
        result = flowgen.fit(experiment, "runs/digits")
    """

    # Options for drawing and evaluation, in addition to the experiment's fields; None if the kind draws no samples.
    draw_options: ClassVar[type[DrawOptions] | None] = None
    evaluate_options: ClassVar[type[EvaluateOptions]] = EvaluateOptions

    name: str
    model: Any  # Each kind declares which configs it accepts.
    data: Any
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    init: InitConfig = InitConfig()
    reference: dict[str, float] = field(default_factory=dict)

    def build(self) -> Any:
        """Returns the model that `model` describes, as a Flax module without parameters."""
        return self.model.build()

    @property
    @abc.abstractmethod
    def best_metric(self) -> str:
        """The name of the evaluation metric by which a run ranks its checkpoints; lower is better."""

    @property
    def drawn_channels(self) -> int | None:
        """The number of channels of sampled images or clips; None if the experiment samples neither."""
        return None

    @abc.abstractmethod
    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Returns the job for `flowgen.training.train`, with the given datasets or, by default, with the experiment's
        `data`.

        dataset: the data to train on instead of `data`. held_out: the data to evaluate on if `dataset` is given; None
        for no evaluation. model: the model to train instead of the result of `build`.
        """

    def rehearsal(self, model: Any, rows: int) -> Rehearsal | None:
        """Returns what is needed to trace a training step on `rows` samples, for example to estimate its memory.

        model: the result of `build`, or a model that replaces it.

        Neither data nor frozen networks (codec, text encoder) are opened. The result is None if this kind of experiment
        does not support tracing.
        """
        return None

    def sampling_cost(self, model: Any, variables: Any, num: int) -> SamplingCost | None:
        """Returns the FLOP per sample and the memory of drawing `num` samples at a time; None if they are unknown.

        model: the result of `build`, or a model that replaces it. variables: the shapes and dtypes of the model's
        variables, as `jax.eval_shape` returns them.
        """
        return None

    def draw(self, model: Any, variables: Any, options: Any, say: Callable[[str], None] = lambda line: None) -> Samples:
        """Returns `sampling.num` samples of a trained model.

        options: an instance of the class in the attribute `draw_options`. say: a function that is called with a line of
        text about each batch of samples.

        Raises ValueError if this kind of experiment draws no samples.
        """
        raise ValueError(f"{type(self).__name__} cannot draw samples.")

    @abc.abstractmethod
    def evaluate(self, model: Any, variables: Any, options: Any) -> Evaluation:
        """Returns a trained model's metrics. options: an instance of the class in the attribute `evaluate_options`."""

    @abc.abstractmethod
    def debug(self) -> Experiment:
        """Returns a small version of the experiment, which trains and samples in seconds on a CPU.

        It trains a tiny model of the same kind for a few steps, on data that ship with flowgen or, in the case of a
        `TokenFlowExperiment` on a file, on the same file.
        """

    def with_provenance(self) -> Experiment:
        """Returns a copy of the experiment that records its class names and which frozen networks it uses.

        The fields `data.classes`, `codec.digest` and `text.digest`, if the experiment has them and they are not set
        yet, are set to the names of the classes in the data and the digests of the autoencoder and the text encoder.
        """
        return self

    def to_json(self) -> dict[str, Any]:
        """Returns the experiment as plain values for JSON, from which `flowgen.experiments.from_json` restores it."""
        return {settings.TYPE: type(self).__name__, **settings.to_plain(self)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Experiment:
        """Restores an experiment of this class from the result of `to_json`.

        Raises ValueError if the experiment is of another class, or if a field is unknown or invalid. The function
        `flowgen.experiments.from_json` restores experiments of all classes.
        """
        kind = plain.get(settings.TYPE)
        if kind != cls.__name__:
            raise ValueError(f"type is {kind!r:.80}; it must be {cls.__name__}.")
        return settings.from_plain(cls, {name: value for name, value in plain.items() if name != settings.TYPE})

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raises ValueError if a run with the config `saved` cannot be resumed with this experiment.

        The message lists the differences that prevent this. saved: the experiment that the run has saved, as `to_json`
        returns it.
        """
        if (kind := saved.get(settings.TYPE)) != type(self).__name__:
            raise ValueError(
                f"the run was started as a {kind!s:.80}, but this is a {type(self).__name__}; train in a new --workdir."
            )
        begun = self.from_json(saved)
        if changed := self._changes(begun):
            small = self.debug().with_provenance()
            if self.train != small.train and not small._changes(begun):
                raise ValueError("the run was started with --debug; add --debug, or train in a new --workdir.")
            raise ValueError(
                f"the run was started with another config ({'; '.join(changed)}); undo the change, or train in a "
                "new --workdir."
            )

    def _changes(self, begun: Experiment) -> list[str]:
        """Describes the changes since a run began that prevent it from being resumed."""
        lines = settings.differences(begun.to_json(), self.from_json(self.to_json()).to_json())
        # A run that started without a frozen network's digest cannot tell whether the network has changed.
        changed = [line for line in lines if not line.startswith(RESUMABLE) and ".digest: None -> " not in line]
        return changed + _renamed(begun.data, self.data)

    def check_warmups(self, others: Mapping[str, int] = MappingProxyType({})) -> None:
        """Raises ValueError unless `optim.warmup_steps` and all values in `others` are below `train.steps`.

        others: numbers of steps of other warm-ups, by the names of their fields.
        """
        check_warmups({"optim.warmup_steps": self.optim.warmup_steps, **others}, self.train.steps)


def _renamed(old: Any, new: Any) -> list[str]:
    """Describes differences between a run's class names and the data's; returns [] if either has no names."""
    before, now = getattr(old, "classes", ()), getattr(new, "classes", ())
    if not before or not now or before == now:
        return []
    missing = name_list([name for name in before if name not in now])
    unknown = name_list([name for name in now if name not in before])
    if missing and not unknown:
        fix = "; to continue anyway, set --data.classes to the names that the run started with"
        return [f"data.classes: {missing} missing{fix}"]
    parts = [f"{missing} missing"] * bool(missing) + [f"{unknown} not known to the run"] * bool(unknown)
    return [f"data.classes: {', '.join(parts) or f'{name_list(before)} in another order'}"]
