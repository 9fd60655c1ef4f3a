"""TARFlow on a folder of your own images at 32x32 (docs/start.md). Training takes an estimated ten minutes on one CPU
core. For images in one folder per class, also set --model.num_classes to the number of folders.

    python train.py --config configs/photos.py --workdir runs/photos --data.path photos
    python sample.py --checkpoint runs/photos --num 64 --out photos.png

The result depends on your images, so there is no expected metric.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="photos",
        model=TARFlowConfig(
            image_size=32,
            channels=3,
            patch_size=4,
            width=128,
            num_blocks=4,
            layers_per_block=2,
            noise_std=0.1,
        ),
        data=DataConfig(name="folder", path="photos", flip=True, on_corrupt="skip"),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=100, ema_decay=0.998),
        train=TrainConfig(steps=1500, batch_size=32),
        log=LogConfig(log_every=25, eval_every=500, sample_every=250, checkpoint_every=250),
        sampling=SamplingConfig(num=64),
    )
