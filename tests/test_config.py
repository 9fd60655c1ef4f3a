"""An experiment is plain data: JSON gives it back exactly, and what does not fit is named in one sentence."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from flowgen import config, fields
from flowgen.codecs import VideoAutoencoderConfig
from flowgen.config import (
    AutoencodingConfig,
    Experiment,
    LikelihoodConfig,
    SamplingConfig,
    SolverConfig,
    TextConfig,
    TrainedCodec,
)
from flowgen.data import ClipsConfig, DataConfig, PointsConfig
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.matching import (
    CondOT,
    GibbsWeights,
    LogitNormal,
    MatchingConfig,
    MeanFlow,
    MinibatchOT,
    MLPConfig,
    Polynomial,
)
from flowgen.training import LogConfig, OptimConfig, TrainConfig

MODELS = "TARFlow, STARFlow, STARFlowV, MLP, DiT, UNet, Autoencoder, VideoAutoencoder"
DIGITS = Path(__file__).parent.parent / "configs/tarflow_digits.py"
# No field keeps its default, so that a field which JSON loses is seen.
UNUSUAL = Experiment(
    name="unusual",
    model=TARFlowConfig(
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
        source="npz",
        path="pictures/set ü.npz",
        flip=True,
        crop="none",
        on_corrupt="skip",
        eval_fraction=1 / 3,
        in_memory_bytes=1,
        classes=("ü", "0"),
    ),
    optim=OptimConfig(
        lr=1e-3,
        min_lr=1e-20,
        schedule="constant",
        warmup_steps=3,
        weight_decay=0.0,
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
    train=TrainConfig(steps=7, batch_size=12, seed=2**32 - 1, label_dropout=0.25, accumulation=2),
    log=LogConfig(
        log_every=1, eval_every=2, sample_every=3, checkpoint_every=4, keep=5, tensorboard=False, progress=False
    ),
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
VELOCITY = Experiment(
    name="velocity",
    model=MLPConfig(dim=2, width=7, num_layers=5, spans=True),
    data=PointsConfig(source="moons", target="five_gaussians"),
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
LATENT = Experiment(
    name="latent",
    model=STARFlowConfig(image_size=(4, 6), layers_per_block=(1, 0, 2), text_dim=5, text_length=7, rope_base_grid=3.5),
    data=DataConfig(source="folder", path="pictures", aspects=True),
    likelihood=LikelihoodConfig(norm_penalty=1e-4, noise_weight=True),
    codec=TrainedCodec("runs/ä"),
    text=TextConfig(encoder="words", truncate=False, noise_level=True, aspect=True),
    sampling=SamplingConfig(prompts=("ein Hündchen", "")),
)
CLIPS = Experiment(
    name="clips",
    model=STARFlowVConfig(image_size=(4, 6), layers_per_block=(1, 2), num_classes=10, frames=3, denoiser_layers=2),
    data=ClipsConfig(source="folder", path="videos", fps=12.5, hop=3, flip=True),
    likelihood=LikelihoodConfig(denoiser=OptimConfig(lr=1e-3)),
    codec=TrainedCodec("runs/ä", temporal_scale=0.6),
)
VIDEO_AUTOENCODER = Experiment(
    name="video autoencoder",
    model=VideoAutoencoderConfig(channels=1, widths=(8, 8), decoder_widths=(8, 8), halve_time=(True,)),
    data=ClipsConfig(),
    autoencoding=AutoencodingConfig(image_size=(16, 20), frames=5),
)
BASE = Experiment(
    name="base",
    model=TARFlowConfig(image_size=8, channels=1, patch_size=2, width=64, head_dim=32),
    optim=OptimConfig(lr=2e-3),
    train=TrainConfig(steps=2000, batch_size=64),
)
EXPERIMENTS = {
    "defaults": Experiment(name="defaults", model=TARFlowConfig(image_size=8)),
    "unusual": UNUSUAL,
    "digits": config.load(DIGITS),
    "shrunk": config.shrink(config.load(DIGITS)),
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


def one_sentence(error: pytest.ExceptionInfo) -> str:
    """The message, which must be a single line that ends in a full stop."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    return message


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_json_gives_the_same_experiment(name):
    given = EXPERIMENTS[name]
    text = json.dumps(given.to_json(), allow_nan=False)
    back = config.from_json(json.loads(text))
    assert back == given
    assert types_of(dataclasses.asdict(back)) == types_of(dataclasses.asdict(given))
    assert json.dumps(back.to_json(), allow_nan=False) == text


