"""The coupling of a trained flow (NFM): closed forms of Gaussian flows, and the flow that ships with flowgen."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from laws import SMALL, perturbed
from tolerances import FORMULA, NETWORK, assert_close

import flowgen
from flowgen import checkpoint
from flowgen import matching as fm
from flowgen.data import ArrayDataset, from_uint8
from flowgen.experiments import MatchingExperiment
from flowgen.experiments.distilled import open_flow, with_flow
from flowgen.matching.loss import rows_of
from flowgen.training import TrainConfig

CONFIG = flowgen.TARFlowConfig(image_size=4, num_classes=3, noise_std=0.0, **{**SMALL, "layers_per_block": 1})
DIGITS = fm.DiTConfig(image_size=8, channels=1, num_classes=10)


# The first token of a block passes unchanged: in the flow below, it is the first patch of the image.
MEAN, STD = (np.full(CONFIG.event_shape, value, np.float32) for value in (0.7, 0.4))
MEAN[:2, :2], STD[:2, :2] = 0, 1


@jax.jit
def couple(coupling, x0, x1, cond=None):
    return coupling(jax.random.key(2), x0, x1, cond)


def identity_flow(config=CONFIG):
    """Returns a flow whose blocks are the identity; fresh heads have kernels of zero, but not biases."""
    flow = config.build()
    variables = flowgen.init(flow, jax.random.key(0))
    for index in range(config.num_blocks):
        head = variables["params"][f"blocks_{index}"]["proj_out"]
        head["bias"] = jnp.zeros_like(head["bias"])
    return flow, variables


def gaussian_flow():
    """Returns the exact flow of N(MEAN, STD²): its first block is affine, and the other block is the identity."""
    flow, variables = identity_flow()
    bias = [jnp.full(CONFIG.token_dim, value, jnp.float32) for value in (np.log(0.4), 0.7)]
    variables["params"]["blocks_0"]["proj_out"]["bias"] = jnp.concatenate(bias)
    return flow, variables


def noise_and_data(mean=0.0, std=1.0):
    x0, x1 = np.random.default_rng(0).standard_normal((2, 64, *CONFIG.event_shape)).astype(np.float32)
    return jnp.asarray(x0), jnp.asarray(mean + std * x1, jnp.float32)


def test_a_flow_that_is_the_identity_adds_noise_alone_in_the_layout_of_images():
    x0, x1 = noise_and_data()
    pairs = couple(fm.FlowDistilled(*identity_flow(), noise_std=0.5), x0, x1)
    assert_close(pairs.x0, x1 + 0.5 * x0, FORMULA)
    np.testing.assert_array_equal(pairs.x1, x1)
    np.testing.assert_array_equal(pairs.log_weight, 0)


def test_the_flow_of_a_gaussian_gives_the_optimal_map_and_straight_paths():
    x0, x1 = noise_and_data(MEAN[None], STD[None])
    coupling = fm.FlowDistilled(*gaussian_flow())
    pairs = couple(coupling, x0, x1)
    assert_close(pairs.x0, (x1 - MEAN[None]) / STD[None], NETWORK)  # the Monge map: both have independent entries

    def velocity(t, x, cond):
        t = t[:, None, None, None]
        return MEAN[None] + (STD[None] - 1) * (x - t * MEAN[None]) / (1 - t + t * STD[None])

    def loss(coupling):
        return fm.flow_matching_loss(coupling=coupling)(velocity, {"x1": x1, "x0": x0}, jax.random.key(3))[0]

    # Every x_t lies on one path alone, so the regression has no error; independent paths cross.
    assert jax.jit(loss)(coupling) < NETWORK < 0.1 < loss(fm.Independent())
    assert jax.jit(lambda x0: fm.path_report(velocity, x0, num_steps=10).curvature)(pairs.x0) < NETWORK


def test_noise_is_in_units_of_the_prior():
    flow, variables = identity_flow(dataclasses.replace(CONFIG, scale_parameterisation="volume_preserving"))
    variables["prior"]["variance"] = jnp.full_like(variables["prior"]["variance"], 4.0)
    x0, x1 = noise_and_data(std=2.0)
    assert_close(couple(fm.FlowDistilled(flow, variables), x0, x1).x0, x1 / 2, FORMULA)


def test_a_flow_without_noise_gets_dequantised_images(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (64, *CONFIG.event_shape), np.uint8)
    x0, x1 = noise_and_data()[0], jnp.asarray(from_uint8(images))
    found = (np.asarray(couple(fm.FlowDistilled(*identity_flow(), noise="uniform"), x0, x1).x0, np.float64) + 1) * 128
    # Near 1, float32 has steps of 2^-24, which are 128 times as large here.
    np.testing.assert_allclose(found, images + scipy.stats.norm.cdf(np.asarray(x0, np.float64)), atol=1e-4)

    model = dataclasses.replace(CONFIG, channels=1, image_size=8, num_classes=0)
    experiment = flowgen.FlowExperiment(name="flow", model=model)
    checkpoint.write_run(tmp_path / "run", experiment, flowgen.init(model.build(), jax.random.key(0)))
    assert open_flow(str(tmp_path / "run"), DIGITS).noise == "uniform"


def test_rows_labels_gradients_and_compilation():
    flow, variables = perturbed(dataclasses.replace(CONFIG, noise_std=0.1), jax.random.key(0))
    x0, x1 = noise_and_data()
    labels, traces = jnp.arange(64) % 3, []

    @jax.jit
    def couple(coupling, x0, x1, labels):
        traces.append(None)
        return coupling(jax.random.key(2), x0, x1, labels)

    coupling = fm.FlowDistilled(flow, variables)
    pairs = couple(coupling, x0, x1, labels)
    z, _ = jax.jit(flow.apply)(variables, x1 + 0.1 * x0, labels)
    assert_close(flow.config.to_tokens(pairs.x0), z, NETWORK)
    np.testing.assert_array_equal(pairs.cond, labels)
    others = couple(fm.FlowDistilled(flow, variables), x0[::-1], x1[::-1], labels[::-1])
    assert_close(others.x0[::-1], pairs.x0, NETWORK)
    assert len(traces) == 1
    assert jnp.abs(couple(coupling, x0, x1, (labels + 1) % 3).x0 - pairs.x0).max() > 1e-3
    slopes = jax.grad(lambda coupling: jnp.square(couple(coupling, x0, x1, labels).x0).sum())(coupling)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slopes))
    dropped = fm.draw_pairs(rows_of({"x1": x1}, jax.random.key(4)), {"x1": x1, "cond": labels}, coupling)
    assert dropped.x0.shape == x1.shape


def test_the_shipped_flow_pairs_digits_with_near_normal_noise():
    experiment = flowgen.load_config("nfm_digits")
    coupling = with_flow(experiment.matching, experiment.model).coupling
    dataset = experiment.dataset("train")
    batch = dataset[np.arange(256)]
    x1 = jnp.asarray(from_uint8(batch.pixels))
    x0 = jax.random.normal(jax.random.key(0), x1.shape)
    pairs = jax.jit(coupling)(jax.random.key(1), x0, x1, jnp.asarray(batch.labels))
    # 512 images gave mean 0.004 and standard deviation 0.979, and a mean squared distance of 1.37 instead of 1.72.
    assert abs(pairs.x0.mean()) < 0.05
    assert abs(pairs.x0.std() - 1) < 0.05
    assert jnp.square(pairs.x0 - x1).mean() < 0.9 * jnp.square(x0 - x1).mean()


def test_a_training_step_has_the_flow_as_an_argument(key):
    network = dataclasses.replace(DIGITS, width=16, head_dim=8, num_layers=1)
    matching = fm.MatchingConfig(coupling=fm.FromFlow("digits"))
    experiment = MatchingExperiment(name="nfm", model=network, matching=matching, train=TrainConfig(batch_size=8))
    job = experiment.job()
    batch, variables = next(iter(job.batches(0, 1))), job.init(key)
    traced = jax.make_jaxpr(job.objective)({**variables, **job.fixed}, batch, jax.random.key(1))
    sizes = [leaf.size for leaf in jax.tree.leaves(job.fixed)]
    assert sum(map(np.size, traced.consts)) < sum(sizes) / 100
    assert not set(job.fixed) & set(variables)


def named(*classes):
    """Returns an experiment on digits of these classes alone, with the flow that ships with flowgen."""
    matching = fm.MatchingConfig(coupling=fm.FromFlow("digits"))
    data = ArrayDataset(np.zeros((4, 8, 8, 1), np.uint8), np.zeros(4, np.int32), class_names=classes)
    experiment = MatchingExperiment(name="nfm", model=DIGITS, matching=matching, train=TrainConfig(batch_size=4))
    return SimpleNamespace(job=lambda: experiment.job(dataset=data))


@pytest.mark.parametrize("classes", [(), ("0", "1", "2")], ids=["unknown", "the first"])
def test_a_flow_fits_data_whose_labels_have_the_same_names(classes):
    assert open_flow("digits", DIGITS, classes).flow.config.num_classes == 10


REFUSED = {
    "no flow": (lambda: fm.FlowDistilled(fm.MLPConfig().build(), {}), "flow is a VelocityMLP"),
    "noise": (lambda: fm.FlowDistilled(CONFIG.build(), {}, noise_std=-1.0), "noise_std is -1.0"),
    "kind of noise": (lambda: fm.FlowDistilled(CONFIG.build(), {}, noise="none"), "noise is 'none'; it must be"),
    "other samples": (
        lambda: fm.FlowDistilled(CONFIG.build(), {})(None, jnp.zeros((2, 3)), jnp.zeros((2, 3))),
        "x1 has samples of shape (3,), but the flow of the coupling models samples of shape (4, 4, 2)",
    ),
    "config": (lambda: fm.FromFlow("digits")(None, None, None), "use FlowDistilled(flow, variables)"),
    "no run": (lambda: open_flow("runs/nowhere", DIGITS), "matching.coupling.path 'runs/nowhere': "),
    "velocity network": (lambda: open_flow("digits-cfm", DIGITS), "this is the run of a MatchingExperiment"),
    "other images": (
        lambda: open_flow("digits", dataclasses.replace(DIGITS, image_size=16)),
        "this flow models samples of shape (8, 8, 1), but the velocity network models samples of shape (16, 16, 1)",
    ),
    "other classes": (
        lambda: open_flow("digits", dataclasses.replace(DIGITS, num_classes=0)),
        "this flow has 10 classes, but model.num_classes is 0",
    ),
    "classes in another order": (
        lambda: open_flow("digits", DIGITS, (*"1023456789",)),
        "on the classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, in this order, but the data have 1, 0, 2, 3, 4, 5, 6, 7, 8, 9",
    ),
    "other class names in the data": (
        lambda: named("zero", "one").job(),
        "in this order, but the data have zero, one; give a flow with the same classes",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_flows_that_do_not_fit_are_refused_in_one_sentence(what, untyped):
    run, part = REFUSED[what]
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run()
    assert part in str(error.value)
