"""Video autoencoder for bouncing digits. It maps frames of 16x16 pixels to latent frames of 4x4x8. The first frame of a
clip becomes one latent frame, and so does each later pair of frames.

python train.py --config configs/autoencoder_bouncing.py --workdir runs/autoencoder_bouncing
"""

from flowgen.codecs import VideoAutoencoderConfig
from flowgen.data import ClipsConfig
from flowgen.experiments import AutoencoderExperiment, AutoencodingConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> AutoencoderExperiment:
    return AutoencoderExperiment(
        name="autoencoder_bouncing",
        model=VideoAutoencoderConfig(
            channels=1,
            latent_channels=8,
            widths=(16, 32, 32),
            decoder_widths=(16, 32, 32),
            halve_time=(False, True),
            layers_per_block=1,
            patch_size=1,
        ),
        data=ClipsConfig(name="bouncing"),
        autoencoding=AutoencodingConfig(shown=8, image_size=16, frames=5, kl_weight=1e-3),
        optim=OptimConfig(lr=2e-3, min_lr=1e-5, warmup_steps=50, weight_decay=0.0, ema_decay=0.99),
        train=TrainConfig(steps=1000, batch_size=32),
        log=LogConfig(log_every=100, eval_every=500, sample_every=500, checkpoint_every=500),
    )
