"""Autoencoder for 64x64 OpenMoji images with 16x16x4 latents, used by configs/starflow_openmoji.py. Train it on an
accelerator.

    python train.py --config configs/autoencoder_openmoji.py --workdir runs/autoencoder_openmoji

This config needs pip install -e ".[train,datasets]". We have not measured it yet, so there is no expected metric.
"""

from flowgen.codecs import AutoencoderConfig
from flowgen.data import DataConfig
from flowgen.experiments import AutoencoderExperiment, AutoencodingConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> AutoencoderExperiment:
    return AutoencoderExperiment(
        name="autoencoder_openmoji",
        model=AutoencoderConfig(
            channels=3, latent_channels=4, widths=(64, 128, 128), layers_per_block=2, num_groups=16, dtype="bfloat16"
        ),
        data=DataConfig(name="openmoji"),
        autoencoding=AutoencodingConfig(shown=32, image_size=64, kl_weight=1e-3),
        optim=OptimConfig(lr=5e-4, min_lr=1e-6, warmup_steps=200, weight_decay=0.0, ema_decay=0.999),
        train=TrainConfig(steps=10000, batch_size=64),
        log=LogConfig(log_every=50, eval_every=1000, sample_every=1000, checkpoint_every=1000),
    )
