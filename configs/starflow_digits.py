"""Class-conditional STARFlow on 4x4x4 latents of the built-in digits. Training takes a few minutes on a CPU.

python train.py --config configs/autoencoder_digits.py --workdir runs/autoencoder_digits
python train.py --config configs/starflow_digits.py --workdir runs/starflow
python -m flowgen evaluate --checkpoint runs/starflow --samples 500 --split all

`reference` contains the expected metrics, averaged over three seeds. Each seed has its own autoencoder and therefore
different latents; the held-out nats/dim are 0.72, 0.65 and 0.69. `evaluate` measures the other two metrics on samples,
by default with guidance 1. Without guidance (`--guidance 0`), `frechet` is 0.61 and `class_accuracy` is 0.99.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, LikelihoodConfig, PretrainedAutoencoder, SamplingConfig
from flowgen.flows import STARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="starflow_digits",
        model=STARFlowConfig(
            image_size=4,
            channels=4,
            width=64,
            layers_per_block=(1, 1, 1, 4),
            deep_width=96,
            head_dim=32,
            num_classes=10,
            noise_std=0.3,
        ),
        data=DataConfig(name="digits"),
        likelihood=LikelihoodConfig(norm_penalty=1e-4),
        codec=PretrainedAutoencoder("runs/autoencoder_digits"),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=100, ema_decay=0.995),
        train=TrainConfig(steps=2000, batch_size=64, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=500, sample_every=500, checkpoint_every=500),
        sampling=SamplingConfig(num=100, guidance=1.0, rule="product"),
        reference={"nats_per_dim": 0.69, "frechet": 1.09, "class_accuracy": 1.0},
    )
