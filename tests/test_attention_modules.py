"""The attention modules against the published layers in NumPy, and inside linen, NNX and Equinox models."""

import math
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import rows
from flax import linen as nn
from flax import nnx
from laws import drawn
from tolerances import LAYER, assert_close

import flowgen.attention as attention
import flowgen.attention.nnx as twins

RNG = np.random.default_rng(0)
PUBLISHED = 1e-10  # float64 on both sides
GRID = (4, 6)
WIDTH, HEADS = 16, 2

CAUSAL = {
    **{
        name: attention.LinearAttention(WIDTH, HEADS, kernel=name, is_causal=True)
        for name in attention.CAUSAL_KERNEL_NAMES
        if name != "softmax"
    },
    "grouped": attention.LinearAttention(WIDTH, 4, kernel="nala", num_kv_heads=2, is_causal=True),
    "nala layer": attention.NaLaAttention(WIDTH, HEADS, is_causal=True, learnable=True, direction_map="cosine"),
}
FULL = {
    "linear": (attention.LinearAttention(WIDTH, HEADS, kernel="focused"), {}),
    "nala layer": (attention.NaLaAttention(WIDTH, HEADS), {"grid": GRID}),
    "soft": (attention.SOFTAttention(WIDTH, HEADS, num_landmarks=6), {}),
    "soft conv": (
        attention.SOFTAttention(
            WIDTH, HEADS, tied=False, landmarks="conv_norm_gelu", value_conv=3, normalize="symmetric", solver="cholesky"
        ),
        {"grid": GRID},
    ),
}


@pytest.fixture(autouse=True)
def same_draws(monkeypatch):
    """Every test draws the same inputs, whichever tests ran before it."""
    monkeypatch.setitem(globals(), "RNG", np.random.default_rng(0))


def inputs(n=GRID[0] * GRID[1], batch=2, width=WIDTH):
    return jnp.asarray(RNG.standard_normal((batch, n, width)), jnp.float32)


def perturbed(module, x, **options):
    return drawn(partial(module.init, **options), jax.random.key(0), x, scale=0.2)


def depthwise(image, filters, bias=0.0):
    """Same-padded depthwise convolution of `i j c` with `p q c`, in NumPy."""
    size = filters.shape[0] // 2
    padded = np.pad(image, ((size, size), (size, size), (0, 0)))
    out = np.zeros_like(image)
    for p in range(filters.shape[0]):
        for q in range(filters.shape[1]):
            out += padded[p : p + image.shape[0], q : q + image.shape[1]] * filters[p, q]
    return out + bias


