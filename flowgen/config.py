"""An experiment as plain data: what to train, on what, how, and what it is expected to reach."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from flowgen import settings
from flowgen.data import ClipsConfig, DataConfig, PointsConfig, told_once
from flowgen.data.inventory import name_list
from flowgen.matching import MatchingConfig
from flowgen.models import ModelConfig, build
from flowgen.settings import config
from flowgen.tasks import AutoencodingConfig, LikelihoodConfig, SamplingConfig, SolverConfig, frozen, task_of
from flowgen.tasks.frozen import PixelBlocks, TrainedCodec
from flowgen.tasks.images import named
from flowgen.tasks.texts import TextConfig
from flowgen.training import Job, LogConfig, OptimConfig, TrainConfig
from flowgen.training.options import check_warmups

# Fields that a resumed run may change: they do not touch what the checkpoint holds or the data it has seen. (Of the
# frozen networks the digest counts, wherever they lie. Names of classes are compared apart.)
RESUMABLE = ("name", "train.steps", "log.", "sampling.", "reference", "codec.path", "text.encoder", "data.classes")


@config
class Experiment:
    """A model, its data and its training; JSON round-trips exactly and is saved with every run.

    A flow is trained by maximum likelihood and sampled by decoding (`SamplingConfig`); a velocity network needs
    `matching` and a `SolverConfig`; an autoencoder needs `autoencoding`. Raises ValueError where the parts do not
    belong together.

    name: of the experiment, as a title.
    model: an autoregressive flow, a velocity network or an autoencoder.
    data: what it is trained on: images, clips or points.
    matching: how a velocity network is trained; None for other models.
    likelihood: how a flow is trained beyond maximum likelihood; None for no more than that.
    autoencoding: how an autoencoder is trained; None for other models.
    codec: what makes the latents of a flow on latents; None for a model of pixels.
    text: the encoder of a flow of texts; None for others.
    optim: the optimizer.
    train: length and batch.
    log: reports and checkpoints.
    sampling: how samples are drawn.
    reference: expected metrics by name, published or measured, as the config's docstring explains.

    Example:
        experiment = flowgen.config.load("configs/tarflow_digits.py")
    """

    name: str
    model: ModelConfig
    data: DataConfig | ClipsConfig | PointsConfig = DataConfig()
    matching: MatchingConfig | None = None
    likelihood: LikelihoodConfig | None = None
    autoencoding: AutoencodingConfig | None = None
    codec: PixelBlocks | TrainedCodec | None = None
    text: TextConfig | None = None
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    log: LogConfig = LogConfig()
    sampling: SamplingConfig | SolverConfig = SamplingConfig()
    reference: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        task_of(self.model).check(self)
        warmups = {"optim.warmup_steps": self.optim.warmup_steps}
        if self.likelihood is not None and self.likelihood.denoiser is not None:
            warmups["likelihood.denoiser.warmup_steps"] = self.likelihood.denoiser.warmup_steps
        check_warmups(warmups, self.train.steps)

    def flow(self) -> Any:
        """Returns the model, without parameters."""
        return build(self.model)

    def source(self, split: Literal["train", "eval", "all"]) -> Any:
        """Returns the pictures of a split at the model's size, or at that of which the codec makes the model's.

        Raises ValueError where they do not fit each other.
        """
        return task_of(self.model).pictures(self, split)

    def sealed(self) -> Experiment:
        """Returns the experiment as it is kept with a run: with the names of its classes, and the digests of its frozen
        networks."""
        return named(frozen.sealed(self))

    def job(self) -> Job:
        """Returns what the training loop needs, with the data opened."""
        with told_once():
            return task_of(self.model).job(self)

    def to_json(self) -> dict[str, Any]:
        """Returns plain values for JSON; `from_json` gives the same experiment back."""
        return to_json(self)

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raises ValueError naming the fields in which a run begun with `saved` does not fit this experiment."""
        lines = settings.differences(to_json(from_json(saved)), to_json(from_json(to_json(self))))
        # A run that was begun without the digest of a frozen network does not know which it was.
        changed = [line for line in lines if not line.startswith(RESUMABLE) and ".digest: None -> " not in line]
        changed += _renamed(from_json(saved).data, self.data)
        if changed:
            raise ValueError(
                f"the run was begun with another config ({'; '.join(changed)}); undo that, or train in a new --workdir."
            )


def _renamed(old: Any, new: Any) -> list[str]:
    """Which classes a run began with and does not have now, and the other way round. A run that was begun without names
    does not know what they were."""
    before, now = getattr(old, "classes", ()), getattr(new, "classes", ())
    if not before or not now or before == now:
        return []
    missing = name_list([name for name in before if name not in now])
    unknown = name_list([name for name in now if name not in before])
    if missing and not unknown:
        fix = "; to go on without it, set --data.classes to the names that the run began with"
        return [f"data.classes: {missing} missing{fix}"]
    parts = [f"{missing} missing"] * bool(missing) + [f"{unknown} not known to the run"] * bool(unknown)
    return [f"data.classes: {', '.join(parts) or f'{name_list(before)} in another order'}"]


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
    return settings.override(experiment, arguments)


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Returns an experiment as plain values; parts of several possible types carry theirs.

    Example:
        json.dumps(to_json(experiment))
    """
    return settings.to_plain(experiment)


def from_json(data: dict[str, Any]) -> Experiment:
    """Returns the experiment of `to_json`; ValueError names an unknown field or a wrong value.

    Example:
        experiment = from_json(json.loads(text))
    """
    # A saved config.json carries its digest, which `flowgen.runs` checks.
    return settings.from_plain(Experiment, {name: value for name, value in data.items() if name != "sha256"})


def shrink(experiment: Experiment) -> Experiment:
    """Returns the experiment made small enough to train and sample in seconds on a CPU, on data that ship with flowgen.

    What is kept is the kind of model and of training: channels, classes (at most 10), attention, precision, coupling.

    Example:
        experiment = shrink(load("configs/tarflow_imagenet64.py"))
    """
    return task_of(experiment.model).shrink(experiment)
