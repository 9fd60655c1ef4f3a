"""Import of published weights: every tensor in its place, none used twice, lost or guessed."""

import re
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import one_sentence
from tolerances import FORMULA, assert_close

import flowgen
from flowgen.convert import (
    MappingError,
    Requirement,
    Rule,
    fill,
    parse_file_name,
    read_state_dict,
    tarflow,
)
from flowgen.convert.mapping import match, transpose


@dataclass(frozen=True)
class Published:
    """Sizes of a published state dict: K blocks, L layers, T tokens of D numbers, width C, n classes."""

    blocks: int = 2
    layers: int = 3
    tokens: int = 6
    token_dim: int = 12
    width: int = 64
    classes: int = 0
    outputs_per_number: int = 2

    def state_dict(self, seed=0):
        """The names and shapes of the published module, filled with noise."""
        c, d = self.width, self.token_dim
        rng = np.random.default_rng(seed)
        shapes = {}
        for b in range(self.blocks):
            block = f"blocks.{b}"
            shapes[f"{block}.pos_embed"] = (self.tokens, c)
            if self.classes:
                shapes[f"{block}.class_embed"] = (self.classes, 1, c)
            shapes |= linear(f"{block}.proj_in", d, c)
            for i in range(self.layers):
                layer = f"{block}.attn_blocks.{i}"
                shapes |= norm(f"{layer}.attention.norm", c)
                shapes |= linear(f"{layer}.attention.qkv", c, 3 * c)
                shapes |= linear(f"{layer}.attention.proj", c, c)
                shapes |= norm(f"{layer}.mlp.norm", c)
                shapes |= linear(f"{layer}.mlp.main.0", c, 4 * c)
                shapes |= linear(f"{layer}.mlp.main.2", 4 * c, c)
            shapes |= linear(f"{block}.proj_out", c, self.outputs_per_number * d)
        weights = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
        masks = {f"blocks.{b}.attn_mask": np.tri(self.tokens, dtype=np.float32) for b in range(self.blocks)}
        return {"var": np.ones((self.tokens, d), np.float32)} | weights | masks


def linear(name, inputs, outputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


AFFINE = Published()
CLASSES = Published(classes=3)
VOLUME_PRESERVING = Published(outputs_per_number=1, classes=2)
SIZES = {"image_size": (4, 6), "patch_size": 2}


def variance(sizes):
    return np.random.default_rng(9).uniform(0.5, 2, (sizes.tokens, sizes.token_dim)).astype(np.float32)


@pytest.mark.parametrize("sizes", [AFFINE, CLASSES, VOLUME_PRESERVING])
def test_every_tensor_lands_where_it_belongs(sizes):
    weights = sizes.state_dict()
    if sizes is VOLUME_PRESERVING:
        weights["var"] = variance(sizes)
    _, variables = tarflow(weights, **SIZES)
    for b in range(sizes.blocks):
        source, params = f"blocks.{b}", variables["params"][f"blocks_{b}"]
        expected = {"pos_embed": weights[f"{source}.pos_embed"]}
        if sizes.classes:
            expected["class_embed"] = weights[f"{source}.class_embed"][:, 0, :]
        for name in ("proj_in", "proj_out"):
            expected[f"{name}/kernel"] = weights[f"{source}.{name}.weight"].T
            expected[f"{name}/bias"] = weights[f"{source}.{name}.bias"]
        for i in range(sizes.layers):
            layer = f"{source}.attn_blocks.{i}"
            for published, ours in (("attention.norm", "attention_norm"), ("mlp.norm", "mlp_norm")):
                expected[f"layers/{ours}/scale", i] = weights[f"{layer}.{published}.weight"]
                expected[f"layers/{ours}/bias", i] = weights[f"{layer}.{published}.bias"]
            for published, ours in (
                ("attention.qkv", "attention/qkv"),
                ("attention.proj", "attention/proj"),
                ("mlp.main.0", "mlp/up"),
                ("mlp.main.2", "mlp/down"),
            ):
                expected[f"layers/{ours}/kernel", i] = weights[f"{layer}.{published}.weight"].T
                expected[f"layers/{ours}/bias", i] = weights[f"{layer}.{published}.bias"]
        got = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            got |= {(name, i): leaf[i] for i in range(len(leaf))} if "layers/" in name else {name: leaf}
        assert got.keys() == expected.keys()
        for name, want in expected.items():
            np.testing.assert_array_equal(got[name], want, err_msg=str(name))
    if sizes is VOLUME_PRESERVING:
        np.testing.assert_array_equal(variables["prior"]["variance"], weights["var"])
    else:
        assert "prior" not in variables


@pytest.mark.parametrize("sizes", [AFFINE, CLASSES, VOLUME_PRESERVING])
def test_sizes_are_inferred_and_the_tree_is_that_of_the_model(sizes):
    flow, variables = tarflow(sizes.state_dict(), **SIZES, noise_std=0.07)
    affine = sizes.outputs_per_number == 2
    assert flow.config == flowgen.TARFlowConfig(
        image_size=(4, 6),
        channels=3,
        patch_size=2,
        width=64,
        num_blocks=2,
        layers_per_block=3,
        num_classes=sizes.classes,
        scale_parameterisation="exponential" if affine else "volume_preserving",
        noise_std=0.07,
    )
    abstract = jax.eval_shape(lambda key: flowgen.init(flow, key), jax.random.key(0))
    assert jax.tree.structure(variables) == jax.tree.structure(abstract)
    for leaf, want in zip(jax.tree.leaves(variables), jax.tree.leaves(abstract), strict=True):
        assert type(leaf) is np.ndarray
        assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)


