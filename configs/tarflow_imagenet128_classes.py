"""TARFlow for class-conditional ImageNet 128x128: 4-1024-8-8-0.15, bfloat16. The five numbers are the patch size, the
width, the number of blocks, the layers per block and the standard deviation of the noise.

    python train.py --config configs/tarflow_imagenet128_classes.py --workdir runs/imagenet128_classes

The published FID is 5.03 (arXiv 2412.06329, according to secondary sources). With guidance 1.5 and denoising 0.97, the
sampling defaults of this config, an independent reproduction reached 5.06. The model has 823,927,552 parameters. The
published training used batch size 768 for 320 epochs on 32 A100s. We have not reproduced these results.

Optimisation is as published: AdamW (0.9, 0.95), weight decay 1e-4 on all parameters, one epoch of warm-up, cosine
decay to 1e-6 and no clipping. The parameter average is our addition; `--no-ema` samples without it. Put the training
images in data/imagenet, one folder per class, or set --data.path.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_imagenet128_classes",
        model=TARFlowConfig(
            image_size=128,
            channels=3,
            patch_size=4,
            width=1024,
            num_blocks=8,
            layers_per_block=8,
            num_classes=1000,
            noise_std=0.15,
            dtype="bfloat16",
        ),
        data=DataConfig(name="folder", path="data/imagenet", flip=True, eval_fraction=0.01),
        optim=OptimConfig(lr=0.0001, min_lr=1e-06, warmup_steps=1668, clip_norm=0.0),
        train=TrainConfig(steps=533760, batch_size=768, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=20000, sample_every=5000, checkpoint_every=5000),
        sampling=SamplingConfig(num=64, guidance=1.5, anneal=True, denoise=0.97),
        reference={"fid": 5.03, "fid_reproduced": 5.06},
    )
