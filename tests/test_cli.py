"""The commands as a user types them: one tiny run from training to images, scripts, streams and exit codes."""

import contextlib
import dataclasses
import errno
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import Outcome, outcome_of, refused, succeed
from PIL import Image
from published_files import write_safetensors
from reference_weights import Shape, state_dict

from flowgen import checkpoint, experiments
from flowgen.cli import EXIT_MISTAKE, EXIT_NOT_FINITE, main
from flowgen.training import CheckpointReader

PROJECT = Path(__file__).parent.parent
DIGITS = PROJECT / "configs" / "tarflow_digits.py"
STEPS = 8  # of the debug shrink
# Batches of other sizes sum in another order in float32, which can carry a pixel over the edge to the next level.
LEVELS_APART = 1
PUBLISHED = Shape(channels=1, width=64, num_blocks=2, layers_per_block=1)
# The published names tell patch size and noise: here 2, width 64, 2 blocks of 1 layer, 0.1.
PUBLISHED_NAME = "digits_model_2_64_2_1_0.1.safetensors"


@dataclasses.dataclass(frozen=True)
class Trained:
    """A finished run, and what its two commands printed."""

    path: Path
    first: str
    second: Outcome


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """One run of the shrunk digits, stopped half-way and gone on with by the same command."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    words = ("--config", DIGITS, "--workdir", path)
    first = succeed(f"train --debug --train.steps {STEPS // 2}", *words)
    return Trained(path, first, outcome_of("train --debug", *words))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run directory of published weights, and what `convert` printed."""
    folder = tmp_path_factory.mktemp("imported")
    file = write_safetensors(folder / PUBLISHED_NAME, state_dict(PUBLISHED))
    out = succeed("convert --image-size 8 --channels 1", file, "--to", folder / "run")
    return folder / "run", out


# One run, end to end.


def test_training_goes_on_where_it_stopped(trained):
    assert re.fullmatch(
        r"tarflow_digits: [\d,]+ parameters, 4 steps\n"
        r"--debug trains a tiny model .*\n"
        r"(No huge pages, .*\n)?"
        r"Held-out bits_per_dim \d+\.\d{3}, gaussian_bits_per_dim \d+\.\d{3}\.\n"
        rf"Samples: {re.escape(str(trained.path))}/samples/0000004\.png\n",
        trained.first,
    )
    assert trained.second.code == 0
    assert f"Resuming {trained.path} from step 4." in trained.second.err
    assert "step 8: bits_per_dim " in trained.second.err
    assert trained.second.out.splitlines()[-1] == f"Samples: {trained.path}/samples/0000008.png"
    assert CheckpointReader(trained.path / "checkpoints").steps() == [4, 8]
    rows = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "eval/bits_per_dim" in row] == [4, 8]
    assert all(np.isfinite(list(row.values())).all() for row in rows)
    for name in ("0000004.png", "0000008.png"):
        assert read_png(trained.path / "samples" / name).std() > 0
    flow, _, experiment = checkpoint.load(trained.path, "best")
    assert experiment == experiments.load_config(DIGITS).debug().with_provenance()
    assert experiments.from_json(json.loads((trained.path / "config.json").read_text())) == experiment
    assert flow.config == experiment.model


SAMPLES = "sample --num 6 --classes 3,1 --batch 6"
LINE = (
    r"samples (\d+)\.\.(\d+): [\d.]+ per second( \(with compilation\))?; "
    r"passes per block \(data side first\) (\d+), (\d+); residual (\S+?)"
    r"(?:; certified to (\S+) in noise; error in data .*)?"
)


