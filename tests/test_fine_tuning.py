"""Runs that start from another run: what is taken, mapped and refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from commands import one_sentence
from conftest import rows
from fine_tuning_cases import DIT, NEW, OLD, STAR, TAR, UNET, VIDEO, experiment_of, perturbed, run_of, started
from tolerances import NETWORK, assert_close

import flowgen
from flowgen.experiments import AutoencoderExperiment, FlowExperiment, MatchingExperiment, SpaceToDepth, TextConfig
from flowgen.experiments.fine_tuning import differences
from flowgen.experiments.remapping import matched_classes, remapped_classes, resampled
from flowgen.runs import CHECKPOINTS, flatten
from flowgen.training import InitConfig, OptimConfig

MATCHED = [1, 3, 0]  # the new numbers of the old classes


# Pure functions.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((3, 5, OLD, NEW), [2, 0, -1, 1, -1]),
        ((3, 2, OLD, ("fox", "owl")), [2, -1]),
        ((3, 4, OLD, ("dog",)), [1, -1, -1, -1]),  # a class without a name is new
        ((4, 3, OLD, ("fox", "emu", "cat")), [2, -1, 0]),
        ((3, 5, (), NEW), [0, 1, 2, -1, -1]),  # without names on one side, by number
        ((3, 2, OLD, ()), [0, 1]),
    ],
)
def test_classes_are_matched_by_name_or_else_by_number(arguments, expected):
    assert matched_classes(*arguments).tolist() == expected


@pytest.mark.parametrize("rest", [0, 1])
def test_rows_of_classes_move_and_the_last_row_stays_that_of_no_class(rest):
    table = np.random.default_rng(0).normal(size=(3 + rest, 4)).astype(np.float32)
    made = remapped_classes(table, 3, np.array([2, -1, 0, 1]))
    np.testing.assert_array_equal(made[[0, 2, 3]], table[[2, 0, 1]])
    assert_close(made[1], table[:3].mean(axis=0), 1e-6)
    np.testing.assert_array_equal(made[4:], table[3:])
    # What no class means where a table has no row for it.
    assert_close(made[:4].mean(axis=0), table[:3].mean(axis=0), 1e-6, scale=1)


def test_a_table_of_positions_is_resampled_on_the_grid():
    table = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    assert resampled(table, (2, 3), (2, 3)) is table
    # The centres of every third token are those of the old tokens.
    tripled = resampled(table, (2, 3), (6, 9)).reshape(6, 9, 5)
    assert_close(tripled[1::3, 1::3].reshape(6, 5), table, 1e-6)
    assert_close(resampled(np.ones_like(table), (2, 3), (5, 4)), np.ones((20, 5)), 1e-6)
    down, across = np.meshgrid((np.arange(4) + 0.5) / 4, (np.arange(5) + 0.5) / 5, indexing="ij")
    ramp = np.stack([down, 2 * across], axis=-1).reshape(20, 2)
    made = resampled(ramp.astype(np.float32), (4, 5), (8, 10)).reshape(8, 10, 2)
    inner = (np.arange(8)[1:-1] + 0.5) / 8
    assert_close(made[1:-1, 3, 0], inner, 1e-6)
    assert_close(made[3, 1:-1, 1], 2 * (np.arange(10)[1:-1] + 0.5) / 10, 1e-6)


# Mapped models.


def outputs(experiment, variables, labels):
    """What a model gives for the same samples and these labels: log densities or velocities."""
    model = experiment.build()
    x = 0.5 * np.random.default_rng(2).normal(size=(len(labels), *model.config.event_shape)).astype(np.float32)
    labels = np.array(labels, np.int32)
    if isinstance(experiment, MatchingExperiment):
        t = np.linspace(0.1, 0.9, len(labels)).astype(np.float32)
        return jax.jit(model.apply)(variables, t, x, labels)
    return jax.jit(lambda *given: model.apply(*given, method="log_prob"))(variables, x, labels)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(TAR, id="TARFlow"),
        pytest.param(STAR, id="STARFlow"),
        pytest.param(DIT, id="DiT", marks=pytest.mark.slow),
        pytest.param(
            dataclasses.replace(STAR, class_conditioning="add", conditioned_blocks="all"),
            id="added",
            marks=pytest.mark.slow,
        ),
        pytest.param(dataclasses.replace(VIDEO, denoiser_layers=1), id="STARFlowV", marks=pytest.mark.slow),
        pytest.param(UNET, id="UNet", marks=pytest.mark.slow),
    ],
)
def test_a_model_with_more_classes_is_the_old_one_for_old_classes(model, tmp_path):
    old = experiment_of(dataclasses.replace(model, num_classes=3), classes=OLD)
    variables = perturbed(old)
    path = run_of(tmp_path, old, variables)
    model = dataclasses.replace(model, num_classes=5)
    new = experiment_of(model, classes=NEW, path=path, allow=("classes",))
    made, lines = started(new)
    expected = outputs(old, variables, [0, 1, 2, -1])
    assert_close(outputs(new, made, [*MATCHED, -1]), expected, NETWORK)
    assert np.isfinite(outputs(new, made, [2, 4, 2, 4])).all()
    [mapped] = [line for line in lines if line.startswith("  mapped")]
    assert "3 classes by name, 2 new at the mean" in mapped
    assert any(line.startswith("  taken") for line in lines)
    assert not any(line.startswith(("  new", "  left out")) for line in lines)


def test_a_flow_on_larger_images_is_the_old_one_where_positions_are_equal(tmp_path):
    old = experiment_of(dataclasses.replace(TAR, num_blocks=1))
    variables = perturbed(old)
    table = variables["params"]["blocks_0"]["pos_embed"]
    table[:] = table[:1]
    path = run_of(tmp_path, old, variables)
    new = experiment_of(dataclasses.replace(TAR, num_blocks=1, image_size=(8, 4)), path=path, allow=("size",))
    made, lines = started(new)
    assert_close(made["params"]["blocks_0"]["pos_embed"], np.repeat(table[:1], 8, axis=0), 1e-6)
    assert sum("resampled from 2 x 2 to 4 x 2 tokens" in line for line in lines) == 1
    x = np.random.default_rng(1).normal(size=(2, 8, 4, 1)).astype(np.float32)
    tall, _ = jax.jit(new.build().apply)(made, x)
    short, _ = jax.jit(old.build().apply)(variables, x[:, :4])
    assert_close(tall[:, :4], short, NETWORK)  # a causal block, so the tokens below do not matter
    assert np.isfinite(tall).all()


@pytest.mark.slow
def test_a_tracked_prior_variance_is_resampled_too(tmp_path):
    model = dataclasses.replace(TAR, scale_parameterisation="volume_preserving")
    old = experiment_of(model)
    variables = perturbed(old)
    variables["prior"]["variance"] = np.exp(variables["prior"]["variance"])
    path = run_of(tmp_path, old, variables)
    made, _ = started(experiment_of(dataclasses.replace(model, image_size=8), path=path, allow=("size",)))
    expected = resampled(variables["prior"]["variance"], (2, 2), (4, 4))
    np.testing.assert_array_equal(made["prior"]["variance"], expected)
    assert (expected > 0).all()


def test_what_parameters_mean_is_a_difference_whichever_way_it_changes():
    velocity = MatchingExperiment(name="old", model=DIT)
    loss = dataclasses.replace(velocity.matching.loss, prediction="x1")
    x1 = dataclasses.replace(velocity, matching=dataclasses.replace(velocity.matching, loss=loss))
    pixels = FlowExperiment(name="old", model=STAR)
    latents = dataclasses.replace(pixels, codec=SpaceToDepth(2))
    for old, new in ((velocity, x1), (pixels, latents)):
        assert list(differences(old, new)) == list(differences(new, old)) == ["other"]
        assert differences(old, old) == {}


TEXT = dataclasses.replace(STAR, text_dim=4, text_length=3)
# What changes, which difference allows it, what the message names, and which arrays are new.
CHANGES = {
    "rotary size": (STAR, {"image_size": 8}, "size", "model.image_size: 4 -> 8", set()),
    "velocity size": (DIT, {"image_size": 8}, "size", "model.image_size: 4 -> 8", set()),
    "frames": (VIDEO, {"frames": 3}, "frames", "model.frames: 2 -> 3", set()),
    "longer text": (TEXT, {"text_length": 5}, "text", "model.text_length: 3 -> 5", set()),
    "wider text": (TEXT, {"text_dim": 6}, "text", "model.text_dim: 4 -> 6", {"proj_prefix"}),
    "first classes": (TAR, {"num_classes": 2}, "classes", "model.num_classes: 0 -> 2", {"class_embed"}),
    "activation": (TAR, {"activation": "silu"}, "other", "model.activation: 'gelu' -> 'silu'", set()),
    "other heads": (TAR, {"head_dim": 4}, "other", "model.head_dim: 8 -> 4", set()),
}


@pytest.mark.parametrize("name", rows(CHANGES, ("velocity size", "longer text", "activation", "first classes")))
def test_a_change_is_refused_unless_it_is_allowed(name, tmp_path):
    model, change, allow, told, new_arrays = CHANGES[name]
    fields = {"text": TextConfig("words")} if model.__dict__.get("text_dim") else {}
    old = experiment_of(model, **fields)
    variables = perturbed(old)
    path = run_of(tmp_path, old, variables)
    model = dataclasses.replace(model, **change)
    with pytest.raises(ValueError, match=r"init\.path") as error:
        started(experiment_of(model, path=path, **fields))
    assert told in one_sentence(error)
    assert f"add --init.allow {allow}." in str(error.value)
    made, lines = started(experiment_of(model, path=path, allow=(allow,), **fields))
    before, after = flatten(variables), flatten(made)
    fresh = flatten(perturbed(experiment_of(model, **fields), seed=1))
    for array, value in after.items():
        is_new = not new_arrays.isdisjoint(array.split("/"))
        np.testing.assert_array_equal(value, fresh[array] if is_new else before[array])
    assert any(line.startswith("  new") for line in lines) == bool(new_arrays)


def test_several_differences_are_told_together(tmp_path):
    path = run_of(tmp_path, experiment_of(dataclasses.replace(TAR, num_classes=3), classes=OLD))
    model = dataclasses.replace(TAR, num_classes=5, image_size=8)
    with pytest.raises(ValueError, match=r"init\.path") as error:
        started(experiment_of(model, classes=NEW, path=path))
    for told in ("model.num_classes: 3 -> 5", "data.classes: cat, dog, fox -> fox", "image_size: 4 -> 8"):
        assert told in one_sentence(error)
    assert "--init.allow classes,size." in str(error.value)
    # Classes of other names are other classes, even if there are as many.
    with pytest.raises(ValueError, match=r"\(data.classes: .*--init.allow classes\.$"):
        started(experiment_of(dataclasses.replace(TAR, num_classes=3), classes=OLD[::-1], path=path))


def test_other_parameters_are_refused_by_any_option(tmp_path):
    path = run_of(tmp_path, experiment_of(TAR))
    everything = ("classes", "size", "text", "frames", "other")
    for name, value in {"width": 16, "num_blocks": 3, "patch_size": 1}.items():
        with pytest.raises(ValueError, match=r"no option of --init\.allow") as error:
            started(experiment_of(dataclasses.replace(TAR, **{name: value}), path=path, allow=everything))
        assert f"model.{name}: {getattr(TAR, name)} -> {value}" in one_sentence(error)
        assert "blocks_" in str(error.value)


def test_what_is_no_run_of_this_kind_is_refused(tmp_path):
    run = run_of(tmp_path, experiment_of(TAR))
    with pytest.raises(ValueError, match=r"run of a TARFlow \(FlowExperiment\), but this is a DiT") as error:
        started(experiment_of(DIT, path=run))
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match=r"init.path: .*absent is not a directory"):
        started(experiment_of(TAR, path=tmp_path / "absent"))
    empty = shutil.copytree(run, tmp_path / "empty")
    shutil.rmtree(empty / CHECKPOINTS)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        started(experiment_of(TAR, path=empty))
    damaged = shutil.copytree(run, tmp_path / "damaged")
    file = max((damaged / CHECKPOINTS / "0" / "params").rglob("d/*"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"Checkpoint 0 .* is damaged") as error:
        started(experiment_of(TAR, path=damaged))
    one_sentence(error)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: InitConfig("run", ("colour",)), "allow has the entry 'colour'; choose from classes, size"),
        (lambda: InitConfig(allow=("size",)), r"path is empty; .* --init-from"),
        (
            lambda: AutoencoderExperiment(
                name="own",
                model=flowgen.load_config("autoencoder_digits").model,
                optim=OptimConfig(weight_decay=0.0),
                autoencoding=dataclasses.replace(
                    flowgen.load_config("autoencoder_digits").autoencoding, decoder_of="other"
                ),
                init=InitConfig("run"),
            ),
            r"decoder_of is 'other' and init.path is 'run'",
        ),
    ],
    ids=["unknown", "alone", "two origins"],
)
def test_options_that_contradict_each_other_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
