"""The pages of the site are all in its navigation, link to what exists, and document every public name."""

import ast
import importlib
import pkgutil
import re
import types
from pathlib import Path

import jax
import pytest
import yaml

import flowgen
from flowgen.decoding.request import DecodeResult
from flowgen.experiments.video_flow import PSNR_METRICS
from flowgen.runs.metrics import SPEED

PROJECT = Path(__file__).parent.parent
DOCS = PROJECT / "docs"
PAGES = [PROJECT / "README.md", PROJECT / "benchmarks" / "README.md", *sorted(DOCS.rglob("*.md"))]
LINK = re.compile(r"(?<!`)!?\[[^\]\[]*(?:!\[[^\]]*\]\([^)]*\))?[^\]\[]*\]\(([^)\s]+)[^)]*\)")
CODE = re.compile(r"^( *)```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
API = "\n".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
DOCUMENTED = set(re.findall(r"^::: (\S+)$", API, re.MULTILINE))  # modules


def navigated(entry):
    """The files that an entry of the navigation names."""
    match entry:
        case str():
            return [entry]
        case dict():
            return [name for below in entry.values() for name in navigated(below)]
        case _:
            return [name for below in entry for name in navigated(below)]


def anchors(page):
    """The anchors of a page's headings, as the site and GitHub form them."""
    headings = re.findall(r"^#+ (.+)$", CODE.sub(lambda found: found[0].strip("`"), page.read_text()), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_navigation_names_every_page_once():
    names = navigated(yaml.safe_load((PROJECT / "mkdocs.yml").read_text())["nav"])
    assert sorted(names) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(CODE.sub("", page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def public_packages():
    """The packages of flowgen that list their public names."""
    names = [module.name for module in pkgutil.iter_modules(flowgen.__path__) if module.ispkg]
    packages = [importlib.import_module(f"flowgen.{name}") for name in names]
    return [package for package in packages if hasattr(package, "__all__")]


@pytest.mark.parametrize("package", public_packages(), ids=lambda package: package.__name__)
def test_every_public_name_is_on_a_page_of_the_api(package):
    documented = [importlib.import_module(name) for name in sorted(DOCUMENTED)]
    for name in package.__all__:
        value = getattr(package, name)
        home = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
        constant = [module for module in documented if getattr(module, name, None) is value]
        assert home in DOCUMENTED or home == "typing" or constant, f"{package.__name__}.{name} of {home}"


def test_pages_of_the_api_name_modules_that_exist():
    assert len(DOCUMENTED) > 90
    for name in DOCUMENTED:
        importlib.import_module(name)


def test_pages_of_fields_and_numbers_are_as_the_code_says(monkeypatch):
    monkeypatch.syspath_prepend(DOCS / "scripts")
    reference = importlib.import_module("reference")
    for name, page in reference.PAGES.items():
        assert (DOCS / name).read_text() == page(), f"run python docs/scripts/reference.py, which writes docs/{name}"


# One of each kind of model and loss.
KINDS = (
    *("tarflow_digits", "starflow_digits", "starflow_v_bouncing", "autoencoder_digits"),
    *("two_moons", "cfm_moons", "meanflow_digits"),
)


def names_in_functions(package, functions):
    """The keys of the dicts that functions with these names return or fill, read from the source of a package."""
    for path in sorted(Path(package.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name in functions:
                keys = [key for part in ast.walk(node) if isinstance(part, ast.Dict) for key in part.keys]
                keys += [part.slice for part in ast.walk(node) if isinstance(part, ast.Subscript)]
                yield from (key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str))


def printed_names():
    """The names of metrics that training, evaluation and decoding report."""
    names = {"loss", "lr", "grad_norm", "skipped", "skipped_in_a_row", *SPEED, *DecodeResult._fields} - {"x"}
    for kind in KINDS:
        experiment = flowgen.load_config(kind).debug()
        rehearsal = experiment.rehearsal(experiment.build(), 4)
        variables = jax.eval_shape(rehearsal.init, jax.random.key(0))
        names |= set(jax.eval_shape(rehearsal.objective, variables, rehearsal.batch, jax.random.key(0))[1])
    names |= set(names_in_functions(importlib.import_module("flowgen.evaluation"), ("point_metrics",)))
    names |= set(names_in_functions(flowgen.experiments, ("evaluated", "sample_metrics", "_distances", "_fit_of_z")))
    names |= set(PSNR_METRICS.values())
    names |= {name for path in (PROJECT / "configs").glob("*.py") for name in flowgen.load_config(path).reference}
    return names


def test_the_glossary_explains_every_name_that_is_printed():
    names = printed_names()
    assert {"bits_per_dim", "nats_per_dim", "ess", "signed_npe", "error_estimate"} <= names
    assert {"frechet", "kernel", "z_square", "psnr_score"} <= names
    explained = set(re.findall(r"`([\w/]+)`", (DOCS / "glossary.md").read_text()))
    assert "jacobi_error/0" in explained  # an option that no config sets
    assert {name for name in names if not name.startswith("mean_square/")} <= explained
