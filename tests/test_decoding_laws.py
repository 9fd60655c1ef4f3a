"""Laws of decoders over plans, flows and kernels; samples against the density; which frames are decoded when."""

import dataclasses

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, NETWORK, assert_close

import flowgen
from flowgen.attention import (
    CAUSAL_KERNEL_NAMES,
    causal_kernel,
    cosformer_features,
    gated_delta_rule,
    init_delta_state,
    nala_features,
    rotary_line,
)
from flowgen.decoding import Guidance, Jacobi, Sequential, SlidingWindow, invert, sample
from flowgen.decoding.layout import ClipLayout

# Six tokens, the first of which a TARFlow passes through.
TAR = flowgen.TARFlowConfig(
    image_size=(4, 6), patch_size=2, channels=1, width=16, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=3
)
STAR = flowgen.STARFlowConfig(
    image_size=(4, 6), patch_size=2, channels=1, width=20, head_dim=20, layers_per_block=(1, 1), num_classes=3
)
# Softmax keeps a slot per token. The others keep running states: of feature maps, and with a decay.
ALWAYS = ("softmax", "nala", "retention")
PLANS = (Sequential(), Jacobi(window=4, tol=0.0), Jacobi(tol=0.0, init="zeros"), SlidingWindow(window=4, tol=0.0))


def kernels():
    return [pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in CAUSAL_KERNEL_NAMES]


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("config", [TAR, pytest.param(STAR, marks=pytest.mark.slow)], ids=["tarflow", "starflow"])
def test_every_plan_at_tolerance_0_is_the_inverse_of_forward(config, kernel):
    flow, params = laws.perturbed(dataclasses.replace(config, attention=kernel), jax.random.key(0))
    x, labels = laws.images(config, jax.random.key(1), batch=2), jnp.array([1, -1], jnp.int32)
    z, _ = laws.apply(flow, params, x, labels)
    for plan in PLANS:
        r = invert(flow, params, z, labels, plan=plan)
        assert_close(r.x, x, NETWORK)
        assert jnp.all(r.residual == 0)
        several = r.sweeps.max() > 1
        assert several == (not isinstance(plan, Sequential)), plan  # the state is taken up again from the same place


@pytest.mark.parametrize("kernel", kernels())
def test_a_window_runs_again_from_a_rewound_cache_as_if_for_the_first_time(kernel):
    begin, end, length = 2, 5, 7
    functions = causal_kernel(kernel)

    @jax.jit
    def run(q, k, v, *wrong):
        cache = functions.init_cache(2, length, 2, 8, jnp.float32)
        _, window = functions.attend_window(q[:, :begin], k[:, :begin], v[:, :begin], cache, 0)
        after = before = functions.accept(cache, window, None)
        for parts in (wrong, [2 * part for part in wrong], (q, k, v)):  # two wrong guesses, and the solution
            cache = functions.rewind(before, after)
            out, window = functions.attend_window(*(part[:, begin:end] for part in parts), cache, begin)
            after = functions.accept(cache, window, None)
        rest, _ = functions.attend_window(q[:, end:], k[:, end:], v[:, end:], after, end)
        return out, rest, functions.attend(q, k, v)

    out, rest, expected = run(*np.random.default_rng(0).standard_normal((6, 2, length, 2, 8)).astype(np.float32))
    assert_close(out, expected[:, begin:end], LAYER)
    assert_close(rest, expected[:, end:], LAYER)


@dataclasses.dataclass(frozen=True)
class GatedDelta:
    """The gated delta rule, with the same gates for all tokens, as a kernel with a state of its own."""

    def _run(self, q, k, v, **options):
        beta, log_decay = jnp.full(q.shape[:3], 0.6), jnp.full(q.shape[:3], -0.1)
        return gated_delta_rule(q, k, v, beta, log_decay, **options)

    def attend(self, q, k, v, *, mask=None, is_causal=True, segment_ids=None):
        return self._run(q, k, v, mask=mask)[0]

    def init_state(self, batch, num_heads, key_dim, value_dim, dtype=jnp.float32):
        return init_delta_state(batch, num_heads, key_dim, value_dim, dtype=dtype)

    def prefill(self, q, k, v, *, state=None, mask=None):
        return self._run(q, k, v, state=state, mask=mask)


OWN = {
    "gated delta rule": GatedDelta(),
    "as many positions as tokens": cosformer_features(TAR.num_tokens),
    "rotated": nala_features(rotary=rotary_line(TAR.num_tokens, 16)),
}