def layer_norm(x, scale, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale + bias


def published_nala(params, x, grid):
    """The released NaLaFormer layer for one image `n c`, written from its description."""
    n, width = x.shape
    head = width // HEADS
    q, k, v, g = np.split(x @ params["qkvg"]["kernel"] + params["qkvg"]["bias"], 4, axis=-1)
    conv = params["value_conv"]
    local = depthwise(v.reshape(*grid, width), conv["kernel"][:, :, 0], conv["bias"]).reshape(n, width)
    angles = 10_000.0 ** -np.linspace(0, 1, head // 4)
    rows, columns = np.divmod(np.arange(n), grid[1])
    angles = np.concatenate([rows[:, None] * angles, columns[:, None] * angles], axis=1)

    def rotate(half):
        turned = np.empty_like(half)
        turned[:, 0::2] = half[:, 0::2] * np.cos(angles) - half[:, 1::2] * np.sin(angles)
        turned[:, 1::2] = half[:, 1::2] * np.cos(angles) + half[:, 0::2] * np.sin(angles)
        return turned

    out = np.empty_like(x)
    for h in range(HEADS):
        part = slice(h * head, (h + 1) * head)
        norm = np.linalg.norm(q[:, part], axis=-1, keepdims=True)
        u, cube = q[:, part] / norm, k[:, part] ** 3
        power = 3 * (0.5 + np.tanh(norm))
        halves_q = [np.maximum(u, 0) ** power, np.maximum(-u, 0) ** power]
        halves_k = [np.maximum(cube, 0), np.maximum(-cube, 0)]
        weights = np.hstack([rotate(y) for y in halves_q]) @ np.hstack([rotate(y) for y in halves_k]).T / n
        total = np.hstack(halves_q) @ np.hstack(halves_k).mean(axis=0) + 1e-6
        out[:, part] = weights @ v[:, part] / total[:, None]
    out = layer_norm(out + local, params["out_norm"]["scale"], params["out_norm"]["bias"])
    return (out * g / (1 + np.exp(-g))) @ params["proj"]["kernel"] + params["proj"]["bias"]


def published_soft(params, x, grid, stride):
    """The released SOFT layer for one image `n c`: convolved landmarks, LayerNorm, GELU, ridge, 20 Newton steps."""
    n, width = x.shape
    head = width // HEADS
    q = (x @ params["query"]["kernel"] + params["query"]["bias"]).reshape(n, HEADS, head) / head**0.25
    v = (x @ params["value"]["kernel"] + params["value"]["bias"]).reshape(n, HEADS, head)
    out = np.empty_like(v)
    for h in range(HEADS):
        image = q[:, h].reshape(grid[0] // stride, stride, grid[1] // stride, stride, head)
        points = np.einsum("ipjqk,pqkl->ijl", image, params["landmark_conv"]["kernel"]).reshape(-1, head)
        points = layer_norm(points, params["landmark_norm"]["scale"], params["landmark_norm"]["bias"])
        points = points * 0.5 * (1 + np.vectorize(math.erf)(points / math.sqrt(2)))
        near = np.exp(-((q[:, h, None] - points[None]) ** 2).sum(-1) / 2)
        gram = np.exp(-((points[:, None] - points[None]) ** 2).sum(-1) / 2)
        ridged = gram + 0.01 * np.eye(len(gram))
        inverse = 1.8 / gram.sum(-1).max() ** 2 * ridged
        for _ in range(20):
            inverse = 2 * inverse - inverse @ ridged @ inverse
        local = depthwise(v[:, h].reshape(*grid, head), params["local"]["kernel"][:, :, 0, h, None, None][..., 0])
        out[:, h] = near @ inverse @ (near.T @ v[:, h]) + local.reshape(n, head)
    return out.reshape(n, width) @ params["proj"]["kernel"] + params["proj"]["bias"]


def test_nala_layer_is_the_published_one():
    with jax.enable_x64(True):
        n = GRID[0] * GRID[1]
        module = attention.NaLaAttention(WIDTH, HEADS, eps=n * 1e-6, dtype=jnp.float64)
        x = jnp.asarray(RNG.standard_normal((2, n, WIDTH)))
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), perturbed(module, x, grid=GRID))
        ours = jax.jit(partial(module.apply, grid=GRID))(variables, x)
        params = jax.tree.map(np.asarray, variables["params"])
        for image, out in zip(np.asarray(x), ours, strict=True):
            np.testing.assert_allclose(out, published_nala(params, image, GRID), atol=PUBLISHED)


def test_soft_layer_is_the_published_one():
    with jax.enable_x64(True):
        options = {"landmarks": "conv_norm_gelu", "stride": 2, "value_conv": 3, "dtype": jnp.float64}
        module = attention.SOFTAttention(WIDTH, HEADS, **options)
        x = jnp.asarray(RNG.standard_normal((2, GRID[0] * GRID[1], WIDTH)))
        variables = jax.tree.map(lambda leaf: leaf.astype(np.float64), perturbed(module, x, grid=GRID))
        ours = jax.jit(partial(module.apply, grid=GRID))(variables, x)
        params = jax.tree.map(np.asarray, variables["params"])
        for image, out in zip(np.asarray(x), ours, strict=True):
            np.testing.assert_allclose(out, published_soft(params, image, GRID, 2), atol=PUBLISHED)


# Kernels that show little beside the others: laws of kernels hold them.
ALIKE = ("elu_plus_one", "focused", "inline", "pola", "relu")


@pytest.mark.parametrize("name", rows(CAUSAL, ALIKE))
def test_causal_modules_decode_what_they_compute_in_parallel(name):
    module, x = CAUSAL[name], inputs(n=13)
    variables = perturbed(module, x)
    parallel = jax.jit(module.apply)(variables, x)
    prefill = jax.jit(lambda tokens, state: module.apply(variables, tokens, state, method="prefill"))
    first, state = prefill(x[:, :6], module.init_state(len(x)))
    step = jax.jit(lambda token, state: module.apply(variables, token, state, method="step"))
    rest = []
    for t in range(6, 13):
        out, state = step(x[:, t], state)
        rest.append(out)
    recurrent = jnp.concatenate([first, jnp.stack(rest, axis=1)], axis=1)
    assert_close(recurrent, parallel, LAYER)
    # No output depends on later inputs, not even a little.
    gradient = jax.jit(jax.grad(lambda x: module.apply(variables, x)[:, 5].sum()))(x)
    assert not gradient[:, 6:].any()
    assert gradient[:, :6].any()


@pytest.mark.parametrize("name", rows([*CAUSAL, *FULL], ALIKE))
def test_every_parameter_of_every_module_receives_gradient(name):
    module, options = FULL[name] if name in FULL else (CAUSAL[name], {})
    x = inputs()
    variables = perturbed(module, x, **options)
    gradient = jax.jit(jax.grad(lambda v: (module.apply(v, x, **options) ** 2).sum()))(variables)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("name", rows([n for n in [*CAUSAL, *FULL] if n != "soft conv"], ALIKE))
def test_masked_tokens_do_not_matter(name):
    module, options = FULL[name] if name in FULL else (CAUSAL[name], {})
    x = inputs()
    variables = perturbed(module, x, **options)
    valid = jnp.arange(x.shape[1]) < 17
    mask = jnp.broadcast_to(valid[None, None, None], (len(x), 1, 1, x.shape[1]))
    other = jnp.where(valid[None, :, None], x, 7.0)
    masked = jax.jit(lambda y: module.apply(variables, y, mask=mask, **options)[:, :17])
    ours, theirs = masked(x), masked(other)
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "twin",
    [
        pytest.param("LinearAttention", marks=pytest.mark.slow),
        pytest.param("NaLaAttention", marks=pytest.mark.slow),
        "SOFTAttention",
    ],
)
def test_nnx_twins_train_and_decode(twin):
    fields = {"LinearAttention": {"kernel": "nala", "is_causal": True}, "NaLaAttention": {"is_causal": True}}
    options = {} if twin in fields else {"grid": GRID}
    module = getattr(twins, twin)(WIDTH, width=WIDTH, num_heads=HEADS, rngs=nnx.Rngs(0), **fields.get(twin, {}))
    x = inputs()
    linen = getattr(attention, twin)(WIDTH, HEADS, **fields.get(twin, {}))
    assert module(x, **options).shape == linen.init_with_output(jax.random.key(0), x, **options)[0].shape
    optimizer = nnx.Optimizer(module, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def train_step(module, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: ((m(x, **options) - 1) ** 2).mean())(module)
        optimizer.update(module, gradient)
        return loss

    losses = [float(train_step(module, optimizer)) for _ in range(20)]
    assert losses[-1] < 0.7 * losses[0]
    if twin in fields:
        out, state = module.prefill(x[:, :7], module.init_state(len(x)))
        last, _ = module.step(x[:, 7], state)
        assert_close(jnp.concatenate([out, last[:, None]], 1), module(x)[:, :8], LAYER)


@pytest.mark.slow
def test_nnx_twins_decode_inside_the_scan_of_jax():
    x = inputs(n=6)
    module = twins.LinearAttention(WIDTH, width=WIDTH, num_heads=HEADS, kernel="nala", is_causal=True, rngs=nnx.Rngs(0))
    decode = jax.jit(lambda x: jax.lax.scan(lambda s, t: module.step(t, s)[::-1], module.init_state(2), x)[1])
    assert_close(decode(x.swapaxes(0, 1)).swapaxes(0, 1), module(x), LAYER)


def test_inside_a_linen_model():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + attention.NaLaAttention(WIDTH, HEADS)(nn.LayerNorm()(x), grid=GRID)
            x = x + attention.SOFTAttention(WIDTH, HEADS, num_landmarks=6)(nn.LayerNorm()(x), grid=GRID)
            return x + attention.LinearAttention(WIDTH, HEADS, kernel="pola")(nn.LayerNorm()(x))

    model, x, target = Model(), inputs(), inputs()
    variables = jax.jit(model.init)(jax.random.key(0), x)
    tx = optax.adam(1e-2)
    opt_state = jax.jit(tx.init)(variables)

    @jax.jit
    def train_step(variables, opt_state):
        loss, gradient = jax.value_and_grad(lambda v: ((model.apply(v, x) - target) ** 2).mean())(variables)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(variables, updates), opt_state, loss

    losses = []
    for _ in range(20):
        variables, opt_state, loss = train_step(variables, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 * losses[0]


def test_the_pure_functions_inside_an_equinox_model():
    class Layer(eqx.Module):
        qkv: eqx.nn.Linear
        attend: str = eqx.field(static=True)

        def __call__(self, x):
            q, k, v = jnp.split(jax.vmap(self.qkv)(x).reshape(1, len(x), HEADS, -1), 3, axis=-1)
            if self.attend == "soft":
                return attention.soft_attention(q, q, v, num_landmarks=6).reshape(x.shape)
            return attention.nala_attention(q, k, v, is_causal=True).reshape(x.shape)

    x = inputs()
    for name in ("soft", "nala"):
        layer = Layer(eqx.nn.Linear(WIDTH, 3 * WIDTH, key=jax.random.key(0)), name)
        loss = eqx.filter_jit(eqx.filter_value_and_grad(lambda m: ((jax.vmap(m)(x) - 1) ** 2).mean()))
        before, gradient = loss(layer)
        after, _ = loss(eqx.apply_updates(layer, jax.tree.map(lambda g: -0.1 * g, gradient)))
        assert after < before


@pytest.mark.slow
def test_positions_past_the_end_of_a_table_are_loud_and_not_wrong():
    module, x = attention.NaLaAttention(WIDTH, HEADS, is_causal=True, max_length=8), inputs(n=9)
    variables = perturbed(module, x[:, :8])
    _, state = module.apply(variables, x[:, :8], method="prefill")
    with pytest.raises(ValueError, match="there are 9 tokens, but the feature map has 8 positions"):
        module.apply(variables, x[:, 8], state, method="step")
    out, _ = jax.jit(lambda token, state: module.apply(variables, token, state, method="step"))(x[:, 8], state)
    assert jnp.isnan(out).all()


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda x: attention.LinearAttention(15, 4).init(jax.random.key(0), x), ["width 15", "num_heads 4"]),
        (lambda x: attention.NaLaAttention(WIDTH, 2).init(jax.random.key(0), x), ["grid is None", "24 tokens"]),
        (lambda x: attention.NaLaAttention(WIDTH, 2).init(jax.random.key(0), x, grid=(5, 5)), ["(5, 5)", "24"]),
        (
            lambda x: attention.NaLaAttention(WIDTH, 2, is_causal=True).init(jax.random.key(0), x, grid=GRID),
            ["grid is (4, 6)", "leave it out"],
        ),
        (
            lambda x: attention.LinearAttention(WIDTH, 2).init(jax.random.key(0), x, method="prefill"),
            ["is_causal is False", "is_causal=True"],
        ),
        (
            lambda x: attention.nala_attention(*[x[:, :, None]] * 3, mask=jnp.ones((1, 1, 1, x.shape[1]))),
            ["mask has dtype float32", "boolean"],
        ),
        (
            lambda x: attention.prefill(*[x[:, :, None]] * 3, attention.cosformer_features(8)),
            ["24 tokens", "8 positions"],
        ),
        (
            lambda x: attention.LinearAttention(WIDTH, 2).init_state(2),
            ["is_causal is False", "is_causal=True"],
        ),
        (
            lambda x: attention.SOFTAttention(WIDTH, 2, landmarks="convolved").init(jax.random.key(0), x),
            ["'convolved'", "conv_norm_gelu"],
        ),
        (
            lambda x: attention.SOFTAttention(WIDTH, 2, landmarks="conv", stride=9).init(jax.random.key(0), x, GRID),
            ["stride is 9", "(4, 6)"],
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(call, parts):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        call(inputs())
    for part in parts:
        assert part in str(error.value)
