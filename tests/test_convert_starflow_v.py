"""Import of published STARFlow-V weights: every tensor has its place, the denoiser its scale, arguments are read."""

import dataclasses

import jax
import numpy as np
import pytest
import starflow_v_weights as sv
import starflow_weights as sw
from commands import one_sentence
from published_files import write_safetensors

from flowgen import checkpoint, convert
from flowgen.cli import main
from flowgen.convert.mapping import match
from flowgen.convert.published_starflow import model_config
from flowgen.convert.tables import starflow_v as starflow_v_rules
from flowgen.flows import STARFLOW_V_480P, STARFlowV, denoiser_variables
from flowgen.nn import init

BUFFERS = 1 + 6 + 2  # var, attn_mask of each block, feat_rope
# The published YAML, in which what shapes no model and the learning rate may stay as they are.
YAML = """arguments:
- no_flip: 1
- fsdp: 1
- img_size: 640
- secondary_img_size: 512
- txt_size: 256
- vid_size: '81:16'
- fps_cond: 1
- channel_size: 48
- patch_size: 1
- channels: 3072
- top_block_channels: 4096
- blocks: 6
- layers_per_block: 2 2 2 2 2 24
- noise_std: 0.5
- lr: 5e-5
- nvp: 1
- rope: 1
- adaln: 0
- sos: 1
- seq_order: L2R
- pt_seq_len: 32
- mix_aspect: 1
- use_softplus: 1
- cond_top_only: 1
- use_final_norm: 1
- learnable_self_denoiser: 1
- conditional_denoiser: 1
- denoiser_window: 10
- cond_noise_level: 1
- temporal_causal: 2
- shallow_block_local: 1
- gradient_checkpoint: 1
- vae: Wan-AI/Wan2.2-TI2V-5B-Diffusers:0.6
- finetuned_vae: none
- text: google/flan-t5-xl
- cfg: 2.5
- drop_image: 0.25
- soft_clip: 4
"""
TOY = dataclasses.replace(sv.CASES["text"], noise_std=0.5)


