"""Configs check their fields and name them bare; JSON gives them back exactly; a command line sets them by path."""

import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import field
from types import ModuleType
from typing import Annotated, Any, Literal

import jax
import numpy as np
import own_parts
import pytest

from flowgen.settings import (
    FieldError,
    config,
    differences,
    from_plain,
    help_of,
    import_object,
    in_group,
    leaf_names,
    name_of,
    override,
    resolve,
    settings,
    to_plain,
)
from flowgen.settings.ranges import (
    Count,
    Entries,
    Fraction,
    NonNegative,
    OneOf,
    OpenFraction,
    Positive,
    ProperFraction,
    Within,
)
from flowgen.text.bert import BertConfig
from flowgen.text.t5 import T5Config


@config
class Rates:
    """What is learned how fast.

    lr: learning rate; positive.
    min_lr: at the end; at most lr.
    steps: of the run,
    at least 1.
    """

    lr: Positive = 0.1
    min_lr: NonNegative = 0.0
    steps: Count = 10

    def __post_init__(self):
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr is {self.min_lr}, above lr {self.lr}; lower it.")


@config
class CircleConfig:
    """radius: of the circle."""

    radius: Positive = 1.0


@config
class SquareConfig:
    """side: of the square. turned: on its corner."""

    side: Positive
    turned: bool = False


@config
class Scene:
    """A config with a field of every kind."""

    name: str
    shape: CircleConfig | SquareConfig = CircleConfig()
    inset: CircleConfig | SquareConfig | None = None
    rates: Rates = Rates()
    other: Rates | None = None
    size: Count | tuple[Count, Count] = 8
    pair: tuple[int, str] = (1, "a")
    layers: Annotated[tuple[Annotated[int, Within(0, 9)], ...], Entries(1, 3)] = (1,)
    words: tuple[str, ...] = ()
    either: int | float | None = None
    table: dict[str, float] = field(default_factory=dict)
    choice: Literal["on", 2] = "on"
    kernel: Annotated[str, OneOf(("dense", "sparse"))] = "dense"
    cost: Literal["plain"] | Callable[[Any], Any] = "plain"


SCENES = {
    "defaults": Scene("a"),
    "all else": Scene(
        "ü",
        shape=SquareConfig(0.1 + 0.2, turned=True),
        inset=CircleConfig(2.0),
        rates=Rates(1e-3, 1e-20, 3),
        other=Rates(),
        size=(4, 6),
        pair=(3, ""),
        layers=(0, 9),
        words=("b, c", ""),
        either=2.5,
        table={"fid": 2.0000000000000004},
        choice=2,
        kernel="sparse",
    ),
    "an int stays one": Scene("b", either=3),
}


def types_of(plain: Any) -> Any:
    """The nested types of plain values; 1 and 1.0 and True are equal, their types are not."""
    if isinstance(plain, dict):
        return {name: types_of(value) for name, value in plain.items()}
    return [types_of(value) for value in plain] if isinstance(plain, list | tuple) else type(plain)


def value_at(value, path):
    for part in path.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize("name", SCENES)
def test_json_gives_the_same_config(name):
    given = SCENES[name]
    text = json.dumps(to_plain(given), allow_nan=False)
    back = from_plain(Scene, json.loads(text))
    assert back == given
    assert types_of(dataclasses.asdict(back)) == types_of(dataclasses.asdict(given))
    assert json.dumps(to_plain(back), allow_nan=False) == text


def test_fields_left_out_of_json_take_defaults():
    assert from_plain(Scene, {"name": "a", "shape": {"radius": 2}}) == Scene("a", shape=CircleConfig(2.0))


