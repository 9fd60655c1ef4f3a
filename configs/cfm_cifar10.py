"""Flow matching on CIFAR-10 with torchcfm's recipe (Tong et al., arXiv 2302.00482) and a 35,746,307-parameter U-Net.

    python train.py --config configs/cfm_cifar10.py --workdir runs/cifar10 --data.path cifar10.npz

cifar10.npz contains `images`, uint8 (50000, 32, 32, 3), and `labels`, which are not used. Training takes 400,001 steps
with batch size 128. It uses Adam with a learning rate of 2e-4 after 5,000 steps of warm-up, gradient clipping at norm
1, an EMA of 0.9999, random flips and dropout 0.1. The network receives unscaled times.

The published FID is 3.5 (clean-fid, legacy_tensorflow, 50,000 samples, dopri5 at 1e-5). We have not measured the FID;
docs/evaluation.md contains the command. For W-CFM, add --matching.coupling GibbsWeights --matching.coupling.epsilon 5.
The published FID of W-CFM is 7.33; the training budget was not published. For OT-CFM, add --matching.coupling
MinibatchOT.
"""

from flowgen.data import DataConfig
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.matching import MatchingConfig, UNetConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> MatchingExperiment:
    return MatchingExperiment(
        name="cfm_cifar10",
        model=UNetConfig(
            image_size=32,
            width=128,
            multipliers=(1, 2, 2, 2),
            blocks_per_level=2,
            attention_factors=(2,),
            dropout=0.1,
            time_scale=1.0,
        ),
        data=DataConfig(name="npz", path="cifar10.npz", flip=True, eval_fraction=0.0),
        matching=MatchingConfig(),
        optim=OptimConfig(
            lr=2e-4,
            min_lr=0.0,
            schedule="constant",
            warmup_steps=5000,
            weight_decay=0.0,
            b2=0.999,
            clip_norm=1.0,
            ema_decay=0.9999,
            ema_warmup=False,
        ),
        train=TrainConfig(steps=400_001, batch_size=128),
        log=LogConfig(log_every=100, sample_every=5000, checkpoint_every=20_000),
        sampling=SolverConfig(num=64, method="dopri5"),
        reference={"fid": 3.5},
    )
