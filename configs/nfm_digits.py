"""Normalized Flow Matching (NFM) on the built-in digits: a flow that ships with flowgen pairs noise and data.

python train.py --config configs/nfm_digits.py --workdir runs/nfm
python -m flowgen evaluate --checkpoint runs/nfm --samples 500
"""

from flowgen.data import DataConfig
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.matching import DiTConfig, FromFlow, MatchingConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> MatchingExperiment:
    return MatchingExperiment(
        name="nfm_digits",
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
        matching=MatchingConfig(coupling=FromFlow(path="digits")),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=100, weight_decay=0.01, ema_decay=0.995),
        train=TrainConfig(steps=3000, batch_size=64, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=1000, sample_every=1000, checkpoint_every=1000),
        sampling=SolverConfig(num=100, method="heun", num_steps=10, guidance=0.5, frechet_samples=500),
        reference={"frechet": 1.284},
    )