BOUNDS = {
    Positive: ([0.5, 1e300], {0: "positive", -1: "positive"}),
    NonNegative: ([0, 1e300], {-0.5: "0 or more"}),
    Fraction: ([0, 1], {-0.5: "0 or more", 2: "from 0 to 1"}),
    ProperFraction: ([0, 0.5], {-0.5: "0 or more", 1: "below 1"}),
    OpenFraction: ([0.5], {0: "positive", 1: "below 1"}),
    Count: ([1, 2**31 - 1], {0: "at least 1", 2**31: "from 1 to 2147483647"}),
    Annotated[int, Within(most=3)]: ([-9, 3], {4: "at most 3"}),
    Annotated[float, Within(above=1)]: ([1.5], {1: "above 1"}),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("bound", BOUNDS, ids=str)
def test_a_range_names_field_value_and_fix(bound):
    holder = config(type("Holder", (), {"__annotations__": {"value": bound}, "__module__": __name__}))
    fitting, refused = BOUNDS[bound]
    for value in fitting:
        assert holder(value).value == value
    for value, must in refused.items():
        with pytest.raises(FieldError) as error:
            holder(value)
        assert str(error.value) == f"value is {value}; it must be {must}."


REFUSED = {
    "of the wrong type": (lambda: Rates(steps=2.5), "steps is 2.5; it must be an integer."),
    "a truth for a number": (lambda: Rates(steps=True), "steps is True; it must be an integer."),
    "no finite number": (lambda: Rates(lr=float("nan")), "lr is nan, which is not finite; give a finite number."),
    "out of range": (lambda: Rates(lr=-1), "lr is -1; it must be positive."),
    "several": (
        lambda: Rates(lr=-1, steps=0),
        "lr is -1; it must be positive, and steps is 0; it must be at least 1.",
    ),
    "fields that do not fit each other": (lambda: Rates(min_lr=1.0), "min_lr is 1.0, above lr 0.1; lower it."),
    "a huge number": (lambda: Rates(steps=10**5000), "steps is over 10^4983; it must be from 1 to 2147483647."),
    "an entry": (lambda: Scene("a", layers=(1, -2)), "layers has the entry -2; it must be 0 or more."),
    "too many entries": (lambda: Scene("a", layers=(1,) * 4), "layers has 4 entries; it must have 1 to 3."),
    "no entries": (lambda: Scene("a", layers=()), "layers has 0 entries; it must have 1 to 3."),
    "a member of a union": (lambda: Scene("a", size=0), "size is 0; it must be at least 1."),
    "no name of a table": (lambda: Scene("a", kernel="x"), "kernel is 'x'; choose one of dense, sparse."),
    "a tuple": (lambda: Scene("a", pair=(1,)), "pair is (1,); it must be a tuple of 2 integers."),
    "a table": (
        lambda: Scene("a", table={"fid": "low"}),
        "table is {'fid': 'low'}; it must be a dict of numbers by name.",
    ),
    "a choice": (lambda: Scene("a", choice="off"), "choice is 'off'; it must be 'on' or 2."),
    "a function": (lambda: Scene("a", cost=3), "cost is 3; it must be 'plain' or a function."),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("name", REFUSED)
def test_a_config_names_its_bare_field(name):
    make, sentence = REFUSED[name]
    with pytest.raises(FieldError) as error:
        make()
    assert str(error.value) == sentence


@pytest.mark.usefixtures("untyped")
def test_values_are_converted():
    scene = Scene("a", size=np.array([4, 6]).tolist(), layers=[np.int32(2)], either=np.float64(0.5))
    assert (scene.size, scene.layers, scene.either) == ((4, 6), (2,), 0.5)
    assert type(scene.layers[0]) is int
    assert type(Rates(lr=1).lr) is float


def test_who_holds_a_config_puts_its_name_in_front():
    with pytest.raises(FieldError, match=r"^run\.rates\.lr is -1; .* and run\.rates\.steps is 0"), in_group("run"):
        dataclasses.replace(SCENES["defaults"], rates=from_held({"lr": -1, "steps": 0}))


def from_held(plain):
    with in_group("rates"):
        return from_plain(Rates, plain)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"rates": {"stepz": 3}}, "rates.stepz is not a field of this config; did you mean steps?"),
        ({"tabel": {}}, "tabel is not a field of this config; did you mean table?"),
        ({"zzzz": {}}, "zzzz is not a field of this config."),
        ({"rates": {"steps": 0}}, "rates.steps is 0; it must be at least 1."),
        ({"rates": {"min_lr": 2}}, "rates.min_lr is 2.0, above lr 0.1; lower it."),
        ({"rates": {"lr": 0, "steps": "a"}}, "rates.lr is 0; it must be positive, and rates.steps is 'a'; it must be"),
        ({"rates": 3}, "rates is 3; it must be a Rates."),
        ({"shape": 3}, "shape is 3; it must be a CircleConfig or a SquareConfig."),
        ({"shape": {"type": "Square"}}, "shape.side is missing; give it a value."),
        ({"shape": {"type": "Star"}}, "shape.type is 'Star'; choose one of Circle, Square."),
        ({"inset": {}}, "inset.type is None; choose one of Circle, Square."),
    ],
)
def test_json_that_does_not_fit_is_named(change, sentence):
    with pytest.raises(FieldError) as error:
        from_plain(Scene, {"name": "a", **change})
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


