"""Class-conditional STARFlow 1.4 B on ImageNet 512x512 latents (arXiv 2506.06276), with 1,412,255,816 parameters.

    python -m flowgen encode --config configs/starflow_imagenet512.py --out latents --data.path train --data.flip true
    python train.py --config configs/starflow_imagenet512.py --workdir runs/imagenet512 \\
        --data Latents --data.path latents

codec.path is the folder of a published autoencoder. `reference` contains the published FID, which was measured on
50,000 samples with a decoder fine-tuned on noisy latents. We have not measured this metric.
"""

import dataclasses

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, LikelihoodConfig, PretrainedAutoencoder, SamplingConfig
from flowgen.flows import STARFLOW_PRESETS
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="starflow_imagenet512",
        model=dataclasses.replace(STARFLOW_PRESETS["xlv2_1"], image_size=64, dtype="bfloat16"),
        data=DataConfig(name="folder"),
        likelihood=LikelihoodConfig(norm_penalty=1e-4),
        codec=PretrainedAutoencoder("sd-vae-ft-ema"),
        optim=OptimConfig(lr=1e-4, min_lr=1e-6, warmup_steps=10000),
        train=TrainConfig(steps=780000, batch_size=512, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=10000, sample_every=10000, checkpoint_every=10000),
        sampling=SamplingConfig(num=16, guidance=3.0, rule="product"),
        reference={"fid": 3.0},
    )
