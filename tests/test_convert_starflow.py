"""Import of published STARFlow weights: every tensor has its place, and arguments are read strictly."""

import dataclasses
import tracemalloc

import codec_weights as cw
import jax
import numpy as np
import pytest
import starflow_weights as sw
from commands import outcome_of, refused, succeed
from published_files import publish, write_safetensors

from flowgen import checkpoint, convert
from flowgen.convert.mapping import match
from flowgen.convert.published_starflow import model_config
from flowgen.convert.tables import starflow as starflow_rules
from flowgen.flows import STARFLOW_PRESETS, STARFlow
from flowgen.nn import init

BUFFERS = 1 + 6 + 2  # var, attn_mask of each block, feat_rope


def test_the_released_text_to_image_layout_has_455_keys_and_each_has_its_place():
    shapes = sw.shapes(sw.T2I)
    assert len(shapes) == 455
    flow = STARFlow(STARFLOW_PRESETS["t2i_3b"])
    target = jax.eval_shape(lambda key: init(flow, key), jax.random.key(0))
    rules, used = starflow_rules(gated=False), []
    for path, leaf in jax.tree_util.tree_leaves_with_path(target):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [(rule, sources) for rule in rules if (sources := rule.sources(name, leaf.shape)) is not None]
        sources = [source for _, sources in found for source in sources if source in shapes]
        numbers = sum(int(np.prod(shapes[source])) for source in sources)
        assert numbers == np.prod(leaf.shape), name
        used += sources
    assert len(used) == len(set(used)) == 455 - BUFFERS
    dropped = shapes.keys() - set(used)
    assert all(any(rule.target is None and match(rule.source, name) is not None for rule in rules) for name in dropped)
    assert {name for name in shapes if sw.is_buffer(name)} == dropped
    assert sum(int(np.prod(shapes[name])) for name in used) == 3_858_281_544


def test_the_published_yaml_gives_the_released_shape():
    published = sw.T2I.arguments() | {
        "img_size": 256,
        "vae": "stabilityai/sd-vae-ft-ema",
        "lr": 6.4e-5,
        "drop_label": 0.1,
        "latent_norm_regularization": 1e-4,
    }
    weights = {"blocks.5.proj_txt.weight": np.zeros((3072, 2048), np.float32)}
    assert model_config(weights, published) == STARFLOW_PRESETS["t2i_3b"]


@pytest.mark.parametrize("case", sw.CASES)
def test_every_tensor_of_a_small_model_lands_where_it_belongs(case):
    shape = sw.CASES[case]
    weights = sw.state_dict(shape)
    flow, variables = convert.starflow(weights, shape.arguments())
    total = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert total == sum(x.size for name, x in weights.items() if not sw.is_buffer(name))
    deep, last = flow.config.num_blocks - 1, len(shape.layers_per_block) - 1
    block, params = f"blocks.{last}", variables["params"][f"blocks_{deep}"]
    np.testing.assert_array_equal(params["start_token"], weights[f"{block}.sos_embed"][0, 0])
    np.testing.assert_array_equal(params["proj_prefix"]["kernel"], weights[f"{block}.proj_txt.weight"].T)
    layer = f"{block}.attn_blocks.{shape.layers_per_block[-1] - 1}"
    np.testing.assert_array_equal(
        params["layers"]["attention"]["qkv"]["kernel"][-1], weights[f"{layer}.attention.qkv.weight"].T
    )


