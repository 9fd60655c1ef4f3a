"""TARFlow on OpenMoji, 4,270 colour images at 64x64 in 11 groups: 4-384-6-4-0.05, bfloat16. The five numbers are the
patch size, the width, the number of blocks, the layers per block and the standard deviation of the noise.

    python train.py --config configs/tarflow_openmoji.py --workdir runs/openmoji

Train it on an accelerator. This config needs pip install -e ".[train,datasets]". We have not measured it yet, so there
is no expected metric. About half of the images show people, each in several skin tones. Held-out images therefore have
near duplicates in the training split, so the held-out bits/dim is optimistic.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_openmoji",
        model=TARFlowConfig(
            image_size=64,
            channels=3,
            patch_size=4,
            width=384,
            num_blocks=6,
            layers_per_block=4,
            num_classes=11,
            noise_std=0.05,
            dtype="bfloat16",
        ),
        data=DataConfig(name="openmoji"),
        optim=OptimConfig(lr=0.0003, min_lr=1e-06, warmup_steps=500, ema_decay=0.999),
        train=TrainConfig(steps=30000, batch_size=128, label_dropout=0.1),
        log=LogConfig(log_every=50, eval_every=2000, sample_every=1000, checkpoint_every=1000),
        sampling=SamplingConfig(num=66, guidance=1.5),
        reference={},
    )
