"""TARFlow for AFHQ 256x256 with three classes: 8-768-8-8-0.07, bfloat16. The five numbers are the patch size, the
width, the number of blocks, the layers per block and the standard deviation of the noise.

    python train.py --config configs/tarflow_afhq256.py --workdir runs/afhq256

With guidance 3.4 and denoising 1.4, the sampling defaults of this config, an independent reproduction reached FID
13.60. The model has 463,481,856 parameters. The published training used batch size 256 for 4,000 epochs of 14,630
images on 8 A100s. `python -m flowgen convert` reads the only published checkpoint, afhq_model_8_768_8_8_0.07.pth, which
has this shape. We have not reproduced this result.

Optimisation is as published: AdamW (0.9, 0.95), weight decay 1e-4 on all parameters, one epoch of warm-up, cosine
decay to 1e-6 and no clipping. The parameter average is our addition; `--no-ema` samples without it. Put the training
images in data/afhq, one folder per class, or set --data.path.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_afhq256",
        model=TARFlowConfig(
            image_size=256,
            channels=3,
            patch_size=8,
            width=768,
            num_blocks=8,
            layers_per_block=8,
            num_classes=3,
            noise_std=0.07,
            dtype="bfloat16",
        ),
        data=DataConfig(name="folder", path="data/afhq", flip=True, eval_fraction=0.02),
        optim=OptimConfig(lr=0.0001, min_lr=1e-06, warmup_steps=57, clip_norm=0.0),
        train=TrainConfig(steps=228000, batch_size=256, label_dropout=0.1),
        log=LogConfig(log_every=100, eval_every=20000, sample_every=5000, checkpoint_every=5000),
        sampling=SamplingConfig(num=16, guidance=3.4, anneal=True, denoise=1.4),
        reference={"fid_reproduced": 13.6},
    )
