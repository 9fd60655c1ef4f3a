"""TARFlow for unconditional generation of ImageNet 64x64: 2-768-8-8-0.05, bfloat16. The five numbers are the patch
size, the width, the number of blocks, the layers per block and the standard deviation of the noise.

    python train.py --config configs/tarflow_imagenet64.py --workdir runs/imagenet64

The published FID is 18.42 (arXiv 2412.06329, according to secondary sources). With guidance 0.2, attention temperature
0.3 and denoising 0.9, the sampling defaults of this config, an independent reproduction reached 14.67. The model has
460,142,784 parameters. The published training used batch size 256 for 200 epochs on 8 A100s. We have not reproduced
these results.

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
        name="tarflow_imagenet64",
        model=TARFlowConfig(
            image_size=64,
            channels=3,
            patch_size=2,
            width=768,
            num_blocks=8,
            layers_per_block=8,
            noise_std=0.05,
            dtype="bfloat16",
        ),
        data=DataConfig(name="folder", path="data/imagenet64", flip=True, eval_fraction=0.01),
        optim=OptimConfig(lr=0.0001, min_lr=1e-06, warmup_steps=5004, clip_norm=0.0),
        train=TrainConfig(steps=1000800, batch_size=256),
        log=LogConfig(log_every=100, eval_every=20000, sample_every=5000, checkpoint_every=5000),
        sampling=SamplingConfig(num=64, guidance=0.2, anneal=True, temperature=0.3, denoise=0.9),
        reference={"fid": 18.42, "fid_reproduced": 14.67},
    )
