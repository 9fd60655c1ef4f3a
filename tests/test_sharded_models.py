"""Models, solvers, couplings and losses of arrays that a mesh divides: the numbers of one device.

One table of calls, each with the arrays that are divided along their first axis, and one of programs. Each call works
in every program, as the same call on whole arrays does, unless a table below says why it cannot.
"""

import dataclasses
from collections.abc import Callable
from functools import cache, partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import NETWORK, assert_trees_close

from flowgen import matching as fm
from flowgen.attention import Causal, linear_attention
from flowgen.decoding import invert, sample
from flowgen.flows import ClipDenoiser, denoiser_variables, density, flow_score_objective
from flowgen.flows.objective import nll_objective
from flowgen.nn import init

BATCH, DEVICES = 8, 4
X0, X1 = np.random.default_rng(0).normal(size=(2, BATCH, 2)).astype(np.float32)
T = np.linspace(0.1, 0.9, BATCH, dtype=np.float32)
LABELS = np.arange(BATCH) % 3
IMAGES = np.random.default_rng(1).normal(size=(BATCH, 8, 8, 1)).astype(np.float32)


def key():
    return jax.random.key(3)


def mesh(kind):
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(kind,), devices=jax.devices()[:DEVICES])


def divided(arrays, kind):
    return jax.device_put(arrays, NamedSharding(mesh(kind), P("data")))


# How a program comes to divided arrays: (call, arrays) -> results.
PROGRAMS: dict[str, Callable] = {
    "explicit": lambda call, arrays: jax.jit(call)(*divided(arrays, AxisType.Explicit)),
    "explicit, eager": lambda call, arrays: call(*divided(arrays, AxisType.Explicit)),
    "automatic": lambda call, arrays: jax.jit(call)(*divided(arrays, AxisType.Auto)),
    "shard_map": lambda call, arrays: jax.jit(
        jax.shard_map(call, mesh=mesh(AxisType.Auto), in_specs=P("data"), out_specs=P("data"))
    )(*arrays),
}


def of_flow(name, method="log_prob"):
    """A method of a flow, and its images and conditions."""
    flow, variables = laws.perturbed(laws.FLOWS[name], jax.random.key(0))
    images = np.asarray(laws.images(flow.config, jax.random.key(1), BATCH))
    cond = jax.tree.map(np.asarray, laws.labels(flow.config, BATCH))
    tokens = images.reshape(BATCH, flow.config.num_tokens, flow.config.token_dim)
    methods = {
        "posterior": (lambda x: density.class_posterior(flow, variables, x), (images,)),
        "score": (partial(density.score, flow, variables), (images, cond)),
        "tweedie": (partial(density.tweedie_step, flow, variables, noise_std=0.3), (images, cond)),
        "sample": (lambda cond: sample(flow, variables, key(), len(cond), cond).x, (cond,)),
        "invert": (lambda z, cond: invert(flow, variables, z, cond).x, (tokens, cond)),
    }
    return methods.get(method, (lambda x, cond: flow.apply(variables, x, cond, method=method), (images, cond)))


def of_objective(config, objective):
    """The loss of a flow's objective, of 8-bit images and their conditions."""
    flow, variables = laws.perturbed(config, jax.random.key(0))
    images = np.asarray(laws.images(config, jax.random.key(1), BATCH))
    cond = jax.tree.map(np.asarray, laws.labels(config, BATCH))

    def call(x, cond):
        return objective(flow)(variables, laws.batch_of(x, cond), key())[0][None]

    return call, (images, cond)


def of_denoiser():
    """A denoiser of clips, and its clips and texts."""
    _, variables = laws.perturbed(CLIPS, jax.random.key(0))
    clips = np.asarray(laws.images(CLIPS, jax.random.key(1), BATCH))
    cond = jax.tree.map(np.asarray, laws.labels(CLIPS, BATCH))
    return partial(ClipDenoiser(CLIPS).apply, denoiser_variables(variables)), (clips, cond)


def of_network(config, use=None, replicated=False):
    """A velocity network, or what `use` makes of it, and times, samples and labels."""
    network = config.build()
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init, network), key())
    variables = jax.tree.map(lambda leaf: jnp.asarray(random.normal(size=leaf.shape) / 4, leaf.dtype), shapes)
    if replicated:
        variables = jax.device_put(variables, NamedSharding(mesh(AxisType.Explicit), P()))
    field = partial(network.apply, variables)
    samples = X0 if config.event_shape == (2,) else IMAGES
    if use is None:
        return field, (T, samples, LABELS)
    return lambda x, cond: use(field, x, cond), (samples, LABELS)


def of_coupling(coupling):
    return lambda x0, x1: coupling(key(), x0, x1)[:2], (X0, X1)


def loss(coupling, **options):
    def call(x0, x1):
        loss_fn = fm.flow_matching_loss(coupling=coupling, **options)
        return loss_fn(lambda t, x, cond: -x, {"x0": x0, "x1": x1}, key())[0][None]

    return call, (X0, X1)


