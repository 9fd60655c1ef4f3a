"""TARFlow on the built-in 8x8 digits, the first run in the README. Training takes a few minutes on a laptop.

python train.py --config configs/tarflow_digits.py --workdir runs/digits
python -m flowgen evaluate --checkpoint runs/digits
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_digits",
        model=TARFlowConfig(
            image_size=8,
            channels=1,
            patch_size=2,
            width=64,
            num_blocks=4,
            layers_per_block=2,
            head_dim=32,
            num_classes=10,
            activation="silu",
            noise_std=0.1,
        ),
        data=DataConfig(name="digits"),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=100, ema_decay=0.995),
        train=TrainConfig(steps=1800, batch_size=64, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=300, sample_every=300, checkpoint_every=500),
        sampling=SamplingConfig(num=100, guidance=1.5),
        reference={"bits_per_dim": 6.756},
    )
