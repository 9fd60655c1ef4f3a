"""Flow matching from eight Gaussians to two moons, with Sinkhorn-corrected Gibbs weights. Training takes a minute or
two on a CPU.

    python train.py --config configs/cfm_moons.py --workdir runs/moons
    python sample.py --checkpoint runs/moons --num 1000 --out moons.png

To compare couplings, use a separate workdir for each, and add one of these options:

    --matching.coupling Independent          (I-CFM)
    --matching.coupling MinibatchOT          (OT-CFM)
    --matching.coupling.sinkhorn_sweeps 0    (plain W-CFM)

The tilted marginals of plain W-CFM raise W2 here. The toy data have quirks that comparisons must reproduce;
flowgen/matching/toy.py describes them. `reference` contains the expected metrics, averaged over three seeds of
benchmarks/matching.py. A perfect network would reach a W2 of 0.24 (docs/matching.md).
"""

from flowgen.data import PointsConfig
from flowgen.experiments import MatchingExperiment, SolverConfig
from flowgen.matching import GibbsWeights, MatchingConfig, MLPConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> MatchingExperiment:
    return MatchingExperiment(
        name="cfm_moons",
        model=MLPConfig(dim=2, width=64, num_layers=3),
        data=PointsConfig(x0="eight_gaussians", x1="moons"),
        matching=MatchingConfig(coupling=GibbsWeights(epsilon=0.5, sinkhorn_sweeps=20)),
        optim=OptimConfig(lr=2e-3, min_lr=0.0, weight_decay=0.0, b2=0.999, clip_norm=0.0, ema_decay=0.0),
        train=TrainConfig(steps=20_000, batch_size=256),
        log=LogConfig(log_every=500, eval_every=5000, sample_every=5000, checkpoint_every=5000),
        sampling=SolverConfig(num=1000, method="rk4", num_steps=50),
        reference={"w2": 0.225, "signed_npe": 0.027, "euler_4": 0.26},
    )