SET = [
    (["--rates.steps", "12"], "rates.steps", 12),
    (["--rates.steps", "1e4"], "rates.steps", 10_000),
    (["--rates.steps=1_000"], "rates.steps", 1000),
    (["--rates.lr=3e-4"], "rates.lr", 3e-4),
    (["--rates.lr", "1"], "rates.lr", 1.0),
    (["--name", "12"], "name", "12"),
    (["--name", "none"], "name", "none"),
    (["--name=a=b c"], "name", "a=b c"),
    (["--name="], "name", ""),
    (["--either", "none"], "either", None),
    (["--size", "16"], "size", 16),
    (["--size", "(8, 12)"], "size", (8, 12)),
    (["--size=[8, 12]"], "size", (8, 12)),
    (["--either", "4", "--either=none"], "either", None),
    (["--words", 'cat,"dog, small"'], "words", ("cat", "dog, small")),
    (["--words", "('a,b',)"], "words", ("a,b",)),
    (["--table={'fid': 3}"], "table", {"fid": 3.0}),
    (["--table.fid", "3"], "table", {"fid": 3.0}),
    (["--table.fid", "3", "--table.psnr", "40"], "table", {"fid": 3.0, "psnr": 40.0}),
    (["--choice", "2"], "choice", 2),
    (["--shape.radius", "2"], "shape", CircleConfig(2.0)),
    (["--shape", "Square", "--shape.side=3"], "shape", SquareConfig(3.0)),
    (["--shape.turned=true", "--shape.side=3", "--shape", "Square"], "shape", SquareConfig(3.0, turned=True)),
    (["--inset", "Circle"], "inset", CircleConfig()),
    (["--other.steps", "3"], "other", Rates(steps=3)),
    (["--rates.lr=2", "--rates.min_lr=1"], "rates", Rates(2.0, 1.0)),
]


@pytest.mark.parametrize(("arguments", "path", "value"), SET, ids=lambda part: str(part))
def test_a_command_line_sets_fields(arguments, path, value):
    scene = SCENES["defaults"]
    changed = override(scene, arguments)
    assert value_at(changed, path) == value
    assert type(value_at(changed, path)) is type(value)
    group = path.split(".")[0]
    assert dataclasses.replace(changed, **{group: getattr(scene, group)}) == scene


def test_what_is_not_named_stays_the_same_object():
    scene = Scene("a", cost=len)
    assert override(scene, ["--size", "3"]).cost is len


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rates.lrr", "1"], "rates.lrr is not a field of this config; did you mean rates.lr?"),
        (["--rates.zzzzzzzz", "1"], "rates.zzzzzzzz is not a field of this config; rates has lr, min_lr, steps."),
        (["--lr", "1"], "lr is not a field of this config; did you mean rates.lr?"),
        (["--zzzzzzzz", "1"], "zzzzzzzz is not a field of this config."),
        (["--raets", "Square"], "raets is not a field of this config; did you mean rates?"),
        (["--rates.steps.more", "1"], "rates.steps.more is not a field of this config; did you mean rates.steps?"),
        (["--table.fid", "low"], "table.fid is 'low'; it must be a number."),
        (["--table.fid.worst", "1"], "table.fid.worst is not a field of this config."),
        (["--rates.steps", "many"], "rates.steps is 'many'; it must be an integer."),
        (["--rates.steps="], "rates.steps is ''; it must be an integer."),
        (["--rates.lr", "inf"], "rates.lr is 'inf'; it must be a number."),
        (["--rates.lr", "-1"], "rates.lr is -1; it must be positive."),
        (["--rates.min_lr", "1"], "rates.min_lr is 1.0, above lr 0.1; lower it."),
        (["--size", "(8, 8, 8)"], "size is '(8, 8, 8)'; it must be an integer or a tuple of 2 integers."),
        (["--layers", "x"], "layers is 'x'; it must be a tuple of integers, as in --layers 4,1."),
        (["--layers", "12"], "layers has the entry 12; it must be from 0 to 9."),
        (["--choice", "off"], "choice is 'off'; it must be 'on' or 2."),
        (["--rates.steps"], "--rates.steps has no value; write --rates.steps VALUE."),
        (["--rates.steps", "--name", "1"], "--rates.steps has no value; write --rates.steps VALUE."),
        (["steps=3"], "'steps=3' is not an override; write overrides like --optim.lr 3e-4."),
        (["--"], "'--' is not an override; write overrides like --optim.lr 3e-4."),
        (["--rates", "1"], "--rates is a group; set one of --rates.lr, --rates.min_lr, --rates.steps."),
        (["--rates", "{'lr': 1}"], "--rates is a group; set one of --rates.lr, --rates.min_lr, --rates.steps."),
        (
            ["--shape", "square"],
            "--shape is a group, and 'square' is not one of its types (did you mean Square?); give Circle, Square, "
            "or set one of --shape.radius.",
        ),
        (["--shape", "Square"], "shape.side is missing; give it a value."),
        (
            ["--shape.side", "2"],
            "shape.side is not a field of Circle, the type of shape; Square has it, so add --shape Square.",
        ),
        (
            ["--inset.side", "2"],
            "inset.side is not a field of none, the type of inset; Square has it, so add --inset Square.",
        ),
    ],
)
def test_a_command_line_that_does_not_fit_is_named(arguments, sentence):
    with pytest.raises(ValueError, match=r"\w") as error:
        override(SCENES["defaults"], arguments)
    assert str(error.value) == sentence


