"""TARFlow for the likelihood of unconditional ImageNet 64x64: 2-768-8-8, uniform dequantisation, float32. The four
numbers are the patch size, the width, the number of blocks and the layers per block.

    python train.py --config configs/tarflow_imagenet64_likelihood.py --workdir runs/imagenet64_likelihood

The published result is 2.99 bits/dim on the official validation set of downsampled ImageNet64 (arXiv 2412.06329,
according to secondary sources). The model has 460,142,784 parameters. The published training used batch size 256 for
100 epochs on 8 to 16 A100s. We have not reproduced this result.

Optimisation is as published: AdamW (0.9, 0.95), weight decay 1e-4 on all parameters, one epoch of warm-up, cosine
decay to 1e-6 and no clipping. The parameter average is our addition; `--no-ema` samples without it. Put the training
images in data/imagenet64, or set --data.path.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_imagenet64_likelihood",
        model=TARFlowConfig(
            image_size=64,
            channels=3,
            patch_size=2,
            width=768,
            num_blocks=8,
            layers_per_block=8,
            noise_std=0.0,
        ),
        data=DataConfig(name="folder", path="data/imagenet64", flip=True, eval_fraction=0.01),
        optim=OptimConfig(lr=0.0001, min_lr=1e-06, warmup_steps=5004, clip_norm=0.0),
        train=TrainConfig(steps=500400, batch_size=256),
        log=LogConfig(log_every=100, eval_every=20000, sample_every=5000, checkpoint_every=5000),
        sampling=SamplingConfig(num=64),
        reference={"bits_per_dim": 2.99},
    )
