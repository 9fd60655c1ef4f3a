"""Linear attention refuses what does not fit, and says what would."""

import jax
import jax.numpy as jnp
import pytest

from flowgen.attention import (
    FEATURE_MAPS,
    KERNELS,
    Causal,
    Features,
    FrameWindow,
    attend_heads,
    attend_kv_window,
    cosformer_attention,
    cosformer_features,
    feature_map,
    gated_linear_attention,
    gaussian_landmark_map,
    init_kv_cache,
    kernel,
    linear_attention,
    nala_features,
    pola_attention,
    prefill,
    prefix_product,
    quadratic_products,
    retention,
    rotary_grid,
    rotary_line,
    rotate,
    softmax_attention,
    step,
)

SHAPES = {"q": (2, 6, 4, 8), "k": (2, 6, 2, 8), "v": (2, 6, 2, 4)}
REFUSED_SHAPES = {
    "q of rank 3": ({"q": (6, 4, 8)}, ["q has shape (6, 4, 8)", "(batch, tokens, heads, width)", "Add or split"]),
    "v of rank 5": ({"v": (1, 2, 6, 2, 4)}, ["v has shape (1, 2, 6, 2, 4)", "(batch, tokens, heads, width)"]),
    "heads that do not divide": (
        {"k": (2, 6, 3, 8), "v": (2, 6, 3, 4)},
        ["q has 4 heads", "k has 3", "must be a multiple of"],
    ),
    "more key heads": ({"q": (2, 6, 1, 8)}, ["q has 1 heads", "k has 2", "must be a multiple of"]),
    "batches": ({"q": (3, 6, 4, 8)}, ["(3, 6, 4, 8)", "(2, 6, 2, 8)", "batch sizes must be equal"]),
    "k without v": ({"v": (2, 5, 2, 4)}, ["k has shape (2, 6, 2, 8)", "(2, 5, 2, 4)", "must be equal"]),
    "k and v heads": ({"v": (2, 6, 1, 4)}, ["(2, 6, 2, 8)", "(2, 6, 1, 4)", "must be equal"]),
    "head widths": ({"q": (2, 6, 4, 4)}, ["(2, 6, 4, 4)", "(2, 6, 2, 8)", "head widths must be equal"]),
    "lengths": ({"q": (2, 5, 4, 8)}, ["is_causal", "(2, 5, 4, 8)", "(2, 6, 2, 8)", "prefill"]),
    "mask of rank 2": ({"mask": (2, 6)}, ["mask has shape (2, 6)", "(2, 4, 6, 6)", "valid[:, None, None, :]"]),
    "mask of other heads": ({"mask": (2, 3, 6, 6)}, ["mask has shape (2, 3, 6, 6)", "(2, 4, 6, 6)", "padding mask"]),
    "mask of other keys": ({"mask": (2, 1, 1, 5)}, ["mask has shape (2, 1, 1, 5)", "(2, 4, 6, 6)", "padding mask"]),
    "segments": ({"segment_ids": (2, 5)}, ["segment_ids have shape (2, 5)", "(batch, tokens)", "(2, 6)"]),
    "segments of rank 1": ({"segment_ids": (6,)}, ["segment_ids have shape (6,)", "(batch, tokens)", "(2, 6)"]),
}
KINDS = {"mask": bool, "segment_ids": jnp.int32}


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("case", REFUSED_SHAPES)
def test_shapes_that_do_not_fit_are_refused(case, name, untyped):
    shapes, parts = REFUSED_SHAPES[case]
    arguments = {key: jax.ShapeDtypeStruct(x, KINDS.get(key, jnp.float32)) for key, x in (SHAPES | shapes).items()}
    refuse(lambda: jax.eval_shape(lambda a: KERNELS[name].attend(**a, is_causal=True), arguments), parts)


def refuse(call, parts):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the parts are matched below)
        call()
    message = str(raised.value).split("\n")[0]
    assert message.endswith(".")
    for part in parts:
        assert part in message


def zeros(**shapes):
    return [jnp.zeros(x) for x in (SHAPES | shapes).values()]


def attend(features):
    return linear_attention(*zeros(), features)


def frames(q, k, v):
    return FrameWindow(prefix=2, tokens=2, past_frames=1, lookahead_frames=0).attend(q, k, v)


def heads_first(*arrays, mask=None):
    return attend_heads(*(x.swapaxes(1, 2) for x in arrays), mask)


def quadratic(q, k, v, mask=None, **norms):
    return quadratic_products(Features(q, k, **norms), v, mask)


def prefix(q, k, v, **options):
    return prefix_product(Features(q, k), v, **options)


def cached(q, k, v, start=0, slots=9):
    return attend_kv_window(q, k, v, init_kv_cache(2, slots, 2, 8, jnp.float32), start)


def square(**shapes):
    """Queries, keys and values of one width."""
    return zeros(**({"v": SHAPES["k"]} | shapes))


def rotated(positions):
    return rotate(jnp.ones((2, 3, 2, 4)), rotary_line(5, 4), positions)