def test_the_unusual_experiment_covers_every_field():
    defaults = EXPERIMENTS["defaults"]
    unchanged = {name for name in fields.leaf_names(UNUSUAL) if _leaf(UNUSUAL, name) == _leaf(defaults, name)}
    # The first has one value so far; "both" is the only parts that the product rule takes; a TARFlow has one size, and
    # no texts.
    assert unchanged <= {"model.attention", "sampling.parts", "data.aspects", "sampling.prompts"}


def _leaf(value, name):
    for part in name.split("."):
        value = getattr(value, part)
    return value


def test_fields_left_out_take_defaults():
    plain = {"name": "short", "model": {"type": "TARFlow", "image_size": 8}}
    assert config.from_json(plain) == Experiment(name="short", model=TARFlowConfig(image_size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"stepz": 3}}, "train.stepz is not a field of this config; did you mean train.steps?"),
        ({"trian": {}}, "trian is not a field of this config; did you mean train?"),
        ({"train": {"steps": 2.5}}, "train.steps is 2.5; it must be an integer."),
        ({"train": {"steps": True}}, "train.steps is True; it must be an integer."),
        ({"train": {"steps": 0}}, "train.steps is 0; it must be at least 1."),
        ({"train": 3}, "train is 3; it must be a group of fields."),
        ({"optim": {"lr": "fast"}}, "optim.lr is 'fast'; it must be a number."),
        ({"optim": {"lr": float("nan")}}, "optim.lr is nan; it must be a number."),
        ({"optim": {"ema_warmup": 1}}, "optim.ema_warmup is 1; it must be true or false."),
        (
            {"sampling": {"plan": "fast"}},
            "sampling.plan is 'fast'; it must be 'sequential' or 'jacobi' or 'sliding' or 'auto'.",
        ),
        ({"model": {"type": "TARFlow"}}, "model.image_size is missing; give it a value."),
        (
            {"model": {"type": "Glow"}},
            f"model.type is 'Glow'; choose one of {MODELS}.",
        ),
        (
            {"model": {}},
            f"model.type is None; choose one of {MODELS}.",
        ),
        ({"data": {"type": "Sound"}}, "data.type is 'Sound'; choose one of Data, Clips, Points."),
        ({"model": 3}, "model is 3; it must be a group of fields."),
        ({"reference": {"fid": "low"}}, "reference is {'fid': 'low'}; it must be a table of names to numbers."),
    ],
)
def test_json_that_does_not_fit_is_named(experiment, change, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        config.from_json({**experiment.to_json(), **change})
    assert one_sentence(error) == message


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--train.steps", "12"], "train.steps", 12),
        (["--train.steps", "1e4"], "train.steps", 10_000),
        (["--train.steps=1_000"], "train.steps", 1000),
        (["--optim.lr=3e-4"], "optim.lr", 3e-4),
        (["--optim.lr", "1"], "optim.lr", 1.0),
        (["--optim.ema_warmup", "False"], "optim.ema_warmup", False),
        (["--data.flip=true"], "data.flip", True),
        (["--name", "12"], "name", "12"),
        (["--name", "none"], "name", "none"),
        (["--sampling.blocks", "none"], "sampling.blocks", None),
        (["--data.path=a=b c"], "data.path", "a=b c"),
        (["--data.path="], "data.path", ""),
        (["--model.image_size", "16"], "model.image_size", 16),
        (["--model.image_size", "(8, 12)"], "model.image_size", (8, 12)),
        (["--model.image_size=[8, 12]"], "model.image_size", (8, 12)),
        (["--sampling.window", "4"], "sampling.window", 4),
        (["--sampling.window", "4", "--sampling.window=none"], "sampling.window", None),
        (["--optim.min_lr", "-0"], "optim.min_lr", 0.0),
        (["--model.activation", "gelu"], "model.activation", "gelu"),
        (["--reference={'fid': 3}"], "reference", {"fid": 3.0}),
    ],
)
def test_overrides_take_the_type_of_the_field(experiment, arguments, name, value):
    changed = config.override(experiment, arguments)
    assert _leaf(changed, name) == value
    assert type(_leaf(changed, name)) is type(value)
    assert _leaf(config.override(changed, [f"--{name}={_leaf(experiment, name)}"]), name) == _leaf(experiment, name)


