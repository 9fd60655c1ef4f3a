"""Class-conditional STARFlow-V and its denoiser on bouncing digits, in clips of 6 frames of 16x16 pixels.

Training takes 14 minutes on two cores.

python train.py --config configs/starflow_v_bouncing.py --workdir runs/bouncing
python sample.py --checkpoint runs/bouncing --num 10 --out bouncing.gif

`reference` contains the expected metrics, measured on held-out clips with the training noise added.
"""

from flowgen.data import ClipsConfig
from flowgen.experiments import LikelihoodConfig, SamplingConfig, VideoFlowExperiment
from flowgen.flows import STARFlowVConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> VideoFlowExperiment:
    return VideoFlowExperiment(
        name="starflow_v_bouncing",
        model=STARFlowVConfig(
            image_size=16,
            channels=1,
            patch_size=4,
            frames=6,
            width=64,
            layers_per_block=(1, 1, 1, 3),
            deep_width=96,
            head_dim=32,
            num_classes=10,
            noise_std=0.2,
            denoiser_layers=4,
            denoiser_past_frames=5,
            remat=False,
        ),
        data=ClipsConfig(name="bouncing"),
        likelihood=LikelihoodConfig(denoiser=OptimConfig(lr=3e-3, warmup_steps=100, b2=0.999)),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=100, ema_decay=0.995),
        train=TrainConfig(steps=1200, batch_size=32, label_dropout=0.1),
        log=LogConfig(log_every=50, eval_every=400, sample_every=400, checkpoint_every=400),
        sampling=SamplingConfig(num=10, guidance=1.0, rule="product"),
        reference={"bits_per_dim": 6.934, "psnr_score": 28.34, "psnr_denoiser": 28.40},
    )
