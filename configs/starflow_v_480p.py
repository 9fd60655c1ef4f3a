"""STARFlow-V as released, with 6,890,096,528 parameters. It turns texts into videos of 81 frames of 480 x 848 pixels at
16 fps.

python train.py --config configs/starflow_v_480p.py --workdir runs/t2v --data.path videos \\
    --codec.path Wan2.2-TI2V-5B-Diffusers --text.encoder flan-t5-xl

Encode the latents first, with python -m flowgen encode. The published model was trained on 70 M clips and 400 M images.
Its published total VBench score is 78.67 (arXiv 2511.20462); we have not measured this score. The published training
skipped updates with a gradient norm above 1.
"""

import dataclasses

from flowgen.data import ClipsConfig
from flowgen.experiments import LikelihoodConfig, PretrainedAutoencoder, SamplingConfig, TextConfig, VideoFlowExperiment
from flowgen.flows import STARFLOW_V_480P
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> VideoFlowExperiment:
    return VideoFlowExperiment(
        name="starflow_v_480p",
        model=dataclasses.replace(STARFLOW_V_480P, dtype="bfloat16"),
        data=ClipsConfig(name="folder", path="videos", fps=16.0, drop_first=0.25),
        likelihood=LikelihoodConfig(noise_weight=True, denoiser=OptimConfig(b2=0.999)),
        codec=PretrainedAutoencoder("Wan2.2-TI2V-5B-Diffusers", temporal_scale=0.6),
        text=TextConfig("flan-t5-xl", noise_level=True, aspect=True, frames_per_second=16),
        optim=OptimConfig(lr=5e-5, min_lr=1e-6, warmup_steps=1000, skip_norm=1.0),
        train=TrainConfig(steps=500_000, batch_size=192, label_dropout=0.1),
        log=LogConfig(eval_every=5000, sample_every=0, checkpoint_every=1000),
        sampling=SamplingConfig(
            num=1, plan="sliding", window=64, tol=1e-3, init="previous_frame", guidance=2.5, rule="product"
        ),
        reference={"vbench_total": 78.67},
    )
