"""STARFlow on a folder of your own images with captions, at 32x32 (docs/start.md). Training takes an estimated ten
minutes on one CPU core.

    python train.py --config configs/photos_captions.py --workdir runs/captions --data.path photos
    python sample.py --checkpoint runs/captions --prompt "a red car" --num 16 --out cars.png

The caption of photos/1.jpg is the text in photos/1.txt. Nothing is downloaded. Every patch of 4x4 pixels is a latent,
and the text encoder `words` assigns random features to each word, so the model only learns words that occur in the
captions. The result depends on your images, so there is no expected metric.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig, SpaceToDepth, TextConfig
from flowgen.flows import STARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="photos_captions",
        model=STARFlowConfig(
            image_size=8,
            channels=48,
            width=128,
            layers_per_block=(2, 2, 4),
            text_dim=64,
            text_length=16,
            noise_std=0.1,
        ),
        data=DataConfig(name="folder", path="photos"),
        codec=SpaceToDepth(4),
        text=TextConfig(encoder="words"),
        optim=OptimConfig(lr=1e-3, min_lr=1e-5, warmup_steps=100, skip_norm=5.0, ema_decay=0.998),
        train=TrainConfig(steps=1500, batch_size=32, label_dropout=0.1),
        log=LogConfig(log_every=25, eval_every=500, sample_every=250, checkpoint_every=250),
        sampling=SamplingConfig(num=16, guidance=1.0),
    )