def test_other_expansions_and_depths_are_inferred():
    weights = Published(blocks=3, layers=1).state_dict()
    for name in list(weights):
        if ".mlp.main.0." in name:
            weights[name] = weights[name][:128]
        elif name.endswith(".mlp.main.2.weight"):
            weights[name] = weights[name][:, :128]
    flow, _ = tarflow(weights, **SIZES)
    assert (flow.config.expansion, flow.config.num_blocks, flow.config.layers_per_block) == (2, 3, 1)


def test_imported_model_has_the_log_determinant_of_its_heads():
    weights = CLASSES.state_dict()
    # A constant log-scale in every block scales every token but each block's free one.
    for b in range(CLASSES.blocks):
        out = f"blocks.{b}.proj_out"
        weights[f"{out}.weight"] = np.zeros_like(weights[f"{out}.weight"])
        weights[f"{out}.bias"] = np.repeat(np.float32([0.25, 0.5]), 12)
    flow, variables = tarflow(weights, **SIZES)
    x = jnp.linspace(-1, 1, 2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    on_device = jax.tree.map(jnp.asarray, variables)
    z, logdet = flow.apply(on_device, x, jnp.array([0, 2]), method="forward")
    assert z.shape == (2, 6, 12)
    assert_close(logdet, -0.25 * 2 * 5 * 12, FORMULA)  # blocks, tokens but one, channels


def test_a_prior_variance_that_is_not_one_is_kept_for_affine_models_too():
    weights = AFFINE.state_dict() | {"var": variance(AFFINE)}
    flow, variables = tarflow(weights, **SIZES)
    np.testing.assert_array_equal(variables["prior"]["variance"], weights["var"])
    on_device = jax.tree.map(jnp.asarray, variables)
    np.testing.assert_array_equal(flow.apply(on_device, method="prior_variance"), weights["var"])


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_data_parallelism_and_compilation_are_removed(prefix):
    weights = AFFINE.state_dict()
    _, expected = tarflow(weights, **SIZES)
    _, variables = tarflow({prefix + name: x for name, x in weights.items()}, **SIZES)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions_become_float32(dtype):
    weights = {name: x.astype(jnp.dtype(dtype)) for name, x in AFFINE.state_dict().items()}
    _, variables = tarflow(weights, **SIZES)
    expected = weights["blocks.1.proj_in.weight"].astype(np.float32).T
    got = variables["params"]["blocks_1"]["proj_in"]["kernel"]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)


# What is refused.


def without(*names):
    return lambda weights: {name: x for name, x in weights.items() if name not in names}


def changed(**replaced):
    return lambda weights: weights | {name.replace("__", "."): x for name, x in replaced.items()}


