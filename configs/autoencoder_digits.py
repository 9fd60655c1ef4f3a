"""Autoencoder for the built-in 8x8 digits with 4x4x4 latents, used by configs/starflow_digits.py. Training takes a
minute or two on a CPU.

python train.py --config configs/autoencoder_digits.py --workdir runs/autoencoder_digits
"""

from flowgen.codecs import AutoencoderConfig
from flowgen.data import DataConfig
from flowgen.experiments import AutoencoderExperiment, AutoencodingConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> AutoencoderExperiment:
    return AutoencoderExperiment(
        name="autoencoder_digits",
        model=AutoencoderConfig(
            channels=1, latent_channels=4, widths=(32, 64), layers_per_block=1, num_groups=8, attention=False
        ),
        data=DataConfig(name="digits"),
        autoencoding=AutoencodingConfig(shown=50, image_size=8, kl_weight=1e-3),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=50, weight_decay=0.0, ema_decay=0.99),
        train=TrainConfig(steps=1000, batch_size=64),
        log=LogConfig(log_every=100, eval_every=500, sample_every=500, checkpoint_every=500),
        reference={"psnr": 32.28},
    )