def test_the_released_layout_has_558_keys_and_each_has_its_place():
    shapes = sv.shapes(sv.T2V)
    assert len(shapes) == 558
    target = jax.eval_shape(lambda key: init(STARFlowV(STARFLOW_V_480P), key), jax.random.key(0))
    rules, used, numbers = starflow_v_rules(gated=False, denoiser_scale=0.6), [], {"flow": 0, "denoiser": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(target):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [(rule, sources) for rule in rules if (sources := rule.sources(name, leaf.shape)) is not None]
        sources = [source for _, sources in found for source in sources if source in shapes]
        assert sum(int(np.prod(shapes[source])) for source in sources) == np.prod(leaf.shape), name
        numbers["denoiser" if "denoiser" in name else "flow"] += int(np.prod(leaf.shape))
        used += sources
    assert len(used) == len(set(used)) == 558 - BUFFERS
    assert {name for name in shapes if sw.is_buffer(name)} == shapes.keys() - set(used)
    dropped = shapes.keys() - set(used)
    assert all(any(rule.target is None and match(rule.source, name) is not None for rule in rules) for name in dropped)
    assert numbers == {"flow": 5_977_211_744, "denoiser": 912_884_784}
    assert sum(int(np.prod(shapes[name])) for name in used) == sum(numbers.values()) == 6_890_096_528


def test_the_published_yaml_gives_the_released_shape(tmp_path):
    (tmp_path / "arguments.yaml").write_text(YAML)
    weights = {"blocks.5.proj_txt.weight": np.zeros((4096, 2048), np.float32)}
    config = model_config(weights, convert.read_arguments(tmp_path / "arguments.yaml"))
    assert config == dataclasses.replace(STARFLOW_V_480P, image_size=40)
    assert STARFlowV(config).with_image_size(30, 53).config == STARFLOW_V_480P
    assert (config.denoiser_past_frames, config.denoiser_lookahead_frames) == (9, 1)
    assert convert.clip_size("81:16") == (81, 16)
    assert STARFLOW_V_480P.num_tokens == 33_390


@pytest.mark.parametrize("case", sv.CASES)
def test_every_tensor_of_a_small_model_lands_where_it_belongs(case):
    shape = sv.CASES[case]
    weights = sv.state_dict(shape)
    flow, variables = convert.starflow(weights, shape.arguments())
    total = sum(leaf.size for leaf in jax.tree.leaves(variables))
    assert total == sum(x.size for name, x in weights.items() if not sw.is_buffer(name))
    assert flow.config.frames == shape.frames
    reach = shape.denoiser_window - shape.temporal_causal + 1, shape.temporal_causal - 1
    assert (flow.config.denoiser_past_frames, flow.config.denoiser_lookahead_frames) == reach
    deep = len(shape.layers_per_block) - 1
    params = variables["params"][f"blocks_{deep}"]
    np.testing.assert_array_equal(params["start_token"], weights[f"blocks.{deep}.sos_embed"][0, 0])
    np.testing.assert_array_equal(params["proj_prefix"]["kernel"], weights[f"blocks.{deep}.proj_txt.weight"].T)
    denoiser, name = variables["params"]["denoiser"], sv.DENOISER
    np.testing.assert_array_equal(denoiser["proj_in"]["kernel"], weights[f"{name}.proj_in.weight"].T)
    np.testing.assert_array_equal(denoiser["proj_prefix"]["bias"], weights[f"{name}.proj_txt.bias"])
    np.testing.assert_array_equal(denoiser["final_norm"]["weight"], weights[f"{name}.final_norm.weight"])
    np.testing.assert_array_equal(
        denoiser["layers"]["attention"]["qkv"]["kernel"][-1], weights[f"{name}.attn_blocks.7.attention.qkv.weight"].T
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_denoisers_head_is_scaled_before_it_is_rounded(dtype):
    weights = sv.state_dict(TOY)
    _, variables = convert.starflow(weights, TOY.arguments(), dtype=dtype)
    head, factor = denoiser_variables(variables)["params"]["proj_out"], np.float32(0.3 / 0.5)
    np.testing.assert_array_equal(
        head["kernel"], (weights[f"{sv.DENOISER}.proj_out.weight"].T * factor).astype(head["kernel"].dtype)
    )
    np.testing.assert_array_equal(
        head["bias"], (weights[f"{sv.DENOISER}.proj_out.bias"] * factor).astype(head["bias"].dtype)
    )
    assert head["kernel"].dtype.name == dtype


def test_a_model_without_a_denoiser():
    weights = {name: x for name, x in sv.state_dict(TOY).items() if not name.startswith(sv.DENOISER)}
    flow, variables = convert.starflow(weights, TOY.arguments() | {"learnable_self_denoiser": 0})
    assert flow.config.denoiser_layers == 0
    assert "denoiser" not in variables["params"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_per_block": "2"}, "'layer_per_block' is not an argument of the published STARFlow; remove it"),
        ({"vid_size": None}, "temporal_causal is 2, but vid_size is missing; give both for a video model, or neither"),
        ({"vid_size": "81"}, "vid_size is '81'; give frames and frames per second, such as '81:16'"),
        ({"temporal_causal": 0}, r"temporal_causal is 0; all published video models \(vid_size\) use it"),
        ({"shallow_block_local": 0}, "shallow_block_local is 0; all published video models"),
        ({"cond_top_only": 0}, "cond_top_only is 0; all published video models"),
        ({"seq_order": "R2L"}, "seq_order is 'R2L'; it must be 'L2R' for video models"),
        ({"conditional_denoiser": 0}, "conditional_denoiser is 0; all published denoisers"),
        ({"denoiser_window": None}, "denoiser_window is None; all published denoisers"),
        ({"cond_noise_level": 0}, "cond_noise_level is 0; all published denoisers"),
        ({"noise_std": 0}, "noise_std is 0.0; all published denoisers"),
        ({"temporal_causal": 12}, "denoiser_window is 10 and temporal_causal is 12, so no frame attends to itself"),
        ({"local_attn_window": 21}, "local_attn_window is 21; models with this option cannot be imported"),
        ({"vae": "some/vae"}, "vae is 'some/vae', which is not a known autoencoder"),
        ({"learnable_self_denoiser": 0}, "'learnable_self_denoiser.proj_in.weight' is not expected"),
        ({"channels": 32}, "The weights do not fit the model"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message) as error:
        convert.starflow(sv.state_dict(TOY), TOY.arguments() | change)
    one_sentence(error)


def test_missing_unexpected_and_infinite_tensors_are_all_listed():
    weights = sv.state_dict(TOY)
    del weights[f"{sv.DENOISER}.attn_blocks.7.mlp.main.0.bias"]
    del weights[f"{sv.DENOISER}.proj_out.bias"]
    weights[f"{sv.DENOISER}.sos_embed"] = np.zeros((1, 1, 3), np.float32)
    weights["learnable_denoiser.proj_in.bias"] = np.zeros(64, np.float32)
    weights[f"{sv.DENOISER}.attn_blocks.8.mlp.norm.bias"] = np.zeros(64, np.float32)
    weights[f"{sv.DENOISER}.proj_out.weight"] = np.full((3, 64), np.nan, np.float32)
    with pytest.raises(convert.MappingError) as error:
        convert.starflow(weights, TOY.arguments())
    assert len(error.value.failures) == 6
    assert sum("is missing" in failure for failure in error.value.failures) == 2
    assert sum("is not expected" in failure for failure in error.value.failures) == 3
    assert sum("not finite" in failure for failure in error.value.failures) == 1


def test_the_command_writes_a_run_that_can_be_loaded(tmp_path, capsys):
    write_safetensors(tmp_path / "weights.safetensors", sv.state_dict(TOY))
    rows = [f"- {name}: {value!r}" for name, value in TOY.arguments().items() if value is not None]
    rows += ["- fps_cond: 1", "- mix_aspect: 1", "- cfg: 2.5"]
    (tmp_path / "arguments.yaml").write_text("\n".join(["arguments:", *rows]) + "\n")
    words = (tmp_path / "weights.safetensors", "--arguments", tmp_path / "arguments.yaml", "--to", tmp_path / "run")
    assert main(["convert", *map(str, words)]) == 0
    assert capsys.readouterr().err == ""
    flow, params, experiment = checkpoint.load(tmp_path / "run")
    expected, variables = convert.starflow(sv.state_dict(TOY), TOY.arguments())
    assert isinstance(flow, STARFlowV)
    assert flow.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, params, variables)
    assert (experiment.sampling.guidance, experiment.sampling.rule) == (2.5, "product")
    with (tmp_path / "arguments.yaml").open("a") as file:
        file.write("- vae: some/vae:x\n")
    assert main(["convert", *map(str, words[:-1]), str(tmp_path / "other")]) == 2
    error = capsys.readouterr().err
    assert "is 'some/vae:x', but the scale 'x' is not a number; write, for example, " in error
    assert error.count("\n") == 1
    template = experiment.text.template(flow.config.noise_std)
    assert template("a cat", (30, 53)).startswith("Noise Level 500:\nA video with 16 fps:\na cat\n")
    assert template("a cat", (30, 53)).endswith(" in a 16:9 aspect ratio.\n")