@pytest.mark.parametrize(
    ("change", "patterns"),
    [
        (without("blocks.1.proj_in.bias"), ["'blocks.1.proj_in.bias' is missing"]),
        (
            without("blocks.1.attn_blocks.2.mlp.main.0.weight", "blocks.0.proj_out.bias"),
            [
                "2 problems",
                "'blocks.1.attn_blocks.2.mlp.main.0.weight' is missing",
                "'blocks.0.proj_out.bias' is",
            ],
        ),
        (changed(extra=np.ones(3)), ["(1 problem): 'extra' is not expected"]),
        (changed(blocks__2__proj_in__bias=np.ones(64)), ["'blocks.2.proj_in.bias' is not expected"]),
        (changed(blocks__00__pos_embed=np.ones((6, 64))), ["'blocks.00.pos_embed' is not expected"]),
        (
            changed(blocks__99999999__pos_embed=np.ones((6, 64))),
            ["'blocks.99999999.pos_embed' is not expected"],
        ),
        (
            changed(blocks__1__pos_embed=np.ones((7, 64), np.float32)),
            ["'blocks.1.pos_embed' has shape (7, 64), which becomes (7, 64), but the model needs (6, 64)"],
        ),
        (
            changed(blocks__1__class_embed=np.ones((3, 2, 64), np.float32)),
            ["'blocks.1.class_embed' has shape (3, 2, 64)"],
        ),
        (changed(blocks__1__class_embed=np.ones((), np.float32)), ["'blocks.1.class_embed' has shape ()"]),
        (changed(blocks__1__proj_in__bias=np.ones(64, int)), ["'blocks.1.proj_in.bias' is int64"]),
        (changed(blocks__1__proj_in__bias=np.full(64, np.nan, np.float32)), ["not finite in float32"]),
        (changed(blocks__1__proj_in__bias=np.full(64, 1e300)), ["not finite in float32"]),
        (
            changed(blocks__1__attn_mask=np.ones((6, 6))),
            ["'blocks.1.attn_mask' is not a lower triangle of ones"],
        ),
        (changed(var=-np.ones((6, 12), np.float32)), ["'var' is not positive everywhere"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_with_every_reason(change, patterns):
    with pytest.raises(MappingError) as caught:
        tarflow(change(CLASSES.state_dict()), **SIZES)
    for pattern in patterns:
        assert pattern in one_sentence(caught)


def test_long_lists_of_problems_are_cut_in_the_sentence_and_whole_in_the_error():
    weights = CLASSES.state_dict() | {f"extra.{i}": np.ones(1) for i in range(100)}
    with pytest.raises(MappingError, match=r"\(100 problems\): 'extra\.0' .*; and 88 more\.$") as caught:
        tarflow(weights, **SIZES)
    assert len(caught.value.failures) == 100


@pytest.mark.parametrize(
    ("change", "arguments", "pattern"),
    [
        (dict, {"patch_size": 1}, r"gives tokens of 3 numbers, but the weights have 12; use patch_size=2\."),
        (dict, {"channels": 4}, r"the patch_size and channels that the model was trained with\."),
        (dict, {"channels": 0}, "weights have 12"),
        (dict, {"patch_size": -2, "image_size": 8}, "patch_size is -2"),
        (dict, {"image_size": (4, 8)}, "4x8 with patch_size 2 gives 8 tokens, but the weights have 6"),
        (dict, {"image_size": 5}, "patch_size 2 does not divide"),
        (dict, {"noise_std": -0.1}, "noise_std is -0.1"),
        (
            changed(blocks__0__sos_embed=np.ones((1, 1, 4))),
            {},
            r"STARFlow weights \(they have 'blocks.0.sos_embed'",
        ),
        (without("blocks.0.pos_embed"), {}, "not TARFlow weights: 'blocks.0.pos_embed' is missing"),
        (lambda _: {}, {}, r"from the 0 tensors \(nothing"),
        (without("blocks.0.proj_in.weight"), {}, "'blocks.0.proj_in.weight' is missing"),
        (
            changed(blocks__0__pos_embed=np.ones(3)),
            {},
            r"'blocks.0.pos_embed' has shape \(3,\), but in TARFlow weights it has 2 axes",
        ),
        (changed(blocks__0__proj_out__weight=np.ones((13, 64))), {}, "has 13 rows"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(change, arguments, pattern):
    with pytest.raises(ValueError, match=pattern) as caught:
        tarflow(change(CLASSES.state_dict()), **{**SIZES, **arguments})
    one_sentence(caught)


def test_a_fitting_square_image_size_is_proposed():
    with pytest.raises(ValueError, match=r"gives 9 tokens, but the weights have 4; use image_size=4\."):
        tarflow(Published(tokens=4).state_dict(), image_size=6, patch_size=2)


def test_a_file_of_torch_that_is_no_tarflow_is_refused():
    state_dict = read_state_dict(Path(__file__).parent / "fixtures" / "torch_nested.pth")
    with pytest.raises(ValueError, match=re.escape("from the 4 tensors ('0.weight', '0.bias'")):
        tarflow(state_dict, **SIZES)


# The table machinery.

X = jax.ShapeDtypeStruct((2, 3), np.float32)
STACKED = Rule("layers.{layer}.w", "w")
ROWS = {"layers.0.w": np.float32([1, 2, 3]), "layers.1.w": np.float32([4, 5, 6])}


def test_an_index_that_the_target_lacks_fills_the_leading_axis_in_order():
    got, dropped = fill({"w": X}, dict(reversed(ROWS.items())), [STACKED])
    np.testing.assert_array_equal(got["w"], [[1, 2, 3], [4, 5, 6]])
    assert dropped == ()


def test_stacks_are_sorted_as_numbers():
    target = {"w": jax.ShapeDtypeStruct((11,), np.float32)}
    got, _ = fill(target, {f"layers.{i}.w": np.array(i, np.float32) for i in range(11)}, [STACKED])
    np.testing.assert_array_equal(got["w"], np.arange(11))


def test_blocks_may_differ_in_depth_and_width():
    target = {
        "blocks_0": jax.ShapeDtypeStruct((1, 2), np.float32),
        "blocks_1": jax.ShapeDtypeStruct((2, 3), np.float32),
    }
    weights = {"b.0.l.0": np.ones(2), "b.1.l.0": np.ones(3), "b.1.l.1": np.full(3, 2.0)}
    got, _ = fill(target, weights, [Rule("b.{block}.l.{layer}", "blocks_{block}")])
    np.testing.assert_array_equal(got["blocks_1"], [[1, 1, 1], [2, 2, 2]])


def test_dropped_tensors_are_named_and_must_be_what_they_should_be():
    ones = Requirement("all ones", lambda x: bool((x == 1).all()))
    rules = [STACKED, Rule("mask", None, requirement=ones)]
    assert fill({"w": X}, ROWS | {"mask": np.ones(2)}, rules)[1] == ("mask",)
    with pytest.raises(MappingError, match="'mask' is not all ones"):
        fill({"w": X}, ROWS | {"mask": np.zeros(2)}, rules)


def test_tables_that_are_no_bijection_are_refused():
    with pytest.raises(MappingError, match="0 rules fill 'v'"):
        fill({"v": X}, ROWS, [STACKED])
    with pytest.raises(MappingError, match="2 rules fill 'w'"):
        fill({"w": X}, ROWS, [STACKED, STACKED])
    with pytest.raises(MappingError, match=r"'layers.0.w' fills a second leaf, 'w'"):
        fill({"v": X, "w": X}, ROWS, [STACKED, Rule("layers.{layer}.w", "v")])
    with pytest.raises(ValueError, match="stacks block, layer"):
        Rule("blocks.{block}.{layer}.w", "w")


def test_values_are_copies():
    weights = {"w": np.ones((3, 2), np.float32)}
    got, _ = fill({"w": X}, weights, [Rule("w", "w", transpose)])
    got["w"][:] = 0
    assert weights["w"].all()


def test_templates_match_whole_names_and_plain_integers():
    assert match("blocks.{block}.w", "blocks.10.w") == {"block": 10}
    assert match("blocks.{block}.w", "blocks.01.w") is None
    assert match("blocks.{block}.w", "blocks.1xw") is None
    assert match("blocks.{block}.w", "module.blocks.1.w") is None
    assert match("var", "var") == {}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("afhq_model_8_768_8_8_0.07.pth", (8, 768, 8, 8, 0.07)),
        ("runs/a/imagenet64_model_2_768_8_8_uniform.pth", (2, 768, 8, 8, 0.0)),
        (Path("imagenet_model_4_1024_8_8_0.15.safetensors"), (4, 1024, 8, 8, 0.15)),
        ("my_model_model_2_64_3_1_0.05.pth", (2, 64, 3, 1, 0.05)),
        ("afhq_opt_8_768_8_8_0.07.pth", None),
        ("model.pth", None),
        ("afhq_model_8_768_8_0.07.pth", None),
    ],
)
def test_published_file_names_are_understood(name, expected):
    got = parse_file_name(name)
    assert (None if got is None else tuple(got.values())) == expected
    if got is not None:
        assert list(got) == ["patch_size", "width", "num_blocks", "layers_per_block", "noise_std"]
