"""Flows of clips end to end: training with a denoiser, codecs of clips, sampling to files, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from tolerances import FORMULA, NETWORK, assert_close
from toy_clips import LATENTS, QUIET, TINY, experiment_of

from flowgen import checkpoint, experiments
from flowgen.cli import main
from flowgen.codecs import VideoAutoencoderConfig
from flowgen.data import ClipsConfig, DataConfig, LatentsConfig, from_uint8, save_image
from flowgen.data.media import pillow
from flowgen.data.video import video_length, video_size, write_video
from flowgen.experiments import (
    AutoencoderExperiment,
    AutoencodingConfig,
    FlowExperiment,
    LikelihoodConfig,
    PretrainedAutoencoder,
    SamplingConfig,
    SpaceToDepth,
    TextConfig,
    clips,
    fit,
)
from flowgen.experiments.codecs import open_autoencoder
from flowgen.experiments.flow_options import FlowEvaluateOptions
from flowgen.flows import STARFlowConfig
from flowgen.nn import init
from flowgen.training import OptimConfig, TrainConfig


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A flow of bouncing digits and its denoiser, trained for a few steps."""
    workdir = tmp_path_factory.mktemp("clips") / "run"
    fit(experiment_of(data=ClipsConfig(num=60, fps=12.5), log=dataclasses.replace(QUIET, eval_every=4)), workdir)
    return workdir


@pytest.mark.slow
def test_training_reports_both_losses_and_what_denoising_is_worth(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"denoiser_loss", "flow_loss", "score_square", "bits_per_dim"} <= rows[0].keys()
    assert {"eval/bits_per_dim", "eval/psnr_score", "eval/psnr_denoiser"} <= rows[-1].keys()
    assert (run / "samples" / "0000004.png").is_file()
    _, params, _ = checkpoint.load(run)
    assert params["params"].keys() == {"blocks_0", "blocks_1", "denoiser"}


