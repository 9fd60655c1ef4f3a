"""Parts of your own, by value and by name: in configs, flows and runs, and what is refused."""

import dataclasses
import json
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import own_parts as own
import pytest
from laws import apply, perturbed
from tolerances import NETWORK, assert_close

import flowgen
from flowgen import experiments
from flowgen.attention import FeatureMap
from flowgen.cli import main
from flowgen.data import PointsConfig
from flowgen.decoding import Sequential, invert
from flowgen.experiments import FlowExperiment, MatchingExperiment, SolverConfig
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.matching import DiTConfig, GibbsWeights, MatchingConfig, flow_matching_loss
from flowgen.settings import from_plain, override, settings, to_plain
from flowgen.training import LogConfig, TrainConfig

QUIET = LogConfig(log_every=2, checkpoint_every=0, progress=False, tensorboard=False)
FLOW = partial(TARFlowConfig, image_size=4, channels=1, patch_size=2, width=16, head_dim=8, layers_per_block=1)
STAR = partial(STARFlowConfig, image_size=2, channels=2, width=16, head_dim=8, layers_per_block=(1, 1))
POINTS = MatchingExperiment(
    name="own",
    model=own.FieldConfig(),
    data=PointsConfig(),
    matching=MatchingConfig(coupling=own.Ordered(0.5)),
    train=TrainConfig(steps=2, batch_size=8),
    optim=flowgen.load_config("cfm_moons").optim,
    log=QUIET,
    sampling=SolverConfig(num=4, num_steps=2),
)
ITSELF = {"type": "own_parts:Ordered", "share": 0.5}
# Parts by value, and as config.json keeps them.
PARTS = {
    "function": (MatchingConfig(coupling=own.as_drawn), "coupling", "own_parts:as_drawn"),
    "dataclass": (MatchingConfig(coupling=own.Ordered(0.5)), "coupling", ITSELF),
    "cost": (
        MatchingConfig(coupling=GibbsWeights(cost=own.distance)),
        "coupling",
        {**to_plain(GibbsWeights()), "type": "GibbsWeights", "cost": "own_parts:distance"},
    ),
    "feature map": (FLOW(attention=own.softplus_kernel), "attention", "own_parts:softplus_kernel"),
    "feature map without a name": (
        FLOW(attention=FeatureMap(own.softplus, own.softplus)),
        "attention",
        {
            "type": "flowgen.attention.features:FeatureMap",
            **{"query": "own_parts:softplus", "key": "own_parts:softplus"},
            **{"query_scale": None, "rotary": None, "max_length": None},
        },
    ),
    "kernel": (FLOW(attention=own.Scaled(3.0)), "attention", {"type": "own_parts:Scaled", "factor": 3.0}),
    "kernel with a cache": (STAR(attention=own.cached), "attention", "own_parts:cached"),
    "scale": (FLOW(scale_parameterisation=own.bounded), "scale_parameterisation", "own_parts:bounded"),
    "scale of another flow": (STAR(scale_parameterisation=own.bounded), "scale_parameterisation", "own_parts:bounded"),
    "network's attention": (DiTConfig(image_size=8, attention=own.Scaled()), "attention", {"type": "own_parts:Scaled"}),
}


@pytest.mark.parametrize("name", PARTS)
def test_a_config_keeps_the_name_of_a_part(name):
    config, field, kept = PARTS[name]
    plain = json.loads(json.dumps(to_plain(config)))
    assert plain[field] == ({**plain[field], **kept} if isinstance(kept, dict) else kept)
    assert from_plain(type(config), plain) == config


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["--coupling", "own_parts:as_drawn"], {"coupling": own.as_drawn}),
        (["--coupling", "own_parts:Ordered"], {"coupling": own.Ordered()}),
        (["--coupling.share=0.25", "--coupling", "own_parts:Ordered"], {"coupling": own.Ordered(0.25)}),
        (
            ["--coupling", "GibbsWeights", "--coupling.cost", "own_parts:distance"],
            {"coupling": GibbsWeights(cost=own.distance)},
        ),
    ],
)
def test_a_command_names_a_part(words, changes):
    assert override(MatchingConfig(), words) == MatchingConfig(**changes)


