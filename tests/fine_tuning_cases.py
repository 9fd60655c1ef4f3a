"""Small models, their experiments, and runs of them without training, for tests of fine-tuning."""

import functools

import jax
import numpy as np

from flowgen import checkpoint
from flowgen.data import ClipsConfig, DataConfig
from flowgen.experiments import FlowExperiment, MatchingExperiment
from flowgen.experiments import VideoFlowExperiment as Video
from flowgen.experiments.fine_tuning import started_from
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.matching import DiTConfig, UNetConfig
from flowgen.nn import init
from flowgen.training import InitConfig

TAR = TARFlowConfig(
    image_size=4, channels=1, patch_size=2, width=8, head_dim=8, num_blocks=2, layers_per_block=1, noise_std=0.1
)
STAR = STARFlowConfig(image_size=4, channels=1, patch_size=2, width=20, head_dim=20, layers_per_block=(1, 1))
VIDEO = STARFlowVConfig(
    image_size=4, channels=1, patch_size=2, width=20, head_dim=20, layers_per_block=(1, 1), frames=2
)
DIT = DiTConfig(image_size=4, channels=1, patch_size=2, width=8, head_dim=8, num_layers=1)
UNET = UNetConfig(
    image_size=4, channels=1, width=8, multipliers=(1, 2), blocks_per_level=1, head_dim=8, num_groups=4, dropout=0.0
)
OLD, NEW = ("cat", "dog", "fox"), ("fox", "cat", "owl", "dog", "emu")


def experiment_of(model, *, classes=(), allow=None, path="", **fields):
    """An experiment whose data are never opened, for a model of any kind."""
    kinds = {STARFlowVConfig: Video, TARFlowConfig: FlowExperiment, STARFlowConfig: FlowExperiment}
    data = ClipsConfig(classes=classes) if isinstance(model, STARFlowVConfig) else DataConfig(classes=classes)
    start = InitConfig(str(path), allow or ())
    return kinds.get(type(model), MatchingExperiment)(name="own", model=model, data=data, init=start, **fields)


@functools.cache
def shapes_of(model):
    return jax.eval_shape(lambda: init(model.build(), jax.random.key(0)))


def perturbed(experiment, seed=0):
    """Variables of which no array is what initialisation gives."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype(x.dtype), shapes_of(experiment.model))


def run_of(folder, experiment, variables=None):
    """A run with the experiment's config and the variables at step 0."""
    path = folder / f"run-{len(list(folder.iterdir()))}"
    checkpoint.write_run(path, experiment, perturbed(experiment) if variables is None else variables)
    return path


def started(experiment):
    """The variables with which a new run of an experiment starts, and its table."""
    fresh = perturbed(experiment, seed=1)
    return started_from(experiment, jax.eval_shape(lambda: fresh))(fresh)
