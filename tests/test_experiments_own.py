"""Data and models of a user's own: given to `fit` as values, without a name in any config."""

import dataclasses

import jax
import numpy as np
import pytest
from commands import refused, succeed
from flax import linen as nn

import flowgen
from flowgen.contexts import ImageContext, VectorContext
from flowgen.data import Batch, DataConfig
from flowgen.experiments import FlowExperiment, MatchingExperiment, SamplingConfig, SolverConfig, SpaceToDepth
from flowgen.experiments.conditions import conditions_of
from flowgen.experiments.flow_options import FlowDrawOptions
from flowgen.flows import STARFlowConfig, STARFlowVConfig, TARFlowConfig
from flowgen.matching import DiTConfig
from flowgen.training import LogConfig, TrainConfig

DRAWN = FlowDrawOptions()
QUIET = LogConfig(log_every=2, checkpoint_every=0, progress=False, tensorboard=False)
FLOW = TARFlowConfig(image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_blocks=2, layers_per_block=1)
TWO_STEPS = FlowExperiment(
    name="own",
    model=dataclasses.replace(FLOW, num_classes=2),
    train=TrainConfig(steps=2, batch_size=8),
    log=dataclasses.replace(QUIET, checkpoint_every=2),
)


class Stripes:
    """Images of a user's own, which no file holds: upright and level stripes."""

    event_shape = (8, 8, 1)
    class_names = ("upright", "level")

    def __len__(self):
        return 40

    def __getitem__(self, indices):
        stripes = np.broadcast_to(np.arange(8) % 2 * 255, (8, 8)).astype(np.uint8)
        images = np.stack([stripes.T if index % 2 else stripes for index in indices])[..., None]
        return Batch(images, (indices % 2).astype(np.int32))


def changed(num=40, class_names=("upright", "level"), context=np.int32, x=np.uint8, rows=1, shift=0, wrong_from=40):
    """Stripes with one thing that is wrong."""

    class Changed(Stripes):
        def __len__(self):
            return num

        def __getitem__(self, indices):
            batch = super().__getitem__(np.repeat(indices, rows))
            labels = np.where(indices >= wrong_from, -2, batch.context[::rows] + shift)
            return Batch(batch.x.astype(x), None if context is None else labels.astype(context))

    Changed.class_names = class_names
    return Changed()


class OwnNetwork(nn.Module):
    """A velocity network that flowgen does not know, for images of its config."""

    config: DiTConfig

    @nn.compact
    def __call__(self, t, x, cond=None):
        scale = self.param("scale", nn.initializers.ones, ())
        return scale * nn.Conv(x.shape[-1], (3, 3))(x) + t[:, None, None, None]


@pytest.mark.parametrize(
    "experiment",
    [
        pytest.param(FlowExperiment(name="own", model=dataclasses.replace(FLOW, num_classes=2)), id="flow"),
        pytest.param(
            MatchingExperiment(
                name="own",
                model=DiTConfig(
                    image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_layers=1, num_classes=2
                ),
            ),
            id="velocity",
        ),
    ],
)
@pytest.mark.slow
def test_data_of_ones_own_are_trained_on_and_resumed(experiment, tmp_path):
    constant = dataclasses.replace(experiment.optim, schedule="constant")  # by which half a run is half of it
    experiment = dataclasses.replace(experiment, optim=constant, train=TrainConfig(steps=4, batch_size=8), log=QUIET)
    whole = flowgen.fit(experiment, tmp_path / "whole", dataset=Stripes(), held_out=Stripes())
    assert np.isfinite(list(whole.metrics.values())).all()
    assert whole.samples.is_file()
    half = dataclasses.replace(experiment, train=dataclasses.replace(experiment.train, steps=2))
    flowgen.fit(half, tmp_path / "halves", dataset=Stripes())
    resumed = flowgen.fit(experiment, tmp_path / "halves", dataset=Stripes())
    jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)


