"""A tiny flow of clips and its experiment, for several files of tests."""

import dataclasses

from flowgen.data import ClipsConfig
from flowgen.experiments import SamplingConfig, VideoFlowExperiment
from flowgen.flows import STARFlowVConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig

QUIET = LogConfig(log_every=4, checkpoint_every=0, progress=False, tensorboard=False)
TINY = STARFlowVConfig(
    image_size=12,
    channels=1,
    patch_size=4,
    frames=3,
    width=40,
    head_dim=20,
    layers_per_block=(1, 1),
    num_classes=10,
    denoiser_layers=1,
)
LATENTS = dataclasses.replace(TINY, image_size=6, channels=4, patch_size=2)


def experiment_of(**changes):
    """Returns the experiment of a tiny flow of bouncing digits with other parts."""
    parts = {
        "name": "clips",
        "model": TINY,
        "data": ClipsConfig(num=60),
        "optim": OptimConfig(ema_decay=0.9),
        "train": TrainConfig(steps=4, batch_size=8),
        "log": QUIET,
        "sampling": SamplingConfig(num=3),
        **changes,
    }
    return VideoFlowExperiment(**parts)
