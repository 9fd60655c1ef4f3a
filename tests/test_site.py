"""The pages of the site are all in its navigation, link to what exists, and document every public name."""

import importlib
import pkgutil
import re
import types
from pathlib import Path

import pytest
import yaml

import flowgen

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
