"""Huge pages: who has them, how a command switches them on, and the form of layers that is compiled with them."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from conftest import rows
from laws import perturbed
from tolerances import NETWORK, assert_trees_close

import flowgen
from flowgen import backend, huge_pages
from flowgen.backend import Host, LayerForm
from flowgen.huge_pages import TUNABLE, VARIABLE, Pages

PROJECT = Path(__file__).parent.parent
LINUX = Pages("Linux", (2, 36), "madvise", None)
# What a process finds: a word of the problem, and whether a restart would solve it.
FOUND = {
    "not asked for": (LINUX, VARIABLE, True),
    "asked for": (LINUX._replace(tunables=TUNABLE), "", False),
    "asked for among others": (LINUX._replace(tunables=f"glibc.malloc.arena_max=1:{TUNABLE}"), "", False),
    "the user's own": (
        LINUX._replace(tunables="glibc.malloc.arena_max=1"),
        f"export {VARIABLE}=glibc.malloc.arena_max=1:{TUNABLE}",
        False,
    ),
    "switched off by the user": (LINUX._replace(tunables=""), VARIABLE, False),
    "always": (LINUX._replace(kernel="always", glibc=None), "", False),
    "never": (LINUX._replace(kernel="never", tunables=TUNABLE), "is never", False),
    "no setting": (LINUX._replace(kernel=""), "is missing", False),
    "old glibc": (LINUX._replace(glibc=(2, 34)), "glibc 2.34 is older than 2.35", False),
    "musl": (LINUX._replace(glibc=None), "not glibc", False),
    "macOS": (Pages("Darwin", None, "", None), "Darwin", False),
    "Windows": (Pages("Windows", None, "", None), "Windows", False),
}


@pytest.mark.parametrize("name", FOUND)
def test_who_has_huge_pages(name):
    pages, problem, switches_on = FOUND[name]
    assert problem in pages.problem()
    assert bool(pages.problem()) == bool(problem)
    assert pages.can_switch_on() == switches_on


GIB = 1 << 30
HUGE = Host("cpu", huge_pages=True, memory=16 * GIB)
LOOP_RECOMPUTE, LOOP_STORE, ONE_BY_ONE = LayerForm(True, False), LayerForm(False, False), LayerForm(False, True)
FORMS = {
    "huge pages": (("auto", 2, GIB), HUGE, ONE_BY_ONE),
    "too large": (("auto", 2, GIB + 1), HUGE, LOOP_RECOMPUTE),
    "many layers": (("auto", 24, 1), HUGE, LOOP_RECOMPUTE),
    "small pages": (("auto", 2, 1), HUGE._replace(huge_pages=False), LOOP_RECOMPUTE),
    "unknown memory": (("auto", 2, 1), HUGE._replace(memory=0), LOOP_RECOMPUTE),
    "several processes": (("auto", 2, 1), HUGE._replace(processes=2), LOOP_RECOMPUTE),
    "accelerator": (("auto", 2, 1), HUGE._replace(platform="gpu"), LOOP_RECOMPUTE),
    "recompute": ((True, 2, 1), HUGE, LOOP_RECOMPUTE),
    "store": ((False, 2, 64 * GIB), HUGE._replace(huge_pages=False), ONE_BY_ONE),
    "store many layers": ((False, 24, 1), HUGE, LOOP_STORE),
    "store on an accelerator": ((False, 2, 1), HUGE._replace(platform="tpu"), LOOP_STORE),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_of_layers(name):
    asked, host, form = FORMS[name]
    assert backend.layer_form(*asked, host) == form


FLOWS = {
    "tarflow": flowgen.TARFlowConfig(
        image_size=4, channels=1, patch_size=2, width=16, num_blocks=2, layers_per_block=2, head_dim=8, num_classes=3
    ),
    "starflow": flowgen.STARFlowConfig(image_size=2, width=32, layers_per_block=(2, 3), head_dim=32, num_classes=3),
}


@pytest.mark.parametrize("name", rows(FLOWS, ("starflow",)))
def test_layers_one_by_one_equal_a_loop(name, key, monkeypatch):
    _, params = perturbed(FLOWS[name], key)
    x = jax.random.normal(jax.random.fold_in(key, 1), (3, *FLOWS[name].image_shape))

    def program(remat, pages):
        monkeypatch.setattr(huge_pages, "why_absent", lambda: "" if pages == "huge" else "no")
        flow = dataclasses.replace(FLOWS[name], remat=remat).build()
        loss = lambda params: -flow.apply(params, x, jnp.array([0, 2, -1]), method="log_prob").mean()  # noqa: E731
        return jax.jit(jax.value_and_grad(loss)).lower(params)

    loop, one_by_one = program("auto", "small"), program("auto", "huge")
    assert "stablehlo.while" in loop.as_text()
    assert "stablehlo.while" not in one_by_one.as_text()
    assert one_by_one.as_text() == program(False, "small").as_text()
    assert loop.as_text() == program(True, "huge").as_text()
    assert_trees_close(one_by_one.compile()(params), loop.compile()(params), NETWORK)


def test_a_run_resumes_in_another_form():
    experiment = flowgen.load_config("tarflow_digits")
    begun = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, remat=True))
    experiment.check_resumable(begun.to_json())
    begun.check_resumable(experiment.to_json())


# Prints one line each time it starts; its own words decide what `restart` is told. A first word "train" is a command.
SCRIPT = """
import os, sys
from flowgen import huge_pages
huge_pages.pages = lambda: huge_pages.Pages("Linux", (2, 36), "madvise", os.environ.get("GLIBC_TUNABLES"))
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), sys.flags.utf8_mode, *sys.argv[1:])
words = sys.argv[2:] if sys.argv[1:2] == ["train"] else sys.argv[1:]
huge_pages.restart([] if words == ["--traced"] and sys.settrace(lambda *_: None) is None else words)
sys.exit(7)
"""
RESTARTS = {  # environment, words, how often the program starts
    "restarts once": ({}, ["--lr", "a b"], 2),
    "keeps the user's": ({VARIABLE: "glibc.malloc.arena_max=1"}, [], 1),
    "keeps an empty text": ({VARIABLE: ""}, [], 1),
    "never twice": ({huge_pages.RESTARTED: "1"}, [], 1),
    "accelerators": ({"JAX_PLATFORMS": "cuda,cpu"}, [], 1),
    "debuggers": ({}, ["--traced"], 1),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux restarts")
@pytest.mark.parametrize("name", RESTARTS)
def test_restart(name, tmp_path, monkeypatch):
    environment, words, starts = RESTARTS[name]
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "mine.py").write_text(SCRIPT)
    command = [sys.executable, "-X", "utf8=1", str(tmp_path / "mine.py"), *words]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line.split(" ", 1) for line in result.stdout.splitlines()]
    values = [str(environment.get(VARIABLE)), TUNABLE][:starts]
    assert [line for _, line in lines] == [" ".join([value, "1", *words]) for value in values]
    assert len({process for process, _ in lines}) == 1
    assert result.returncode == 7


PROGRAMS = {  # how the program is named on the command line, how often it starts
    "a command": (["mine.py", "train"], 2),
    "a command of a module": (["-m", "mine", "train"], 2),
    "a module": (["-m", "mine"], 2),
    "a stream": (["-", "train"], 1),
    "text": (["-c", SCRIPT, "train"], 1),
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux restarts")
@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_that_can_be_read_again_restart(name, tmp_path, monkeypatch):
    program, starts = PROGRAMS[name]
    for variable in (VARIABLE, huge_pages.RESTARTED):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    (tmp_path / "mine.py").write_text(SCRIPT)
    command = [sys.executable, *program, "--lr", "a b"]
    result = subprocess.run(command, cwd=tmp_path, input=SCRIPT, stdout=subprocess.PIPE, text=True, check=False)
    assert result.stdout.count(" --lr a b\n") == starts
    assert result.returncode == 7


def test_programs_with_words_of_their_own_do_not_restart(monkeypatch):
    monkeypatch.setattr(huge_pages, "pages", lambda: LINUX)
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("restarted"))
    monkeypatch.delenv(VARIABLE, raising=False)
    huge_pages.restart(["--config", "of the caller"])


@pytest.mark.parametrize("first", rows(["huge", "small"], rare=["huge", "small"]))
def test_installed_command_resumes_in_another_form(first, tmp_path, monkeypatch):
    """A run in one process; the first half with huge pages, if this machine has them, and the second without."""
    if not huge_pages.pages()._replace(tunables=None).can_switch_on():
        pytest.skip("this machine has no huge pages to switch on")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    command = tmp_path / "flowgen"  # as pip writes it
    command.write_text("import sys\nfrom flowgen.cli import program\nsys.exit(program())\n")
    for pages, steps in ((first, 4), ("small" if first == "huge" else "huge", 8)):
        monkeypatch.setenv(VARIABLE, "") if pages == "small" else monkeypatch.delenv(VARIABLE, raising=False)
        words = ["--debug", "--config", "tarflow_digits", "--workdir", str(tmp_path / "run"), "--steps", str(steps)]
        result = subprocess.run(
            [sys.executable, str(command), "train", *words], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert ("No huge pages" in result.stdout) == (pages == "small")
    assert (tmp_path / "run" / "checkpoints" / "8").is_dir()