ONE = {"k": (1, 6, 2, 8), "v": (1, 6, 2, 4)}
FEW = {"k": (2, 4, 2, 8), "v": (2, 4, 2, 4)}
THREE = {"k": (2, 6, 3, 8), "v": (2, 6, 3, 4)}
ADDED = jnp.zeros((2, 1, 1, 6))
REFUSED = {
    "frames, few keys": (lambda: frames(*zeros(**FEW)), ["(2, 6, 4, 8)", "(2, 4, 2, 8)", "as many keys as queries"]),
    "frames, batch": (lambda: frames(*zeros(**ONE)), ["(2, 6, 4, 8)", "(1, 6, 2, 8)", "batch sizes must be equal"]),
    "frames, heads": (lambda: frames(*zeros(**THREE)), ["q has 4 heads", "k has 3", "must be a multiple of"]),
    "frames, values": (lambda: frames(*zeros(v=(2, 4, 2, 4))), ["(2, 6, 2, 8)", "(2, 4, 2, 4)", "must be equal"]),
    "heads first, rank": (lambda: heads_first(*zeros(v=(2, 6, 4))), ["v has", "(batch, heads, tokens, width)"]),
    "heads first, batch": (lambda: heads_first(*zeros(**ONE)), ["(2, 4, 6, 8)", "(1, 2, 6, 8)", "batch sizes"]),
    "heads first, heads": (lambda: heads_first(*zeros(**THREE)), ["q has 4 heads", "k has 3"]),
    "heads first, mask": (lambda: heads_first(*zeros(), mask=ADDED), ["mask has dtype float32", "must be boolean"]),
    "heads first, mask of keys": (
        lambda: heads_first(*zeros(q=(2, 3, 4, 8)), mask=jnp.ones((2, 4, 6, 3), bool)),
        ["mask has shape (2, 4, 6, 3)", "(2, 4, 3, 6)"],
    ),
    "quadratic, batch": (lambda: quadratic(*zeros(**ONE)), ["(2, 6, 4, 8)", "(1, 6, 2, 8)", "batch sizes"]),
    "quadratic, width": (lambda: quadratic(*zeros(q=(2, 6, 4, 4))), ["(2, 6, 4, 4)", "head widths must be equal"]),
    "quadratic, mask": (lambda: quadratic(*zeros(), ADDED), ["mask has dtype float32", "must be boolean"]),
    "quadratic, mask of ones": (lambda: quadratic(*zeros(), ADDED.astype(int)), ["mask has dtype int32"]),
    "quadratic, normaliser": (
        lambda: quadratic(*zeros(), norm_q=jnp.ones((2, 6, 4, 3)), norm_k=jnp.ones((1, 6, 2, 3))),
        ["norm_k has shape (1, 6, 2, 3)", "(2, 6, 2)"],
    ),
    "prefix, batch": (lambda: prefix(*zeros(**ONE)), ["(2, 6, 4, 8)", "(1, 6, 2, 8)", "batch sizes must be equal"]),
    "prefix, lengths": (lambda: prefix(*zeros(**FEW)), ["(2, 6, 4, 8)", "(2, 4, 2, 8)", "as many queries as keys"]),
    "prefix, mask": (lambda: prefix(*zeros(), mask=ADDED), ["mask has dtype float32", "must be boolean"]),
    "prefix, decay": (lambda: prefix(*zeros(), log_decay=jnp.zeros((2, 1, 2))), ["log_decay has shape (2, 1, 2)"]),
    "prefix, segments": (lambda: prefix(*zeros(), segment_ids=jnp.zeros((1, 6), int)), ["have shape (1, 6)"]),
    "cache, batch": (lambda: cached(*square(k=(1, 6, 2, 8), v=(1, 6, 2, 8))), ["(1, 6, 2, 8)", "batch sizes"]),
    "cache, lengths": (lambda: cached(*square(q=(2, 5, 4, 8))), ["(2, 5, 4, 8)", "(2, 6, 2, 8)", "one key per query"]),
    "cache, heads": (
        lambda: cached(*square(k=(2, 6, 4, 8), v=(2, 6, 4, 8))),
        ["cache.keys has shape (2, 2, 9, 8)", "(2, 4, 9, 8)"],
    ),
    "cache, values": (lambda: cached(*zeros()), ["cache.values has shape (2, 2, 9, 8)", "(2, 2, 9, 4)"]),
    "cache, end": (lambda: cached(*square(), start=4), ["start is 4", "6 tokens", "9 positions"]),
    "cache, begin": (lambda: cached(*square(), start=jnp.asarray([0, -1])), ["start is -1", "6 tokens"]),
    "positions": (lambda: rotated(jnp.arange(3, 6)), ["from 3 to 5", "positions 0 to 4", "create one with more"]),
    "positions of samples": (lambda: rotated(jnp.asarray([[0, 1, 2], [-1, 0, 1]])), ["from -1 to 2"]),
    "one position": (lambda: rotated(jnp.zeros(1, int)), ["int32 of shape (1,)", "(3,) or (2, 3)"]),
    "one sample's positions": (lambda: rotated(jnp.zeros((1, 3), int)), ["int32 of shape (1, 3)", "(3,) or (2, 3)"]),
    "positions that are not whole": (lambda: rotated(jnp.zeros(3)), ["float32 of shape (3,)", "whole number"]),
    "kernel name": (lambda: kernel("nalla"), ["'nalla'", "choose one of", *KERNELS]),
    "feature name": (lambda: feature_map("elu"), ["'elu'", "choose one of", *FEATURE_MAPS]),
    "feature name in attention": (lambda: attend("softmax"), ["'softmax'", "choose one of", "elu_plus_one"]),
    "direction": (lambda: nala_features(direction_map="sign"), ["'sign'", "'split' or 'cosine'"]),
    "block size": (lambda: Causal(block_size=0), ["block_size must be at least 1, not 0"]),
    "chunk size": (lambda: Causal(chunk_size=-1), ["chunk_size must be at least 1, not -1"]),
    "chunk size of prefill": (lambda: prefill(*zeros(), chunk_size=0), ["chunk_size is 0", "at least 1"]),
    "chunk size of retention": (lambda: retention(*zeros(), chunk_size=0), ["chunk_size is 0", "at least 1"]),
    "odd values": (lambda: pola_attention(*zeros(v=(2, 6, 2, 3))), ["width 3", "must be even"]),
    "retention of all": (lambda: KERNELS["retention"].attend(*zeros()), ["always causal", "is_causal=True"]),
    "retention in blocks": (
        lambda: KERNELS["retention"].attend(*zeros(), is_causal=Causal(block_size=2)),
        ["always causal", "is_causal=True"],
    ),
    "retention of pairs": (
        lambda: retention(*zeros(), mask=jnp.ones((2, 1, 6, 6), bool)),
        ["mask has shape (2, 1, 6, 6)", "requires a key mask", "(batch, 1, 1, keys)"],
    ),
    "retention in segments": (
        lambda: retention(*zeros(), segment_ids=jnp.zeros((2, 5), int)),
        ["segment_ids have shape (2, 5)", "(batch, tokens)", "(2, 6)"],
    ),
    "prefill of pairs": (
        lambda: prefill(*zeros(), mask=jnp.ones((2, 1, 6, 6), bool)),
        ["mask has shape (2, 1, 6, 6)", "requires a key mask", "(batch, 1, 1, keys)"],
    ),
    "prefill of lengths": (lambda: prefill(*zeros(q=(2, 5, 4, 8))), ["(2, 5, 4, 8)", "(2, 6, 2, 8)"]),
    "decay": (
        lambda: gated_linear_attention(*zeros(), jnp.zeros((2, 6, 4))),
        ["log_decay has shape (2, 6, 4)", "(batch, tokens, key heads)", "(2, 6, 2)"],
    ),
    "segments of cross attention": (
        lambda: linear_attention(*zeros(q=(2, 5, 4, 8)), segment_ids=jnp.zeros((2, 5), int)),
        ["segment_ids", "(2, 5, 4, 8)", "(2, 6, 2, 8)", "pass a mask"],
    ),
    "table": (lambda: attend(nala_features(rotary=rotary_line(5, 8))), ["6 tokens", "5 positions"]),
    "table width": (lambda: attend(nala_features(rotary=rotary_line(6, 6))), ["16 channels", "multiple of 6"]),
    "odd table": (lambda: rotary_line(6, 7), ["dim is 7", "must be even"]),
    "odd grid": (lambda: rotary_grid(2, 3, 6), ["dim is 6", "multiple of 4"]),
    "power per head": (lambda: attend(nala_features(jnp.ones(3))), ["shape (3,)", "(4, 8)"]),
    "power of pola": (lambda: pola_attention(*zeros(), power=jnp.ones((4, 5))), ["shape (4, 5)", "(4, 8)"]),
    "power of rank 3": (lambda: attend(nala_features(jnp.ones((1, 4, 8)))), ["shape (1, 4, 8)", "(4, 8)"]),
    "cosformer": (lambda: cosformer_attention(*zeros(), max_length=5), ["6 tokens", "max_length is 5", "raise it"]),
    "cosformer of nothing": (lambda: cosformer_features(0), ["max_length", "at least 1, not 0"]),
    "landmarks": (lambda: attend(gaussian_landmark_map(jnp.zeros((3, 5, 8)))), ["(2, 6, 4, 8)", "(3, 5, 8)"]),
    "softmax lengths": (
        lambda: softmax_attention(*zeros(q=(2, 5, 2, 8)), is_causal=True),
        ["is_causal", "(2, 5, 2, 8)", "(2, 6, 2, 8)", "pass a mask"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_that_do_not_fit_are_refused(case, untyped):
    call, parts = REFUSED[case]
    refuse(call, parts)


def test_a_step_is_refused_like_a_call(untyped):
    q, k, v = zeros()
    state = prefill(q, k, v)[1]
    refuse(lambda: step(state, q[:, 0], k[:, 0, :, :4], v[:, 0]), ["(2, 1, 4, 8)", "(2, 1, 2, 4)", "head width"])
