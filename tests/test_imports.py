"""Imports go downward in the order of the levels, and importing attention loads no training library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "flowgen"

# A module may import from lower levels, and in its own package also from its own. The longest matching name counts.
LEVELS = {
    "flowgen.huge_pages": -3,
    "flowgen.packages": -1,
    "flowgen.places": 0,
    "flowgen.simulators": 0,
    "flowgen.printable": -1,
    "flowgen.arrays": -2,
    "flowgen.settings": -2,
    "flowgen.gaussian": -1,
    "flowgen.guidance": -1,
    "flowgen.weights": -1,
    "flowgen.backend": -2,
    "flowgen.counting": -1,
    "flowgen.attention": -1,
    "flowgen.matching.checks": 0,
    "flowgen.matching.conditions": 0,
    "flowgen.matching.paths": 0,
    "flowgen.matching.conversions": 0,
    "flowgen.matching.times": 0,
    "flowgen.matching.toy": 0,
    "flowgen.matching.plans": 0,
    "flowgen.matching.couplings": 0,
    "flowgen.matching.distilled": 0,
    "flowgen.matching.semidiscrete": 0,
    "flowgen.matching.solvers": 0,
    "flowgen.matching.likelihood": 0,
    "flowgen.matching.diagnostics": 0,
    "flowgen.matching.loss": 1,
    "flowgen.matching.bridge": 1,
    "flowgen.matching.mean_flow": 1,
    "flowgen.matching": 2,
    "flowgen.documents": -1,
    "flowgen.safetensors": 0,
    "flowgen.data.media": 0,
    "flowgen.data.inventory": 0,
    "flowgen.nn": 0,
    "flowgen.conditioning": -2,
    "flowgen.batch": -1,
    "flowgen.optimizers": -1,
    "flowgen.transforms": -1,
    "flowgen.rows": 0,
    "flowgen.contexts": 1,
    "flowgen.text": 1,
    "flowgen.flows": 2,
    "flowgen.codecs": 2,
    "flowgen.decoding": 3,
    "flowgen.runs": 3,
    "flowgen.data": 4,
    "flowgen.training": 4,
    "flowgen.evaluation.networks": 4,
    "flowgen.evaluation.inception": 4,
    "flowgen.evaluation.efficientnet": 4,
    "flowgen.evaluation": 5,
    "flowgen.convert": 5,
    "flowgen.experiments": 6,
    "flowgen.checkpoint": 7,
    "flowgen.cards": 7,
    "flowgen.exports": 8,
    "flowgen.hub": 9,
    "flowgen.inference": 4,
    "flowgen.nnx": 4,
    "flowgen.report": 8,
    "flowgen.cli": 9,
    "flowgen.__main__": 10,
}
# The lazy front door names packages without importing them.
FRONT_DOOR = "flowgen"


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def level(name):
    known = [prefix for prefix in LEVELS if name == prefix or name.startswith(prefix + ".")]
    assert known, f"{name} has no level; give it one"
    prefix = max(known, key=len)
    return LEVELS[prefix]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            base = node.module or ""
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)


def test_imports_go_downward():
    for name, path in MODULES.items():
        if name == FRONT_DOOR:
            continue
        mine = level(name)
        for target in imported(path):
            assert not target.startswith(("torch", "configs", "jax._src")), f"{name} imports {target}"
            if target == FRONT_DOOR or not target.startswith("flowgen."):
                continue
            theirs = level(target)
            same_package = name.split(".")[:2] == target.split(".")[:2] and theirs <= mine
            assert same_package or theirs < mine, f"{name} (level {mine}) imports {target} (level {theirs})"


def test_importing_attention_loads_no_training_library():
    code = (
        "import sys, flowgen.attention\n"
        "heavy = {'optax', 'orbax', 'grain', 'torch', 'PIL', 'tensorboardX', 'flowgen.flows'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_public_names_resolve():
    import flowgen

    documented = {"TARFlow", "TARFlowConfig", "init", "Experiment", "attention", "checkpoint", "convert", "decoding"}
    assert documented <= set(dir(flowgen))
    for name in dir(flowgen):
        assert getattr(flowgen, name) is not None or name.startswith("__")
    with pytest.raises(AttributeError, match="no attribute 'TARflow'"):
        _ = flowgen.TARflow
