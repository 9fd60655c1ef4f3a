"""Flows of latents with texts: prompts, guidance towards the empty text, and texts that are encoded first."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from latent_cases import FEW, TEXT, experiment_of
from tolerances import NETWORK, assert_close

from flowgen import checkpoint
from flowgen.cli import main
from flowgen.conditioning import TextCondition
from flowgen.data import LatentsConfig
from flowgen.experiments import (
    SamplingConfig,
    TextConfig,
    encoding,
    fit,
)


@pytest.fixture(scope="module")
def text_run(tmp_path_factory):
    """A flow of digits by their names, which stand in for captions."""
    workdir = tmp_path_factory.mktemp("text") / "run"
    experiment = experiment_of(
        model=TEXT,
        text=TextConfig(encoder="words", noise_level=True),
        train=dataclasses.replace(FEW, label_dropout=0.5),
        sampling=SamplingConfig(num=4, guidance=1.0, rule="product"),
    )
    fit(experiment, workdir)
    return workdir


@pytest.mark.slow
def test_prompts_are_drawn(text_run, tmp_path):
    out = tmp_path / "samples.npz"
    words = ["sample", "--checkpoint", str(text_run), "--out", str(out), "--aspect", "1:1"]
    assert main([*words, "--prompt", "3", "--prompt", "7"]) == 0
    with np.load(out) as arrays:
        two = arrays["images"]
        assert two.shape == (2, 8, 8, 1)
        assert arrays["prompts"].tolist() == ["3", "7"]
    (tmp_path / "prompts.txt").write_text("3\n\n7\n", encoding="utf-8-sig")  # with a byte order mark
    assert main([*words, "--prompts", str(tmp_path / "prompts.txt"), "--num", "4"]) == 0
    with np.load(out) as arrays:
        assert_close(arrays["images"][:2], two, NETWORK)
        assert arrays["prompts"].tolist() == ["3", "7", "3", "7"]
    assert (text_run / "samples" / "0000004.png").is_file()


@pytest.mark.slow
def test_guidance_of_texts_is_towards_the_wrapped_empty_text(text_run):
    flow, params, experiment = checkpoint.load(text_run)
    encode = experiment.encoding.open_text_encoder()
    cond = experiment.encoding.condition(["3", "7"])
    plain = encode(["Noise Level 300:\n3", "Noise Level 300:\n7"])
    np.testing.assert_array_equal(cond.embeddings, plain.embeddings)
    (latents, _), given = (
        experiment.draw_batch(
            flow, params, jax.random.key(0), np.arange(2), cond, guidance=experiment.guidance(flow, null)
        )
        for null in (None, TextCondition(*map(jnp.asarray, encode(["Noise Level 300:\n"]))))
    )
    np.testing.assert_array_equal(latents, given[0])
    other = TextCondition(*map(jnp.asarray, encode([""])))
    towards = experiment.guidance(flow, other)
    bare, _ = experiment.draw_batch(flow, params, jax.random.key(0), np.arange(2), cond, guidance=towards)
    # After a few steps texts change little.
    assert np.abs(latents - bare).max() > 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "this model requires texts; give --prompt"),
        (["--prompt", "one two three four five six"], "has 10 tokens, but the limit is 6; shorten it"),
        (["--classes", "3"], "--classes is 3, but this model requires texts; give --prompt"),
        (["--prompt", "3", "--prompts", "x"], "--prompt and --prompts cannot be combined"),
        (["--prompts", "nowhere.txt"], "nowhere.txt"),
        (["--prompt", "3", "--aspect", "4:3"], "aspect is '4:3'; choose one of 1:1, 2:3"),
        (["--prompt", "3", "--autoencoder", "vae"], "--autoencoder"),
        (["--prompt", "3", "--text.noise_level", "true"], "--text.noise_level is not an option of this command"),
        (["--prompt", "3", "--text.digest", "none"], "--text.digest is not an option of this command"),
        (["--prompt", "3", "--text-encoder", "nowhere"], "The folder 'nowhere' of the text encoder does not exist"),
    ],
)
def test_mistakes_in_prompts_are_named(text_run, tmp_path, capsys, words, message):
    assert main(["sample", "--checkpoint", str(text_run), "--out", str(tmp_path / "no.png"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


@pytest.mark.slow  # beside test_encoding_first_or_on_the_way_trains_the_same
def test_texts_can_be_encoded_first(tmp_path, monkeypatch):
    experiment = experiment_of(
        model=TEXT, text=TextConfig(encoder="words"), train=dataclasses.replace(FEW, label_dropout=0.5)
    )
    path = tmp_path / "latent.py"
    path.write_text(
        f"from flowgen.experiments import from_json\nconfig = lambda: from_json({experiment.to_json()!r})\n"
    )
    assert main(["encode", "--config", str(path), "--out", str(tmp_path / "encoded")]) == 0
    encoded = dataclasses.replace(experiment, data=LatentsConfig(str(tmp_path / "encoded")))
    direct, again = fit(experiment, tmp_path / "direct"), fit(encoded, tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, direct.state.params, again.state.params)
    other = dataclasses.replace(encoded, text=TextConfig(encoder="words", noise_level=True))
    with pytest.raises(ValueError, match=r"text.noise_level False, but this experiment uses True; set it to False, or"):
        fit(other, tmp_path / "other")
    prompted = dataclasses.replace(encoded, sampling=SamplingConfig(prompts=("one two three four five six",)))
    with pytest.raises(ValueError, match=r"has 7 tokens, but the limit is 6"):
        fit(prompted, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    monkeypatch.setattr(encoding, "open_text_encoder", lambda *_, **__: pytest.fail("the text encoder was opened"))
    guided = dataclasses.replace(encoded, sampling=SamplingConfig(num=2, guidance=1.0))
    assert fit(guided, tmp_path / "guided").samples.is_file()
