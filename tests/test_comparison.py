"""Comparisons of samples with data: what is computed again, refused, or told beside the numbers."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from flowgen.data import ArrayDataset, DataConfig, load
from flowgen.evaluation import feature_statistics, frechet_distance, save_statistics
from flowgen.experiments import FlowExperiment
from flowgen.experiments.comparison import compare_samples, open_comparison
from flowgen.experiments.distances import draw_features, pixel_features
from flowgen.experiments.flow import ImageEvaluateOptions
from flowgen.experiments.images import TrainingImages, training_images
from flowgen.flows import TARFlowConfig

PIXELS = ImageEvaluateOptions(samples=30, features="pixels")


def images(count, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 1), np.uint8)
    return ArrayDataset(levels, np.full(count, -1, np.int32))


def vectors(dataset):
    return np.asarray(dataset[np.arange(len(dataset))].x).reshape(len(dataset), -1) / 127.5 - 1


def drawn(key, numbers, cond):
    """Samples that differ for each number."""
    return np.stack([np.random.default_rng(number).uniform(-1, 1, (2, 2, 1)) for number in numbers]), "drawn"


def compared(data, options=PIXELS, train=None, num=30):
    named = TrainingImages(train or data, "training images")
    comparison = open_comparison(options, data, lambda: named)
    return compare_samples(drawn, comparison, num, options, conditions=None, how="")


@pytest.mark.usefixtures("untyped")
def test_statistics_are_computed_again_if_files_change_and_keep_their_size(tmp_path):
    """Each of 70 files is read, not some of them."""
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images(70).x[..., 0]):
        Image.fromarray(image).save(tmp_path / "images" / f"{index:02}.bmp")
    options = dataclasses.replace(PIXELS, cache=str(tmp_path / "cache"))

    def distances():
        config = DataConfig("folder", path=str(tmp_path / "images"), eval_fraction=0.0)
        data = load(config, image_size=(2, 2), channels=1, split="all")
        expected = frechet_distance(drawn(None, range(30), None)[0].reshape(30, -1), vectors(data))
        return compared(data, options).metrics["frechet"].value, expected

    first, expected = distances()
    assert first == pytest.approx(expected, rel=1e-4)
    assert distances()[0] == first
    assert len(list((tmp_path / "cache").iterdir())) == 1
    Image.new("L", (2, 2), 255).save(tmp_path / "images" / "01.bmp")
    changed, expected = distances()
    assert changed == pytest.approx(expected, rel=1e-4)
    assert changed != first


@pytest.mark.usefixtures("untyped")
def test_statistics_of_other_features_are_refused_before_a_classifier_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("flowgen.experiments.comparison.train_features", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr("flowgen.experiments.comparison.CLASSIFIER_FEATURES", 4)
    labels = np.arange(30, dtype=np.int32) % 2
    data = dataclasses.replace(images(30), labels=labels, class_names=("cat", "dog"))
    for extractor, name in (("pixels", "classifier"), ("pixels", "auto"), ("classifier abc", "pixels")):
        statistics = feature_statistics([vectors(data)], 30, about={"extractor": extractor})
        save_statistics(tmp_path / "a.npz", statistics)
        options = dataclasses.replace(PIXELS, features=name, reference=str(tmp_path / "a.npz"))
        with pytest.raises(ValueError, match=f"the extractor '{extractor}', but that of --features {name} is"):
            compared(data, options)


@pytest.mark.usefixtures("untyped")
def test_an_unknown_extractor_of_a_reference_is_told(tmp_path):
    data = images(30)
    for about, told in (({}, "unknown"), ({"extractor": "pixels"}, "pixels")):
        save_statistics(tmp_path / "a.npz", feature_statistics([vectors(data)], 30, about=about))
        evaluation = compared(data, dataclasses.replace(PIXELS, reference=str(tmp_path / "a.npz")))
        assert evaluation.about["reference"] == {"of": "a.npz", "extractor": told}
        assert ("the extractor of the features of a.npz is unknown" in " ".join(evaluation.lines)) == (
            told == "unknown"
        )


@pytest.mark.usefixtures("untyped")
def test_covariances_of_few_vectors_are_told():
    for num, count, few in ((30, 30, []), (4, 30, ["samples"]), (30, 4, ["data"]), (3, 4, ["samples", "data"])):
        evaluation = compared(images(count), num=num)
        assert evaluation.about["singular_covariances"] == few
        told = any(line.startswith(f"too few {' and '.join(few)} for 4 features") for line in evaluation.lines)
        assert told == bool(few)


@pytest.mark.usefixtures("untyped")
def test_samples_that_are_not_finite_are_refused_before_their_features_are_computed():
    def broken(key, numbers, cond):
        samples, line = drawn(key, numbers, cond)
        samples[5, 0, 0], samples[6, 1, 1] = np.nan, np.inf
        return samples, line

    with pytest.raises(ValueError, match="2 of samples 0 to 9 have values that are not finite"):
        draw_features(broken, pixel_features(), images(30), 10)


def test_neighbours_are_those_of_the_training_images():
    train = images(12, seed=1)
    evaluation = compared(images(30), dataclasses.replace(PIXELS, neighbours=2), train)
    found = evaluation.about["neighbours"]
    far = np.linalg.norm(drawn(None, range(2), None)[0].reshape(2, 1, -1) - vectors(train), axis=2)
    np.testing.assert_array_equal(found["positions"], np.argsort(far, axis=1)[:, :7])
    assert found["of"] == "training images"
    assert any(line.startswith("nearest training images of 2 samples") for line in evaluation.lines)


def test_training_images_are_those_of_the_run_or_told(caplog):
    model = TARFlowConfig(image_size=8, channels=1)
    digits, lost = DataConfig("digits"), DataConfig("folder", path="no such folder")
    experiment = FlowExperiment(name="digits", model=model, data=dataclasses.replace(digits, eval_fraction=0.5))

    def opened(trained_on, split):
        found = training_images(experiment, trained_on, split, lambda one, split: one.dataset(split))
        return len(found.dataset), found.name

    whole = len(experiment.dataset("all"))
    held_out = len(dataclasses.replace(experiment, data=digits).dataset("eval"))
    for split in ("eval", "train", "all"):
        assert opened(digits, split) == (whole - held_out, "training images")
        assert opened(None, split) == (len(experiment.dataset("train")), "training images")
    assert not caplog.text
    assert opened(lost, "all") == (whole, "evaluated images")
    assert "no such folder" in caplog.text
    assert opened(lost, "eval") == (len(experiment.dataset("train")), "images of the train split")
    with pytest.raises(FileNotFoundError):
        training_images(dataclasses.replace(experiment, data=lost), None, "eval", lambda one, split: one.dataset(split))
