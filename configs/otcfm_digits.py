"""Flow matching with optimal transport (OT-CFM) on the built-in digits. Exact transport pairs noise and data within
each class of a batch.

python train.py --config configs/otcfm_digits.py --workdir runs/otcfm
python -m flowgen evaluate --checkpoint runs/otcfm --samples 500
"""

from flowgen.data import DataConfig
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.matching import DiTConfig, MatchingConfig, MinibatchOT
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> MatchingExperiment:
    return MatchingExperiment(
        name="otcfm_digits",
        model=DiTConfig(
            image_size=8,
            channels=1,
            patch_size=2,
            width=64,
            num_layers=4,
            head_dim=32,
            num_classes=10,
        ),
        data=DataConfig(name="digits"),
        matching=MatchingConfig(coupling=MinibatchOT(class_aware=True)),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=100, weight_decay=0.01, ema_decay=0.995),
        train=TrainConfig(steps=3000, batch_size=64, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=1000, sample_every=1000, checkpoint_every=1000),
        sampling=SolverConfig(num=100, method="heun", num_steps=10, guidance=0.5, frechet_samples=500),
        reference={"frechet": 0.971},
    )
