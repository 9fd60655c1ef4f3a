"""Fields of the config in every command that asks them: their help, their names, and what conflicts."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import typing
import warnings
from pathlib import Path

import jax
import laws
import numpy as np
import pytest
from commands import outcome_of, refused, succeed
from conftest import rows

from flowgen import checkpoint, experiments, settings
from flowgen.attention import CAUSAL_KERNEL_NAMES, KERNELS
from flowgen.cli import EXIT_BROKEN_PIPE, EXIT_MISTAKE, main
from flowgen.data import PointsConfig
from flowgen.experiments import (
    AutoencoderExperiment,
    FlowExperiment,
    MatchingExperiment,
    SamplingConfig,
    SolverConfig,
    TokenFlowExperiment,
    VideoFlowExperiment,
)
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.matching import DiTConfig, MLPConfig
from flowgen.nn import init
from flowgen.runs import CHECKPOINTS, CheckpointStore
from flowgen.settings import help_of
from flowgen.training.step import init_state

PROJECT = Path(__file__).parent.parent
CONFIGS = sorted((PROJECT / "configs").glob("*.py"))
CLIPS = PROJECT / "configs" / "starflow_v_bouncing.py"


def config_classes(annotation):
    """All dataclasses that a field of an experiment may hold, at any depth."""
    if dataclasses.is_dataclass(annotation):
        yield annotation
        for field in typing.get_type_hints(annotation).values():
            yield from config_classes(field)
    for member in typing.get_args(annotation):
        yield from config_classes(member)


EXPERIMENTS = (
    FlowExperiment,
    VideoFlowExperiment,
    TokenFlowExperiment,
    MatchingExperiment,
    AutoencoderExperiment,
)
CLASSES = sorted({cls for kind in EXPERIMENTS for cls in config_classes(kind)}, key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_field_has_a_line_of_help(cls):
    about = help_of(cls)
    for field in dataclasses.fields(cls):
        assert about.get(field.name, "").endswith("."), field.name
        assert "\n" not in about[field.name]


@pytest.mark.parametrize(
    ("cls", "names"),
    [
        (TARFlowConfig, CAUSAL_KERNEL_NAMES),
        (STARFlowConfig, CAUSAL_KERNEL_NAMES),
        (DiTConfig, ("softmax", "soft", *(name for name in KERNELS if name != "retention"))),
    ],
)
def test_the_help_of_attention_names_what_the_model_takes(cls, names):
    choices = {setting.name: setting.choices for setting in settings.settings(cls(image_size=8))}["attention"]
    assert set(map(repr, names)) <= set(choices.split(" or "))
    for name in names:
        cls(image_size=8, attention=name)
    for name in {"soft", *KERNELS, "gated", "delta"} - set(names):
        with pytest.raises(ValueError, match="attention"):
            cls(image_size=8, attention=name)


# One of each kind whenever anything changes.
SHOWN = ("autoencoder_digits", "cfm_moons", "starflow_t2i_256", "starflow_v_bouncing", "tarflow_digits", "two_moons")


@pytest.mark.parametrize(
    "path", rows(CONFIGS, [path for path in CONFIGS if path.stem not in SHOWN]), ids=lambda path: path.stem
)
def test_info_prints_options_that_give_the_experiment_again(path):
    experiment = experiments.load_config(path)
    groups = dict.fromkeys(setting.name.partition(".")[0] for setting in settings.settings(experiment))
    lines = succeed("info --config", path, *groups).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    assert all(len(option) == 2 for option in words)
    assert [option for option, _ in words] == [f"--{setting.name}" for setting in settings.settings(experiment)]
    # The type of a group stands for its defaults, and is what it is already.
    leaves = {f"--{name}" for name in settings.leaf_names(experiment)}
    given = [word for option in words if option[0] in leaves for word in option]
    assert experiments.override(experiment, given) == experiment
    for line in lines:
        assert line.partition("  # ")[2].strip(), line  # a help
        assert line.endswith("]"), line  # and what the field may be


@pytest.mark.parametrize(
    ("command", "names"),
    [
        ("train", ["train.steps", "optim.lr", "log.keep"]),
        (
            "sample",
            [field.name for cls in (SamplingConfig, SolverConfig) for field in dataclasses.fields(cls)],
        ),
    ],
)
def test_help_lists_fields(capsys, command, names):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    for name in names:
        assert f"--{name} " in shown


REFUSED_BATCHES = {
    "--train.parallel fsdp --train.mesh 3,1": "64; it must be a multiple of 3 devices",
    "--train.parallel fsdp --train.mesh 2,3": "",
    "--train.accumulation 48": r"64; it must be a multiple of 4 devices × train.accumulation 48 = 192\.$",
}


@pytest.mark.parametrize(("words", "sentence"), REFUSED_BATCHES.items())
def test_info_tells_that_training_refuses_a_batch(words, sentence):
    told = succeed(f"info --config tarflow_digits {words}")
    start = "training refuses this batch: train.batch_size is "
    assert ("training refuses" in told) == bool(sentence)
    assert re.search(f"^{start}{sentence}" if sentence else "", told, re.MULTILINE)


# Errors that belong together are told together.


TOGETHER = {
    "warm-ups": (
        lambda: experiments.override(experiments.load_config(CLIPS), ["--train.steps", "60"]),
        ["optim.warmup_steps is 100", "likelihood.denoiser.warmup_steps is 100", "train.steps, which is 60"],
    ),
    "sides": (lambda: TARFlowConfig(image_size=(9, 10), patch_size=4), ["height 9", "width 10"]),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_is_wrong_together_is_told_at_once(name):
    make, parts = TOGETHER[name]
    with pytest.raises(ValueError, match=r"\w") as error:
        make()
    for part in parts:
        assert part in str(error.value)


def test_the_sentence_of_a_warm_up_gives_options_that_fit():
    with pytest.raises(ValueError, match=r"warmup") as error:
        experiments.override(experiments.load_config(CLIPS), ["--train.steps", "60"])
    options = str(error.value).partition("so add ")[2].rstrip(".").split()
    assert experiments.override(experiments.load_config(CLIPS), ["--train.steps", "60", *options]).train.steps == 60


# Sampling fields in `sample` and `evaluate`.


@pytest.fixture(scope="module")
def flow_run(tmp_path_factory):
    """A run of a tiny class flow that was never trained, whose parameters are no zeros."""
    model = TARFlowConfig(
        image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=10
    )
    return written(tmp_path_factory, FlowExperiment(name="flow", model=model, sampling=SamplingConfig(num=4)))


@pytest.fixture(scope="module")
def points_run(tmp_path_factory):
    """A run of a tiny velocity network that was never trained."""
    model = MLPConfig(width=8, num_layers=1)
    experiment = MatchingExperiment(
        name="points", model=model, data=PointsConfig(), sampling=SolverConfig(num=8, num_steps=3)
    )
    return written(tmp_path_factory, experiment)


def written(tmp_path_factory, experiment):
    path = tmp_path_factory.mktemp(experiment.name) / "run"
    checkpoint.write_run(path, experiment, laws.drawn(init, experiment.build(), jax.random.key(0)))
    return path


def drawn(tmp_path, run, *words):
    succeed("sample --checkpoint", run, "--out", tmp_path / "x.npz", *words)
    with np.load(tmp_path / "x.npz") as file:
        return file[file.files[0]]


SHORT_AND_DOTTED = {
    "num": ["2"],
    "guidance": ["0.5"],
    "plan": ["jacobi"],
    "denoise": ["0"],
}


@pytest.mark.parametrize("name", rows(SHORT_AND_DOTTED, ("guidance", "plan", "denoise")))
def test_short_and_dotted_names_mean_the_same(tmp_path, flow_run, name):
    value = SHORT_AND_DOTTED[name]
    short = drawn(tmp_path, flow_run, f"--{name}", *value)
    dotted = drawn(tmp_path, flow_run, f"--sampling.{name}", *value)
    np.testing.assert_array_equal(short, dotted)
    assert refused("sample --checkpoint", flow_run, f"--{name}", *value, f"--sampling.{name}", *value).startswith(
        f"flowgen: --{name} and --sampling.{name} set the same field"
    )


ONLY_DOTTED = {
    "rule": ["--sampling.rule", "product"],
    "parts": ["--sampling.parts=shift"],
    "anneal": ["--sampling.anneal", "true"],
    "temperature": ["--sampling.temperature", "0.5"],
    "blocks": ["--sampling.blocks", "(0,)"],
    "jacobi": ["--sampling.plan", "jacobi", "--sampling.window", "1", "--sampling.tol=0", "--sampling.init", "zeros"],
}


@pytest.mark.parametrize("name", rows(ONLY_DOTTED, ("parts", "anneal", "blocks")))
def test_every_field_of_sampling_reaches_the_samples(tmp_path, flow_run, name):
    plain = drawn(tmp_path, flow_run, "--sampling.guidance", "0.5")
    other = drawn(tmp_path, flow_run, "--guidance", "0.5", *ONLY_DOTTED[name])
    if name == "jacobi":  # another way to the same samples, to float32's rounding
        np.testing.assert_allclose(other, plain, rtol=1e-4, atol=1e-4 * np.abs(plain).max())
    else:
        assert np.abs(other - plain).max() > 1e-3 * np.abs(plain).max()


def test_solvers_take_their_fields(tmp_path, points_run):
    few = drawn(tmp_path, points_run, "--sampling.num_steps", "3", "--sampling.method", "euler")
    np.testing.assert_array_equal(few, drawn(tmp_path, points_run, "--num-steps", "3", "--method", "euler"))
    edm = drawn(tmp_path, points_run, "--sampling.times", "edm", "--sampling.method=euler")
    assert np.abs(edm - few).max() > 1e-4


REFUSED = {
    "another group": (["--model.width", "8"], "--model.width is not an option of this command"),
    "no option": (["more"], "'more' is not understood"),
    "an unknown field": (["--sampling.rules", "product"], "sampling.rules is not a field"),
    "a window without a plan": (["--sampling.window", "4"], "--window, --tol and --init need --plan jacobi"),
    "a value out of range": (["--sampling.temperature", "0"], "temperature is 0"),
    "a field of solvers": (["--sampling.num_steps", "4"], "sampling.num_steps is not a field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_do_not_fit_are_refused(tmp_path, flow_run, name):
    words, sentence = REFUSED[name]
    assert sentence in refused("sample --checkpoint", flow_run, "--out", tmp_path / "x.npz", *words)
    assert not (tmp_path / "x.npz").exists()


def test_guidance_towards_nothing_is_refused(tmp_path, tmp_path_factory):
    model = TARFlowConfig(image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2)
    run = written(tmp_path_factory, FlowExperiment(name="without", model=model))
    told = refused("sample --checkpoint", run, "--out", tmp_path / "x.npz", "--guidance", "1.5")
    assert "sampling.guidance is 1.5, but the model is conditioned on neither classes nor text" in told


@pytest.mark.parametrize("steps", [0, 1])
def test_guidance_that_was_not_trained_for_is_told(tmp_path, tmp_path_factory, flow_run, steps):
    _, variables, experiment = checkpoint.load(flow_run)
    run = written(tmp_path_factory, experiment)
    if steps:  # Otherwise, the weights were given, and may have been trained in any way.
        state = jax.tree.map(np.asarray, init_state(variables, experiment.optim, experiment.train.steps))
        with CheckpointStore(run / CHECKPOINTS) as store:
            store.save(steps, state.replace(step=np.int32(steps)), config=experiment.to_json())
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        told = outcome_of("sample --num 1 --guidance 1 --checkpoint", run, "--out", tmp_path / "x.npz")
    assert told.code == 0
    assert told.err.count("train.label_dropout is 0") == steps


EVALUATE_REFUSED = {
    "nothing is drawn": (["--sampling.guidance", "2"], "--sampling.guidance has no effect without samples"),
    "another count": (["--samples", "4", "--sampling.num", "2"], "--sampling.num has no effect in evaluate"),
    "another group": (["--optim.lr", "1"], "--optim.lr is not an option of this command"),
    "features of nothing": (["--features", "pixels"], "--features is pixels, but there are no samples; add --samples"),
    "the FID of nothing": (
        ["--features", "fid.pth"],
        "--features is fid.pth, but there are no samples and no such file; give the path",
    ),
    "neighbours of nothing": (["--neighbours", "2"], "--neighbours is 2, but there are no samples; add --samples"),
    "too many neighbours": (["--samples", "4", "--neighbours", "5"], "--neighbours is 5, but samples is 4; lower it"),
    "other features": (
        ["--samples", "4", "--features", "vgg"],
        "--features is 'vgg'; it must be auto, classifier",
    ),
    "no weights": (["--samples", "4", "--features", "fid.pth"], "There is no file 'fid.pth' of Inception v3 weights"),
    "no reference": (["--samples", "4", "--reference", "a.npz"], "There is no file 'a.npz' of reference statistics"),
    "no anomalies": (["--anomaly", "mnits"], "--anomaly is 'mnits', which is neither 'corrupted', a dataset such as"),
}


@pytest.mark.parametrize("name", EVALUATE_REFUSED)
def test_evaluate_refuses_what_it_does_not_ask(flow_run, name):
    words, sentence = EVALUATE_REFUSED[name]
    assert sentence in refused("evaluate --checkpoint", flow_run, *words)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_features")
def test_evaluate_draws_as_it_is_told(flow_run):
    told = succeed("evaluate --samples 20 --sampling.guidance 20 --checkpoint", flow_run)
    assert "guidance 20" in told
    plain = succeed("evaluate --samples 20 --checkpoint", flow_run)
    assert told.splitlines()[:2] == plain.splitlines()[:2]  # the likelihood is the same
    distances = [re.search(r"Fréchet distance of 20 samples (\S+)", lines)[1] for lines in (told, plain)]
    assert distances[0] != distances[1]


# Folders, pipes, and other environments.


@pytest.mark.parametrize("out", ["o/p/x.png", "o/p/x.npz"])
def test_the_folder_of_out_is_made(tmp_path, flow_run, out):
    succeed("sample --num 2 --checkpoint", flow_run, "--out", tmp_path / out, "--single", tmp_path / "s" / "t")
    assert (tmp_path / out).is_file()
    assert len(list((tmp_path / "s" / "t").iterdir())) == 2


@pytest.mark.parametrize("words", [["info", "--config", str(CLIPS)], ["--help"]], ids=" ".join)
def test_a_reader_that_has_left_is_no_mistake(words):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "flowgen", *words],
            stdout=writing,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
        )
    finally:
        os.close(writing)
    assert ended.stderr == ""
    # argparse itself passes over a help that it cannot write, if output is not buffered.
    assert ended.returncode in ((0, EXIT_BROKEN_PIPE) if "--help" in words else (EXIT_BROKEN_PIPE,))


@pytest.mark.parametrize("script", ["train.py --config configs/cfm_moons.py --workdir x", "sample.py --checkpoint x"])
def test_outside_the_environment_the_missing_package_is_named(script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-S", *script.split()]  # without the packages that are installed
    ended = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    assert ended.returncode == EXIT_MISTAKE
    assert re.match(r"flowgen: The package (jax|numpy) is not installed for ", ended.stderr)
    assert 'pip install -e ".[train]"' in ended.stderr
    assert ended.stderr.count("\n") == 1