def read_png(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_a_grid_is_written_and_accounted_for(trained, tmp_path):
    lines = succeed("sample --num 12 --batch 6 --out", tmp_path / "grid.png", "--checkpoint", trained.path).splitlines()
    spans = [re.fullmatch(LINE, line).group(1, 2, 3, 4, 5) for line in lines[:-1]]
    # Sequential: one pass for each token but the first.
    assert spans == [("0", "5", " (with compilation)", "15", "15"), ("6", "11", None, "15", "15")]
    assert lines[-1] == f"Wrote {tmp_path / 'grid.png'}"
    image = read_png(tmp_path / "grid.png")
    # One class per column, so 10 columns and 2 rows of 8x8 digits enlarged 8 times, 2 pixels apart.
    assert image.shape == (2 * 66 + 2, 10 * 66 + 2)
    assert image[2:66, 2:66].std() > 10, "the first digit is blank"
    assert [path.name for path in tmp_path.iterdir()] == ["grid.png"]


def test_an_image_depends_on_its_seed_and_number_alone(trained, tmp_path):
    def draw(name, words):
        succeed(f"{SAMPLES} {words} --single {name} --out {name}.npz --checkpoint", trained.path)
        with np.load(f"{name}.npz") as arrays:
            np.testing.assert_array_equal(arrays["labels"], [3, 1, 3, 1, 3, 1])
            assert arrays["images"].shape == (6, 8, 8, 1)
            assert arrays["images"].dtype == np.float32
            assert np.isfinite(arrays["images"]).all()
        files = sorted(Path(name).iterdir())
        assert [file.name for file in files] == [f"{index:06d}.png" for index in range(6)]
        return np.stack([read_png(file) for file in files]).astype(int)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        whole = draw("whole", "--seed 1")
        np.testing.assert_array_equal(draw("again", "--seed 1"), whole)
        assert np.abs(draw("cut", "--seed 1 --batch 4") - whole).max() <= LEVELS_APART
        other = draw("other", "--seed 2")
    assert (np.abs(other - whole).max(axis=(1, 2)) > LEVELS_APART).all(), "every image follows the seed"


def test_jacobi_decoding_gives_the_same_images_and_is_certified(trained, tmp_path):
    def draw(name, words):
        path = tmp_path / name
        lines = succeed(f"{SAMPLES} {words} --checkpoint", trained.path, "--out", path).splitlines()
        assert lines[-1] == f"Wrote {path}"
        with np.load(path) as arrays:
            return arrays["images"], re.fullmatch(LINE, lines[0]).groups()

    sequential, (*_, certificate) = draw("sequential.npz", "--plan sequential")
    assert certificate is None
    tol = 1e-5
    solved, (*_, data_side, noise_side, residual, certificate) = draw(
        "jacobi.npz", f"--plan jacobi --window 5 --tol {tol} --certify --strict"
    )
    # 15 tokens in 3 windows of 5: at least one pass each, at most one per token.
    assert all(3 <= int(passes) <= 15 for passes in (data_side, noise_side))
    assert float(residual) <= tol
    assert float(certificate) <= 100 * tol
    np.testing.assert_allclose(solved, sequential, atol=100 * tol)


@pytest.mark.slow  # beside the step and average that tests/test_checkpoint.py loads
def test_a_step_can_be_chosen(trained, tmp_path):
    def draw(words):
        succeed(f"{SAMPLES} {words} --out", tmp_path / "x.npz", "--checkpoint", trained.path)
        with np.load(tmp_path / "x.npz") as arrays:
            return arrays["images"]

    reader = CheckpointReader(trained.path / "checkpoints")
    scores = {step: reader.meta(step)["metrics"]["bits_per_dim"] for step in reader.steps()}
    best = min(scores, key=scores.get)
    latest = draw("")
    np.testing.assert_array_equal(draw("--step 8"), latest)
    np.testing.assert_array_equal(draw("--step best"), draw(f"--step {best}"))
    assert not np.array_equal(draw("--step 4"), latest)
    assert not np.array_equal(draw("--no-ema"), latest)


def test_evaluate_measures_splits_and_noises(trained):
    sizes = {"eval": 180, "train": 1617, "all": 1797}
    bits, baselines = {}, {}
    for split, noise, words in (
        ("eval", "model", ""),
        ("eval", "uniform", ""),
        ("train", "model", "--batch 180"),
        ("all", "uniform", "--batch 180 --unconditional --seed 1"),
    ):
        out = succeed(f"evaluate --split {split} --noise {noise} {words} --checkpoint", trained.path)
        named = "Gaussian noise of std 0.1" if noise == "model" else "uniform dequantisation"
        whose = "training" if split == "eval" else "same"
        first, gaussian = rf"{sizes[split]} images \({split}\), {named}", f"a Gaussian fitted to the {whose} images"
        wrote = rf"Wrote {trained.path}/evaluations/8-\d{{8}}-\d{{6}}(-\d+)?\.json"
        number = r"(\S+) ± 0\.0\d{3}"
        found = re.fullmatch(rf"{first}\nbits/dim {number}\nbits/dim of {gaussian} {number}\n{wrote}\n", out)
        bits[split, noise], baselines[split, noise] = map(float, found.groups()[:2])
    # The same measure as in training, which prints three digits of it.
    held_out, baseline = map(float, re.findall(r"\d+\.\d{3}", trained.second.out)[:2])
    assert abs(bits["eval", "model"] - held_out) < 1e-3
    assert abs(baselines["eval", "model"] - baseline) < 1e-3
    assert all(0 < value < 12 for value in (*bits.values(), *baselines.values()))
    assert len(set(bits.values())) == len(bits), "every split and noise is another measurement"
    assert len(list((trained.path / "evaluations").glob("8-*.json"))) == 4, "no evaluation overwrites another"


def test_evaluations_are_saved_with_all_that_they_were_made_of(trained, tmp_path):
    out = succeed("evaluate --noise uniform --checkpoint", trained.path, "--out", tmp_path / "a.json")
    assert out.endswith(f"Wrote {tmp_path / 'a.json'}\n")
    record = json.loads((tmp_path / "a.json").read_text())
    bits = record["metrics"]["bits_per_dim"]
    assert (bits["count"], record["step"], record["options"]["seed"], record["files"]) == (180, 8, 0, [])
    assert f"bits/dim {bits['value']:.4f} ± {bits['standard_error']:.4f}\n" in out
    assert record["noise"] == "uniform dequantisation"
    assert record["versions"]["jax"] == jax.__version__
    assert "never overwritten" in refused("evaluate --checkpoint", trained.path, "--out", tmp_path / "a.json")
    assert "must end in .json" in refused("evaluate --checkpoint", trained.path, "--out", tmp_path / "a.txt")


def test_published_weights_become_a_run(imported, tmp_path):
    run, out = imported
    found = re.fullmatch(r"Wrote (\S+): ([\d,]+) parameters; sample with --checkpoint (\S+)\n", out)
    assert found.group(1, 3) == (str(run), str(run))
    dropped = ("var", "attn_mask")
    size = sum(x.size for name, x in state_dict(PUBLISHED).items() if not name.endswith(dropped))
    assert found[2] == f"{size:,}"
    out = succeed("sample --num 2 --out", tmp_path / "x.png", "--checkpoint", run)
    assert out.endswith(f"Wrote {tmp_path / 'x.png'}\n")
    assert read_png(tmp_path / "x.png").shape == (66 + 2, 2 * 66 + 2)
    out = succeed("info --checkpoint", run)
    assert "checkpoints: 0\n" in out
    assert "noise_std 0.1, " in out


def test_info_lists_what_train_takes(trained):
    out = succeed("info --checkpoint", trained.path)
    size = re.search(r"tarflow_digits: ([\d,]+) parameters", trained.first)[1]
    assert out.startswith(f"checkpoints: 4, 8\nparameters: {size}\n")
    assert "\ntrain: steps 8, batch_size 16, " in out
    planned = succeed("info --debug --config", DIGITS, "--optim.lr", "3e-4")
    assert "\noptim: name adamw, options '{}', lr 0.0003, " in planned
    assert "\nmodel: TARFlow, image_size 8, " in planned
    assert len(planned.splitlines()) < 40


def test_info_explains_the_fields_that_it_names():
    out = succeed("info --config", DIGITS, "optim.lr", "--lr", "3e-4", "likelihood", "guidance")
    lines = [line.partition(" ")[0] for line in out.splitlines()]
    likelihood = [f"--likelihood.{name}" for name in ("norm_penalty", "jacobi", "noise_weight", "denoiser")]
    assert lines == ["--optim.lr", *likelihood, "--sampling.guidance"]
    assert "[none, or set its weight, sweeps, blocks]" in out
    assert out.startswith("--optim.lr 0.0003 ")


# Real processes: the scripts, the exit codes, the streams.


def run_python(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.slow  # beside the same command in this process, and the other script
def test_sample_script_writes_a_image(trained, tmp_path):
    result = run_python(PROJECT / "sample.py", "--checkpoint", trained.path, "--num", 2, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("Wrote samples.png\n")
    assert read_png(tmp_path / "samples.png").shape == (68, 134)


MINE = """from flowgen.training import TrainConfig

def config():
    return TrainConfig(batch_size=16.5)
"""


def test_train_script_refuses_in_one_line(tmp_path):
    # In a process of its own, because tests check types where a user's process does not.
    (tmp_path / "mine.py").write_text(MINE)
    result = run_python(PROJECT / "train.py", "--config", "mine.py", "--workdir", "run", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (EXIT_MISTAKE, "")
    assert re.fullmatch(r"flowgen: [^\n]* \(batch_size is 16\.5; it must be an integer\)[^\n]*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_have_their_own_exit_code(monkeypatch, tmp_path):
    def fit(experiment, workdir, **options):
        raise FloatingPointError("Step 3 has loss nan.")

    monkeypatch.setattr("flowgen.experiments.fit", fit)
    outcome = outcome_of("train --debug --config", DIGITS, "--workdir", tmp_path / "run")
    assert (outcome.code, outcome.err) == (EXIT_NOT_FINITE, "flowgen: Step 3 has loss nan.\n")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def fit(experiment, workdir, **options):
        raise TypeError("unsupported operand")

    monkeypatch.setattr("flowgen.experiments.fit", fit)
    with pytest.raises(TypeError, match="unsupported operand"):
        outcome_of("train --debug --config", DIGITS, "--workdir", tmp_path / "run")


# A run in a bucket.


def test_commands_read_a_run_by_its_url(trained, tmp_path, monkeypatch):
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "staging"))
    url, out = f"file://{trained.path}", f"file://{tmp_path}/out/samples.png"
    before = sorted(trained.path.rglob("*"))
    assert succeed(f"info --checkpoint {url}") == succeed(f"info --checkpoint {trained.path}")
    assert succeed(f"sample --num 4 --checkpoint {url} --step best --out {out}").splitlines()[-1] == f"Wrote {out}"
    succeed(f"sample --num 4 --checkpoint {trained.path} --step best --out", tmp_path / "samples.png")
    assert (tmp_path / "out" / "samples.png").read_bytes() == (tmp_path / "samples.png").read_bytes()
    lines = [
        succeed(f"evaluate --checkpoint {place} --out file://{tmp_path}/{name}.json").splitlines()[:-1]
        for name, place in {"remote": url, "local": trained.path}.items()
    ]
    assert lines[0] == lines[1]
    assert json.loads((tmp_path / "remote.json").read_text())["run"] == url
    assert sorted(trained.path.rglob("*")) == before
    assert not list((tmp_path / "staging").iterdir())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("sample --checkpoint file://{run} --single memory://a", "--single is 'memory://a'"),
        ("sample --checkpoint file://{run} --prompts memory://a", "--prompts is 'memory://a'"),
        ("sample --checkpoint file://{run} --step 7", "file://{run} has no checkpoint 7; choose one of 4, 8"),
        ("sample --checkpoint memory://nowhere", "memory://nowhere does not exist"),
        ("sample --checkpoint gs:/run", "lost a slash; write 'gs://run'"),
        ("info --config memory://a.py", "config is 'memory://a.py'"),
        ("encode --config tarflow_digits --out memory://a", "'memory://a'"),
        ("convert memory://a.pth --to {run}/new", "the weight file is 'memory://a.pth'"),
        ("train --config tarflow_digits --debug --workdir nowhere://a", "nowhere://, which fsspec does not know"),
        ("train --config tarflow_digits --debug --workdir memory://a --init-from memory://b", "init.path: "),
    ],
)
def test_urls_that_cannot_be_used_are_refused(trained, words, named):
    assert named.format(run=trained.path) in refused(words.format(run=trained.path))


class _Lost(io.StringIO):
    """A standard output that is gone after its first line."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        if self.getvalue().count("\n"):
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "Standard output could not be written to (No space"),
    ],
    ids=["closed", "full"],
)
def test_files_are_written_even_if_standard_output_is_lost(trained, tmp_path, error, code, told):
    out = tmp_path / "a.npz"
    words = ["sample", "--checkpoint", str(trained.path), "--num", "4", "--batch", "2", "--out", str(out)]
    with contextlib.redirect_stdout(_Lost(error)), contextlib.redirect_stderr(io.StringIO()) as printed:
        assert main(words) == code
    assert told in printed.getvalue()
    with np.load(out) as arrays:
        assert len(arrays["images"]) == 4
    assert "Wrote" in succeed("sample --num 1 --checkpoint", trained.path, "--out", tmp_path / "b.png")