def test_differences_name_fields():
    old, new = SCENES["defaults"], override(SCENES["defaults"], ["--rates.steps", "9", "--size=(1, 2)"])
    assert differences(to_plain(old), to_plain(new)) == ["rates.steps: 10 -> 9", "size: 8 -> [1, 2]"]
    assert differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> (absent)", "b: (absent) -> {'c': 2}"]


def test_settings_are_fields_with_value_help_and_choices():
    known = {setting.name: setting for setting in settings(SCENES["all else"])}
    assert known["shape"][1:] == ("Square", "", "Circle or Square", True)
    assert known["inset"].choices == "Circle or Square or none"
    assert known["rates.steps"][1:] == (3, "of the run, at least 1.", "an integer", False)
    assert known["kernel"].choices == "'dense' or 'sparse'"
    assert set(leaf_names(SCENES["all else"])) == {name for name in known if not known[name].is_type}
    assert help_of(Rates)["min_lr"] == "at the end; at most lr."


@pytest.mark.parametrize("cls", [BertConfig, T5Config])
def test_encoders_have_help_for_every_field(cls):
    assert all(help_of(cls).get(field.name, "").endswith(".") for field in dataclasses.fields(cls))


def test_objects_are_found_by_name(monkeypatch):
    elsewhere = ModuleType("elsewhere")  # a module that happens to be imported names what another one defines
    elsewhere.mine = own_parts.softplus_kernel
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    assert resolve("numpy:ndarray.sum").__name__ == "sum"
    assert import_object("own_parts:Ordered").__name__ == "Ordered"
    assert name_of(np.linalg.norm) == "numpy.linalg:norm"
    assert name_of(jax.nn.silu) == "jax.nn:silu"  # defined in a module of jax that may move
    assert name_of(own_parts.softplus_kernel) == "own_parts:softplus_kernel"
    assert name_of(json.dumps) is None
    assert name_of(lambda: None) is None


def test_only_imported_modules_have_objects(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ValueError, match="colorsys is not imported"):
        resolve("colorsys:rgb_to_hsv")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("json", "is 'json'; write it as package.module:object."),
        ("json:", "is 'json:'; write it as package.module:object."),
        ("a b:c", "is 'a b:c'; write it as package.module:object."),
        ("no_such_module.part:c", "needs the module no_such_module, which was not found;"),
        ("json.nothing:c", "needs the module json.nothing, which was not found;"),
        ("json:dumps", "is 'json:dumps', which belongs to Python itself; name an object that you define."),
        ("numpy:ndarrey", "is 'numpy:ndarrey', but ndarrey does not exist; did you mean ndarray?"),
    ],
)
def test_names_that_lead_nowhere_are_told(name, sentence):
    with pytest.raises(ValueError, match=r"\w") as error:
        import_object(name)
    assert str(error.value).startswith(sentence)