@pytest.mark.parametrize("kernel", [*kernels(), "gated delta rule"])
def test_each_sample_goes_on_behind_its_own_accepted_tokens(kernel):
    begin, length, size, counts = 2, 10, 4, np.array([1, 4, 3])
    functions = causal_kernel(OWN.get(kernel, kernel))

    @jax.jit
    def run(parts, wrong, counts):
        cache = functions.init_cache(3, length, 2, 8, jnp.float32)
        _, window = functions.attend_window(*(part[:, :begin] for part in parts), cache, 0)
        cache = functions.accept(cache, window, None)
        keep = (jnp.arange(size)[None] < counts[:, None])[..., None, None]
        right = [part[:, begin : begin + size] for part in parts]
        guess = [jnp.where(keep, x, y) for x, y in zip(right, wrong, strict=True)]
        _, window = functions.attend_window(*guess, cache, jnp.full(3, begin))
        cache = functions.accept(cache, window, counts)
        rows = begin + counts[:, None] + jnp.arange(size)[None]
        own = [jnp.take_along_axis(part, rows[..., None, None], axis=1) for part in parts]
        out, _ = functions.attend_window(*own, cache, begin + counts)
        return out, jnp.take_along_axis(functions.attend(*parts), rows[..., None, None], axis=1)

    random = np.random.default_rng(0)
    parts = random.standard_normal((3, 3, length, 2, 8)).astype(np.float32)
    wrong = random.standard_normal((3, 3, size, 2, 8)).astype(np.float32)
    assert_close(*run(list(parts), list(wrong), counts), LAYER)


@pytest.mark.parametrize("name", rows(OWN, ("rotated",)))
def test_windows_that_end_beyond_the_last_token(name):
    flow, params = laws.perturbed(dataclasses.replace(TAR, attention=OWN[name]), jax.random.key(0))
    x, labels = laws.images(TAR, jax.random.key(1), batch=2), jnp.array([1, -1], jnp.int32)
    z, _ = laws.apply(flow, params, x, labels)
    for plan in (Jacobi(window=4, tol=0.0), SlidingWindow(window=4, tol=0.0)):
        r = invert(flow, params, z, labels, plan=plan)
        assert_close(r.x, x, NETWORK)
        assert jnp.all(r.residual == 0)


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=pytest.mark.slow) for name in ALWAYS])
def test_every_plan_decodes_alike_under_guidance(kernel):
    flow, params = laws.perturbed(dataclasses.replace(TAR, attention=kernel), jax.random.key(0))
    labels, guidance = jnp.array([1, 0], jnp.int32), Guidance(scale=1.5, anneal=True)
    z = jax.random.normal(jax.random.key(1), (2, flow.config.num_tokens, flow.config.token_dim))
    first, *others = (invert(flow, params, z, labels, plan=plan, guidance=guidance, certify=True) for plan in PLANS)
    assert first.error.max() < NETWORK
    for r in others:
        assert_close(r.x, first.x, NETWORK)


def test_samples_are_distributed_as_the_density_says():
    config = flowgen.STARFlowConfig(
        image_size=(1, 2), channels=1, width=8, head_dim=4, layers_per_block=(1, 1), noise_std=0.5
    )
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.3)
    edges, num, cells = np.linspace(-20, 20, 401), 4000, 8
    middles = (edges[1:] + edges[:-1]) / 2
    grid = np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1).reshape(-1, 1, 2, 1)
    mass = np.exp(laws.apply(flow, params, jnp.asarray(grid, jnp.float32), method="log_prob"))
    mass = mass.reshape(400, 400) * (edges[1] - edges[0]) ** 2
    assert mass.sum() == pytest.approx(1, abs=1e-3)
    x = np.asarray(sample(flow, params, jax.random.key(0), num, denoise=False).x).reshape(num, 2)
    # Cells of equal shares of each token's marginal, so that few are nearly empty.
    cuts = [np.searchsorted(np.cumsum(mass.sum(axis=1 - axis)), np.arange(1, cells) / cells) for axis in (0, 1)]
    expected = num * np.add.reduceat(np.add.reduceat(mass, [0, *cuts[0]], axis=0), [0, *cuts[1]], axis=1)
    likely = expected > 5
    freedom = likely.sum() - 1

    def chi_square(x):
        counts, _, _ = np.histogram2d(*x.T, bins=[[-np.inf, *edges[cut], np.inf] for cut in cuts])
        return (np.square(counts - expected) / expected)[likely].sum()

    assert abs(chi_square(x) - freedom) < 5 * np.sqrt(2 * freedom)
    assert chi_square(x[:, ::-1]) > 2 * freedom  # swapped tokens are noticed


@pytest.mark.parametrize(("total", "clip", "context"), [(3, 3, 0), (7, 3, 1), (8, 4, 3), (1, 1, 0)])
def test_segments_decode_every_frame_once_behind_those_before_it(total, clip, context):
    for given in range(total):
        layout = ClipLayout(total, clip, given, context, tokens_per_frame=2)
        assert layout.reached >= total
        frames = jnp.repeat(jnp.arange(float(layout.reached)), 2)[None, :, None]
        new = [layout.in_a_row(layout.new_tokens(frames, part)) for part in layout.segments]
        np.testing.assert_array_equal(jnp.concatenate(new, axis=1), frames[:, 2 * given :])
        for part in layout.segments:
            whole = np.asarray(layout.whole_segments(frames, part)[:, 0, ::2, 0], int)
            np.testing.assert_array_equal(np.diff(whole, axis=1), 1)  # frames in a row
            np.testing.assert_array_equal(whole[:, part.context], layout.new_tokens(frames, part)[:, 0, 0, 0])
            # A frame has the place in its clip that positions and noise follow.
            places = layout.places[whole[:, part.context :]]
            np.testing.assert_array_equal(places, [range(part.context, clip)] * part.count)
