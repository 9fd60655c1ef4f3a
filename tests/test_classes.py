"""Labels are numbers of the names that a run keeps, whatever data they come from; a class is asked for by its name."""

import contextlib
import dataclasses
import json
import shutil
import zipfile

import jax
import numpy as np
import pytest
from commands import outcome_of, refused, succeed
from PIL import Image

from flowgen import checkpoint, experiments
from flowgen.data import (
    ArrayDataset,
    ClipsConfig,
    DataConfig,
    Moments,
    check_classes,
    found_classes,
    load,
    load_clips,
    told_once,
)
from flowgen.data.classes import parse_classes
from flowgen.data.latent_files import LatentsConfig, LatentWriter, read_latents
from flowgen.data.latents import Shard
from flowgen.evaluation import flow_bits_per_dim
from flowgen.experiments import FlowExperiment, VideoFlowExperiment, fit
from flowgen.experiments.drawing import drawn_classes
from flowgen.flows import STARFlowVConfig, TARFlowConfig
from flowgen.training import LogConfig, OptimConfig, TrainConfig, train

KNOWN = ("cat", "dog", "fox")
LEVELS = {"cat": 20, "dog": 120, "fox": 220, "zebra": 70}


def photos(root, *names, count=6):
    """Grey images with a little noise, of a level that is the class's."""
    for name in names:
        (root / name).mkdir(parents=True)
        noise = np.random.default_rng(0)
        for number in range(count):
            level = LEVELS[name] + noise.integers(-9, 10, (8, 8))
            Image.fromarray(level.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def everything(dataset):
    return dataset[np.arange(len(dataset))]


def of_folder(path, names, classes):
    photos(path, *names, count=1)
    return load(DataConfig("folder", path=str(path), classes=classes), image_size=(8, 8), channels=1, split="all")


def of_npz(path, names, classes):
    images = np.zeros((len(names), 8, 8), np.uint8)
    np.savez(f"{path}.npz", images=images, labels=np.arange(len(names)), class_names=list(names))
    return load(DataConfig("npz", path=f"{path}.npz", classes=classes), image_size=(8, 8), channels=1, split="all")


def encoded(path, names, labels=None):
    writer, count = LatentWriter(path), len(names)
    labels = np.arange(count, dtype=np.int32) if labels is None else labels
    moments = np.ones((count, 4, 4, 1), np.float32)
    writer.add("train", Shard(Moments(moments, moments), labels), kind="image")
    writer.finish(class_names=names)
    return path


def of_latents(path, names, classes):
    return read_latents(encoded(path, names), "train", classes)


MAKERS = [of_folder, of_npz, of_latents]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (KNOWN, (), [0, 1, 2]),
        (("dog", "fox"), KNOWN, [1, 2]),
        (("cat", "dog", "fox"), ("fox", "cat", "dog"), [1, 2, 0]),
        (("fox",), KNOWN, [2]),
    ],
    ids=["as found", "some", "another order", "one"],
)
def test_labels_are_mapped_by_name(make, names, classes, expected, tmp_path, caplog):
    dataset = make(tmp_path / "data", names, classes)
    assert everything(dataset).context.tolist() == expected
    assert everything(dataset).context.dtype == np.int32
    assert dataset.class_names == (classes or names)
    missing = [name for name in classes if name not in names]
    assert [name for name in KNOWN if name in caplog.text.replace(str(tmp_path), "")] == missing


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_a_class_that_is_not_known_is_refused_by_name(make, tmp_path):
    with pytest.raises(ValueError, match=r"the class zebra, but data\.classes lists only cat, dog, fox"):
        make(tmp_path / "data", ("cat", "zebra"), KNOWN)


def test_built_in_images_and_clips_are_mapped_by_name():
    names = tuple("9876543210")
    digits = load(DataConfig(), image_size=(8, 8), channels=1, split="all")
    turned = load(DataConfig(classes=names), image_size=(8, 8), channels=1, split="all")
    np.testing.assert_array_equal(turned.labels, 9 - digits.labels)
    shape = {"frames": 2, "image_size": (10, 10), "channels": 1, "split": "all"}
    clips, mapped = (load_clips(ClipsConfig(num=40, classes=classes), **shape) for classes in ((), names))
    np.testing.assert_array_equal(everything(mapped).context, 9 - everything(clips).context)
    with pytest.raises(ValueError, match=r"data\.name 'bouncing' has the class 9"):
        load_clips(ClipsConfig(num=40, classes=tuple("012345678")), **shape)