def test_fields_of_a_part_given_by_value_are_set_and_listed():
    changed = experiments.override(POINTS, ["--matching.coupling.share", "1", "--model.width=4"])
    assert (changed.matching.coupling, changed.model) == (own.Ordered(1.0), own.FieldConfig(width=4))
    known = {setting.name: setting for setting in settings(changed)}
    assert known["matching.coupling"].value == "own_parts:Ordered"
    assert known["model"].choices.endswith("module:object")
    assert known["model.width"].value == 4


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(FLOW(attention=own.softplus_kernel, scale_parameterisation=own.bounded), marks=pytest.mark.slow),
        pytest.param(FLOW(attention=own.Scaled()), marks=pytest.mark.slow),
        STAR(attention=own.cached, scale_parameterisation=own.bounded),
    ],
    ids=["feature map and scale", "kernel", "cache and scale"],
)
def test_a_flow_of_own_parts_is_exact(config, key):
    flow, params = perturbed(config, key)
    x = jax.random.normal(jax.random.key(1), (3, *config.event_shape))
    z, logdet = apply(flow, params, x)
    decoded = invert(flow, params, z, None, plan=Sequential())
    assert_close(decoded.x, x, NETWORK)

    def flat(x):
        return flow.apply(params, x.reshape(1, *config.event_shape), method="forward")[0].reshape(-1)

    jacobian = jax.jit(jax.vmap(jax.jacobian(flat)))(x.reshape(3, -1))
    assert_close(logdet, jnp.linalg.slogdet(jacobian)[1], NETWORK)
    if config.scale_parameterisation is own.bounded:
        assert np.abs(logdet).max() <= config.num_blocks * x[0].size


def test_a_scale_of_another_shape_is_refused(key):
    with pytest.raises(ValueError, match="scale_parameterisation returned shapes"):
        flowgen.init(FLOW(scale_parameterisation=own.misshapen).build(), key)


def test_a_loss_takes_the_coupling(key):
    batch = {"x1": jax.random.normal(jax.random.key(1), (8, 2)), "cond": jnp.arange(8)}
    loss, _, _ = flow_matching_loss(coupling=own.Ordered())(lambda t, x, cond: -x, batch, key)
    assert np.isfinite(loss)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a network and a coupling of your own."""
    path = tmp_path_factory.mktemp("runs") / "own"
    flowgen.fit(POINTS, path)
    return path


@pytest.fixture
def not_imported(monkeypatch):
    """As in a process that has not imported the user's module."""
    monkeypatch.delitem(sys.modules, "own_parts")


@pytest.mark.slow
def test_a_run_keeps_its_parts(run):
    kept = json.loads((run / "config.json").read_text())
    assert kept["matching"]["coupling"] == ITSELF
    assert kept["model"] == {"type": "own_parts:FieldConfig", "width": 8, "num_classes": 0}
    network, params, experiment = flowgen.load(run)
    assert (network, experiment) == (own.FieldNetwork(own.FieldConfig()), POINTS)
    assert params["params"]["Dense_0"]["kernel"].shape == (3, 8)


@pytest.mark.slow
def test_a_command_goes_on_with_a_run_of_own_parts(tmp_path, capsys):
    words = ["--config", "cfm_moons", "--debug", "--workdir", str(tmp_path), "--model", "own_parts:FieldConfig"]
    words += ["--model.width", "4", "--matching.coupling", "own_parts:Ordered", "--log.tensorboard", "false"]
    assert main(["train", *words, "--steps", "2"]) == 0
    assert main(["train", *words, "--steps", "2"]) == 0
    assert main(["train", *words, "--steps", "2", "--matching.coupling.share", "0.5"]) == 2
    assert "matching.coupling.share: 1.0 -> 0.5" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("not_imported")
def test_reading_a_run_imports_nothing(run):
    with pytest.raises(
        ValueError, match=r"model is 'own_parts:FieldConfig', but own_parts is not imported; .*--import own_parts"
    ):
        flowgen.load(run)
    assert "own_parts" not in sys.modules


@pytest.mark.slow
@pytest.mark.usefixtures("not_imported")
@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--num", "2", "--out", "{}/a.npz"],
        pytest.param(["evaluate", "--samples", "8"], marks=pytest.mark.slow),
        ["info"],
    ],
)
def test_commands_read_a_run_of_an_imported_module(run, tmp_path, words, capsys):
    command = [*(word.format(tmp_path) for word in words), "--checkpoint", str(run)]
    assert main(command) == 2
    assert "--import own_parts" in capsys.readouterr().err
    assert main([*command, "--import", "own_parts"]) == 0


