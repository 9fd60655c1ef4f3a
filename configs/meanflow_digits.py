"""MeanFlow on the built-in digits. Sampling needs only one network evaluation.

python train.py --config configs/meanflow_digits.py --workdir runs/meanflow
python -m flowgen evaluate --checkpoint runs/meanflow --samples 500
"""

from flowgen.data import DataConfig
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.matching import DiTConfig, LogitNormal, MatchingConfig, MeanFlow
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> MatchingExperiment:
    return MatchingExperiment(
        name="meanflow_digits",
        model=DiTConfig(
            image_size=8,
            channels=1,
            patch_size=2,
            width=64,
            num_layers=4,
            head_dim=32,
            num_classes=10,
            intervals=True,
            time_scale=1.0,
        ),
        data=DataConfig(name="digits"),
        matching=MatchingConfig(loss=MeanFlow(guidance_weight=0.5), time=LogitNormal(mean=0.4, std=1.0)),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=100, weight_decay=0.01, ema_decay=0.995),
        train=TrainConfig(steps=3000, batch_size=64, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=1000, sample_every=1000, checkpoint_every=1000),
        sampling=SolverConfig(num=100, method="mean_flow", num_steps=1, frechet_samples=500),
        reference={"frechet": 1.05},
    )
