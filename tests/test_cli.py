"""The commands as a user types them: one tiny run from training to images, and every mistake in one sentence."""

import dataclasses
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import zlib
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from published_files import write_safetensors

from flowgen.cli import EXIT_MISTAKE, EXIT_NOT_FINITE, main
from flowgen.runs import read_config, write_config
from flowgen.training import CheckpointReader

PROJECT = Path(__file__).parent.parent
DIGITS = PROJECT / "configs" / "tarflow_digits.py"
STEPS = 8  # of the debug shrink
# Batches of other sizes sum in another order in float32, which can carry a pixel over the edge to the next level.
LEVELS_APART = 1
# The published names tell patch size and noise: here 2, width 32, 2 blocks of 1 layer, 0.1.
PUBLISHED_NAME = "digits_model_2_32_2_1_0.1.safetensors"


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def flowgen(command, *words):
    """Runs a command line in this process; words are added as they are, for paths with spaces."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*shlex.split(command), *map(str, words)])
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(command, *words):
    """The standard output of a command that must succeed."""
    outcome = flowgen(command, *words)
    assert outcome.code == 0, outcome
    return outcome.out


def published_state_dict(*, tokens=16, token_dim=4, width=32, blocks=2, seed=0):
    """The names and shapes of a published unconditional model of one layer per block, small random numbers."""
    shapes = {}
    for block in (f"blocks.{index}" for index in range(blocks)):
        layer = f"{block}.attn_blocks.0"
        shapes[f"{block}.pos_embed"] = (tokens, width)
        for name, inputs, outputs in (
            (f"{block}.proj_in", token_dim, width),
            (f"{layer}.attention.qkv", width, 3 * width),
            (f"{layer}.attention.proj", width, width),
            (f"{layer}.mlp.main.0", width, 4 * width),
            (f"{layer}.mlp.main.2", 4 * width, width),
            (f"{block}.proj_out", width, 2 * token_dim),
        ):
            shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
        for name in (f"{layer}.attention.norm", f"{layer}.mlp.norm"):
            shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    rng = np.random.default_rng(seed)
    weights = {name: rng.normal(scale=0.1, size=shape).astype(np.float32) for name, shape in shapes.items()}
    masks = {f"blocks.{index}.attn_mask": np.tri(tokens, dtype=np.float32) for index in range(blocks)}
    return {"var": np.ones((tokens, token_dim), np.float32), **masks, **weights}


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
    return Trained(path, first, flowgen("train --debug", *words))


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A run directory of published weights, and what `convert` printed."""
    folder = tmp_path_factory.mktemp("imported")
    file = write_safetensors(folder / PUBLISHED_NAME, published_state_dict())
    out = succeed("convert --image-size 8 --channels 1", file, "--to", folder / "run")
    return folder / "run", out


# One run, end to end.


def test_training_goes_on_where_it_stopped(trained):
    assert re.fullmatch(
        r"tarflow_digits: [\d,]+ parameters, 4 steps\n"
        r"--debug: a tiny model, .*\n"
        r"Held-out bits_per_dim \d+\.\d{3}, gaussian_bits_per_dim \d+\.\d{3}\.\n"
        rf"Samples: {re.escape(str(trained.path))}/samples/0000004\.png\n",
        trained.first,
    )
    assert trained.second.code == 0
    assert f"Resuming {trained.path} from step 4." in trained.second.err
    assert trained.second.out.splitlines()[-1] == f"Samples: {trained.path}/samples/0000008.png"
    assert CheckpointReader(trained.path / "checkpoints").steps() == [4, 8]
    rows = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    assert sorted({row["step"] for row in rows}) == [2, 4, 6, 8]
    assert json.loads((trained.path / "config.json").read_text())["train"]["steps"] == STEPS


