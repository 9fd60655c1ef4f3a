"""Tiny runs that tests export, and the comparison of their variables."""

import dataclasses

import jax
import numpy as np
from laws import drawn

from flowgen.codecs import AutoencoderConfig
from flowgen.data import PointsConfig
from flowgen.experiments import (
    AutoencoderExperiment,
    AutoencodingConfig,
    FlowExperiment,
    MatchingExperiment,
    SamplingConfig,
)
from flowgen.flows import TARFlowConfig
from flowgen.matching import MLPConfig
from flowgen.nn import init
from flowgen.runs import CheckpointStore, flatten, write_config

TINY = TARFlowConfig(image_size=8, channels=1, patch_size=4, width=8, head_dim=8, num_blocks=2, layers_per_block=1)
EXPERIMENTS = {
    "flow": FlowExperiment(name="flow", model=TINY, sampling=SamplingConfig(num=2)),
    "prior": FlowExperiment(name="prior", model=dataclasses.replace(TINY, scale_parameterisation="volume_preserving")),
    "points": MatchingExperiment(
        name="points",
        model=MLPConfig(dim=2, width=8, num_layers=1),
        data=PointsConfig(x0="normal", x1="moons"),
    ),
    "autoencoder": AutoencoderExperiment(
        name="autoencoder",
        model=AutoencoderConfig(channels=1, widths=(4, 4), layers_per_block=1, num_groups=2, attention=False),
        autoencoding=AutoencodingConfig(image_size=8),
    ),
}
METRICS = {"bits_per_dim": 2.5}
LATENTS = {"latents": {"mean": np.full(4, 0.5, np.float32), "variance": np.full(4, 2.0, np.float32)}}


def variables_of(experiment, seed=0):
    """Variables far from fresh ones, so that an array in another's place is seen."""
    made = drawn(init, experiment.build(), jax.random.key(0))
    made |= LATENTS if isinstance(experiment, AutoencoderExperiment) else {}
    return jax.tree.map(lambda leaf: (leaf * (1 + seed / 64)).astype(leaf.dtype), made)


def write_trained(path, experiment):
    """A run as training leaves it: the parameters, another average of them, and what sampling does not read."""
    variables, average = variables_of(experiment), variables_of(experiment, seed=1)
    path.mkdir()
    write_config(path, experiment.to_json())
    with CheckpointStore(path / "checkpoints") as store:
        state = {
            "step": np.int32(7),
            "params": variables["params"],
            "ema": average["params"],
            "opt_state": [np.ones(3, np.float32)],
            "collections": {name: part for name, part in variables.items() if name != "params"},
        }
        store.save(7, state, config=experiment.to_json(), metrics=METRICS)
    return path


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for name, leaf in flatten(a).items():
        assert leaf.dtype == flatten(b)[name].dtype
        np.testing.assert_array_equal(leaf, flatten(b)[name], err_msg=name)
