"""Small experiments on latents, for tests."""

import dataclasses

from flowgen.experiments import (
    FlowExperiment,
    SamplingConfig,
    SpaceToDepth,
)
from flowgen.flows import STARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig

QUIET = LogConfig(log_every=4, checkpoint_every=0, progress=False, tensorboard=False)
FEW = TrainConfig(steps=4, batch_size=16)
TINY = STARFlowConfig(image_size=4, channels=4, width=40, head_dim=20, layers_per_block=(1, 1), num_classes=10)
TEXT = dataclasses.replace(TINY, num_classes=0, text_dim=16, text_length=6)


def experiment_of(**changes):
    parts = {
        "name": "latent",
        "model": TINY,
        "codec": SpaceToDepth(2),
        "optim": OptimConfig(ema_decay=0.9),
        "train": FEW,
        "log": QUIET,
        "sampling": SamplingConfig(num=10),
        **changes,
    }
    return FlowExperiment(**parts)