SAMPLES = "sample --num 6 --classes 3,1 --batch 6"
LINE = (
    r"samples (\d+)\.\.(\d+): [\d.]+ per second( \(with compilation\))?; "
    r"passes per block \(data side first\) (\d+), (\d+); residual (\S+?)(?:; certified to (\S+))?"
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
        "jacobi.npz", f"--plan jacobi --window 5 --tol {tol} --certify"
    )
    # 15 tokens in 3 windows of 5: at least one pass each, at most one per token.
    assert all(3 <= int(passes) <= 15 for passes in (data_side, noise_side))
    assert float(residual) <= tol
    assert float(certificate) <= 100 * tol
    np.testing.assert_allclose(solved, sequential, atol=100 * tol)


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
        found = re.fullmatch(
            rf"{sizes[split]} images \({split}\), {named}\nbits/dim (\S+)\nbits/dim of a Gaussian fit (\S+)\n", out
        )
        bits[split, noise], baselines[split, noise] = map(float, found.groups())
    # The same measure as in training, which prints three digits of it.
    held_out, baseline = map(float, re.findall(r"\d+\.\d{3}", trained.second.out)[:2])
    assert abs(bits["eval", "model"] - held_out) < 1e-3
    assert abs(baselines["eval", "model"] - baseline) < 1e-3
    assert all(0 < value < 12 for value in (*bits.values(), *baselines.values()))
    assert len(set(bits.values())) == len(bits), "every split and noise is another measurement"


def test_published_weights_become_a_run(imported, tmp_path):
    run, out = imported
    found = re.fullmatch(r"Wrote (\S+): ([\d,]+) parameters; sample with --checkpoint (\S+)\n", out)
    assert found.group(1, 3) == (str(run), str(run))
    dropped = ("var", "attn_mask")
    size = sum(x.size for name, x in published_state_dict().items() if not name.endswith(dropped))
    assert found[2] == f"{size:,}"
    out = succeed("sample --num 2 --out", tmp_path / "x.png", "--checkpoint", run)
    assert out.endswith(f"Wrote {tmp_path / 'x.png'}\n")
    assert read_png(tmp_path / "x.png").shape == (66 + 2, 2 * 66 + 2)
    out = succeed("info --checkpoint", run)
    assert "checkpoints: 0\n" in out
    assert "--model.noise_std 0.1 " in out


def test_info_lists_what_train_takes(trained):
    out = succeed("info --checkpoint", trained.path)
    size = re.search(r"tarflow_digits: ([\d,]+) parameters", trained.first)[1]
    assert out.startswith(f"checkpoints: 4, 8\nparameters: {size}\n")
    assert "--train.batch_size 16 " in out
    planned = succeed("info --debug --config", DIGITS, "--optim.lr", "3e-4")
    assert "--optim.lr 0.0003 " in planned
    assert re.search(r"^--model TARFlow [^\n]+\n--model\.image_size", planned, re.MULTILINE)
    fields = re.compile(r"^--\S+", re.MULTILINE)
    assert fields.findall(planned) == fields.findall(out)


# Real processes: the scripts, the exit codes, the streams.


