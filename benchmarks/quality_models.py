"""The experiments of benchmarks/quality.py by name. All models have 3.2 to 3.4 million parameters."""

import dataclasses
from pathlib import Path
from typing import Any

import quality_budget as shared

SCHEDULE_STEPS = 1_000_000  # The schedule's position is set to the spent fraction of the budget.
MATCHING = ("icfm", "otcfm", "wcfm", "corrected")
AUTOENCODER_SHARE = 0.2  # of the budget of "starflow"


def experiment(name: str, seed: int, codec: Path | str = "") -> Any:
    """Returns the experiment with this name. codec: the run of the autoencoder, for "starflow"."""
    if name in ("tarflow", "openmoji"):
        return tarflow(name, seed)
    return matching(name, seed) if name in MATCHING else starflow(seed, codec)


def training(seed: int, *, ema_decay: float = 0.0) -> dict[str, Any]:
    """Returns the optimizer and the run length that both sides share."""
    from flowgen.training import OptimConfig, TrainConfig

    optim = OptimConfig(
        lr=shared.LEARNING_RATE,
        min_lr=shared.LEAST_RATE,
        warmup_steps=round(shared.WARMUP * SCHEDULE_STEPS),
        clip_norm=0.0,
        ema_decay=ema_decay,
    )
    return {"optim": optim, "train": TrainConfig(steps=SCHEDULE_STEPS, batch_size=shared.BATCH, seed=seed)}


def tarflow(name: str, seed: int) -> Any:
    """Returns the TARFlow of configs/tarflow_mnist.py, or the same for OpenMoji at 32 x 32."""
    from flowgen import load_config
    from flowgen.data import DataConfig

    base = dataclasses.replace(load_config("tarflow_mnist"), **training(seed))
    if name == "tarflow":
        return base
    model = dataclasses.replace(base.model, image_size=32, channels=3, num_classes=11)
    train = dataclasses.replace(base.train, label_dropout=0.1)
    sampling = dataclasses.replace(base.sampling, guidance=1.0)
    return dataclasses.replace(
        base, name="tarflow_openmoji32", model=model, data=DataConfig("openmoji"), train=train, sampling=sampling
    )


def matching(name: str, seed: int) -> Any:
    """Returns the experiment of a DiT in pixels with one of the couplings."""
    from flowgen.data import DataConfig
    from flowgen.experiments import MatchingExperiment, SolverConfig
    from flowgen.matching import DiTConfig, GibbsWeights, Independent, MatchingConfig, MinibatchOT

    couplings = {
        "icfm": Independent(),
        "otcfm": MinibatchOT(class_aware=True),
        "wcfm": GibbsWeights(ess=0.5),
        "corrected": GibbsWeights(ess=0.5, sinkhorn_sweeps=10),
    }
    return MatchingExperiment(
        name=f"{name}_mnist",
        model=DiTConfig(image_size=28, channels=1, patch_size=4, width=128, num_layers=11, num_classes=10, remat=False),
        data=DataConfig("mnist"),
        matching=MatchingConfig(coupling=couplings[name]),
        sampling=SolverConfig(method="heun", num_steps=25),
        **training(seed, ema_decay=0.999),
    )


def autoencoder(seed: int) -> Any:
    """Returns the experiment of the autoencoder for `starflow`, with 7 x 7 x 4 latents."""
    from flowgen.codecs import AutoencoderConfig
    from flowgen.data import DataConfig
    from flowgen.experiments import AutoencoderExperiment, AutoencodingConfig

    return AutoencoderExperiment(
        name="autoencoder_mnist",
        model=AutoencoderConfig(
            channels=1, latent_channels=4, widths=(16, 32, 64), layers_per_block=1, num_groups=8, attention=False
        ),
        data=DataConfig("mnist"),
        autoencoding=AutoencodingConfig(image_size=28, kl_weight=1e-3),
        **training(seed, ema_decay=0.99),
    )


def starflow(seed: int, codec: Path | str) -> Any:
    """Returns the experiment of a STARFlow on the latents of the autoencoder whose run is in `codec`."""
    from flowgen.data import DataConfig
    from flowgen.experiments import FlowExperiment, LikelihoodConfig, PretrainedAutoencoder
    from flowgen.flows import STARFlowConfig

    return FlowExperiment(
        name="starflow_mnist",
        model=STARFlowConfig(
            image_size=7, channels=4, width=128, layers_per_block=(2, 2, 2, 10), num_classes=10, noise_std=0.3
        ),
        data=DataConfig("mnist"),
        likelihood=LikelihoodConfig(norm_penalty=1e-4),
        codec=PretrainedAutoencoder(str(codec)),
        **training(seed, ema_decay=0.999),
    )