@pytest.mark.slow
def test_samples_are_strips_videos_and_arrays(run, tmp_path):
    words = ["sample", "--checkpoint", str(run), "--classes", "3,7"]
    for name, *fps in (("strips.png",), ("clips.gif",), ("clips.mp4", "--fps", "5"), ("clips.npz",)):
        assert main([*words, "--num", "4", *fps, "--out", str(tmp_path / name)]) == 0
    with np.load(tmp_path / "clips.npz") as arrays:
        assert arrays["clips"].shape == (4, 3, 12, 12, 1)
        assert arrays["labels"].tolist() == [3, 7, 3, 7]
    seconds, fps = video_length(tmp_path / "clips.mp4")
    assert (seconds, fps) == pytest.approx((0.6, 5.0))
    assert video_length(tmp_path / "clips.gif")[1] == pytest.approx(12.5)  # as in training
    single = [*words, "--num", "2", "--out", str(tmp_path / "x.png"), "--single", str(tmp_path / "single")]
    assert main(single) == 0
    assert sorted(path.name for path in (tmp_path / "single").iterdir()) == ["000000.gif", "000001.gif"]
    # As they are, so that they can be given again.
    assert video_size(tmp_path / "single" / "000001.gif") == (12, 12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fps", "out", "message"),
    [
        ("0", "x.gif", "--fps is 0; it must be at least 0.1"),
        ("0.0001", "x.mp4", "--fps is 0.0001; it must be at least 0.1"),
        ("101", "x.gif", "--fps is 101; it must be from 0.1 to 100"),
        ("5", "x.png", "x.png is not a video; use .gif or .mp4, or leave out --fps"),
        ("5", "x.npz", "x.npz is not a video; use .gif or .mp4, or leave out --fps"),
    ],
)
def test_rates_that_no_video_has_are_refused(fps, out, message, run, tmp_path, capsys):
    words = ["sample", "--checkpoint", str(run), "--fps", fps, "--out", str(tmp_path / out)]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_clips_begin_with_what_is_given_and_go_on_as_long_as_asked(run, tmp_path, capsys):
    image = np.zeros((12, 12, 1), np.uint8)
    image[3:9, 4:7] = 255
    save_image(tmp_path / "first.png", image)
    out = tmp_path / "clips.npz"
    words = ["sample", "--checkpoint", str(run), "--num", "2", "--out", str(out)]
    words += ["--plan", "sliding", "--init", "previous_frame"]
    assert main([*words, "--frames", "5", "--context", "2", "--given", str(tmp_path / "first.png")]) == 0
    with np.load(out) as arrays:
        drawn = arrays["clips"]
    assert drawn.shape == (2, 5, 12, 12, 1)
    assert_close(drawn[:, 0], np.broadcast_to(from_uint8(image), (2, 12, 12, 1)), FORMULA)
    assert np.abs(drawn[0, 1:] - drawn[1, 1:]).max() > 0.01
    write_video(tmp_path / "dataset.mp4", np.stack([image] * 2), fps=8.0)
    assert main([*words, "--frames", "4", "--given", str(tmp_path / "dataset.mp4")]) == 0
    with np.load(out) as arrays:
        np.testing.assert_allclose(
            arrays["clips"][0, :2, ..., 0], from_uint8(image)[None, ..., 0] + np.zeros((2, 1, 1)), atol=0.1
        )
    save_image(tmp_path / "wide.png", np.zeros((12, 30, 1), np.uint8))
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    write_video(tmp_path / "long.gif", np.stack([image] * 8), fps=12.5)
    capsys.readouterr()
    for given, message in (
        (
            "wide.png",
            "wide.png is 12 x 30 pixels (height x width), so fitting it to clips of 12 x 12 pixels would cut",
        ),
        ("nowhere.png", "does not exist"),
        ("broken.mp4", "is not a readable video"),
        (
            "long.gif",
            "long.gif has 8 frames, so none is left to generate in clips of length 3; use --frames 9",
        ),
    ):
        assert main([*words, "--given", str(tmp_path / given)]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    for short in ([], ["--frames", "3"]):
        assert main([*words, "--context", "2", *short]) == 2
        assert "--context is 2, but it applies only to clips of more than 3 frames" in capsys.readouterr().err
    assert main([*words, "--context", "9", "--frames", "5"]) == 2
    assert "context is 9; it must be from 1 to 2" in capsys.readouterr().err


def test_no_more_is_given_than_leaves_a_frame_to_draw(tmp_path):
    experiment = experiment_of()
    flow, video, codec = experiment.build(), tmp_path / "long.mp4", experiment.encoding.open_codec()
    frames = np.arange(8, dtype=np.uint8)[:, None, None, None] * 30 + np.zeros((1, 12, 12, 1), np.uint8)
    write_video(video, frames, fps=8.0)
    given = clips.read_given(codec, flow, str(video), frames=6, fps=8.0)
    np.testing.assert_allclose(given, from_uint8(frames[:5]), atol=0.1)
    assert clips.read_given(codec, flow, str(video), frames=99, fps=8.0).shape == (8, 12, 12, 1)
    save_image(tmp_path / "first.png", frames[0])
    for name, asked, message in (
        ("long.mp4", None, "long.mp4 has 8 frames, so none is left to generate in clips of length 3; use --frames 9"),
        ("long.mp4", 1, "long.mp4 has 1 frame, so none is left to generate in clips of length 1; use --frames 2"),
        ("first.png", 1, "first.png has 1 frame, so none is left to generate in clips of length 1"),
    ):
        with pytest.raises(ValueError, match=message):
            clips.read_given(codec, flow, str(tmp_path / name), frames=asked, fps=8.0)
    for name, content in (("b.mp4", b"no video"), ("b.mkv", b""), ("b.png", b"%!PS-Adobe-3.0\n"), ("b.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"--given cannot be read: .*{name}"):
            clips.read_given(codec, flow, str(tmp_path / name), frames=6, fps=8.0)
    # Shown for longer than others, the last frame is given as often.
    shown = [pillow().fromarray(frame[..., 0]) for frame in frames[:3]]
    shown[0].save(tmp_path / "slow.gif", save_all=True, append_images=shown[1:], duration=[250, 250, 1000])
    given = clips.read_given(codec, flow, str(tmp_path / "slow.gif"), frames=99, fps=8.0)
    assert_close(given, from_uint8(frames[[0] * 2 + [1] * 2 + [2] * 8]), FORMULA)
    assert clips.read_given(codec, flow, str(tmp_path / "slow.gif"), frames=99).shape == (3, 12, 12, 1)


@pytest.mark.slow
def test_frames_that_a_codec_cannot_make_are_refused(autoencoder):
    codec = open_autoencoder(str(autoencoder))
    assert clips.latent_frames(codec, 5) == 3
    with pytest.raises(ValueError, match=r"--frames is 4, but the codec needs 1 plus .*; use 3 or 5"):
        clips.latent_frames(codec, 4)


@pytest.mark.slow
def test_evaluation_says_how_frames_move(run, capsys):
    assert main(["evaluate", "--checkpoint", str(run), "--samples", "4"]) == 0
    printed = capsys.readouterr().out
    assert "6 clips (eval), Gaussian noise of std 0.3" in printed
    assert "PSNR of noisy clips as they are" in printed
    assert "by the denoiser" in printed
    assert "frames of 4 samples: distance to the next" in printed
    assert main(["evaluate", "--checkpoint", str(run), "--data.images-fraction=0.2"]) == 2
    assert "--data.images_fraction has no effect in evaluate" in capsys.readouterr().err
    assert main(["evaluate", "--checkpoint", str(run), "--data.drop_first", "0.2"]) == 2
    assert "--data.drop_first has no effect in evaluate, which uses only whole clips" in capsys.readouterr().err


@pytest.mark.slow
def test_evaluation_of_single_frames_says_nothing_of_how_they_move():
    experiment = experiment_of(model=TINY.with_num_frames(1))
    flow, options = experiment.build(), FlowEvaluateOptions(samples=4, batch=8)
    evaluation = experiment.evaluate(flow, init(flow, jax.random.key(0)), options)
    assert "by the denoiser" in evaluation.lines[-1]
    assert not any("distance" in line for line in evaluation.lines)
    assert {"psnr_noisy", "psnr_score", "psnr_denoiser"} <= evaluation.metrics.keys()


def test_distances_of_frames_tell_order_from_none():
    random = np.random.default_rng(0)
    walk = random.normal(size=(50, 8, 2, 2, 1)).cumsum(axis=1)
    near, far = clips.frame_distances(walk)
    assert near < 0.7 * far
    near, far = clips.frame_distances(random.normal(size=(50, 8, 2, 2, 1)))
    assert near == pytest.approx(far, rel=0.05)


@pytest.mark.slow  # beside the first, which resumes nothing
def test_a_stopped_run_ends_where_one_that_was_not_does(tmp_path):
    experiment = experiment_of(
        optim=OptimConfig(ema_decay=0.9, schedule="constant"),
        likelihood=LikelihoodConfig(denoiser=OptimConfig(lr=1e-3, schedule="constant")),
    )
    whole = fit(experiment, tmp_path / "whole")
    fit(dataclasses.replace(experiment, train=TrainConfig(steps=2, batch_size=8)), tmp_path / "parts")
    again = fit(experiment, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, whole.state.params["blocks_0"], again.state.params["blocks_0"])


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The run of a small video autoencoder of bouncing digits, one latent frame per two frames."""
    workdir = tmp_path_factory.mktemp("autoencoder") / "run"
    experiment = AutoencoderExperiment(
        name="video autoencoder",
        model=VideoAutoencoderConfig(
            channels=1,
            latent_channels=4,
            widths=(8, 8),
            decoder_widths=(8, 8),
            halve_time=(True,),
            layers_per_block=1,
            patch_size=1,
        ),
        data=ClipsConfig(num=60),
        autoencoding=AutoencodingConfig(image_size=12, frames=5, kl_weight=1e-3, shown=2),
        optim=OptimConfig(lr=3e-3, weight_decay=0.0, ema_decay=0.9),
        train=TrainConfig(steps=20, batch_size=8),
        log=dataclasses.replace(QUIET, eval_every=10),
    )
    fit(experiment, workdir)
    return workdir


@pytest.mark.slow
def test_a_video_autoencoder_is_trained_and_its_latents_are_those_of_a_flow(autoencoder, tmp_path, capsys):
    rows = [json.loads(line) for line in (autoencoder / "metrics.jsonl").read_text().splitlines()]
    errors = [row["eval/mean_square_error"] for row in rows if "eval/mean_square_error" in row]
    assert errors[-1] < errors[0]
    assert (autoencoder / "samples" / "0000020.png").is_file()
    experiment = experiment_of(model=LATENTS, codec=PretrainedAutoencoder(str(autoencoder), temporal_scale=0.5))
    assert experiment.dataset("train")[np.arange(2)].x.shape == (2, 5, 12, 12, 1)
    direct = fit(experiment, tmp_path / "direct")
    assert np.isfinite(direct.metrics["nats_per_dim"])
    path = tmp_path / "clips.py"
    path.write_text(
        f"from flowgen.experiments import from_json\nconfig = lambda: from_json({experiment.to_json()!r})\n"
    )
    assert main(["encode", "--config", str(path), "--out", str(tmp_path / "encoded")]) == 0
    encoded = dataclasses.replace(experiment, data=LatentsConfig(str(tmp_path / "encoded")))
    again = fit(encoded, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, direct.state.params, again.state.params)
    other = dataclasses.replace(encoded, codec=PretrainedAutoencoder(str(autoencoder)))
    with pytest.raises(ValueError, match="was encoded by the autoencoder at"):
        fit(other, tmp_path / "other")
    capsys.readouterr()
    assert main(["evaluate", "--checkpoint", str(tmp_path / "again"), "--samples", "4"]) == 0
    assert "frames of 4 data: distance to the next" in capsys.readouterr().out  # decoded, which no encoded data hold
    longer = dataclasses.replace(encoded, model=LATENTS.with_num_frames(5))
    with pytest.raises(ValueError, match=r"has latents of shape .*; set model.image_size, model.frames and"):
        fit(longer, tmp_path / "other")
    out = tmp_path / "samples.npz"
    assert main(["sample", "--checkpoint", str(tmp_path / "direct"), "--num", "2", "--out", str(out)]) == 0
    with np.load(out) as arrays:
        assert arrays["clips"].shape == (2, 5, 12, 12, 1)
    assert main(["evaluate", "--checkpoint", str(autoencoder)]) == 0
    assert "6 clips (eval), one latent per 2 x 2 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"likelihood": LikelihoodConfig(norm_penalty=1e-4)}, "likelihood.norm_penalty is 0.0001, which would distort"),
        (
            {"data": ClipsConfig(drop_first=0.25), "model": TINY.with_num_frames(2)},
            "data.drop_first is 0.25, but if model.frames is 2, clips without their first frame are single images",
        ),
        ({"model": dataclasses.replace(TINY, noise_std=0.0)}, "model.noise_std is 0, so a denoiser has nothing"),
        (
            {
                "model": dataclasses.replace(LATENTS, num_classes=0, text_dim=16, text_length=12),
                "codec": SpaceToDepth(2),
                "text": TextConfig("words", frames_per_second=16),
                "data": ClipsConfig("folder", path="videos"),
            },
            "text.frames_per_second is 16, but data.fps is 8; set both to the same value",
        ),
        (
            {"sampling": SamplingConfig(denoise=0.5)},
            "sampling.denoise is 0.5, but a learned denoiser takes only full steps",
        ),
        (
            {
                "model": dataclasses.replace(TINY, denoiser_layers=0),
                "likelihood": LikelihoodConfig(denoiser=OptimConfig()),
            },
            "likelihood.denoiser is given, but model.denoiser_layers is 0",
        ),
        (
            {"likelihood": LikelihoodConfig(denoiser=OptimConfig(warmup_steps=4))},
            "likelihood.denoiser.warmup_steps is 4; it must be below train.steps, which is 4",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        experiment_of(**changes)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            VideoAutoencoderConfig(channels=1),
            {"autoencoding": AutoencodingConfig(16, frames=5), "data": ClipsConfig(drop_first=0.25)},
            "data.drop_first is given, but a VideoAutoencoder trains only on whole clips",
        ),
        (
            VideoAutoencoderConfig(channels=1),
            {"autoencoding": AutoencodingConfig(16, frames=4), "data": ClipsConfig()},
            "autoencoding.frames is 4, but the model encodes the first frame alone and the others 4 at a time",
        ),
        (
            VideoAutoencoderConfig(channels=1),
            {"autoencoding": AutoencodingConfig(16, frames=5), "data": DataConfig()},
            "a VideoAutoencoder trains on clips; give a ClipsConfig",
        ),
    ],
)
def test_parts_that_do_not_fit_an_autoencoder_are_refused(model, changes, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderExperiment(name="autoencoder", model=model, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": -1.0}, "likelihood.denoiser.lr is -1.0; it must be positive"),
        ({"lr": 0.1, "min_lr": 0.2}, "likelihood.denoiser.min_lr is 0.2, above lr 0.1; lower min_lr"),
        (
            {"ema_decay": 0.9},
            "likelihood.denoiser.ema_decay is 0.9, but optim.ema_decay sets it for all parameters",
        ),
        ({"ema_warmup": False}, "likelihood.denoiser.ema_warmup is False, but"),
        ({"max_skips": 9}, "likelihood.denoiser.max_skips is 9, but"),
    ],
)
def test_what_the_optimizer_of_a_denoiser_cannot_have_is_refused_by_its_name(change, message):
    experiment = experiment_of(likelihood=LikelihoodConfig(denoiser=OptimConfig()))
    words = [f"--likelihood.denoiser.{name}={value}" for name, value in change.items()]
    with pytest.raises(ValueError, match=f"^{message}"):
        experiments.override(experiment, words)


def test_the_debug_run_warms_the_denoiser_up_as_fast_as_the_flow():
    experiment = experiment_of(
        train=TrainConfig(steps=500), likelihood=LikelihoodConfig(denoiser=OptimConfig(warmup_steps=100))
    )
    assert experiment.debug().likelihood.denoiser.warmup_steps == 2


@pytest.mark.parametrize(("order", "layers"), [("raster", (1, 0, 2)), ("raster", (3,)), ("reversed", (0, 2))])
def test_the_debug_run_keeps_the_token_order_of_the_deep_block(order, layers):
    experiment = experiment_of()
    model = dataclasses.replace(experiment.model, order=order, layers_per_block=layers)
    small = dataclasses.replace(experiment, model=model).debug().model
    assert [block.order for block in small.blocks[-2:]] == ["reversed", "raster"]


@pytest.mark.slow
def test_an_autoencoder_of_clips_encodes_images_for_an_image_flow(autoencoder):
    model = STARFlowConfig(image_size=6, channels=4, width=40, head_dim=20, layers_per_block=(1, 1), noise_std=0.3)
    experiment = FlowExperiment(name="images", model=model, codec=PretrainedAutoencoder(str(autoencoder)))
    images, latents = experiment.dataset("eval"), experiment.flow_dataset("eval")
    some = np.arange(3)
    mean, _ = experiment.encoding.open_codec().moments(images[some].pixels[:, None] / 127.5 - 1)
    assert latents.event_shape == (6, 6, 4)
    assert_close(latents[some].x.mean, mean[:, 0], NETWORK)


@pytest.mark.slow
def test_an_autoencoder_is_not_sampled(autoencoder, tmp_path, capsys):
    assert main(["sample", "--checkpoint", str(autoencoder), "--out", str(tmp_path / "x.png")]) == 2
    assert "cannot be sampled; train a flow on its latents" in capsys.readouterr().err