def run_python(*words, cwd):
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_sample_script_writes_a_image(trained, tmp_path):
    result = run_python(PROJECT / "sample.py", "--checkpoint", trained.path, "--num", 2, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("Wrote samples.png\n")
    assert read_png(tmp_path / "samples.png").shape == (68, 134)


def test_train_script_refuses_in_one_line(tmp_path):
    # In a process of its own, because tests check types where a user's process does not.
    (tmp_path / "mine.py").write_text(TINY.format(model="", train="batch_size=16.5"))
    result = run_python(PROJECT / "train.py", "--config", "mine.py", "--workdir", "run", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (EXIT_MISTAKE, "")
    assert re.fullmatch(r"flowgen: [^\n]* \(batch_size is 16\.5; it must be an integer\)[^\n]*\n", result.stderr)
    assert not (tmp_path / "run").exists()


def test_numbers_that_are_not_finite_have_their_own_exit_code(monkeypatch, tmp_path):
    def fit(experiment, workdir, signals):
        raise FloatingPointError("Step 3 has loss nan.")

    monkeypatch.setattr("flowgen.experiments.fit", fit)
    outcome = flowgen("train --debug --config", DIGITS, "--workdir", tmp_path / "run")
    assert (outcome.code, outcome.err) == (EXIT_NOT_FINITE, "flowgen: Step 3 has loss nan.\n")


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch, tmp_path):
    def fit(experiment, workdir, signals):
        raise TypeError("unsupported operand")

    monkeypatch.setattr("flowgen.experiments.fit", fit)
    with pytest.raises(TypeError, match="unsupported operand"):
        flowgen("train --debug --config", DIGITS, "--workdir", tmp_path / "run")


# Mistakes. All are made in one folder, of which nothing may change.

TINY = """from flowgen.experiments import FlowExperiment
from flowgen.flows import TARFlowConfig
from flowgen.training import TrainConfig

def config():
    model = TARFlowConfig(image_size=8, channels=1, patch_size=2, num_classes=10, {model})
    return FlowExperiment(name="mine", model=model, train=TrainConfig({train}))
"""


class Intruder:
    """Pickled, it would create a file when it is loaded."""

    def __reduce__(self):
        return open, ("intruder", "w")


def flip_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def change_config(run, group, **values):
    config = read_config(run)
    config[group] |= values
    write_config(run, config)


@pytest.fixture(scope="module")
def museum(trained, imported, tmp_path_factory):
    """A folder with a good run, and everything that a user could give by mistake."""
    root = tmp_path_factory.mktemp("museum")
    (root / "file.txt").write_text("mine\n")
    (root / "out.png").write_bytes(b"mine")
    (root / "out.npz").write_bytes(b"mine")
    (root / "empty").mkdir()
    (root / "mine").mkdir()
    (root / "mine" / "letter.txt").write_text("mine\n")
    make_configs(root)
    make_runs(root, trained.path, imported[0])
    make_photos(root)
    make_weights(root)
    return root, contents(root)


def make_configs(root):
    for name, text in {
        "tiny": TINY.format(model="", train=""),
        "nothing": "answer = 42\n",
        "text": "def config():\n    return 'digits'\n",
        "raises": "def config():\n    raise RuntimeError('no cluster')\n",
        "syntax": "def config(:\n",
        "name": "def config():\n    return FlowExperiment(name='mine')\n",
        "import": "import not_installed_anywhere\n",
        "argument": TINY.format(model="widht=64", train=""),
        "value": TINY.format(model="width=0", train=""),
        "group": TINY.format(model="", train="").replace("train=TrainConfig()", "data='digits'"),
    }.items():
        (root / f"{name}.py").write_text(text)


def make_runs(root, trained, imported):
    shutil.copytree(trained, root / "run")
    shutil.copytree(imported, root / "classless")
    for name in ("flipped", "flipped_meta", "truncated", "other_model", "begun", "not_json", "unknown_field", "alien"):
        shutil.copytree(trained, root / name)
    data = max((root / "flipped" / "checkpoints" / "8" / "ema").rglob("d/*"), key=lambda file: file.stat().st_size)
    flip_byte(data)
    flip_byte(root / "flipped_meta" / "checkpoints" / "8" / "meta.json")
    (root / "truncated" / "checkpoints" / "8" / "ema" / "_METADATA").write_bytes(b"")
    change_config(root / "other_model", "model", width=64)
    change_config(root / "unknown_field", "model", depth=3)
    change_config(root / "alien", "model", type="GLOW")
    shutil.rmtree(root / "begun" / "checkpoints")
    (root / "not_json" / "config.json").write_text("{")


def make_photos(root):
    for folder in ("good/zero", "corrupt/zero", "no_images/zero", "flat", "mixed/zero"):
        (root / "photos" / folder).mkdir(parents=True)
    grey = Image.new("L", (8, 8), 128)
    for name in ("good/zero/a", "good/zero/b", "corrupt/zero/a", "flat/a", "flat/b", "mixed/a", "mixed/zero/a"):
        grey.save(root / "photos" / f"{name}.png")
    (root / "photos" / "corrupt" / "zero" / "b.png").write_bytes(b"not an image")
    (root / "photos" / "no_images" / "zero" / "notes.txt").write_text("mine\n")
    images, labels = np.zeros((20, 8, 8), np.uint8), np.zeros(20, np.int64)
    for name, arrays in {
        "float": {"images": images / 255, "labels": labels},
        "small": {"images": images[:, :6], "labels": labels},
        "colour": {"images": images[..., None].repeat(3, -1), "labels": labels},
        "axes": {"images": images[0], "labels": labels},
        "labels": {"images": images, "labels": labels / 2},
        "many": {"images": images, "labels": labels + 10},
        "unnamed": {"photos": images},
        "unlabelled": {"images": images},
    }.items():
        np.savez(root / "photos" / f"{name}.npz", **arrays)
    (root / "photos" / "text.npz").write_text("mine\n")


def make_weights(root):
    weights = published_state_dict()
    folder = root / "weights"
    folder.mkdir()
    good = write_safetensors(folder / PUBLISHED_NAME, weights)
    shutil.copy(good, folder / "unnamed.safetensors")
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    (folder / "intruder.pth").write_bytes(pickle.dumps(Intruder(), protocol=2))
    (folder / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    for name, changed in {
        "starflow": {**weights, "blocks.0.sos_embed": np.zeros(3, np.float32)},
        "linear": {"weight": np.zeros((2, 2), np.float32)},
        "incomplete": {k: x for k, x in weights.items() if k != "blocks.1.proj_in.bias"},
        "extra": {**weights, "blocks.0.gate": np.zeros(3, np.float32)},
        "nan": {**weights, "blocks.0.proj_in.bias": np.full(32, np.nan, np.float32)},
    }.items():
        write_safetensors(folder / f"{name}.safetensors", changed)


def contents(root):
    return {path: path.is_file() and zlib.crc32(path.read_bytes()) for path in root.rglob("*")}


TRAIN = "train --debug --workdir new --config tiny.py"
SAMPLE = "sample --out out.png --checkpoint"
CONVERT = f"convert weights/{PUBLISHED_NAME} --image-size 8 --channels 1"
FROM = "convert --to new --image-size 8 --channels 1 --patch-size 2 --noise-std 0.1 weights"
MISTAKES = {
    # Command lines.
    "": r"arguments are required: COMMAND; see python -m flowgen --help",
    "trian": r"COMMAND: invalid choice: 'trian' \(choose from '?train",
    "train --workdir new": r"arguments are required: --config; see",
    "sample": r"arguments are required: --checkpoint; see",
    "convert --to new": r"arguments are required: file; see",
    "info": r"One of the arguments --config --checkpoint is required; see",
    "info --config tiny.py --checkpoint run": r"--checkpoint: not allowed with argument --config",
    "info --checkpoint run --debug": r"--debug is not an option of info --checkpoint",
    "info --checkpoint run --optim.lr 1": r"--optim\.lr is not an option of info --checkpoint",
    f"{SAMPLE} run --number 3": r"--number is not an option .* did you mean --num\?",
    "evaluate --checkpoint run --split test": r"split is 'test'; it must be 'train' or 'eval' or 'all'",
    # Overrides.
    f"{TRAIN} --optim.learning_rate 1": r"optim\.learning_rate is not a field of this config",
    f"{TRAIN} --optim.warmup_step 1": r"optim\.warmup_step is not a field .* did you mean optim\.warmup_steps\?",
    f"{TRAIN} --model.lr 1e-3": r"model\.lr is not a field .* did you mean optim\.lr\?",
    f"{TRAIN} --model 3": r"--model is a group, and '3' is not one of its types; "
    r"name its type, TARFlow, .*, or set one of --model\.image_size",
    f"{TRAIN} --train.steps many": r"train\.steps is 'many'; it must be an integer",
    f"{TRAIN} --train.steps 2.5": r"train\.steps is '2\.5'; it must be an integer",
    f"{TRAIN} --data.flip 3": r"data\.flip is '3'; it must be true or false",
    f"{TRAIN} --optim.lr nan": r"optim\.lr is 'nan'; it must be a number",
    f"{TRAIN} --optim.lr -1": r"optim\.lr is -1; it must be positive",
    f"{TRAIN} --train.steps": r"--train\.steps has no value; write --train\.steps VALUE",
    f"{TRAIN} --train.steps --data.flip true": r"--train\.steps has no value",
    f"{TRAIN} steps 3": r"'steps' is not understood; set fields as in --",
    f"{TRAIN} --model.image_size 9": r"model\.image_size has height 9 and width 9, which patch_size 2 does not",
    f"{TRAIN} --model.image_size '(8, 9)'": r"model\.image_size has width 9, which patch_size 2 does not divide",
    f"{TRAIN} --model.patch_size 8": r"model\.patch_size is 8, which makes the image one token; use a smaller",
    f"{TRAIN} --model.num_classes -1": r"model\.num_classes is -1; it must be 0",
    f"{TRAIN} --model.activation relu6": r"model\.activation is 'relu6'",
    f"{TRAIN} --train.batch_size 0": r"train\.batch_size is 0; it must be at least 1",
    f"{TRAIN} --train.batch_size 6": r"train\.batch_size is 6; it must be a multiple of 4 devices",
    f"{TRAIN} --train.accumulation 3": r"train\.batch_size is 16; it must be a multiple of 4 devices .* = 12",
    f"{TRAIN} --optim.warmup_steps 8": r"optim\.warmup_steps is 8; it must be below train\.steps, which is 8",
    f"{TRAIN} --train.seed -1": r"train\.seed is -1; it must be 0 or more",
    f"{TRAIN} --sampling.num 0": r"sampling\.num is 0; it must be at least 1",
    f"{TRAIN} --data.eval_fraction 1": r"data\.eval_fraction is 1; it must be below 1",
    # Config files.
    "train --workdir new --config none.py": r"config none\.py does not exist",
    "train --workdir new --config empty": r"config empty does not exist",
    "train --workdir new --config tarflow_digit": r"config tarflow_digit does not exist; did you mean \S*tarflow_d",
    f"{TRAIN} --number 3": r"--number is not an option .* did you mean --num\?",
    f"{SAMPLE} run --method heun": r"--method is not an option .* for a TARFlow",
    f"{SAMPLE} run --frames 3": r"--frames is not an option .* for a TARFlow",
    f"{SAMPLE} run --autoencoder mine": r"--autoencoder is not an option .* for a TARFlow",
    f"{SAMPLE} run --zzzzzzzz 1": r"it takes options --seed, .* and --sampling\.\*\.$",
    "evaluate --checkpoint run --samples 1": r"samples is 1",
    "train --workdir new --config nothing.py": r"config nothing\.py must define config\(\) that returns an exper",
    "train --workdir new --config text.py": r"config text\.py must define config\(\) that returns an experiment: Fl",
    "train --workdir new --config raises.py": r"config raises\.py fails on line 2 \(RuntimeError: no cluster\); corr",
    "train --workdir new --config syntax.py": r"config syntax\.py fails on line 1 \(SyntaxError: invalid syntax",
    "train --workdir new --config name.py": r"config name\.py fails on line 2 \(NameError: name 'FlowExperiment' is",
    "train --workdir new --config import.py": r"config import\.py fails on line 1 \(ModuleNotFoundError: .*'not_inst",
    "train --workdir new --config argument.py": r"config argument\.py fails on line 6 \(TypeError: .*'widht'\); corr",
    "train --workdir new --config value.py": r"config value\.py fails on line 6 \(width is 0; it must be at lea",
    "info --config value.py": r"config value\.py fails on line 6 \(width is 0; it must be at least 1\); correct",
    # Data.
    f"{TRAIN} --data.name emoji": r"data\.name is 'emoji'; choose one of digits,",
    f"{TRAIN} --data.on_corrupt ignore": r"data\.on_corrupt is 'ignore'; it must be 'refuse' or 'skip'",
    f"{TRAIN} --data.path photos": r"data\.path is 'photos' but data\.name 'digits' reads no path",
    f"{TRAIN} --data.name folder": r"data\.path is empty; data\.name 'folder' needs the path",
    f"{TRAIN} --data.name folder --data.path none": r"data\.path 'none' does not exist; give the folder",
    f"{TRAIN} --data.name folder --data.path file.txt": r"data\.path 'file\.txt' is a file; give the folder",
    f"{TRAIN} --data.name folder --data.path empty": r"data\.path 'empty' has no images; put \.png",
    f"{TRAIN} --data.name folder --data.path photos/no_images": r"has no images; put \.png",
    f"{TRAIN} --data.name folder --data.path photos/mixed": r"has images both directly \(such as 'a\.png'\)",
    f"{TRAIN} --data.name folder --data.path photos/flat": r"the data carries no labels; .* model\.num_classes",
    f"{TRAIN} --data.name folder --data.path photos/corrupt --model.num_classes 1": r"1 image .*/b\.png' \(not",
    f"{TRAIN} --data.name folder --data.path photos/good --model.channels 2": r"model\.channels is 2; .* 1 \(grey",
    f"{TRAIN} --data.name npz --data.path none.npz": r"data\.path 'none\.npz' is not a file; give the path of an \.npz",
    f"{TRAIN} --data.name npz --data.path photos/text.npz": r"is not a readable \.npz file of plain arrays",
    f"{TRAIN} --data.name npz --data.path photos/unnamed.npz": r"\['photos'\] but no 'images'; save it with",
    f"{TRAIN} --data.name npz --data.path photos/float.npz": r"'images' .* is float64; save uint8 levels",
    f"{TRAIN} --data.name npz --data.path photos/axes.npz": r"'images' .* has shape \(8, 8\); save at least",
    f"{TRAIN} --data.name npz --data.path photos/small.npz": r"is 6x8 but model\.image_size is 8x8; resize",
    f"{TRAIN} --data.name npz --data.path photos/colour.npz": r"channels is 1 but .* of 3 channels; set model\.cha",
    f"{TRAIN} --data.name npz --data.path photos/labels.npz": r"'labels' .* is float64 .*; save integers",
    f"{TRAIN} --data.name npz --data.path photos/many.npz": r"num_classes is 10 but the data has 11 classes; set",
    f"{TRAIN} --data.name npz --data.path photos/unlabelled.npz": r"the data carries no labels; .* model\.num_cl",
    # Run directories to write.
    "train --debug --config tiny.py --workdir mine": r"workdir mine holds files, but no flowgen run; give a new",
    "train --debug --config tiny.py --workdir file.txt": r"workdir file\.txt holds files, but no flowgen run",
    "train --debug --config tiny.py --workdir file.txt/a": r"workdir file\.txt/a cannot be written to \(Not a dir",
    f"train --debug --config {DIGITS} --workdir run --model.width 64 --optim.lr 0.1": (
        r"the run was begun with another config \(model\.width: 32 -> 64; optim\.lr: \S+ -> 0\.1\); undo that, or train"
    ),
    f"train --debug --config {DIGITS} --workdir run --train.steps 4": r"run already has 8 steps, .* 4; raise",
    f"train --debug --config {DIGITS} --workdir classless": r"begun with another config \(.*num_classes: 0 -> 10",
    f"train --debug --config {DIGITS} --workdir flipped": r"Checkpoint 8 .* is damaged \(ema/\S+ has changed since",
    f"train --debug --config {DIGITS} --workdir flipped_meta": r"Checkpoint 8 .* is damaged \(meta\.json",
    f"train --debug --config {DIGITS} --workdir not_json": r"not_json/config\.json is not a file with a JSON object",
    f"{CONVERT} --to mine": r"mine already exists; give another directory",
    f"{CONVERT} --to file.txt": r"file\.txt already exists; give another directory",
    f"{CONVERT} --to file.txt/new": r"file\.txt/new cannot be created, because \S*file\.txt is a file; give another",
    # Run directories to read.
    f"{SAMPLE} none": r"checkpoint none is not a directory; give the --workdir of a training run",
    f"{SAMPLE} file.txt": r"checkpoint file\.txt is not a directory",
    f"{SAMPLE} mine": r"checkpoint mine is not a flowgen run \(it has no config\.json\)",
    f"{SAMPLE} begun": r"begun has no checkpoint yet; train it, or give another run",
    f"{SAMPLE} not_json": r"not_json/config\.json is not a file with a JSON object; restore it",
    f"{SAMPLE} alien": r"model\.type is 'GLOW'; choose one of TARFlow, STARFlow\.",
    f"{SAMPLE} unknown_field": r"model\.depth is not a field of this config",
    f"{SAMPLE} other_model": r"Checkpoint 8 of other_model does not fit config\.json: .*\(model\.width: 32 -> 64\)",
    f"{SAMPLE} flipped": r"Checkpoint 8 .* is damaged \(ema/\S+ has changed since .*\); remove that folder",
    f"{SAMPLE} flipped_meta": r"Checkpoint 8 .* is damaged \(meta\.json .*\); remove that folder",
    f"{SAMPLE} truncated": r"Checkpoint 8 .* is damaged \(ema/_METADATA has changed since .*\); remove that folder",
    f"{SAMPLE} run --step 5": r"run has no checkpoint 5; choose one of 4, 8",
    f"{SAMPLE} run --step last": r"--step: 'last' is neither a number nor best; see",
    f"{SAMPLE} run --step -1": r"--step: '-1' is neither a number nor best; see",
    f"{SAMPLE} classless --step best": r"classless has no evaluated checkpoint; leave out the step to load the latest",
    "evaluate --checkpoint none": r"checkpoint none is not a directory",
    "evaluate --checkpoint mine": r"checkpoint mine is not a flowgen run",
    "evaluate --checkpoint flipped": r"Checkpoint 8 .* is damaged",
    "info --checkpoint mine": r"checkpoint mine is not a flowgen run",
    # Sampling.
    f"{SAMPLE} run --classes 10": r"--classes has '10', which is no class of this model",
    f"{SAMPLE} run --classes=-2,1": r"--classes has '-2', which is no class of this model",
    f"{SAMPLE} run --classes cat": r"--classes has 'cat', which is no class of this model",
    f"{SAMPLE} run --classes 1.5": r"--classes has '1\.5', which is no class of this model",
    f"{SAMPLE} run --classes 1,,2": r"--classes has '', which is no class of this model",
    f"{SAMPLE} run --classes 99999999999": r"--classes has '99999999999', which is no class of this model",
    f"{SAMPLE} classless --classes 1": r"--classes is 1, but this model has no classes; leave it out",
    f"{SAMPLE} run --guidance -1": r"sampling\.guidance is -1; it must be 0 or more",
    f"{SAMPLE} run --guidance nan": r"sampling\.guidance is 'nan'; it must be a number",
    f"{SAMPLE} run --guidance strong": r"sampling\.guidance is 'strong'; it must be a number",
    f"{SAMPLE} run --denoise -0.5": r"sampling\.denoise is -0\.5; it must be 0 or more",
    f"{SAMPLE} run --denoise nan": r"sampling\.denoise is 'nan'; it must be a number",
    f"{SAMPLE} run --plan jacobi --tol -1": r"sampling\.tol is -1; it must be 0 or more",
    f"{SAMPLE} run --plan jacobi --tol inf": r"sampling\.tol is 'inf'; it must be a number",
    f"{SAMPLE} run --plan jacobi --window 0": r"sampling\.window is 0; it must be at least 1",
    f"{SAMPLE} run --window 4": r"--window, --tol and --init are for --plan jacobi or sliding; add it",
    f"{SAMPLE} run --tol 0.1 --plan sequential": r"--window, --tol and --init are for --plan jacobi",
    f"{SAMPLE} run --plan fast": r"sampling\.plan is 'fast'; it must be 'sequential' or",
    f"{SAMPLE} run --num 0": r"sampling\.num is 0; it must be at least 1",
    f"{SAMPLE} run --num 2.5": r"sampling\.num is '2\.5'; it must be an integer",
    f"{SAMPLE} run --batch 0": r"--batch is 0; it must be at least 1",
    f"{SAMPLE} run --seed -1": r"--seed is -1; it must be 0 or more",
    f"{SAMPLE} run --seed 4294967296": r"--seed is 4294967296; it must be from 0 to 4294967295",
    "evaluate --checkpoint run --batch 0": r"--batch is 0; it must be at least 1",
    "evaluate --checkpoint run --seed -1": r"--seed is -1; it must be 0 or more",
    # Outputs.
    "sample --checkpoint run --out file.txt/a.png": r"Cannot write 'file\.txt/a\.png': 'file\.txt' is a file, not a f",
    "sample --checkpoint run --out file.txt/a.npz": r"Cannot write 'file\.txt/a\.npz': 'file\.txt' is a file, not a f",
    "sample --checkpoint run --out empty": r"'empty' has no image suffix; use one of \.png",
    "sample --checkpoint run --out a.gif": r"--out is a\.gif, but this model does not draw videos; use \.png",
    "sample --checkpoint run --out a.tiff": r"'a\.tiff' has no image suffix; use one of \.png",
    "sample --checkpoint run --single mine": r"mine already exists; give another directory",
    "sample --checkpoint run --single file.txt/a": r"file\.txt/a cannot be created, because \S*file\.txt is a file",
    "sample --checkpoint run --out a.png --single a.png": r"--single and --out are both a\.png; give --single",
    # Published weights.
    f"{FROM}/none.pth": r"There is no file 'weights/none\.pth'; check the path",
    f"{FROM}": r"'weights' is a folder; give the weight file inside it",
    f"{FROM}/truncated.safetensors": r"'weights/truncated\.safetensors' is damaged .*; get the file again",
    f"{FROM}/intruder.pth": r"'weights/intruder\.pth' is refused: its pickle uses 'io\.open'",
    f"{FROM}/pointer.pth": r"is a Git LFS pointer, not the weights; fetch them with git lfs pull",
    f"{FROM}/../file.txt": r"is neither a safetensors nor a torch\.save file .*; give the weight file itself",
    f"{FROM}/starflow.safetensors": r"These are STARFlow weights .*; import them with flowgen\.convert\.starflow",
    f"{FROM}/linear.safetensors": r"These are not TARFlow weights: 'blocks\.0\.pos_embed' is missing",
    f"{FROM}/incomplete.safetensors": r"do not fit the model, 1 problem: 'blocks\.1\.proj_in\.bias' is missing",
    f"{FROM}/extra.safetensors": r"do not fit the model, 1 problem: 'blocks\.0\.gate' is not expected",
    f"{FROM}/nan.safetensors": r"'blocks\.0\.proj_in\.bias' holds values that are not finite",
    f"{FROM}/unnamed.safetensors --entry ema": r"has no entry 'ema'; leave entry out",
    f"{CONVERT} --to new --image-size 12": r"image_size 12x12 .* but the weights have 16; use image_size=8",
    f"{CONVERT} --to new --image-size big": r"--image-size is 'big'; give a side such as 64, or height,width",
    f"{CONVERT} --to new --patch-size 4": r"patch_size 4 with 1 channels .* use patch_size=2",
    f"{CONVERT} --to new --channels 0": r"--channels: '0' is not a whole number of at least 1; see",
    f"{CONVERT} --to new --noise-std -1": r"noise_std is -1\.0; it must be 0",
    "convert weights/unnamed.safetensors --to new --image-size 8 --noise-std 0": r"--patch-size is missing, and",
    "convert weights/unnamed.safetensors --to new --image-size 8 --patch-size 2": r"--noise-std is missing, and",
}


@pytest.mark.parametrize(("command", "sentence"), MISTAKES.items(), ids=lambda text: text.replace(str(PROJECT), ""))
def test_a_mistake_is_one_sentence_and_changes_nothing(museum, monkeypatch, command, sentence):
    root, before = museum
    monkeypatch.chdir(root)
    outcome = flowgen(command)
    assert outcome.code == EXIT_MISTAKE, outcome
    assert re.fullmatch(r"flowgen: [^\n]+\n", outcome.err), outcome.err
    assert re.search(sentence, outcome.err), outcome.err
    assert "Traceback" not in outcome.err
    assert contents(root) == before
