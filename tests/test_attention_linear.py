"""Linear attention beside its laws: recorded values, the chunked product, precision, memory, parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from tolerances import FORMULA, LAYER, assert_close

from flowgen.attention import (
    FEATURE_MAPS,
    KERNELS,
    Causal,
    FeatureKernel,
    Features,
    LinearState,
    PolaKernel,
    cosformer_features,
    focused_features,
    gated_linear_attention,
    gaussian_landmark_map,
    inline_attention,
    linear_attention,
    nala_attention,
    nala_features,
    prefix_product,
    retention,
    rotary_grid,
    rotary_line,
    rotate,
    softmax_attention,
)

PRINTED = 6e-9  # the recorded values are printed with 8 digits after the point
SUMS = 1e-9  # relative: their sums with 10
ORACLE = 1e-10  # float64
HALF = 2e-3  # float16: two roundings
STATE = 5e-3  # bfloat16 inputs and outputs of a float32 state; a bfloat16 state is wrong by 0.3 to 14


def normal(*shapes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=shape) for shape in shapes]


def as_jax(arrays, dtype=jnp.float32):
    return tuple(jnp.asarray(x, dtype) for x in arrays)


SIXTEEN = 16e-6  # the released codes add 1e-6 to the mean over 16 tokens
GOLDEN = {
    "softmax": (softmax_attention, 0.79540665, 0.16057834, -0.13108604, 31.8831766433, 18.8628762371),
    "softmax causal": (
        lambda *x: softmax_attention(*x, is_causal=True),
        *(0.60388174, 0.80841144, 0.52403582, 66.7369471877, 39.3737155549),
    ),
    "elu": (
        lambda *x: linear_attention(*x, eps=0.0),
        *(0.64548060, 0.03930471, 0.16168087, 31.9712235151, 13.4920743171),
    ),
    "elu causal": (
        lambda *x: linear_attention(*x, is_causal=Causal(chunk_size=5), eps=0.0),
        *(0.46992648, 0.67753928, 0.55000914, 67.6364929651, 35.3921229385),
    ),
    "focused": (
        lambda *x: linear_attention(*x, focused_features(3.0), eps=0.0),
        *(0.91961050, 0.31543202, -0.55534014, 32.9808323451, 28.4830635964),
    ),
    "nala, released": (
        lambda *x: linear_attention(*x, nala_features(rotary=rotary_grid(4, 4, 8)), eps=SIXTEEN),
        *(0.79752753, 0.23175193, -0.38314195, 19.6190877086, 14.1109350213),
    ),
    "nala": (
        lambda *x: linear_attention(*x, "nala", eps=SIXTEEN),
        *(0.87113636, 0.16438736, -0.25297960, 31.5173938284, 22.7380304059),
    ),
    "nala causal": (
        lambda *x: linear_attention(*x, "nala", is_causal=True, eps=0.0),
        *(0.70003465, 0.90013666, 0.50102762, 65.0294626295, 45.1451179178),
    ),
    "nala, paper": (
        lambda *x: linear_attention(*x, nala_features(direction_map="cosine"), eps=0.0),
        *(0.64884607, 0.01585359, 0.12837893, 31.5317928391, 13.8484258571),
    ),
    "pola": (PolaKernel(3.0, eps=SIXTEEN).attend, 0.85819354, 0.18042615, -0.22454866, 31.5271850106, 22.0009753407),
    "inline": (inline_attention, 0.82040525, 0.17676254, -0.12123569, 32.3965701405, 19.7149646207),
    "cosformer": (
        lambda *x: linear_attention(*x, cosformer_features(16), eps=0.0),
        *(0.80359933, 0.19160421, -0.23919376, 30.9123352615, 21.1808495458),
    ),
    "retention": (
        lambda *x: retention(*x, chunk_size=6)[0],
        *(0.61720195, 0.55426310, -0.27667400, -2.3911542712, 662.6541288503),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_reference_values(name, x64):
    attend, *corner, total, squares = GOLDEN[name]
    h, n, j = np.arange(2)[None, :, None], np.arange(16)[:, None, None], np.arange(8)[None, None, :]
    q = np.sin(0.7 * n + 1.3 * j + 2.1 * h + 0.3)[None]
    k = np.cos(0.4 * n - 0.9 * j + 1.7 * h)[None]
    v = np.sin(0.2 * n * (j + 1) + 0.5 * h)[None]
    out = np.asarray(jax.jit(attend)(*as_jax([q, k, v], jnp.float64)))
    np.testing.assert_allclose(out[0, 5, 0, :3], corner, rtol=0, atol=PRINTED)
    np.testing.assert_allclose([out.sum(), (out**2).sum()], [total, squares], rtol=SUMS)


def pairwise(features, v, log_decay=None, segments=None, block_size=1):
    """Numerators, normalisers and the state in NumPy, from the weight of every pair."""
    q, k, norm_q, norm_k = features
    n, repeats = q.shape[1], q.shape[2] // k.shape[2]
    block = np.arange(n) // block_size
    keep = np.broadcast_to((block[:, None] >= block[None, :])[None, None], (len(q), k.shape[2], n, n)).astype(float)
    last = np.ones((len(q), n, k.shape[2]))
    if segments is not None:
        keep = keep * (segments[:, :, None] == segments[:, None, :])[:, None]
        last = last * (segments == segments[:, -1:])[..., None]
    if log_decay is not None:
        sums = np.cumsum(log_decay, axis=1)
        keep = keep * np.exp(np.minimum(sums[:, :, None] - sums[:, None, :], 0)).transpose(0, 3, 1, 2)
        last = last * np.exp(sums[:, -1:] - sums)
    keep = np.repeat(keep, repeats, axis=1)
    weights, norms = (
        np.einsum("bnhf,bmhf->bhnm", x, np.repeat(y, repeats, axis=2)) * keep for x, y in ((q, k), (norm_q, norm_k))
    )
    out = np.einsum("bhnm,bmhd->bnhd", weights, np.repeat(v, repeats, axis=2))
    state = np.einsum("bng,bngf,bngd->bgfd", last, k, v), np.einsum("bng,bnge->bge", last, norm_k)
    return out, norms.sum(-1).swapaxes(1, 2), state


@pytest.mark.parametrize("chunk_size", rows([1, 7, 64], (1,)))
@pytest.mark.parametrize("n", rows([1, 63, 65, 130], (63, 130)))
def test_chunks_are_the_weights_of_every_pair(n, chunk_size, x64):
    arrays = normal((2, n, 4, 3), (2, n, 2, 3), (2, n, 4, 2), (2, n, 2, 2), (2, n, 2, 5))
    *features, v = arrays
    decay = -np.random.default_rng(1).uniform(0.01, 0.5, size=(2, n, 2))
    segments = np.stack(
        [np.arange(n) // 24, np.maximum(np.arange(n) - 61, 0)]
    )  # some shorter than a chunk, some longer
    options = [{}, {"log_decay": decay, "segment_ids": segments}, {"segment_ids": segments, "block_size": 3}]

    @jax.jit
    def run(arrays, decay, segments):
        values = {"log_decay": decay, "segment_ids": segments}
        cases = [{key: values.get(key, x) for key, x in case.items()} for case in options]
        return [prefix_product(Features(*arrays[:4]), arrays[4], chunk_size=chunk_size, **case) for case in cases]

    for (out, total, state), case in zip(run(as_jax(arrays, jnp.float64), decay, segments), options, strict=True):
        names = {"log_decay": "log_decay", "segment_ids": "segments", "block_size": "block_size"}
        expected = pairwise(features, v, **{names[key]: x for key, x in case.items()})
        for got, want in zip((out, total, (state.kv, state.norm)), expected, strict=True):
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=ORACLE), got, want)
        assert (state.length == n).all()


def test_gradients_with_decay_are_finite_differences(x64):
    inputs = as_jax(
        normal((2, 7, 4, 3), (2, 7, 2, 3), (2, 7, 2, 4), (2, 7, 2), (2, 2, 3, 4), (2, 7, 4, 4)), jnp.float64
    )
    *inputs, cotangent = inputs
    segments = jnp.asarray([[0, 0, 0, 0, 1, 1, 1], [4] * 7])

    @jax.jit
    def loss(q, k, v, gate, kv):
        state = LinearState(kv, jnp.zeros((2, 2, 3)), jnp.zeros((), jnp.int32))
        decay = jax.nn.log_sigmoid(gate)
        out, state = gated_linear_attention(q, k, v, decay, state=state, segment_ids=segments, chunk_size=3)
        return (out * cotangent).sum() + jnp.square(state.kv).sum()

    gradients = jax.jit(jax.grad(loss, argnums=range(5)))(*inputs)
    for i, gradient in enumerate(gradients):
        (direction,) = as_jax(normal(inputs[i].shape, seed=10 + i), jnp.float64)
        ahead, behind = (
            loss(*(x + s * direction if j == i else x for j, x in enumerate(inputs))) for s in (1e-5, -1e-5)
        )
        assert abs(ahead - behind) > 1e-7
        np.testing.assert_allclose((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-6)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_compiled_derivatives_of_features_in_both_modes_agree(name):
    (x,) = as_jax(normal((2, 7, 4, 4)))

    def phi(x):
        return FEATURE_MAPS[name](x, x).q

    reverse, forward = (np.asarray(jax.jit(mode(phi))(x)) for mode in (jax.jacrev, jax.jacfwd))
    assert_close(reverse, forward, LAYER)
    assert (reverse[0, :, :, :, 1] == 0).all()


def arrays_of(jaxpr):
    """Every array that a jaxpr computes, in nested ones too, as (primitive, nested, shape)."""
    stack = [(jaxpr.jaxpr, False)]
    while stack:
        inner, nested = stack.pop()
        for equation in inner.eqns:
            yield from ((equation.primitive.name, nested, x.aval.shape) for x in equation.outvars)
            for value in equation.params.values():
                for leaf in value if isinstance(value, (tuple, list)) else [value]:
                    body = getattr(leaf, "jaxpr", leaf)
                    if hasattr(body, "eqns"):
                        stack.append((body, True))


@pytest.mark.parametrize("decay", [False, True])
def test_the_backward_pass_stores_one_state_per_chunk(decay):
    n, size, f, d = 512, 64, 16, 24
    arrays = as_jax(normal((1, n, 1, f), (1, n, 1, f), (1, n, 1, d), (1, n, 1)))

    def loss(q, k, v, gate):
        log_decay = jax.nn.log_sigmoid(gate) if decay else None
        out, total, _ = prefix_product(Features(q, k), v, log_decay=log_decay, chunk_size=size)
        return (out / (1 + jnp.square(total))[..., None]).sum()

    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays)
    found = [(primitive, shape, int(np.prod(shape))) for primitive, _, shape in arrays_of(jaxpr)]
    assert ("scan", (n // size, 1, 1, f, d), n // size * f * d) in found  # the states are stored, one per chunk
    assert max(elements for _, _, elements in found) < n * f * d
    # Nor are the weights of all chunks: those are recomputed.
    assert max(elements for primitive, _, elements in found if primitive == "scan") < n * size


LONG = 16_384
PIECE = 64


def long_features(name, x, key):
    """Features in float64 NumPy, of queries or keys."""
    relu = np.maximum(x, 0)
    if name == "elu_plus_one":
        return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))
    if name == "focused":
        y = relu + 1e-6
        return y**3 * np.linalg.norm(y, axis=-1, keepdims=True) / np.linalg.norm(y**3, axis=-1, keepdims=True)
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    size = np.abs(x) ** 3 if key else np.abs(x / norm) ** (3 * (0.5 + np.tanh(norm)))
    return np.concatenate([size * (x > 0), size * (x < 0)], axis=-1)


@pytest.mark.parametrize("name", ["elu_plus_one", "focused", "nala"])
def test_a_long_bfloat16_sequence_decodes_from_a_float32_state(name):
    q, k, v = as_jax(normal((1, LONG, 1, 8), (1, LONG, 1, 8), (1, LONG, 1, 8)), jnp.bfloat16)

    @jax.jit
    def decode(*inputs):
        def body(state, piece):
            out, state = KERNELS[name].prefill(*piece, state=state)
            return state, out

        pieces = tuple(x.reshape(LONG // PIECE, 1, PIECE, 1, 8) for x in inputs)
        state, out = jax.lax.scan(body, KERNELS[name].init_state(1, 1, 8, 8, jnp.bfloat16), pieces)
        return out.reshape(LONG, 8), state

    out, state = decode(q, k, v)
    assert out.dtype == jnp.bfloat16
    assert state.kv.dtype == state.norm.dtype == jnp.float32
    assert state.length == LONG
    q, k, v = (np.asarray(x, np.float64)[0, :, 0] for x in (q, k, v))
    weights = np.tril(long_features(name, q[-256:], False) @ long_features(name, k, True).T, LONG - 256)
    expected = weights @ v / weights.sum(axis=-1, keepdims=True)
    error = np.linalg.norm(np.asarray(out, np.float64)[-256:] - expected) / np.linalg.norm(expected)
    assert error <= STATE


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_nala_in_float16(scale):
    q, k, v = normal((1, 70, 2, 8), (1, 70, 2, 8), (1, 70, 2, 8))
    half = as_jax([scale * q, scale * k, v], jnp.float16)  # 100 cubed is more than float16 holds

    @jax.jit
    def run(*inputs):
        out = nala_attention(*inputs, is_causal=True)
        return out, jax.grad(lambda *x: nala_attention(*x, is_causal=True).astype(jnp.float32).sum(), (0, 1, 2))(
            *inputs
        )

    out, gradients = run(*half)
    assert out.dtype == jnp.float16
    assert all(jnp.isfinite(x).all() for x in (out, *gradients))
    exact = nala_attention(*(x.astype(jnp.float32) for x in half), is_causal=True)
    assert_close(out.astype(jnp.float32), exact, HALF)


def test_every_parameter_of_a_feature_map_receives_gradient():
    q, k, v = as_jax(normal((2, 9, 3, 4), (2, 9, 3, 4), (2, 9, 3, 6)))
    q, k = q.at[0, 2].set(0), k.at[0, 4].set(0)
    heads, channels = jnp.asarray([1.5, 2.0, 3.0]), jnp.linspace(1.2, 4, 12).reshape(3, 4)
    landmarks = jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, 4)), jnp.float32)
    parameters = {"power": heads, "offset": heads / 4, "cosine": heads, "pola": channels, "landmarks": landmarks}

    @jax.jit
    @jax.grad
    def gradients(p):
        maps = [
            nala_features(p["power"], p["offset"]),
            nala_features(p["cosine"], direction_map="cosine"),
            gaussian_landmark_map(p["landmarks"]),
        ]
        kernels = [*map(FeatureKernel, maps), PolaKernel(p["pola"])]
        outputs = [a.attend(q, k, v, is_causal=c) for a in kernels for c in (False, True)]
        return sum(jnp.square(x).sum() for x in outputs)

    for name, gradient in gradients(parameters).items():
        assert jnp.isfinite(gradient).all(), name
        assert (gradient != 0).all(), name


def test_rotary_tables_are_their_angles():
    line, grid = rotary_line(6, 8), rotary_grid(3, 5, 8, base=100.0)
    angles = np.arange(6)[:, None] * 10_000.0 ** -np.array([0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(line.cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(line.sin, np.sin(angles), atol=1e-6)
    rows, columns = np.repeat(np.arange(3), 5), np.tile(np.arange(5), 3)
    angles = np.stack([rows, rows / 100, columns, columns / 100], axis=1)
    np.testing.assert_allclose(grid.cos, np.cos(angles), atol=1e-6)
    np.testing.assert_allclose(grid.sin, np.sin(angles), atol=1e-6)


def test_traced_positions_beyond_the_table_give_nan():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 1, 8)), jnp.float32)
    positions = jnp.asarray([[0, 5, 6, 2], [-1, 3, 4, 99]])
    out = jax.jit(lambda positions: rotate(x, rotary_line(6, 8), positions))(positions)
    beyond = np.asarray([[False, False, True, False], [True, False, False, True]])
    np.testing.assert_array_equal(jnp.isnan(out), np.broadcast_to(beyond[..., None, None], x.shape))
    angles = np.asarray(positions)[~beyond][:, None] * 10_000.0 ** -np.array([0, 0.25, 0.5, 0.75])
    pairs = np.asarray(x)[~beyond].reshape(-1, 4, 2) @ np.array([1, 1j])  # a rotation of the plane
    turned = np.exp(1j * angles) * pairs
    assert_close(out[~beyond].reshape(-1, 4, 2), np.stack([turned.real, turned.imag], -1), FORMULA)


@pytest.mark.parametrize("reset", [-1e4, -1e8, -np.inf])
def test_a_strong_decay_costs_other_tokens_no_digits(reset):
    random = np.random.default_rng(3)
    q, k, v = (jnp.asarray(random.standard_normal((1, 12, 2, 4)), jnp.float32) for _ in range(3))
    log_decay = jnp.full((1, 12, 2), -0.1).at[:, 4].set(reset)
    whole, _ = gated_linear_attention(q, k, v, log_decay)
    pieces, state = [], None
    for t in range(12):
        out, state = gated_linear_attention(*(x[:, t : t + 1] for x in (q, k, v, log_decay)), state=state)
        pieces.append(out)
    assert_close(whole, jnp.concatenate(pieces, axis=1), LAYER)