def loss_of_network(loss_fn, network, x, labels):
    return loss_fn(network, {"x1": x, "cond": labels}, key())[0][None]


def adaptive(velocity, x, cond):
    return fm.integrate(velocity, x, cond, method="dopri5")[0]


POINTS = fm.MLPConfig(width=8, num_layers=2, num_classes=3)
DIT = fm.DiTConfig(image_size=8, channels=1, patch_size=2, width=16, num_layers=1, head_dim=8, num_classes=3)
UNET = fm.UNetConfig(
    image_size=8,
    channels=1,
    width=8,
    multipliers=(1, 2),
    blocks_per_level=1,
    attention_factors=(2,),
    head_dim=8,
    num_groups=4,
    num_classes=3,
)
AVERAGES = fm.MLPConfig(width=8, num_layers=2, num_classes=3, intervals=True)
CLIPS = dataclasses.replace(laws.FLOWS["starflow video"], denoiser_layers=1)
MEAN_FLOW = fm.mean_flow_loss(guidance_weight=0.5)
BRIDGE = fm.score_and_flow_matching_loss()
CALLS = {
    **{name: partial(of_flow, name) for name in ("classes", "starflow text", "starflow added class", "starflow video")},
    **{f"{method} of a flow": partial(of_flow, "classes", method) for method in ("forward", "posterior", "score")},
    "step to less noise": partial(of_flow, "classes", "tweedie"),
    "samples of a flow": partial(of_flow, "classes", "sample"),
    "inverse of a flow": partial(of_flow, "classes", "invert"),
    "denoiser": of_denoiser,
    "loss of a flow": partial(of_objective, laws.FLOWS["classes"], partial(nll_objective, label_dropout=0.5)),
    "loss of a flow and its denoiser": partial(of_objective, CLIPS, flow_score_objective),
    "MLP": partial(of_network, POINTS),
    "DiT": partial(of_network, DIT),
    "UNet": partial(of_network, UNET),
    "Heun": partial(of_network, POINTS, lambda v, x, c: fm.integrate(v, x, c, num_steps=3)[0]),
    "guided Heun": partial(
        of_network, POINTS, lambda v, x, c: fm.integrate(fm.guided(v, -1, scale=2.0), x, c, num_steps=3)[0]
    ),
    "path": partial(of_network, POINTS, lambda v, x, c: fm.trajectory(v, x, c, num_steps=3)[0].swapaxes(0, 1)),
    "drawn path": partial(of_network, POINTS, lambda v, x, c: fm.integrate_sde(v, v, x, key(), c, num_steps=3)[0]),
    "one step": partial(of_network, AVERAGES, lambda v, x, c: fm.integrate_mean(v, x, c)[0]),
    "dopri5": partial(of_network, POINTS, adaptive),
    "likelihood": partial(of_network, POINTS, lambda v, x, c: fm.log_prob(v, x, c, num_steps=3)),
    "likelihood of images": partial(of_network, UNET, lambda v, x, c: fm.log_prob(v, x, c, key=key(), num_steps=1)),
    "likelihood by dopri5": partial(of_network, POINTS, lambda v, x, c: fm.log_prob(v, x, c, method="dopri5")),
    "exact transport": partial(of_coupling, fm.MinibatchOT()),
    "entropic transport": partial(of_coupling, fm.MinibatchOT("sinkhorn")),
    "weights": lambda: (
        lambda x0, x1: fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=3)(key(), x0, x1).log_weight,
        (X0, X1),
    ),
    "loss": partial(loss, fm.Independent()),
    "loss at stratified times": partial(loss, fm.Independent(), time=fm.Uniform(stratified=True)),
    "loss of x1": partial(loss, fm.Independent(), prediction="x1", path=fm.Trigonometric()),
    "loss of a network": partial(of_network, POINTS, partial(loss_of_network, fm.flow_matching_loss())),
    "loss of MeanFlow": partial(of_network, AVERAGES, partial(loss_of_network, MEAN_FLOW)),
    "loss of a bridge": partial(
        of_network, POINTS, lambda v, x, c: loss_of_network(BRIDGE, lambda *at: (v(*at), v(*at)), x, c)
    ),
    "loss with exact transport": partial(loss, fm.MinibatchOT()),
    "loss with weights": partial(loss, fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=3)),
}
# Here each device of a mapped program sees its own rows alone, and does with them, or draws, as with a batch.
OF_A_BATCH = ("transport", "weights", "loss", "images", "drawn")
DECODED = ("samples of a flow", "inverse of a flow")
REFUSED = {(name, "shard_map"): "check_vma=False" for name in ("dopri5", "likelihood by dopri5", *DECODED)}
# It has a gradient of its own, for which jax wants a mesh as context outside of jit.
REFUSED["loss of a flow and its denoiser", "explicit, eager"] = "jax.set_mesh"


