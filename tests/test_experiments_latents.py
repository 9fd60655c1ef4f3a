"""Flows on latents end to end: autoencoder, encoding, training, sampling, and what is refused."""

import dataclasses
import json
import shutil
import sys
import weakref
from pathlib import Path

import codec_weights as cw
import jax
import numpy as np
import pytest
from latent_cases import FEW, QUIET, TEXT, TINY, experiment_of
from published_files import publish

from flowgen import checkpoint
from flowgen.cli import main
from flowgen.codecs import AutoencoderConfig
from flowgen.data import DataConfig, LatentsConfig
from flowgen.experiments import (
    AutoencoderExperiment,
    AutoencodingConfig,
    LikelihoodConfig,
    PretrainedAutoencoder,
    SamplingConfig,
    SpaceToDepth,
    TextConfig,
    fit,
    flow,
    texts,
)
from flowgen.experiments.codecs import codec_digest, open_autoencoder
from flowgen.flows import TARFlowConfig
from flowgen.training import OptimConfig, TrainConfig

sys.path.insert(0, str(Path(__file__).parent / "fixtures"))

pytestmark = pytest.mark.usefixtures("quick_features")


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The run of a small autoencoder of digits, trained for a few steps."""
    workdir = tmp_path_factory.mktemp("autoencoder") / "run"
    experiment = AutoencoderExperiment(
        name="autoencoder",
        model=AutoencoderConfig(channels=1, widths=(8, 8), layers_per_block=1, num_groups=4, attention=False),
        autoencoding=AutoencodingConfig(image_size=8, kl_weight=1e-3, shown=8),
        optim=OptimConfig(lr=3e-3, weight_decay=0.0, ema_decay=0.9),
        train=TrainConfig(steps=20, batch_size=32),
        log=dataclasses.replace(QUIET, eval_every=10),
    )
    fit(experiment, workdir)
    return workdir


@pytest.mark.slow
def test_the_autoencoder_learns_and_says_so(autoencoder, capsys):
    rows = [json.loads(line) for line in (autoencoder / "metrics.jsonl").read_text().splitlines()]
    errors = [row["eval/mean_square_error"] for row in rows if "eval/mean_square_error" in row]
    assert errors[-1] < errors[0] < 0.5
    assert (autoencoder / "samples" / "0000020.png").is_file()
    assert main(["evaluate", "--checkpoint", str(autoencoder)]) == 0
    printed = capsys.readouterr().out
    assert "180 images (eval), one latent per 2 x 2 pixels" in printed
    assert "PSNR" in printed
    assert main(["sample", "--checkpoint", str(autoencoder), "--out", str(autoencoder / "no.png")]) == 2
    assert "cannot be sampled; train a flow on its latents" in capsys.readouterr().err


@pytest.mark.slow
def test_latents_of_a_trained_autoencoder_are_normalised_and_decoded(autoencoder):
    experiment = experiment_of(codec=PretrainedAutoencoder(str(autoencoder)))
    dataset = experiment.flow_dataset("train")
    assert dataset.event_shape == (4, 4, 4)
    batch = dataset[np.arange(500)]
    drawn = batch.x.mean + batch.x.std * np.random.default_rng(0).normal(size=batch.x.mean.shape)
    # The statistics follow the batches, so they are near, not at, those of the final weights.
    np.testing.assert_allclose(drawn.mean(axis=(0, 1, 2)), 0, atol=0.3)
    np.testing.assert_allclose(drawn.std(axis=(0, 1, 2)), 1, atol=0.3)
    images = experiment.dataset("train")[np.arange(500)].x / 127.5 - 1
    error = np.square(experiment.encoding.open_codec().decode(batch.x.mean) - images).mean()
    rows = [json.loads(line) for line in (autoencoder / "metrics.jsonl").read_text().splitlines()]
    assert error == pytest.approx(rows[-1]["eval/mean_square_error"], rel=0.2)


@pytest.mark.slow
def test_an_autoencoder_in_a_bucket_is_the_same(autoencoder, tmp_path):
    url = f"file://{autoencoder}"
    codec = open_autoencoder(url)
    assert codec_digest(codec) == codec_digest(open_autoencoder(str(autoencoder)))
    assert open_autoencoder(url) is codec
    with pytest.raises(FileNotFoundError, match=r"no run of flowgen at codec.path 'file:"):
        open_autoencoder(f"file://{tmp_path}")


@pytest.mark.slow
def test_another_autoencoder_in_its_place_is_noticed(autoencoder, tmp_path, capsys):
    place = tmp_path / "codec"
    shutil.copytree(autoencoder, place)
    experiment = experiment_of(codec=PretrainedAutoencoder(str(place)))
    fit(experiment, tmp_path / "run")
    _, _, saved = checkpoint.load(tmp_path / "run")
    assert saved.codec.digest
    longer = [dataclasses.replace(experiment, train=dataclasses.replace(FEW, steps=steps)) for steps in (5, 6)]
    moved = dataclasses.replace(longer[0], codec=PretrainedAutoencoder(str(autoencoder)))
    fit(moved, tmp_path / "run")
    shutil.rmtree(place)
    other = AutoencoderExperiment(
        name="other",
        model=AutoencoderConfig(channels=1, widths=(8, 8), layers_per_block=1, num_groups=4, attention=False),
        autoencoding=AutoencodingConfig(image_size=8),
        optim=OptimConfig(ema_decay=0.9),
        train=FEW,
        log=QUIET,
    )
    fit(other, place)
    with pytest.raises(ValueError, match=r"codec.digest"):
        fit(longer[1], tmp_path / "run")
    words = ["sample", "--checkpoint", str(tmp_path / "run"), "--num", "1", "--out", str(tmp_path / "x.png")]
    assert main([*words, "--autoencoder", str(place)]) == 2
    assert "is not the one that the flow was trained with" in capsys.readouterr().err
    assert main(words) == 0
    evaluated = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--autoencoder"]
    assert main([*evaluated, str(place)]) == 2
    assert main([*evaluated, str(autoencoder)]) == 0


@pytest.mark.slow
def test_encoding_first_or_on_the_way_trains_the_same(autoencoder, tmp_path, capsys, monkeypatch):
    experiment = experiment_of(codec=PretrainedAutoencoder(str(autoencoder)), data=DataConfig(flip=True))
    path = tmp_path / "latent.py"
    path.write_text(
        f"from flowgen.experiments import from_json\nconfig = lambda: from_json({experiment.to_json()!r})\n"
    )
    out = tmp_path / "encoded"
    assert main(["encode", "--config", str(path), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "train: 3234 of 8 x 8 pixels" in printed
    assert "eval: 180 of 8 x 8 pixels" in printed
    direct = fit(experiment, tmp_path / "direct")
    encoded = dataclasses.replace(experiment, data=LatentsConfig(str(out)))
    again = fit(encoded, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, direct.state.params, again.state.params)
    assert direct.metrics == again.metrics
    assert set(direct.metrics) == {"nats_per_dim"}
    with monkeypatch.context() as patch:
        patch.setattr(flow, "evaluate_likelihood", None)  # which comes later
        assert main(["evaluate", "--checkpoint", str(tmp_path / "again"), "--samples", "20"]) == 2
    assert "data are cached latents, which do not include the images; give the data" in capsys.readouterr().err
    words = ["evaluate", "--checkpoint", str(tmp_path / "again"), "--data", "Data", "--data.name", "digits"]
    assert main(words) == 0
    assert "1797 latents (all)" in capsys.readouterr().out
    assert main(["encode", "--config", str(path), "--out", str(out)]) == 2
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"codec is missing, but data.path .* was encoded by the autoencoder at"):
        fit(dataclasses.replace(encoded, codec=None), tmp_path / "other")
    other = dataclasses.replace(encoded, codec=SpaceToDepth(2))
    with pytest.raises(
        ValueError, match=r"was encoded by the autoencoder at .*, which differs from the current codec, blocks"
    ):
        fit(other, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_samples_of_latents_are_images(autoencoder, tmp_path, capsys):
    run = tmp_path / "run"
    fit(experiment_of(codec=PretrainedAutoencoder(str(autoencoder)), likelihood=LikelihoodConfig(1e-4)), run)
    out = tmp_path / "samples.npz"
    words = ["sample", "--checkpoint", str(run), "--num", "4", "--guidance", "1", "--out", str(out)]
    assert main(words) == 0
    with np.load(out) as arrays:
        assert arrays["images"].shape == (4, 8, 8, 1)
        assert arrays["labels"].tolist() == [0, 1, 2, 3]
    assert main([*words[:-1], str(tmp_path / "wide.png"), "--aspect", "2:3"]) == 0
    assert main(["evaluate", "--checkpoint", str(run), "--samples", "20"]) == 0
    printed = capsys.readouterr().out
    assert "180 latents (eval), Gaussian noise of std 0.3" in printed
    assert "Fréchet distance of 20 samples" in printed
    assert "samples that show their class" in printed
    assert main(["evaluate", "--checkpoint", str(run), "--noise", "uniform"]) == 2
    assert "which works only for pixels, but this flow models latents" in capsys.readouterr().err


@pytest.mark.slow
def test_several_aspects_train_together(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(40):
        side, other = (8, 8) if index % 2 else (8, 14)
        Image.fromarray(rng.integers(0, 256, (side, other), np.uint8)).save(tmp_path / f"{index}.png")
    experiment = experiment_of(
        model=dataclasses.replace(TINY, num_classes=0),
        data=DataConfig(name="folder", path=str(tmp_path), aspects=True, eval_fraction=0.2),
        train=TrainConfig(steps=6, batch_size=8),
    )
    dataset = experiment.dataset("train")
    assert {bucket.event_shape for bucket in dataset.buckets} == {(8, 8, 1), (6, 10, 1)}
    result = fit(experiment, tmp_path / "run")
    assert np.isfinite(result.metrics["nats_per_dim"])


@pytest.mark.slow
def test_a_digest_is_of_what_latents_depend_on(autoencoder):
    from flowgen.codecs import Autoencoder, AutoencoderCodec, LatentNormalisation

    codec = open_autoencoder(str(autoencoder))
    shape, variables = codec.autoencoder.config, codec.variables

    def digest(scale, **changes):
        network = Autoencoder(dataclasses.replace(shape, **changes))
        return codec_digest(AutoencoderCodec(network, variables, LatentNormalisation(scale=scale)))

    assert digest(0.18215) == digest(np.full(4, 0.18215)) == digest(0.18215, remat=True)
    # Training keeps variances in float32, of which scales are made again.
    for scale in np.random.default_rng(0).uniform(0.1, 2, 50):
        assert digest(scale) == digest(1 / np.sqrt(np.float64(np.float32(1 / scale**2))))
    assert digest(0.18215) != digest(0.2)
    assert digest(0.18215) != digest(0.18215, num_groups=8)


@pytest.mark.slow
def test_a_decoder_is_trained_on_beside_its_encoder(autoencoder, tmp_path):

    _, _, experiment = checkpoint.load(autoencoder)
    noisy = dataclasses.replace(
        experiment,
        autoencoding=dataclasses.replace(experiment.autoencoding, decoder_of=str(autoencoder), noise=0.3),
        train=FEW,
    )
    fit(noisy, tmp_path / "run")
    before, after = open_autoencoder(str(autoencoder)), open_autoencoder(str(tmp_path / "run"))
    same = {}
    for part in ("encoder", "quant_conv", "decoder", "post_quant_conv"):
        pair = [jax.tree.leaves(codec.variables["params"][part]) for codec in (before, after)]
        same[part] = all(np.array_equal(a, b) for a, b in zip(*pair, strict=True))
    assert same == {"encoder": True, "quant_conv": True, "decoder": False, "post_quant_conv": False}
    assert codec_digest(before) == codec_digest(after)
    np.testing.assert_array_equal(before.normalisation.shift, after.normalisation.shift)
    with pytest.raises(
        ValueError, match=r"optim.weight_decay is 0.1, but weight decay would change the frozen encoder"
    ):
        dataclasses.replace(noisy, optim=OptimConfig(weight_decay=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"codec": SpaceToDepth(3)},
            "model.channels is 4, but blocks of 3 x 3 pixels make 9 channels from grey",
        ),
        ({"codec": PretrainedAutoencoder("")}, "codec.path is empty; give the run directory"),
        (
            {"codec": PretrainedAutoencoder("nowhere")},
            "There is no autoencoder at codec.path 'nowhere'; train one first",
        ),
        ({"model": TEXT}, "text is missing, but model.text_dim is 16"),
        ({"text": TextConfig("words")}, "text is given, but model.text_dim is 0"),
        ({"model": dataclasses.replace(TINY, noise_std=0.0)}, "model.noise_std is 0, which works only for pixels"),
        (
            {"sampling": SamplingConfig(guidance=1.0, blocks=(0, 7))},
            "sampling.blocks has 7, but the model has blocks 0",
        ),
        ({"sampling": SamplingConfig(prompts=("a cat",))}, "sampling.prompts is .*, but the model accepts no texts"),
        ({"text": TextConfig("words", digest="other"), "model": TEXT}, "text.encoder 'words' is not the one that"),
        ({"data": LatentsConfig("nowhere")}, "has no complete cache of latents"),
        (
            {"model": TARFlowConfig(image_size=4, patch_size=1), "data": DataConfig("folder", path="x", aspects=True)},
            "data.aspects is set, but the parameters of a TARFlow are tied to one image size",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiment_of(**changes).job()


def test_more_latents_than_fit_are_to_be_encoded_first():
    experiment = experiment_of(data=DataConfig(in_memory_bytes=100_000))
    with pytest.raises(ValueError, match=r"of 1617 images need 827,904 bytes, more .* flowgen encode"):
        experiment.job()


def test_a_digest_of_a_text_encoder_is_of_all_that_its_features_depend_on(tmp_path):
    from flowgen.convert import load_text_encoder
    from flowgen.text import FrozenTextEncoder

    folder = publish(tmp_path / "t5", cw.T5, cw.state_dict("t5"), "model.safetensors")
    (folder / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    encoder = load_text_encoder(folder, length=8)
    digest = texts.text_digest(encoder)
    assert digest == texts.text_digest(load_text_encoder(folder, length=9))

    class OtherWords(type(encoder.tokenizer)):
        def content(self):
            return super().content()[:-1]

    network = dataclasses.replace(encoder.network.config, max_distance=4)
    changes = (
        {"tokenizer": OtherWords(folder / "spiece.model")},
        {"network": type(encoder.network)(network)},
        {"variables": jax.tree.map(lambda x: x + 1e-3, encoder.variables)},
    )
    parts = {field.name: getattr(encoder, field.name) for field in dataclasses.fields(encoder)}
    for change in changes:
        assert texts.text_digest(FrozenTextEncoder(**{**parts, **change})) != digest


def test_what_is_cached_of_a_network_goes_with_it():
    calls = []

    class Network:
        pass

    @texts.weakly_cached
    def measure(network, of):
        calls.append(of)
        return [of]

    network = Network()
    assert measure(network, 1) is measure(network, 1)
    measure(network, 2)
    assert calls == [1, 2]
    alive = weakref.ref(network)
    del network
    assert alive() is None


@pytest.mark.parametrize("size", [0, (8, -8)])
def test_autoencoders_of_no_pixels_are_refused(size):
    with pytest.raises(ValueError, match=r"image_size (is|has) .*; it must be at least 1"):
        AutoencodingConfig(image_size=size)


@pytest.mark.slow
def test_an_autoencoder_of_other_channels_is_refused(autoencoder):
    model = dataclasses.replace(TINY, channels=8)
    with pytest.raises(ValueError, match=r"makes latents with 4 channels; set model.channels to 4"):
        experiment_of(model=model, codec=PretrainedAutoencoder(str(autoencoder))).job()