@pytest.mark.slow
def test_a_model_of_ones_own_is_trained_and_loaded(tmp_path):
    experiment = MatchingExperiment(
        name="own",
        model=DiTConfig(image_size=8, channels=1, patch_size=4, width=16, head_dim=8),
        train=TrainConfig(steps=2, batch_size=8),
        log=QUIET,
    )
    network = OwnNetwork(experiment.model)
    flowgen.fit(experiment, tmp_path, dataset=Stripes(), model=network)
    loaded, params, _ = flowgen.load(tmp_path, model=network)
    assert loaded is network
    assert params["params"].keys() == {"scale", "Conv_0"}
    with pytest.raises(ValueError, match="does not fit the model"):
        flowgen.load(tmp_path)


class OwnExperiment(FlowExperiment):
    """An experiment that no command could load."""


def test_a_subclass_of_an_experiment_is_refused(tmp_path):
    with pytest.raises(ValueError, match="experiment is a OwnExperiment, a class of your own"):
        flowgen.fit(OwnExperiment(name="own", model=FLOW), tmp_path)


def test_what_is_given_in_part_or_wrong_is_refused(tmp_path):
    with pytest.raises(ValueError, match="held_out is given without dataset"):
        flowgen.fit(FlowExperiment(name="own", model=FLOW), tmp_path, held_out=Stripes())


@pytest.mark.slow  # a run and two commands for what its config says
def test_a_run_of_ones_own_data_passes_for_no_other(tmp_path):
    flowgen.fit(TWO_STEPS, tmp_path, dataset=Stripes())
    longer = dataclasses.replace(TWO_STEPS, train=TrainConfig(steps=4, batch_size=8))
    with pytest.raises(ValueError, match=r"data\.name: 'own' -> 'digits'"):
        flowgen.fit(longer, tmp_path)
    assert "a dataset passed to `fit`" in refused("evaluate --checkpoint", tmp_path)
    assert flowgen.load(tmp_path)[2].data.classes == ("upright", "level")
    succeed("sample --num 1 --classes level --checkpoint", tmp_path, "--out", tmp_path / "x.npz")


@pytest.mark.parametrize(
    ("changes", "dataset", "message"),
    [
        ({}, [1, 2], r"dataset is .*event_shape"),
        (
            {"image_size": 16},
            Stripes(),
            r"dataset has event_shape \(8, 8, 1\); the model requires data of shape \(16, 16, 1\)",
        ),
        ({"num_classes": 1}, Stripes(), r"model.num_classes is 1, but the data have 2 classes"),
        ({}, Stripes, r"dataset is the class Stripes; give an object with"),
        ({}, changed(num=0), r"dataset is empty"),
        ({"num_classes": 2}, changed(class_names=()), r"dataset has no class_names"),
        (
            {"num_classes": 2},
            changed(context=None),
            r"dataset returned the context None; give one integer label per sample",
        ),
        ({"num_classes": 2}, changed(context=np.float32), r"the context float32 of shape \(1,\); give one integer"),
        ({"num_classes": 2}, changed(shift=2), r"has the label 2 at position 0; labels must be from 0 to 1"),
        ({}, changed(x=np.float32), r"batch.x is float32"),
        ({}, changed(rows=2), r"dataset returned x of shape \(2, 8, 8, 1\); the shape must be \(1, 8, 8, 1\)"),
    ],
)
@pytest.mark.usefixtures("untyped")
def test_data_of_ones_own_that_do_not_fit_are_refused(changes, dataset, message, tmp_path):
    experiment = FlowExperiment(name="own", model=dataclasses.replace(FLOW, **changes))
    with pytest.raises(ValueError, match=message):
        flowgen.fit(experiment, tmp_path / "run", dataset=dataset)
    assert not (tmp_path / "run").exists()


def test_held_out_data_of_other_classes_are_refused(tmp_path):
    experiment = FlowExperiment(name="own", model=dataclasses.replace(FLOW, num_classes=2))
    with pytest.raises(ValueError, match="held_out has the classes level, upright, but dataset has upright, level"):
        flowgen.fit(experiment, tmp_path, dataset=Stripes(), held_out=changed(class_names=("level", "upright")))


