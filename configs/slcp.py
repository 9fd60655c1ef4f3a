"""The posterior of the simulator SLCP (five parameters, four modes) from 10,000 simulations.

    python train.py --config configs/slcp.py --workdir runs/slcp
    python sample.py --checkpoint runs/slcp --step best --num 2000 --out slcp.png
    python -m flowgen evaluate --checkpoint runs/slcp --step best

A flow fits 10,000 simulations closely, so the parameters are averaged, and --step best chooses the checkpoint with the
best held-out density. --data.simulations sets the number of simulations. The C2ST of seed 0 is 0.754, the mean over the
fixed observations with 10,000 samples each, after 10 minutes of one core (benchmarks/results/posteriors.json).
"""

from flowgen.contexts import VectorContext
from flowgen.data import SimulatedConfig
from flowgen.experiments import TokenFlowExperiment, TokenSamplingConfig
from flowgen.flows import TokenFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig
from flowgen.transforms import MixtureMap


def config() -> TokenFlowExperiment:
    return TokenFlowExperiment(
        name="slcp",
        model=TokenFlowConfig(
            shape=(5,),
            context=VectorContext(dim=8),
            width=64,
            num_blocks=4,
            layers_per_block=2,
            mixture=MixtureMap(components=8),
        ),
        data=SimulatedConfig("slcp", simulations=10_000),
        optim=OptimConfig(lr=5e-4, min_lr=1e-5, warmup_steps=100, weight_decay=0.01, b2=0.99, ema_decay=0.995),
        train=TrainConfig(steps=6000, batch_size=256),
        log=LogConfig(log_every=100, eval_every=200, sample_every=3000, checkpoint_every=200),
        sampling=TokenSamplingConfig(num=2000),
    )