@pytest.mark.parametrize("classes", [("cat", "cat"), ("",), "cat"], ids=str)
@pytest.mark.parametrize("kind", [DataConfig, ClipsConfig])
@pytest.mark.usefixtures("untyped")
def test_names_that_are_none_are_refused(kind, classes):
    with pytest.raises(ValueError, match="classes"):
        kind(classes=classes)


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (np.arange(256, dtype=np.uint8), 256),
        (np.arange(-1, 128, dtype=np.int8), 128),
        (np.array([0, 32767], np.int16), 32768),
        (np.array([-1, -1]), 0),
    ],
    ids=["uint8", "int8", "int16", "none"],
)
def test_the_largest_label_of_a_type_counts(tmp_path, labels, classes):
    path = tmp_path / "a.npz"
    np.savez(path, images=np.zeros((len(labels), 8, 8), np.uint8), labels=labels)
    dataset = load(DataConfig("npz", path=str(path)), image_size=(8, 8), channels=1, split="all")
    assert len(dataset.class_names) == len(found_classes(DataConfig("npz", path=str(path)))) == classes
    np.testing.assert_array_equal(dataset.labels, labels)


@pytest.mark.parametrize("largest", [30_000_000, 2**62, 2**64 - 1])
def test_sparse_labels_are_refused_before_anything_is_made_of_them(tmp_path, largest):
    labels = np.array([0, largest], np.uint64)
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=labels)
    with pytest.raises(ValueError, match=rf"'labels' .* contains {largest}, which is too large for 2 images"):
        load(DataConfig("npz", path=str(tmp_path / "a.npz")), image_size=(8, 8), channels=1, split="all")


@pytest.mark.parametrize(
    ("names", "labels", "classes"),
    [
        (np.array(["a", "a"]), [0, 1], ()),
        (np.array(["a"]), [0, 1], ()),
        (np.array([[1, 2]]), [0, 1], ()),
        (None, [0, 3], ("a", "b")),
    ],
    ids=["twice", "too few", "numbers", "more than the run knows"],
)
def test_names_in_an_npz_that_do_not_fit_are_refused(tmp_path, names, labels, classes):
    more = {} if names is None else {"class_names": names}
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), labels=labels, **more)
    config = DataConfig("npz", path=str(tmp_path / "a.npz"), classes=classes)
    with pytest.raises(ValueError, match=r"data\.classes|'class_names' in data\.path"):
        load(config, image_size=(8, 8), channels=1, split="all")


def test_other_arrays_of_an_npz_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 8, 8), np.uint8), other=np.full(1000, 7, np.uint8))
    whole = (tmp_path / "a.npz").read_bytes()
    # Whoever reads the other array finds its checksum wrong.
    (tmp_path / "a.npz").write_bytes(whole.replace(bytes([7] * 1000), bytes([8] * 1000)))
    with np.load(tmp_path / "a.npz") as arrays, pytest.raises(zipfile.BadZipFile):
        _ = arrays["other"]
    assert len(load(DataConfig("npz", path=str(tmp_path / "a.npz")), image_size=(8, 8), channels=1, split="all")) == 2


@pytest.mark.parametrize("label", [-9, 3, 2**31 - 1])
def test_latents_with_labels_of_no_class_are_refused(tmp_path, label):
    path = encoded(tmp_path / "set", KNOWN, np.array([0, 1, label], np.int32))
    with pytest.raises(ValueError, match=r"label\.npy' has labels out of range for 3 classes"):
        read_latents(path, "train")


@pytest.mark.parametrize(("part", "value"), [("mean", np.nan), ("std", np.inf), ("std", -1.0)])
def test_latents_that_are_no_numbers_are_refused_when_they_are_read(tmp_path, part, value):
    path = encoded(tmp_path / "set", KNOWN)
    array = np.load(path / "train-00000" / f"{part}.npy")
    array[1, 2, 2] = value
    np.save(path / "train-00000" / f"{part}.npy", array)
    dataset = read_latents(path, "train")
    assert getattr(dataset[np.array([0, 2])].x, part).shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="train-00000' have a mean or std"):
        dataset[np.array([1])]


