"""Every shipped config builds abstractly, round-trips, has its published size, and its debug shrink trains."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from PIL import Image

import flowgen
from flowgen.data import load
from flowgen.data.dataset import captions_in
from flowgen.experiments import from_json, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))

OF_FOLDERS = [path for path in CONFIGS if 'DataConfig(name="folder"' in path.read_text()]
RECORDED = CONFIGS[0].parents[1] / "benchmarks" / "results" / "configs.json"
ROUNDED = 1e-3  # expected metrics have four digits
MEANS = {"starflow_digits"}  # expects the mean over several seeds
SEEDS_APART = 0.05  # its docstring gives the metric of each seed

# Parameters counted by instantiating the published code with the published command lines.
PUBLISHED_SIZES = {
    "cfm_cifar10": 35_746_307,
    "tarflow_imagenet64_likelihood": 460_142_784,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_imagenet64_classes": 466_286_784,
    "tarflow_imagenet128_classes": 823_927_552,
    "tarflow_afhq256": 463_481_856,
    "tarflow_mnist": 3_227_776,
    "starflow_t2i_256": 3_858_281_544,
    "starflow_imagenet256": 1_412_255_816,
    "starflow_imagenet512": 1_412_255_816,
    "starflow_v_480p": 6_890_096_528,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    experiment = load_config(path)
    assert experiment.name == path.stem
    assert from_json(json.loads(json.dumps(experiment.to_json()))) == experiment
    assert f"configs/{path.name}" in path.read_text()
    variables = jax.eval_shape(lambda: flowgen.init(experiment.build(), jax.random.key(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == PUBLISHED_SIZES.get(path.stem, size)
    small = experiment.debug()
    assert type(small.model) is type(experiment.model)
    for name in {"num_classes", "text_dim"} & set(vars(experiment.model)):
        assert bool(getattr(small.model, name)) == bool(getattr(experiment.model, name))
    kept = {"scale_parameterisation", "attention", "dtype", "intervals", "scale_shift_norm"} & set(
        vars(experiment.model)
    )
    assert all(getattr(small.model, name) == getattr(experiment.model, name) for name in kept)
    assert getattr(small, "matching", None) == getattr(experiment, "matching", None)
    variables = jax.eval_shape(lambda: flowgen.init(small.build(), jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) < 200_000
    assert small.job().objective is not None


def test_expected_metrics_are_those_of_the_recorded_run():
    for row in json.loads(RECORDED.read_text()):
        experiment = load_config(row["config"])
        assert (experiment.train.seed, experiment.train.steps) == (row["seed"], row["steps"])
        apart = ROUNDED if row["config"] not in MEANS else SEEDS_APART
        for name in experiment.reference.keys() & row["metrics"].keys():
            assert experiment.reference[name] == pytest.approx(row["metrics"][name], rel=apart), row["config"]


def test_every_published_size_has_its_config():
    assert set(PUBLISHED_SIZES) <= {path.stem for path in CONFIGS}


@pytest.mark.parametrize("path", OF_FOLDERS, ids=lambda path: path.stem)
def test_the_data_of_a_config_open_a_real_folder(path, tmp_path):
    """The debug form, which the other tests train, has other data."""
    experiment = load_config(path)
    described = bool(getattr(experiment.model, "text_dim", 0))
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (12, 16), (number, 9, 99)).save(tmp_path / name / f"{number}.png")
            if described:
                (tmp_path / name / f"{number}.txt").write_text(f"a {name}")
    data = dataclasses.replace(experiment.data, path=str(tmp_path))
    dataset = load(data, image_size=(16, 16), channels=3, split="train")
    assert len(dataset) >= 30
    assert set(captions_in(dataset)) == ({"a cat", "a dog"} if described else set())
