"""What flows of clips are trained on beside whole clips: images, clips without their first frame, their texts."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_clips import LATENTS, experiment_of

from flowgen.cli import main
from flowgen.data import ClipsConfig, DataConfig, LatentsConfig
from flowgen.experiments import SamplingConfig, SpaceToDepth, TextConfig, clips, fit, video_flow
from flowgen.experiments.flow_options import FlowEvaluateOptions
from flowgen.nn import init
from flowgen.text import PromptTemplate
from flowgen.training import TrainConfig


@pytest.mark.slow  # beside clips without their first frame
def test_images_are_trained_on_beside_clips(tmp_path):
    experiment = experiment_of(data=ClipsConfig(num=60, images=DataConfig()), train=TrainConfig(steps=3, batch_size=8))
    job = experiment.job()
    shapes = [batch.x.shape for batch in job.batches(0, 40)]
    assert set(shapes) == {(8, 3, 12, 12, 1), (8, 1, 12, 12, 1)}
    # As often as there are of them: 54 clips and 1,617 digits.
    assert shapes.count((8, 1, 12, 12, 1)) > 30
    assert clips.clips_alone(experiment.flow_dataset("eval")).event_shape[0] == 3
    params = job.init(jax.random.key(0))
    losses = {}
    for batch in job.batches(0, 40):
        if batch.x.shape not in losses:
            loss, _ = jax.jit(job.objective)(params, batch, jax.random.key(0))
            losses[batch.x.shape] = float(loss)
    assert all(np.isfinite(loss) for loss in losses.values())
    assert len(losses) == 2


def test_images_come_in_the_fraction_of_batches_that_is_asked_for():
    data = ClipsConfig(num=500, drop_first=0.25, images=DataConfig(), images_fraction=0.2)
    dataset = experiment_of(data=data).flow_dataset("train")
    assert [bucket.event_shape[0] for bucket in dataset.buckets] == [3, 2, 1]
    whole, continued, stills = dataset.shares
    assert continued / (whole + continued) == pytest.approx(0.25)
    assert stills / sum(dataset.shares) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"images_fraction is 0.2, but images is not set"):
        ClipsConfig(images_fraction=0.2)


@pytest.mark.slow  # a run and a command for one count
def test_evaluation_opens_whole_clips_alone(tmp_path):
    gone = DataConfig("folder", path=str(tmp_path / "gone"))
    experiment = experiment_of(data=ClipsConfig(num=60, images=gone, drop_first=0.25))
    assert experiment.dataset("all").event_shape[0] == 3
    assert experiment.flow_dataset("eval").event_shape[0] == 3
    flow = experiment.build()
    lines = experiment.evaluate(flow, init(flow, jax.random.key(0)), FlowEvaluateOptions(split="train", batch=32)).lines
    assert "54 clips (train)" in " ".join(lines)


def test_clips_without_their_first_frame_are_trained_on_as_often_as_asked():
    experiment = experiment_of(data=ClipsConfig(num=500, drop_first=0.25), train=TrainConfig(steps=3, batch_size=9))
    dataset = experiment.flow_dataset("train")
    whole, continued = dataset.buckets
    some = np.array([3, 40])
    np.testing.assert_array_equal(continued[some].x, whole[some].x[:, 1:])
    shapes = [batch.x.shape for batch in experiment.job().batches(0, 200)]  # three times all clips
    assert shapes.count((9, 2, 12, 12, 1)) == 50
    assert shapes.count((9, 3, 12, 12, 1)) == 150
    assert clips.clips_alone(dataset).event_shape[0] == 3
    assert experiment.flow_dataset("eval").event_shape[0] == 3


def test_the_memory_of_latents_is_that_of_their_own_frames():
    data = ClipsConfig(num=60, drop_first=0.25, images=DataConfig(), in_memory_bytes=1)
    experiment = experiment_of(model=LATENTS, codec=SpaceToDepth(2), data=data)
    # Mean and deviation of 6 x 6 x 4 numbers a frame: 54 clips of 3 frames and of the last 2, and 1,617 images.
    needed = 4 * 2 * 6 * 6 * 4 * (54 * 3 + 54 * 2 + 1617)
    with pytest.raises(ValueError, match=f"the latents of 1725 clips need {needed:,} bytes"):
        experiment.flow_dataset("train")


@pytest.fixture
def continued():
    """An experiment of texts in which every other batch of clips has lost its first frame."""
    model = dataclasses.replace(LATENTS, num_classes=0, text_dim=16, text_length=12, denoiser_layers=0)
    return experiment_of(
        model=model,
        codec=SpaceToDepth(2),
        text=TextConfig("words", frames_per_second=8),
        data=ClipsConfig(num=60, drop_first=0.5),
        train=TrainConfig(steps=1, batch_size=8),
    )


def test_texts_of_clips_without_their_first_frame_say_so(continued, tmp_path):
    experiment, model = continued, continued.model
    encode = experiment.encoding.open_text_encoder()
    template = PromptTemplate(frames_per_second=8)
    whole, rest = experiment.flow_dataset("train").buckets
    assert rest.event_shape == (2, 6, 6, 4)
    some = np.arange(4)
    np.testing.assert_array_equal(rest[some].x.mean, whole[some].x.mean[:, 1:])
    for bucket, mark in ((whole, ""), (rest, "(extend) ")):
        said = [
            template(f"{mark}{label}", (6, 6)) for label in dataclasses.replace(bucket, use_texts=False)[some].context
        ]
        np.testing.assert_array_equal(bucket[some].context.embeddings, encode(said).embeddings.astype(np.float16))

    path, folder = tmp_path / "clips.py", tmp_path / "encoded"
    path.write_text(
        f"from flowgen.experiments import from_json\nconfig = lambda: from_json({experiment.to_json()!r})\n"
    )
    assert main(["encode", "--config", str(path), "--out", str(folder)]) == 0
    of_files = LatentsConfig(str(folder))
    read = {
        share: dataclasses.replace(experiment, data=dataclasses.replace(of_files, drop_first=share)).flow_dataset(
            "train"
        )
        for share in (0.0, 0.5)
    }
    assert read[0.0].event_shape == (3, 6, 6, 4)
    features = whole[some].context.embeddings
    np.testing.assert_array_equal(experiment.conditions_of(read[0.0])(some).embeddings, features)
    assert {b.event_shape[0]: share for b, share in zip(read[0.5].buckets, read[0.5].shares, strict=True)} == {
        2: 54,
        3: 54,
    }

    for drop_first in (0.0, 0.5):
        data = dataclasses.replace(of_files, drop_first=drop_first)
        longer = dataclasses.replace(experiment, model=model.with_num_frames(4), data=data)
        with pytest.raises(ValueError, match=r"has latents of shape|contains no clips without their first frame"):
            longer.flow_dataset("train")


@pytest.mark.slow  # a run and a command for one argument
def test_texts_of_restarts_say_so_too(continued, tmp_path, monkeypatch):
    encode, template = continued.encoding.open_text_encoder(), PromptTemplate(frames_per_second=8)
    fit(continued, tmp_path / "run")
    drawn, decode = {}, video_flow.decoded_by_all
    monkeypatch.setattr(
        video_flow,
        "decoded_by_all",
        lambda *args, **options: drawn.update(cond=args[4], clip=args[5]) or decode(*args, **options),
    )
    words = ["sample", "--checkpoint", str(tmp_path / "run"), "--prompt", "7", "--frames", "4", "--progress"]
    assert main([*words, "--out", str(tmp_path / "x.gif")]) == 0
    said = [template(text, (6, 6)) for text in ("7", "(extend) 7")]
    for cond, text in zip((drawn["cond"], drawn["clip"].restart_cond), said, strict=True):
        np.testing.assert_array_equal(cond.embeddings, encode([text]).embeddings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": DataConfig("folder", path="x", aspects=True)}, "images.aspects is true"),
        ({"flip": True}, "images.flip is False, but flip is True; set both to the same value"),
    ],
)
def test_images_that_cannot_be_beside_clips_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        ClipsConfig(**{"images": DataConfig(), **changes})


@pytest.mark.slow  # beside the classes
def test_clips_of_texts_are_drawn_from_prompts(tmp_path):
    model = dataclasses.replace(LATENTS, num_classes=0, text_dim=16, text_length=12, denoiser_layers=0)
    experiment = experiment_of(
        model=model,
        codec=SpaceToDepth(2),
        text=TextConfig("words", frames_per_second=8),
        train=TrainConfig(steps=2, batch_size=8, label_dropout=0.5),
        sampling=SamplingConfig(num=2, guidance=1.0),
        data=ClipsConfig(num=60, images=DataConfig()),
    )
    dataset = experiment.flow_dataset("train")
    of_clips, of_images = (bucket.null.embeddings[0] for bucket in dataset.buckets)
    said = {8: of_clips, 0: of_images}  # frames per second, of which images have none
    for fps, null in said.items():
        wrapped = PromptTemplate(frames_per_second=fps)("", (6, 6))
        np.testing.assert_array_equal(
            null, experiment.encoding.open_text_encoder()([wrapped]).embeddings[0].astype(np.float16)
        )
    fit(experiment, tmp_path / "run")
    words = ["sample", "--checkpoint", str(tmp_path / "run"), "--prompt", "7", "--out", str(tmp_path / "x.gif")]
    assert main(words) == 0
