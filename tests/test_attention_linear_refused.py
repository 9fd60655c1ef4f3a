"""Linear attention refuses what does not fit, and says what would."""

import jax
import jax.numpy as jnp
import pytest

from flowgen.attention import (
    FEATURE_MAPS,
    KERNELS,
    Causal,
    cosformer_attention,
    cosformer_features,
    feature_map,
    gated_linear_attention,
    gaussian_landmark_map,
    kernel,
    linear_attention,
    nala_features,
    pola_attention,
    prefill,
    retention,
    rotary_grid,
    rotary_line,
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


REFUSED = {
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