def test_overrides_change_nothing_else(experiment):
    changed = config.override(experiment, ["--train.steps", "9", "--optim.lr=1e-3"])
    assert fields.differences(experiment.to_json(), changed.to_json()) == [
        "optim.lr: 0.002 -> 0.001",
        "train.steps: 2000 -> 9",
    ]
    assert config.override(experiment, []) == experiment


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optim.lrr", "1"], "optim.lrr is not a field of this config; did you mean optim.lr?"),
        (["--lr", "1"], "lr is not a field of this config; did you mean optim.lr?"),
        (["--train.bach_size=4"], "train.bach_size is not a field of this config; did you mean train.batch_size?"),
        (["--zzzzzzzz", "1"], "zzzzzzzz is not a field of this config."),
        (["--train.steps.more", "1"], "train.steps.more is not a field of this config; did you mean train.steps?"),
        (["--train.steps", "many"], "train.steps is 'many'; it must be an integer."),
        (["--train.steps", "1.5"], "train.steps is '1.5'; it must be an integer."),
        (["--train.steps", "true"], "train.steps is 'true'; it must be an integer."),
        (["--train.steps="], "train.steps is ''; it must be an integer."),
        (["--optim.lr", "inf"], "optim.lr is 'inf'; it must be a number."),
        (["--optim.lr", "1e999"], "optim.lr is '1e999'; it must be a number."),
        (["--data.flip", "1"], "data.flip is '1'; it must be true or false."),
        (
            ["--model.image_size", "(8, 8, 8)"],
            "model.image_size is '(8, 8, 8)'; it must be an integer or a tuple of 2 integers.",
        ),
        (
            ["--sampling.plan", "fast"],
            "sampling.plan is 'fast'; it must be 'sequential' or 'jacobi' or 'sliding' or 'auto'.",
        ),
        (["--train.steps"], "--train.steps has no value; write --train.steps VALUE."),
        (["--train.steps", "--optim.lr", "1"], "--train.steps has no value; write --train.steps VALUE."),
        (["steps=3"], "'steps=3' is not understood; overrides look like --optim.lr 3e-4."),
        (["--"], "'--' is not understood; overrides look like --optim.lr 3e-4."),
        (["--train.steps", "0"], "train.steps is 0; it must be at least 1."),
        (["--optim.b2", "1"], "optim.b2 is 1.0; it must be below 1."),
        (["--sampling.temperature=-1"], "sampling: guidance temperature is -1.0; it must be positive."),
    ],
)
def test_overrides_that_do_not_fit_are_named(experiment, arguments, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        config.override(experiment, arguments)
    assert one_sentence(error) == message


def test_a_group_lists_its_fields(experiment):
    with pytest.raises(ValueError, match="is a group") as error:
        config.override(experiment, ["--train", "1"])
    for name in dataclasses.fields(TrainConfig):
        assert f"--train.{name.name}" in one_sentence(error)


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
    config.override(experiment, arguments).check_resumable(experiment.to_json())


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
    with pytest.raises(ValueError, match="begun with another config") as error:
        config.override(experiment, arguments).check_resumable(experiment.to_json())
    assert f"({'; '.join(changes)})" in one_sentence(error)


def test_a_config_file_must_give_an_experiment(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist") as error:
        config.load(tmp_path / "absent.py")
    one_sentence(error)
    (tmp_path / "empty.py").write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"must define config\(\)") as error:
        config.load(tmp_path / "empty.py")
    one_sentence(error)


@dataclass(frozen=True)
class _Inner:
    pair: tuple[int, str] = (1, "a")
    many: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Outer:
    inner: _Inner = _Inner()
    either: int | float | None = None
    table: dict[str, int] = field(default_factory=dict)
    choice: Literal["on", 2] = "on"


@pytest.mark.parametrize(
    "value",
    [
        _Outer(),
        _Outer(inner=_Inner(pair=(3, ""), many=(1.0, 0.1)), either=2.5, table={"a": 1}, choice=2),
        _Outer(either=3),
    ],
)
def test_fields_round_trip_without_knowing_flowgen(value):
    back = fields.from_plain(_Outer, json.loads(json.dumps(fields.to_plain(value))))
    assert back == value
    assert types_of(dataclasses.asdict(back)) == types_of(dataclasses.asdict(value))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"inner": {"pair": [1]}}, "inner.pair is [1]; it must be a tuple of 2 integers."),
        ({"inner": {"many": ["a"]}}, "inner.many is ['a']; it must be a tuple of numbers."),
        ({"either": "3"}, "either is '3'; it must be an integer or a number or none."),
        ({"table": {"a": 0.5}}, "table is {'a': 0.5}; it must be a table of names to integers."),
        ({"choice": "off"}, "choice is 'off'; it must be 'on' or 2."),
    ],
)
def test_fields_name_what_does_not_fit(plain, message):
    with pytest.raises(ValueError, match="must be") as error:
        fields.from_plain(_Outer, plain)
    assert one_sentence(error) == message