def test_classes_that_the_data_do_not_have_are_told(caplog):
    dataset = ArrayDataset(np.zeros((2, 2, 2, 1), np.uint8), np.arange(2, dtype=np.int32), class_names=("cat", "dog"))
    check_classes(dataset, 2)
    assert not caplog.records
    check_classes(dataset, 10)
    assert "model.num_classes is 10" in caplog.text
    assert "cat, dog" in caplog.text
    assert "set model.num_classes to 2" in caplog.text


def test_cached_latents_of_an_experiment_have_the_numbers_of_its_run(tmp_path):
    model = TARFlowConfig(image_size=4, channels=1, patch_size=2, width=16, head_dim=8, num_blocks=2, num_classes=3)
    data = LatentsConfig(str(encoded(tmp_path / "set", ("dog", "fox"))))
    fresh = FlowExperiment(name="latents", model=dataclasses.replace(model, noise_std=0.3), data=data)
    assert fresh.with_provenance().data.classes == ("dog", "fox")
    experiment = dataclasses.replace(fresh, data=dataclasses.replace(data, classes=KNOWN))
    assert experiment.with_provenance() == experiment
    assert experiment.flow_dataset("train")[np.arange(2)].context.tolist() == [1, 2]


def test_images_beside_clips_have_the_numbers_of_the_clips(tmp_path):
    tiny = {"patch_size": 4, "width": 40, "head_dim": 20, "layers_per_block": (1, 1)}
    names = ["7", "0"]
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 12, 12), np.uint8), labels=[0, 1], class_names=names)
    data = ClipsConfig(num=60, images=DataConfig("npz", path=str(tmp_path / "a.npz"), eval_fraction=0.0))
    model = STARFlowVConfig(image_size=12, channels=1, frames=3, num_classes=10, **tiny)
    _, stills = VideoFlowExperiment(name="clips", model=model, data=data).flow_dataset("train").buckets
    assert stills[np.arange(2)].context.tolist() == [7, 0]


def test_classes_named_by_numbers_are_asked_for_by_name_alone():
    names = ("1", "10", "2")  # as folders are listed
    assert parse_classes("1,2,10,-1", names, 3) == [0, 2, 1, -1]
    with pytest.raises(ValueError, match="'0', which is not a class"):
        parse_classes("0,1,2", names, 3)
    assert parse_classes("0,cat", ("cat", "dog"), 2) == [0, 0]


# A run, by its commands.


def experiment_of(**changes):
    tiny = {"width": 16, "head_dim": 8, "num_blocks": 2, "layers_per_block": 1, "patch_size": 4}
    return dataclasses.replace(
        FlowExperiment(
            name="photos",
            model=TARFlowConfig(image_size=8, channels=1, num_classes=3, noise_std=0.1, **tiny),
            data=DataConfig("folder", path="photos", eval_fraction=0.2),
            optim=OptimConfig(schedule="constant"),  # so that longer runs have the same program
            train=TrainConfig(steps=4, batch_size=8),
            log=LogConfig(log_every=2, checkpoint_every=2, tensorboard=False, progress=False),
        ),
        **changes,
    )