@pytest.mark.slow  # a run for one refusal
def test_data_of_ones_own_keep_the_classes_of_their_run(tmp_path):
    flowgen.fit(TWO_STEPS, tmp_path, dataset=Stripes())
    _, _, saved = flowgen.load(tmp_path)
    longer = dataclasses.replace(saved, train=TrainConfig(steps=4, batch_size=8))
    with pytest.raises(
        ValueError, match=r"dataset has the classes level, upright, but data\.classes are upright, level"
    ):
        flowgen.fit(longer, tmp_path, dataset=changed(class_names=("level", "upright")))


def test_a_wrong_label_in_a_later_batch_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"dataset has the label -2 at position \d+; labels must be"):
        flowgen.fit(TWO_STEPS, tmp_path, dataset=changed(wrong_from=1))


def test_a_flow_of_clips_is_no_flow_of_images():
    with pytest.raises(ValueError, match="VideoFlowExperiment"):
        FlowExperiment(name="clips", model=STARFlowVConfig(image_size=8, frames=3, channels=1))


@pytest.mark.slow
def test_images_of_ones_own_are_encoded_for_a_flow_of_latents(tmp_path):
    model = STARFlowConfig(image_size=4, channels=4, width=40, head_dim=20, layers_per_block=(1, 1))
    experiment = FlowExperiment(
        name="own", model=model, codec=SpaceToDepth(2), train=TrainConfig(steps=1, batch_size=8), log=QUIET
    )
    experiment = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, warmup_steps=0))
    result = flowgen.fit(experiment, tmp_path, dataset=Stripes(), held_out=Stripes())
    assert np.isfinite(result.metrics["nats_per_dim"])


class Noisy(Stripes):
    """Stripes, each with a noisy copy as its context."""

    class_names = ()

    def __getitem__(self, indices):
        x = super().__getitem__(indices).x
        noise = np.stack([np.random.default_rng(index).standard_normal(x.shape[1:]) for index in indices])
        return Batch(x, (x / 127.5 - 1 + noise).astype(np.float32))


def conditioned(context=None, **changes):
    """An experiment that is conditioned on images."""
    context = ImageContext(image_size=8, channels=1, patch_size=4) if context is None else context
    model = DiTConfig(image_size=8, channels=1, patch_size=4, width=16, head_dim=8, num_layers=1, context=context)
    settings = {"train": TrainConfig(steps=2, batch_size=8, label_dropout=0.2), "log": QUIET, **changes}
    return MatchingExperiment(name="own", model=model, **settings)


@pytest.mark.slow
def test_contexts_of_ones_own_are_trained_on_guided_and_sampled(tmp_path):
    experiment = conditioned(sampling=SolverConfig(num=4, num_steps=2, guidance=1.0))
    result = flowgen.fit(experiment, tmp_path, dataset=Noisy(), held_out=Noisy())
    assert np.isfinite(list(result.metrics.values())).all()
    assert result.samples.is_file()
    network, variables, loaded = flowgen.load(tmp_path)
    assert loaded.model == experiment.model
    cond, key = conditions_of(loaded.model, Noisy())(np.arange(3)), jax.random.key(0)
    x, _ = loaded.draw_batch(network, variables, key, np.arange(3), cond)
    other, _ = loaded.draw_batch(network, variables, key, np.arange(3), cond[::-1].copy())
    np.testing.assert_array_equal(x[1], other[1])
    assert np.abs(x[0] - other[0]).max() > 0


class Turned(Stripes):
    """Stripes, each with a vector that tells their direction as its context."""

    class_names = ()

    def __getitem__(self, indices):
        return Batch(super().__getitem__(indices).x, np.eye(2, dtype=np.float32)[indices % 2])


FLOWS_IN_CONTEXT = {
    "pixels": (dataclasses.replace(FLOW, context=VectorContext(2)), None),
    "latents": (
        STARFlowConfig(
            image_size=4, channels=4, width=40, head_dim=20, layers_per_block=(1, 1), context=VectorContext(2)
        ),
        SpaceToDepth(2),
    ),
}


