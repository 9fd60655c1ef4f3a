"""The released STARFlow 3B, which turns texts into 256x256 images (arXiv 2506.06276). It has 3,858,281,544 parameters
and 1,024 tokens.

    python train.py --config configs/starflow_t2i_256.py --workdir runs/t2i --data.path IMAGES_WITH_CAPTIONS
    python -m flowgen convert starflow_3B_t2i_256x256.pth --arguments starflow_3B_t2i_256x256.yaml \\
        --to runs/t2i_released --autoencoder sd-vae-ft-ema --text-encoder flan-t5-xl --dtype bfloat16
    python sample.py --checkpoint runs/t2i_released --prompt "a cat" --aspect 1:1 --guidance 3.6

codec.path and text.encoder are folders of published networks. The parameters, their average and the optimizer's moments
occupy 62 GB in float32. --train.parallel fsdp divides them over the devices; see docs/training.md. `reference` gives
the paper's FID-30K on COCO; the paper's model was trained on more data than the public dataset CC12M. We have not
measured this metric.
"""

import dataclasses

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, LikelihoodConfig, PretrainedAutoencoder, SamplingConfig, TextConfig
from flowgen.flows import STARFLOW_PRESETS
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="starflow_t2i_256",
        model=dataclasses.replace(STARFLOW_PRESETS["t2i_3b"], dtype="bfloat16"),
        data=DataConfig(name="folder"),
        likelihood=LikelihoodConfig(norm_penalty=1e-4),
        codec=PretrainedAutoencoder("sd-vae-ft-ema"),
        text=TextConfig(encoder="flan-t5-xl"),
        optim=OptimConfig(lr=6.4e-5, min_lr=1e-6, warmup_steps=10000, clip_norm=0.0),
        train=TrainConfig(steps=400000, batch_size=1024, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=10000, sample_every=10000, checkpoint_every=10000),
        sampling=SamplingConfig(num=8, guidance=3.6, rule="product"),
        reference={"fid": 9.1},
    )