@cache
def case(name):
    """Returns (call, arrays, results for whole arrays)."""
    call, arrays = CALLS[name]()
    return call, arrays, jax.jit(call)(*arrays)


# Those that compile fast in every program, and one of each other kind in the one that is hardest to get right.
IN_EVERY_PROGRAM = ("Heun", "weights")
IN_ONE = ("classes", "samples of a flow", "DiT", "MLP", "likelihood", "exact transport", "loss")


def marks(name, program):
    shown = name in IN_EVERY_PROGRAM or (name in IN_ONE and program == "explicit")
    return [] if shown or REFUSED.get((name, program)) == "check_vma=False" else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("name", "program"),
    [pytest.param(name, program, marks=marks(name, program)) for name in CALLS for program in PROGRAMS],
)
def test_divided_arrays_give_the_numbers_of_one_device(name, program):
    call, arrays, expected = case(name)
    if (name, program) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, program]):
            PROGRAMS[program](call, arrays)
        return
    if program == "shard_map" and any(word in name for word in OF_A_BATCH):
        parts = [
            jax.tree.map(lambda x, device=device: np.split(x, DEVICES)[device], arrays) for device in range(DEVICES)
        ]
        parts = [jax.jit(call)(*part) for part in parts]
        expected = jax.tree.map(lambda *x: np.concatenate(x), *parts)
    results = PROGRAMS[program](call, arrays)
    assert_trees_close(jax.tree.map(np.asarray, results), jax.tree.map(np.asarray, expected), NETWORK)


@pytest.mark.parametrize(
    "name",
    rows(
        ["classes", "guided Heun", "likelihood", "loss", "loss of MeanFlow", "dopri5"], ("loss of MeanFlow", "dopri5")
    ),
)
def test_the_mesh_may_be_the_context(name):
    call, arrays, expected = case(name)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        results = jax.jit(call)(*divided(arrays, AxisType.Explicit))
    assert_trees_close(jax.tree.map(np.asarray, results), jax.tree.map(np.asarray, expected), NETWORK)


@pytest.mark.parametrize("name", ["classes", "DiT", "dopri5", "samples of a flow"])
def test_results_stay_divided_as_the_inputs_are(name):
    call, arrays, _ = case(name)
    for x in jax.tree.leaves(jax.jit(call)(*divided(arrays, AxisType.Explicit))):
        assert jax.typeof(x).sharding.spec[0] == "data"


@pytest.mark.parametrize("use", rows([None, adaptive], (adaptive,)), ids=["MLP", "dopri5"])
def test_parameters_may_lie_on_the_same_mesh(use):
    call, arrays = of_network(POINTS, use, replicated=True)
    plain, _ = of_network(POINTS, use)
    results = jax.jit(call)(*divided(arrays, AxisType.Explicit))
    assert_trees_close(np.asarray(results), np.asarray(jax.jit(plain)(*arrays)), NETWORK)


def test_gradients_of_parameters_are_those_of_one_device():
    network = POINTS.build()
    variables = laws.drawn(init, network, key())

    def loss(variables, t, x, cond):
        return jnp.square(network.apply(variables, t, x, cond)).mean()

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(variables, T, X0, LABELS)
    assert_trees_close(gradient(variables, *divided((T, X0, LABELS), AxisType.Explicit)), expected, NETWORK)


@pytest.mark.parametrize(
    "loss_fn", rows([fm.flow_matching_loss(), MEAN_FLOW], (MEAN_FLOW,)), ids=["flow matching", "MeanFlow"]
)
def test_gradients_of_losses_are_those_of_one_device(loss_fn):
    network = AVERAGES.build()
    variables = laws.drawn(init, network, key())

    def loss(variables, x1, cond):
        return loss_fn(partial(network.apply, variables), {"x1": x1, "cond": cond}, key())[0]

    gradient = jax.jit(jax.grad(loss))
    expected = gradient(variables, X1, LABELS)
    assert_trees_close(gradient(variables, *divided((X1, LABELS), AxisType.Explicit)), expected, NETWORK)


PALLAS = Causal(chunk_size=16, implementation="pallas")


def attend(x):
    return linear_attention(x, x, x, is_causal=PALLAS)


@pytest.mark.parametrize("shape", [(2, 0, 4, 4), (0, 5, 4, 4)])
def test_the_pallas_kernel_of_nothing_is_nothing(shape):
    assert attend(jnp.ones(shape)).shape == shape
    assert jax.grad(lambda x: attend(x).sum())(jnp.ones(shape)).shape == shape


def test_what_jax_cannot_do_with_the_pallas_kernel_is_one_sentence():
    x = jnp.ones((4, 2, 5, 4, 4))
    with pytest.raises(TypeError, match="implementation='xla'"):
        jax.jvp(attend, (x[0],), (x[0],))
    with pytest.raises(ValueError, match="implementation='xla'"):
        jax.vmap(attend)(divided(x, AxisType.Explicit))