def test_values_that_depend_on_each_other_are_checked_together(experiment):
    # Neither value fits the other's default: 8 pixels in patches of 2.
    changed = config.override(experiment, ["--model.patch_size", "3", "--model.image_size", "9"])
    assert (changed.model.patch_size, changed.model.image_size) == (3, 9)


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["--matching.coupling", "MinibatchOT"], "matching.coupling", MinibatchOT()),
        (
            ["--matching.coupling.method=sinkhorn", "--matching.coupling", "MinibatchOT"],
            "matching.coupling",
            MinibatchOT(method="sinkhorn"),
        ),
        (["--matching.coupling.epsilon=none"], "matching.coupling.epsilon", None),
        (["--matching.path=CondOT", "--matching.path.sigma=0.5"], "matching.path", CondOT(sigma=0.5)),
        (["--sampling.guidance_interval=(0.2, 0.3)"], "sampling.guidance_interval", (0.2, 0.3)),
    ],
)
def test_a_group_of_several_types_takes_the_name_of_one(arguments, name, value):
    assert _leaf(config.override(VELOCITY, arguments), name) == value


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--matching.time", "3"],
            "--matching.time is a group, and '3' is no type of it; name its type, Uniform, LogitNormal, Shifted, or "
            "set one of --matching.time.mean, --matching.time.std.",
        ),
        (
            ["--matching.time", "logitnormal"],
            "--matching.time is a group, and 'logitnormal' is no type of it (did you mean LogitNormal?); name its",
        ),
        (
            ["--matching.coupling.epsilom", "2"],
            "matching.coupling.epsilom is not a field of this config; did you mean ",
        ),
        (["--matching.coupling", "OT"], "'OT' is no type of it (did you mean MinibatchOT?)"),
        (["--matching.copling", "Independent"], "did you mean matching.coupling?"),
        (
            ["--matching.coupling", "Independent", "--matching.coupling.epsilon", "2"],
            "matching.coupling.epsilon is not a field of Independent, which matching.coupling is; GibbsWeights and "
            "MinibatchOT have it, so give --matching.coupling GibbsWeights too.",
        ),
        (
            ["--matching.path=SchroedingerBridge", "--matching.loss=FlowMatching", "--matching.loss.prediction=x1"],
            "matching.loss.prediction is 'x1', but the path has noise of its own, sigma 1.0,",
        ),
        (["--matching.loss.guidance_weight=1"], "matching.loss.guidance_weight is 1.0, but the model has no classes"),
        (["--sampling.guidance=1"], "sampling.guidance is 1.0, but the model has no classes to guide to"),
        (["--sampling.num_steps=1"], "sampling.num_steps is 1; the grid 'edm' needs at least 2"),
        (["--matching.coupling.epsilon", "-1"], "matching.coupling.epsilon is -1.0; it must be positive and finite."),
        (["--matching.path.degree", "0.5"], "matching.path.degree is 0.5; a polynomial path needs at least 1."),
        (["--data.source", "circles"], "data.source is 'circles'; it must be 'normal' or 'eight_gaussians' or "),
        (["--model.num_classes", "2"], "model has dim 2 and num_classes 2; these points have 2 and none."),
        (["--model.spans", "false"], "matching.loss is MeanFlow, which needs model.spans true; this MLP has no spans."),
        (["--matching.loss=FlowMatching", "--sampling.method=mean_flow", "--sampling.times=uniform"], "needs matching"),
        (["--sampling.method", "dopri5"], "sampling.times is 'edm', but dopri5 takes no grid; set it to 'uniform'."),
        (["--sampling.num_steps", "0"], "sampling.num_steps is 0; it must be a whole number of at least 1."),
        (["--sampling.rtol", "0"], "sampling.rtol is 0.0; it must be positive and finite."),
        (["--sampling.guidance_interval", "(0.9, 0.1)"], "sampling.guidance_interval is (0.9, 0.1); give increasing"),
    ],
)
def test_parts_that_do_not_belong_together_are_named(arguments, message, untyped):
    with pytest.raises(ValueError, match=r"\w") as error:
        config.override(VELOCITY, arguments)
    assert message in one_sentence(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matching": None}, "matching is missing; a MLP is trained by flow matching, so give a MatchingConfig."),
        ({"sampling": SamplingConfig()}, "a MLP is sampled by a solver, so give a SolverConfig."),
        ({"data": DataConfig()}, "a MLP is trained on points in the plane, so give a PointsConfig."),
        ({"model": TARFlowConfig(image_size=8)}, "a TARFlow is trained on pictures, so give a DataConfig."),
        ({"model": TARFlowConfig(image_size=8), "data": DataConfig()}, "matching is given, but a TARFlow is trained"),
        (
            {"model": TARFlowConfig(image_size=8), "data": DataConfig(), "matching": None},
            "a TARFlow is decoded, so give a SamplingConfig.",
        ),
    ],
)
def test_models_take_only_their_own_parts(changes, message):
    with pytest.raises(ValueError, match=r"\w") as error:
        dataclasses.replace(VELOCITY, **changes)
    assert message in one_sentence(error)