TOY = sw.CASES["text"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_per_block": "2"}, "'layer_per_block' is not an argument of the published STARFlow; remove it"),
        ({"sos": 0}, "sos is 0; all published models use it, and models without it cannot be imported"),
        ({"temporal_causal": 2}, "temporal_causal is 2, but vid_size is missing; give both for a video model"),
        ({"txt_size": 0}, "txt_size is 0, but the deep block has a text projection"),
        ({"channels": 32}, "The weights do not fit the model"),
        ({"vae": "some/vae"}, "vae is 'some/vae', which is not a known autoencoder"),
        ({"num_heads": 7}, "num_heads is 7; it must be channels / head_dim"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        convert.starflow(sw.state_dict(TOY), TOY.arguments() | change)


def test_missing_and_unexpected_tensors_are_all_listed():
    weights = sw.state_dict(TOY)
    del weights["blocks.1.final_norm.weight"]
    weights["blocks.0.proj_txt.weight"] = np.zeros((64, 6), np.float32)
    with pytest.raises(convert.MappingError) as error:
        convert.starflow(weights, TOY.arguments())
    assert len(error.value.failures) == 2
    weights = sw.state_dict(TOY) | {"blocks.1.proj_in.weight": np.full((64, 3), np.nan, np.float32)}
    with pytest.raises(convert.MappingError, match="not finite"):
        convert.starflow(weights, TOY.arguments())


# -- files: the published ones, small ---------------------------------------------------------------------------

# Widths of the toy autoencoder and text encoder that other tests compare with the published code.
T2I = sw.Shape(channel_size=4, txt_size=24, txt_dim=24)
YAML = """arguments:
- img_size: 32
- txt_size: 24
- channel_size: 4
- patch_size: 1
- channels: 64
- head_dim: 32
- blocks: 2
- layers_per_block: 1 2
- lr: 6.4e-05
- min_lr: 1e-6
- rope: 1
- sos: 1
- seq_order: L2R
- use_softplus: 1
- cond_top_only: 1
- use_final_norm: 1
- vae: stabilityai/sd-vae-ft-ema
- text: google/flan-t5-xl
- cfg: 2.5
- soft_clip: 4
- noise_std: 0.3
"""


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Weights, YAML, autoencoder and text encoder of a toy text-to-image model."""
    folder = tmp_path_factory.mktemp("published")
    write_safetensors(folder / "weights.safetensors", sw.state_dict(T2I))
    (folder / "arguments.yaml").write_text(YAML)
    publish(folder / "vae", cw.AUTOENCODER, cw.state_dict("autoencoder"), "diffusion_pytorch_model.safetensors")
    t5 = publish(folder / "t5", cw.T5, cw.state_dict("t5"), "model.safetensors")
    (t5 / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_published_files_draw_a_prompt(published, tmp_path, dtype):
    files = ("--arguments", published / "arguments.yaml", "--dtype", dtype)
    places = ("--autoencoder", published / "vae", "--text-encoder", published / "t5")
    to = tmp_path / "run"
    assert outcome_of("convert", published / "weights.safetensors", *files, *places, "--to", to)[::2] == (0, "")
    flow, params, experiment = checkpoint.load(to)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {dtype}
    assert experiment.sampling.guidance == 2.5
    assert flow.config.image_size == 4
    out = tmp_path / "samples.npz"
    prompt = ("sample", "--checkpoint", to, "--prompt", "a photo of a cat", "--aspect", "1:1", "--guidance", "3.6")
    assert outcome_of(*prompt, "--out", out)[::2] == (0, "")
    with np.load(out) as arrays:
        assert arrays["images"].shape == (1, 16, 16, 3)
        assert np.isfinite(arrays["images"]).all()
    assert outcome_of(*prompt, "--num", 2, "--out", tmp_path / "samples.png")[::2] == (0, "")
    other = {name: x + 0.1 for name, x in cw.state_dict("autoencoder").items()}
    publish(tmp_path / "vae", cw.AUTOENCODER, other, "diffusion_pytorch_model.safetensors")
    assert "is not the one that the flow was trained with" in refused(
        *prompt, "--autoencoder", tmp_path / "vae", "--out", out
    )
    other = {name: x + 0.1 for name, x in cw.state_dict("t5").items()}
    t5 = publish(tmp_path / "t5", cw.T5, other, "model.safetensors")
    (t5 / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    assert "is not the one that the flow was trained with" in refused(*prompt, "--text-encoder", t5, "--out", out)


@pytest.mark.slow  # samples of a published flow for one argument
def test_places_can_be_given_when_samples_are_drawn(published, tmp_path):
    to, out = tmp_path / "run", tmp_path / "no.png"
    files = ("--arguments", published / "arguments.yaml")
    succeed("convert", published / "weights.safetensors", *files, "--to", to)
    prompt = ("sample", "--checkpoint", to, "--prompt", "a cat", "--out", out)
    vae, t5 = ("--autoencoder", published / "vae"), ("--text-encoder", published / "t5")
    assert "codec.path is empty" in refused(*prompt)
    assert "text.encoder is empty; give the folder" in refused(*prompt, *vae)
    assert "has no config.json, so it is not a published text encoder" in refused(
        *prompt, *vae, "--text-encoder", tmp_path
    )
    assert not out.exists()
    long = ("--prompt", "the red apple and the dogs of a photo of a cat")
    error = refused("sample --checkpoint", to, *long, "--out", out, *vae, *t5)
    assert "tokens, but the limit is 24; shorten it" in error


def test_mistakes_in_the_files_are_named(published, tmp_path):
    weights, to = published / "weights.safetensors", tmp_path / "run"
    (tmp_path / "foreign.yaml").write_text(YAML + "- layer_per_block: 3\n")
    (tmp_path / "fps.yaml").write_text(YAML + "- fps_cond: 1\n")
    (tmp_path / "null.yaml").write_text(YAML + "- soft_clip: null\n")
    (tmp_path / "no.yaml").write_text("img_size: 32\n")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    good = ("--arguments", published / "arguments.yaml")
    for words, message in (
        ((weights, "--arguments", tmp_path / "foreign.yaml"), "'layer_per_block' is not an argument of the published"),
        ((weights, "--arguments", tmp_path / "no.yaml"), "does not list 'name: value' under 'arguments'"),
        ((weights, "--arguments", tmp_path / "nowhere.yaml"), "give the YAML that was published with the weights"),
        ((cut, *good), "is damaged or not a safetensors file"),
        ((weights, *good, "--image-size", "256"), "--image-size is already set by the file in --arguments"),
        ((weights, *good, "--autoencoder", tmp_path / "nowhere"), "There is no folder"),
        (
            (weights, "--arguments", tmp_path / "fps.yaml"),
            "fps_cond is 1, but vid_size is missing; give both",
        ),
        ((weights, "--arguments", tmp_path / "null.yaml"), "soft_clip is None; it must be a number"),
        (
            (weights, "--image-size", "256", "--dtype", "bfloat16"),
            "--dtype is for STARFlow, which also needs --arguments",
        ),
        ((weights,), "--image-size is missing; give it for a TARFlow, or give --arguments for a STARFlow"),
    ):
        assert message in refused("convert", *words, "--to", to)
        assert not to.exists()


def test_conversion_needs_little_memory_beside_its_result():
    convert.starflow(sw.state_dict(TOY), TOY.arguments())  # what is compiled and cached is not of the weights
    wide = dataclasses.replace(TOY, channels=256, layers_per_block=(4, 6))
    state_dict = sw.state_dict(wide)
    tracemalloc.start()
    _, variables = convert.starflow(state_dict, wide.arguments(), dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(variables))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(variables))
    # The result, one tensor on its way, and a MiB that is not arrays: far below twice the result.
    assert result + 2 * largest + (1 << 20) < 1.6 * result
    assert peak < result + 2 * largest + (1 << 20)