def flow_in_context(name, **changes):
    """An experiment that trains a flow on images under contexts."""
    model, codec = FLOWS_IN_CONTEXT[name]
    train = TrainConfig(steps=2, batch_size=8, label_dropout=0.2)
    sampling = SamplingConfig(num=4, guidance=1.0)
    settings = {"train": train, "sampling": sampling, "log": QUIET, **changes}
    return FlowExperiment(name="own", model=model, codec=codec, **settings)


@pytest.mark.parametrize("name", FLOWS_IN_CONTEXT)
def test_flows_are_trained_on_contexts_of_ones_own(name):
    job = flow_in_context(name).job(dataset=Turned())
    batch = next(iter(job.batches(0, 1)))
    second = np.asarray(batch.x)[:, 0, 1, 0] if name == "pixels" else np.asarray(batch.x.mean)[:, 0, 0, 1]
    turned = second <= 0  # the second pixel of the first row
    np.testing.assert_array_equal(batch.context, np.eye(2)[turned.astype(int)])
    keys = jax.random.split(jax.random.key(0))
    loss, *_ = jax.eval_shape(lambda keys: job.objective(job.init(keys[0]), batch, keys[1]), keys)
    assert loss.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS_IN_CONTEXT)
def test_flows_under_contexts_of_ones_own_are_evaluated_and_sampled(name, tmp_path):
    experiment = flow_in_context(name)
    experiment = dataclasses.replace(experiment, optim=dataclasses.replace(experiment.optim, warmup_steps=0, lr=0.1))
    result = flowgen.fit(experiment, tmp_path, dataset=Turned(), held_out=Turned())
    assert np.isfinite(list(result.metrics.values())).all()
    assert result.samples.is_file()
    flow, variables, loaded = flowgen.load(tmp_path)
    cond, key = conditions_of(loaded.model, Turned())(np.arange(3)), jax.random.key(0)
    x, _ = loaded.draw_batch(flow, variables, key, np.arange(3), cond)
    other, _ = loaded.draw_batch(flow, variables, key, np.arange(3), cond[[1, 1, 1]])
    np.testing.assert_array_equal(x[1], other[1])
    assert np.abs(x[0] - other[0]).max() > 0


CONTEXTS_REFUSED = {
    "no contexts in the data of a flow": (
        lambda path: flow_in_context("pixels").flow_dataset("train"),
        "data.name 'digits' has no contexts",
    ),
    "other contexts of a flow": (
        lambda path: flowgen.fit(flow_in_context("pixels"), path, dataset=Noisy()),
        "dataset returned a context that does not fit the model: cond is float32 of shape (1, 8, 8, 1)",
    ),
    "flipped images of a flow": (
        lambda path: dataclasses.replace(
            flow_in_context("pixels"),
            model=dataclasses.replace(FLOW, context=ImageContext(8, 1, 4)),
            data=DataConfig(flip=True),
        ),
        "data.flip is true, but the context",
    ),
    "commands for a flow": (lambda path: flow_in_context("pixels").draw(None, None, DRAWN), "commands cannot give"),
    "no contexts in the data": (lambda path: conditioned().dataset("train"), "data.name 'digits' has no contexts"),
    "other contexts": (
        lambda path: flowgen.fit(conditioned(VectorContext(dim=3)), path, dataset=Noisy()),
        "dataset returned a context that does not fit the model: cond is float32 of shape (1, 8, 8, 1)",
    ),
    "labels for contexts": (
        lambda path: flowgen.fit(conditioned(), path, dataset=changed()),
        "cond is int32 of shape (1,)",
    ),
    "none at all": (lambda path: flowgen.fit(conditioned(), path, dataset=changed(context=None)), "cond is None; give"),
    "flipped images": (lambda path: conditioned(data=DataConfig(flip=True)), "data.flip is true, but the context"),
    "commands": (lambda path: conditioned().draw(None, None, None), "which commands cannot give"),
    "guidance without dropout": (
        lambda path: conditioned(sampling=SolverConfig(guidance=1.0), train=TrainConfig()),
        "needs an unconditional field",
    ),
}


@pytest.mark.parametrize("what", CONTEXTS_REFUSED)
def test_contexts_that_do_not_fit_are_refused(what, tmp_path, untyped):
    run, part = CONTEXTS_REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run(tmp_path)
    assert part in str(error.value)