def test_classes_of_the_model_without_data_are_told_once_and_not_drawn(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos", *KNOWN)
    (tmp_path / "photos" / "notes.xcf").write_text("no image")
    experiment = experiment_of()
    experiment = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, num_classes=10)
    ).with_provenance()
    with told_once():  # as in `fit`
        assert experiment.job().inventory.classes == KNOWN
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "Left out of data.path 'photos': 1 .xcf.",
        "model.num_classes is 10",
    ]
    assert drawn_classes(experiment.model, experiment.data) == 3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on cats, dogs and foxes, which lie beside it."""
    root = tmp_path_factory.mktemp("classes")
    photos(root / "photos", *KNOWN)
    with contextlib.chdir(root):
        fit(experiment_of(), root / "run")
    return root / "run"


@pytest.mark.slow
def test_a_run_keeps_the_names_of_its_classes(run):
    saved = json.loads((run / "config.json").read_text())
    assert saved["data"]["classes"] == list(KNOWN)
    _, _, experiment = checkpoint.load(run)
    assert experiment.data.classes == KNOWN
    assert experiments.from_json(experiment.to_json()) == experiment
    assert "0 cat, 1 dog, 2 fox" in succeed("info --checkpoint", run)


@pytest.mark.slow
def test_other_data_are_evaluated_with_the_numbers_of_the_run(run, tmp_path):
    photos(tmp_path / "photos", "dog", "fox")
    words = ("evaluate", "--checkpoint", run, "--split", "all", "--data.path", tmp_path / "photos")
    code, printed, said = outcome_of(*words)
    assert code == 0
    flow, params, experiment = checkpoint.load(run)
    data = dataclasses.replace(experiment.data, path=str(tmp_path / "photos"), classes=())
    found = load(data, image_size=(8, 8), channels=1, split="all")
    by_hand = dataclasses.replace(found, labels=found.labels + 1, class_names=KNOWN)
    bits = flow_bits_per_dim(flow, params, by_hand, jax.random.key(0), noise_std=0.1)
    assert f"bits/dim {bits:.4f}" in printed
    assert said.count("has no examples of cat") == 1
    photos(tmp_path / "photos", "zebra")
    assert "the class zebra, but data.classes lists only cat, dog, fox" in outcome_of(*words).err
    assert "--data.classes" in refused(*words, "--data.classes", "('dog', 'fox', 'zebra')")


@pytest.mark.slow
def test_a_class_is_asked_for_by_name(run, tmp_path):
    words = ("sample --num 4 --plan sequential --checkpoint", run, "--out", tmp_path / "samples.npz")
    for classes, labels in (("fox,cat", [2, 0, 2, 0]), ("1", [1, 1, 1, 1]), ("-1, dog", [-1, 1, -1, 1])):
        succeed(*words, f"--classes={classes}")
        assert np.load(tmp_path / "samples.npz")["labels"].tolist() == labels
    for wrong, told in (("fxo", "did you mean fox?"), ("3", "cat, dog, fox"), ("", "--classes has no value")):
        assert told in refused(*words, f"--classes={wrong}")


@pytest.fixture
def again(run, tmp_path, monkeypatch):
    """A copy of the run and of its images, in which the test is; the images may be changed."""
    for name in ("run", "photos"):
        shutil.copytree(run.parent / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run", tmp_path / "photos"


def resumed(workdir, **changes):
    return fit(experiment_of(train=TrainConfig(steps=6, batch_size=8), **changes), workdir)


@pytest.mark.slow
def test_a_renamed_class_is_refused(again):
    workdir, path = again
    (path / "cat").rename(path / "zebra")
    with pytest.raises(ValueError, match=r"data\.classes: cat missing, zebra not known"):
        resumed(workdir)
    (path / "zebra").rename(path / "cat")
    assert resumed(workdir).state.step == 6


@pytest.mark.slow
def test_a_class_without_images_goes_on_where_its_name_is_kept(again, caplog):
    workdir, path = again
    shutil.rmtree(path / "dog")
    with pytest.raises(ValueError, match=r"data\.classes: dog missing; to continue"):
        resumed(workdir)
    data = dataclasses.replace(experiment_of().data, classes=KNOWN)
    assert resumed(workdir, data=data).state.step == 6
    assert "has no examples of dog" in caplog.text


@pytest.mark.slow
def test_a_run_that_kept_no_names_goes_on(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    old, workdir = experiment_of(), tmp_path / "old"
    groups = {"optim": old.optim, "train": old.train, "log": old.log, "check_config": old.check_resumable}
    nameless = {**old.to_json(), "data": {**old.to_json()["data"]}}
    del nameless["data"]["classes"]
    train(dataclasses.replace(old.job(), inventory=None), workdir, config=nameless, **groups)
    assert checkpoint.load(workdir)[2] == old
    assert resumed(workdir).state.step == 6
    assert checkpoint.load(workdir)[2].data.classes == KNOWN
    assert "has no list of its data files" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_says_what_changed_in_its_files(again, capsys):
    workdir, path = again
    record = json.loads((workdir / "data.json").read_text())
    assert (record["train"], record["held_out"]) == (14, 4)
    held = sorted(record["files"]["held_out"])
    assert sorted([*record["files"]["train"], *held]) == sorted(f"{name}/{i}.png" for name in KNOWN for i in range(6))
    (path / held[0]).unlink()
    shutil.copy(path / next(iter(record["files"]["train"])), path / "cat" / "new.png")
    resumed(workdir)
    said = capsys.readouterr().err
    assert said.count("The data have changed since the run was last started") == 1
    assert "1 added ('cat/new.png')" in said
    assert f"1 removed ('{held[0]}')" in said
    assert "images: 14 train, 4 held out, 8 x 8, classes: cat, dog, fox" in said
