"""An experiment is plain data: JSON gives it back exactly, and what does not fit is named in one sentence."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from commands import one_sentence

from flowgen import experiments, settings
from flowgen.codecs import VideoAutoencoderConfig
from flowgen.data import ClipsConfig, DataConfig, PointsConfig
from flowgen.experiments import (
    AutoencoderExperiment,
    AutoencodingConfig,
    FlowExperiment,
    LikelihoodConfig,
    MatchingExperiment,
    PretrainedAutoencoder,
    SamplingConfig,
    SolverConfig,
    TextConfig,
    VideoFlowExperiment,
)
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.flows.jacobi_error import JacobiPenalty
from flowgen.matching import (
    GibbsWeights,
    LogitNormal,
    MatchingConfig,
    MeanFlow,
    MLPConfig,
    Polynomial,
)
from flowgen.training import InitConfig, LogConfig, OptimConfig, TrainConfig

MODELS = "TARFlow, STARFlow"
DIGITS = Path(__file__).parent.parent / "configs/tarflow_digits.py"
# No field keeps its default, so that a field which JSON loses is seen.
UNUSUAL = FlowExperiment(
    name="unusual",
    model=TARFlowConfig(
        attention_implementation="xla",
        image_size=(12, 20),
        channels=4,
        patch_size=2,
        width=24,
        num_blocks=3,
        layers_per_block=2,
        head_dim=12,
        expansion=2,
        num_classes=7,
        scale_parameterisation="volume_preserving",
        activation="silu",
        noise_std=0.1 + 0.2,
        dtype="bfloat16",
        remat=False,
    ),
    data=DataConfig(
        name="npz",
        path="photos/set ü.npz",
        flip=True,
        crop="none",
        on_corrupt="skip",
        eval_fraction=1 / 3,
        in_memory_bytes=1,
        workers=3,
        classes=("ü", "0"),
    ),
    optim=OptimConfig(
        name="muon",
        options={"beta": 0.9, "ns_steps": 3, "nesterov": False},
        lr=1e-3,
        min_lr=1e-20,
        adam_lr=1e-4,
        schedule="wsd",
        warmup_steps=3,
        decay_steps=2,
        weight_decay=0.0,
        decayed="matrices",
        not_decayed=("*/proj_out/*",),
        keep_norms=True,
        b1=0.5,
        b2=0.75,
        eps=1e-6,
        clip_norm=0.0,
        skip_norm=7.5,
        skip_after=0,
        max_skips=3,
        ema_decay=0.0,
        ema_warmup=False,
    ),
    train=TrainConfig(
        steps=7,
        batch_size=12,
        seed=2**32 - 1,
        label_dropout=0.25,
        accumulation=2,
        frozen=("*/ü", "a,b"),
        parallel="fsdp",
        mesh=(3, 2),
    ),
    log=LogConfig(
        log_every=1,
        eval_every=2,
        sample_every=3,
        checkpoint_every=4,
        keep=5,
        tensorboard=False,
        tracker="wandb",
        progress=False,
    ),
    init=InitConfig("runs/ü", ("classes", "other")),
    likelihood=LikelihoodConfig(norm_penalty=1e-4, noise_weight=True),
    sampling=SamplingConfig(
        num=9,
        plan="jacobi",
        window=4,
        tol=0.0,
        init="zeros",
        guidance=1.5,
        rule="product",
        blocks=(0, 1),
        parts="both",
        anneal=True,
        temperature=0.9,
        denoise=0.5,
    ),
    reference={"bits_per_dim": 2.0000000000000004},
)
VELOCITY = MatchingExperiment(
    name="velocity",
    model=MLPConfig(dim=2, width=7, num_layers=5, intervals=True),
    data=PointsConfig(x0="moons", x1="five_gaussians"),
    matching=MatchingConfig(
        loss=MeanFlow(instantaneous=0.5, power=0.5),
        path=Polynomial(degree=3.5),
        coupling=GibbsWeights(epsilon=0.7, cost="sqeuclidean", normalize="batch", sinkhorn_sweeps=3, tilt=0.2),
        time=LogitNormal(mean=-0.5, std=2.0),
    ),
    sampling=SolverConfig(
        num=5, method="rk4", num_steps=7, times="edm", rtol=1e-3, atol=1e-4, guidance_interval=(0.1, 0.9)
    ),
)
LATENT = FlowExperiment(
    name="latent",
    model=STARFlowConfig(image_size=(4, 6), layers_per_block=(1, 0, 2), text_dim=5, text_length=7, rope_base_grid=3.5),
    data=DataConfig(name="folder", path="photos", aspects=True),
    likelihood=LikelihoodConfig(norm_penalty=1e-4, noise_weight=True, jacobi=JacobiPenalty(0.2, 3, blocks=(1,))),
    codec=PretrainedAutoencoder("runs/ä"),
    text=TextConfig(encoder="words", truncate=False, noise_level=True, aspect=True),
    sampling=SamplingConfig(prompts=("ein Hündchen", "")),
)
CLIPS = VideoFlowExperiment(
    name="clips",
    model=STARFlowVConfig(image_size=(4, 6), layers_per_block=(1, 2), num_classes=10, frames=3, denoiser_layers=2),
    data=ClipsConfig(name="folder", path="videos", fps=12.5, hop=3, flip=True),
    likelihood=LikelihoodConfig(denoiser=OptimConfig(lr=1e-3)),
    codec=PretrainedAutoencoder("runs/ä", temporal_scale=0.6),
)
VIDEO_AUTOENCODER = AutoencoderExperiment(
    name="video autoencoder",
    model=VideoAutoencoderConfig(channels=1, widths=(8, 8), decoder_widths=(8, 8), halve_time=(True,)),
    data=ClipsConfig(),
    autoencoding=AutoencodingConfig(image_size=(16, 20), frames=5),
)
BASE = FlowExperiment(
    name="base",
    model=TARFlowConfig(image_size=8, channels=1, patch_size=2, width=64, head_dim=32),
    optim=OptimConfig(lr=2e-3),
    train=TrainConfig(steps=2000, batch_size=64),
)
EXPERIMENTS = {
    "defaults": FlowExperiment(name="defaults", model=TARFlowConfig(image_size=8)),
    "unusual": UNUSUAL,
    "digits": experiments.load_config(DIGITS),
    "shrunk": experiments.load_config(DIGITS).debug(),
    "velocity": VELOCITY,
    "latent": LATENT,
    "clips": CLIPS,
    "video autoencoder": VIDEO_AUTOENCODER,
}


@pytest.fixture
def experiment():
    return BASE


def types_of(plain: Any) -> Any:
    """The nested types of plain values; 1 and 1.0 and True are equal, their types are not."""
    if isinstance(plain, dict):
        return {name: types_of(value) for name, value in plain.items()}
    return [types_of(value) for value in plain] if isinstance(plain, list | tuple) else type(plain)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_json_gives_the_same_experiment(name):
    given = EXPERIMENTS[name]
    text = json.dumps(given.to_json(), allow_nan=False)
    back = experiments.from_json(json.loads(text))
    assert back == given
    assert types_of(dataclasses.asdict(back)) == types_of(dataclasses.asdict(given))
    assert json.dumps(back.to_json(), allow_nan=False) == text


def test_the_unusual_experiment_covers_every_field():
    defaults = EXPERIMENTS["defaults"]
    unchanged = {name for name in settings.leaf_names(UNUSUAL) if _leaf(UNUSUAL, name) == _leaf(defaults, name)}
    # The first has one value so far; "both" is the only parts that the product rule takes; a TARFlow has one size, and
    # no texts.
    assert unchanged <= {"model.attention", "sampling.parts", "data.aspects", "sampling.prompts"}


def _leaf(value, name):
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"stepz": 3}}, "train.stepz is not a field of this config; did you mean steps?"),
        ({"train": {"steps": 0}}, "train.steps is 0; it must be at least 1."),
        ({"model": {}}, f"model.type is None; choose one of {MODELS}."),
        ({"data": {"classes": ["a", "a"]}}, "data.classes contains 'a' twice; list each name once."),
        ({"data": {"type": "Sound"}}, "data.type is 'Sound'; choose one of Data, Latents."),
        ({"matching": {}}, "matching is not a field of this config."),
        (
            {"type": "Glow"},
            "type is 'Glow'; it must be one of FlowExperiment, VideoFlowExperiment, TokenFlowExperiment, "
            "MatchingExperiment, AutoencoderExperiment.",
        ),
    ],
)
def test_json_that_does_not_fit_is_named(experiment, change, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        experiments.from_json({**experiment.to_json(), **change})
    assert one_sentence(error) == message


def test_overrides_change_nothing_else(experiment):
    changed = experiments.override(experiment, ["--train.steps", "9", "--optim.lr=1e-3"])
    assert settings.differences(experiment.to_json(), changed.to_json()) == [
        "optim.lr: 0.002 -> 0.001",
        "train.steps: 2000 -> 9",
    ]
    assert experiments.override(experiment, []) == experiment


@pytest.mark.parametrize(
    "arguments",
    [
        ["--train.steps", "4000"],
        ["--log.log_every=7", "--log.keep=1", "--log.progress=false"],
        ["--sampling.num=3", "--sampling.temperature=0.5"],
        ["--name=other", "--reference={'fid': 2.0}"],
        [],
    ],
)
def test_a_resumed_run_may_change_what_its_state_does_not_hold(experiment, arguments):
    experiments.override(experiment, arguments).check_resumable(experiment.to_json())


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        (["--train.batch_size=32"], ["train.batch_size: 64 -> 32"]),
        (["--train.seed=1", "--optim.lr=0.5"], ["optim.lr: 0.002 -> 0.5", "train.seed: 0 -> 1"]),
        (["--model.width=32", "--train.steps=9", "--log.keep=2"], ["model.width: 64 -> 32"]),
        (["--data.eval_fraction=0"], ["data.eval_fraction: 0.1 -> 0.0"]),
        (["--model.image_size=(8, 8)"], ["model.image_size: 8 -> [8, 8]"]),
    ],
)
def test_a_resumed_run_may_not_change_anything_else(experiment, arguments, changes):
    with pytest.raises(ValueError, match="started with another config") as error:
        experiments.override(experiment, arguments).check_resumable(experiment.to_json())
    assert f"({'; '.join(changes)})" in one_sentence(error)


def test_a_config_file_must_give_an_experiment(tmp_path):
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(FileNotFoundError, match="does not exist") as error:
            experiments.load_config(path)
        one_sentence(error)
    for text in ("x = 1\n", "def config():\n    return 'digits'\n"):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(ValueError, match=r"must define a function config\(\) that returns one of") as error:
            experiments.load_config(tmp_path / "mine.py")
        one_sentence(error)


def test_values_that_depend_on_each_other_are_checked_together(experiment):
    # Neither value fits the other's default: 8 pixels in patches of 2.
    changed = experiments.override(experiment, ["--model.patch_size", "3", "--model.image_size", "9"])
    assert (changed.model.patch_size, changed.model.image_size) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--matching.path=SchroedingerBridge", "--matching.loss=FlowMatching", "--matching.loss.prediction=x1"],
            "matching.loss.prediction is 'x1', but the path adds noise (sigma 1.0), which",
        ),
        (["--matching.loss.guidance_weight=1"], "matching.loss.guidance_weight is 1.0, but the model has no classes"),
        (["--sampling.guidance=1"], "sampling.guidance is 1.0, but the model has no classes to guide towards"),
        (["--sampling.num_steps=1"], "sampling.num_steps is 1; it must be at least 2 for times 'edm'"),
        (
            ["--model.num_classes", "2"],
            "model has event_shape (2,), num_classes 2 and context None; for points, they must be (2,), 0 and None.",
        ),
        (
            ["--model.intervals", "false"],
            "matching.loss is MeanFlow, but this MLP accepts no intervals; set model.intervals to true.",
        ),
        (
            ["--matching.loss=FlowMatching", "--sampling.method=mean_flow", "--sampling.times=uniform"],
            "works only if matching",
        ),
        (
            ["--sampling.method", "dopri5"],
            "sampling.times is 'edm', but dopri5 uses no time grid; set it to 'uniform'.",
        ),
        (
            ["--sampling.guidance_interval", "(0.9, 0.1)"],
            "sampling.guidance_interval is (0.9, 0.1); give two increasing",
        ),
    ],
)
def test_parts_that_do_not_belong_together_are_named(arguments, message, untyped):
    with pytest.raises(ValueError, match=r"\w") as error:
        experiments.override(VELOCITY, arguments)
    assert message in one_sentence(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": SamplingConfig()}, "sampling is SamplingConfig("),
        ({"data": DataConfig()}, "this MLP trains on points in the plane; give a PointsConfig."),
        ({"data": ClipsConfig()}, "data is ClipsConfig("),
        ({"model": TARFlowConfig(image_size=8)}, "model is TARFlowConfig("),
        ({"matching": None}, "matching is None; it must be a MatchingConfig."),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_experiments_take_only_their_own_parts(changes, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        dataclasses.replace(VELOCITY, **changes)
    assert message in one_sentence(error)


def test_groups_of_another_kind_are_no_fields():
    with pytest.raises(TypeError, match="matching"):
        dataclasses.replace(BASE, matching=MatchingConfig())
    with pytest.raises(ValueError, match=r"matching\.loss is not a field"):
        experiments.override(BASE, ["--matching.loss", "MeanFlow"])


def test_a_config_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert experiments.load_config("tarflow_digits") == experiments.load_config(DIGITS)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*tarflow_digits") as error:
        experiments.load_config("tarflow_digit")
    one_sentence(error)