def test_names_in_a_file_import_no_module(tmp_path, monkeypatch):
    (tmp_path / "trap.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)
    plain = POINTS.to_json()
    for coupling in ("trap:object", {"type": "trap:object"}):
        with pytest.raises(ValueError, match=r"matching\.coupling is 'trap:object'"):
            experiments.from_json({**plain, "matching": {**plain["matching"], "coupling": coupling}})


@pytest.mark.parametrize("name", ["os:system", "builtins:eval", "subprocess:run", "pprint:pprint"])
def test_names_in_a_file_are_not_of_python_itself(name):
    plain = POINTS.to_json()
    with pytest.raises(
        ValueError, match=r"matching\.coupling is '.*', which belongs to Python itself; name an object that you define"
    ):
        experiments.from_json({**plain, "matching": {**plain["matching"], "coupling": name}})


def test_names_in_a_file_are_looked_up_without_code():
    plain = POINTS.to_json()
    loaded = set(sys.modules)
    with pytest.raises(ValueError, match=r"but nope does not exist|but signal does not exist"):
        experiments.from_json({**plain, "matching": {**plain["matching"], "coupling": "scipy:signal.nope"}})
    assert not {name for name in set(sys.modules) - loaded if name.startswith("scipy.signal")}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--matching.coupling", "own_part:Ordered"],
            "matching.coupling needs the module own_part, which was not found;",
        ),
        (
            ["--matching.coupling", "own_parts:Orderd"],
            "matching.coupling is 'own_parts:Orderd', but Orderd does not exist;",
        ),
        (
            ["--matching.coupling", "own_parts:"],
            "matching.coupling is 'own_parts:'; write it as package.module:object.",
        ),
        (["--matching.coupling", "own_parts:NUMBER"], "matching.coupling is 3; it must be an Independent or"),
        (
            ["--matching.coupling", "own_parts:Changeable"],
            "matching.coupling is the class own_parts:Changeable; it must be a dataclass",
        ),
        (
            ["--matching.coupling", "own_parts:Ordered", "--matching.coupling.share", "2"],
            "matching.coupling.share is 2.0;",
        ),
        (["--matching.coupling.shore", "1"], "matching.coupling.shore is not a field of this config; did you mean"),
        (["--matching.coupling", "Ordered"], "--matching.coupling is a group, and 'Ordered' is not one of its types;"),
        (["--model", "own_parts:Ordered"], "model is Ordered(share=1.0); it must be a MLPConfig or"),
    ],
)
def test_a_name_that_does_not_fit_is_told(words, sentence):
    with pytest.raises(ValueError, match=r"\w") as error:
        experiments.override(POINTS, words)
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: MatchingConfig(coupling=own.Ordered), "coupling is <class 'own_parts.Ordered'>; it must be"),
        (lambda: MatchingConfig(coupling=own.Changeable()), "coupling is Changeable(share=1.0), which is mutable;"),
        (lambda: FLOW(attention=own.softplus), "attention is <function softplus"),
        (lambda: FLOW(scale_parameterisation="tanh"), "scale_parameterisation is 'tanh'; it must be 'exponential' or"),
        (lambda: dataclasses.replace(POINTS, model=FLOW()), "model is TARFlowConfig("),
        (lambda: dataclasses.replace(POINTS, model=own.ForgetfulConfig()).build(), "model is ForgetfulConfig("),
    ],
)
def test_a_value_that_does_not_fit_is_told(make, sentence):
    with pytest.raises(ValueError, match=r"\w") as error:
        make()
    assert str(error.value).startswith(sentence)


@pytest.mark.slow  # a program that trains
def test_a_part_of_a_notebook_is_trained_and_loaded_there(tmp_path, monkeypatch):
    notebook = vars(sys.modules["__main__"])
    monkeypatch.setitem(notebook, "Cell", None)  # to be removed afterwards
    cell = "import dataclasses, own_parts\n@dataclasses.dataclass(frozen=True)\nclass Cell(own_parts.Ordered): pass"
    exec(cell, notebook)
    experiment = dataclasses.replace(POINTS, matching=MatchingConfig(coupling=notebook["Cell"](0.5)))
    with pytest.warns(UserWarning, match=r"^matching\.coupling is defined in this program .* in a module file"):
        flowgen.fit(experiment, tmp_path)
    assert flowgen.load(tmp_path)[2] == experiment
    monkeypatch.delitem(notebook, "Cell")
    with pytest.raises(ValueError, match=r"matching\.coupling is '__main__:Cell', which the program or notebook that"):
        flowgen.load(tmp_path)


def test_a_part_without_a_name_is_refused_before_the_run(tmp_path):
    matching = MatchingConfig(coupling=lambda key, x0, x1, cond=None: own.as_drawn(key, x0, x1, cond))
    with pytest.raises(
        ValueError, match=r"^matching\.coupling is <function .* which config\.json cannot refer to by name"
    ):
        flowgen.fit(dataclasses.replace(POINTS, matching=matching), tmp_path / "run")
    flow = FlowExperiment(name="own", model=FLOW(attention=FeatureMap(lambda x, n: x**2, own.softplus)))
    with pytest.raises(ValueError, match=r"^model\.attention\.query is <function "):
        flowgen.fit(flow, tmp_path / "run")
    assert not (tmp_path / "run").exists()
