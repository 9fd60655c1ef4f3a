"""What a run records besides its metrics: its history, its warnings, images for TensorBoard, and a tracker."""

import dataclasses
import io
import struct
import sys
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from scripts import toy

from flowgen.runs import NullWriter, read_history, read_metrics
from flowgen.training import LogConfig
from flowgen.training.options import check_packages

SHORT = dataclasses.replace(toy.QUIET, log_every=2, sample_every=4, checkpoint_every=4)
IMAGE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def job(**changes):
    return toy.make_job(evaluate=lambda variables: {"score": 1.5}, sample=lambda variables: IMAGE, **changes)


class FakeTracker(types.ModuleType):
    """A module with the functions of W&B and trackio, which keeps what it is given; `fails` names what raises."""

    def __init__(self, name, fails=()):
        super().__init__(name)
        self.calls, self.fails = [], fails
        self.Image = lambda image: ("image", image.mode, image.size)  # both take images of Pillow

    def _note(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fails:
            raise RuntimeError("no network.")

    def init(self, **options):
        self._note("init", options)

    def log(self, values, step):
        self._note("log", step, values)

    def finish(self):
        self._note("finish")

    def named(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


@pytest.fixture
def tracker(monkeypatch):
    def install(name, fails=()):
        module = FakeTracker(name, fails)
        monkeypatch.setitem(sys.modules, name, module)
        return module

    return install


def test_a_history_tells_of_each_start_end_and_warning(tmp_path):
    def evaluate(variables):
        warnings.warn("a window is unsolved", stacklevel=1)
        return {"score": 1.0}

    log = dataclasses.replace(SHORT, eval_every=4)
    with pytest.warns(UserWarning, match="a window is unsolved"):
        toy.run(toy.make_job(evaluate=evaluate, warnings=["tilted"]), tmp_path, steps=8, log=log)
    toy.run(job(), tmp_path, steps=10, log=log)
    rows = read_history(tmp_path)
    assert [row["event"] for row in rows] == ["start", "warning", "warning", "end", "start", "end"]
    first, tilted, unsolved, end, second, last = rows
    assert (first["step"], second["step"]) == (0, 8)
    assert first["id"] == second["id"]
    assert first["devices"] == 4
    assert first["versions"].keys() == {"flowgen", "jax", "python"}
    assert (tilted["text"], tilted["step"]) == ("tilted", 0)
    assert (unsolved["text"], unsolved["step"]) == ("a window is unsolved", 4), "once, at its first step"
    assert (end["step"], end["error"], last["step"]) == (8, "", 10)


def test_a_history_leaves_out_damaged_lines(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"event": "end", "time": "now"}\n[1]\n{"event": 3}\n{"eve')
    assert read_history(tmp_path) == [{"event": "end", "time": "now"}]
    assert read_history(tmp_path / "nothing") == read_metrics(tmp_path / "nothing") == []


def test_a_run_that_fails_says_so_in_its_history(tmp_path):
    def stop(start, stop):
        yield from toy.batches(start, 3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        toy.run(toy.make_job(batches=stop), tmp_path, log=SHORT)
    assert read_history(tmp_path)[-1]["error"] == "ValueError"


def events_of(run_dir):
    """The values of the TensorBoard events of a run: records of length, checksum, content and checksum."""
    from tensorboardX.proto import event_pb2

    (path,) = run_dir.glob("events.*")
    content, values = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        values += [(event.step, value) for value in event.summary.value]
        content = content[16 + length :]
    return values


def test_tensorboard_shows_metrics_and_sample_grids(tmp_path):
    toy.run(job(), tmp_path, steps=8, log=dataclasses.replace(SHORT, tensorboard=True))
    values = events_of(tmp_path)
    drawn = [(step, value.image) for step, value in values if value.tag == "samples"]
    assert [step for step, _ in drawn] == [4, 8]
    with Image.open(io.BytesIO(drawn[0][1].encoded_image_string)) as image:
        np.testing.assert_array_equal(np.asarray(image), IMAGE)
    assert [step for step, value in values if value.tag == "loss"] == [2, 4, 6, 8]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_metrics_and_images_and_goes_on_with_its_run(tmp_path, monkeypatch, tracker, name):
    module = tracker(name)
    monkeypatch.setenv(f"{name.upper()}_PROJECT", "mine")
    log = dataclasses.replace(SHORT, tracker=name)
    for steps in (4, 8):
        toy.run(job(), tmp_path / "digits", steps=steps, log=log)
    rows = [(step, values) for step, values in module.named("log") if "samples" not in values]
    assert [{**values, "step": step} for step, values in rows] == read_metrics(tmp_path / "digits")
    assert [call for call in module.named("log") if "samples" in call[1]] == [
        (4, {"samples": ("image", "RGB", (4, 4))}),
        (8, {"samples": ("image", "RGB", (4, 4))}),
    ]
    assert len(module.named("finish")) == 2
    (first,), (second,) = module.named("init")
    assert first == second
    assert (first["project"], first["resume"], first["config"]) == ("mine", "allow", {"toy": True})
    assert ("id" in first) == (name == "wandb")
    assert first["name"].startswith("digits")
    toy.run(job(), tmp_path / "elsewhere" / "digits", steps=4, log=log)
    third = module.named("init")[2][0]
    assert (third["id"] if name == "wandb" else third["name"]) != (first["id"] if name == "wandb" else first["name"])


def test_a_tracker_gets_grey_images(tmp_path, tracker):
    module = tracker("trackio")
    grey = dataclasses.replace(job(), sample=lambda variables: IMAGE[:3, :, :1])
    toy.run(grey, tmp_path, steps=4, log=dataclasses.replace(SHORT, tracker="trackio"))
    assert (4, {"samples": ("image", "L", (4, 3))}) in module.named("log")


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_fails_ends_no_training(tmp_path, capsys, tracker, fails):
    module = tracker("wandb", fails=(fails,))
    result = toy.run(job(), tmp_path, steps=8, log=dataclasses.replace(SHORT, tracker="wandb"))
    assert result.state.step == 8
    assert len(module.named(fails)) == 1, "not tried again"
    told = capsys.readouterr().err
    assert told.count("log.tracker wandb failed (RuntimeError: no network)") == 1
    assert next(row["text"] for row in read_history(tmp_path) if row["event"] == "warning") in told


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    log = LogConfig(tensorboard=False, progress=False, tracker="wandb")
    with pytest.raises(ModuleNotFoundError, match=r"pip install wandb`, or set --log.tracker none"):
        check_packages(log)


def test_only_the_first_process_sends_to_a_tracker(tmp_path, tracker):
    module = tracker("wandb")
    writer = NullWriter(tmp_path)
    writer.begin({}, first_step=None, last_step=1, tensorboard=False, bar=False, tracker="wandb")
    writer.write(1, {"loss": 1.0})
    assert module.calls == []
