"""Every mistake that a user can make on the command line is one sentence, and changes nothing."""

import pickle
import re
import shutil
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import refused
from PIL import Image
from published_files import write_safetensors
from reference_weights import Shape, state_dict

from flowgen import checkpoint, convert, experiments
from flowgen.nn import init
from flowgen.runs import CHECKPOINTS, CheckpointStore, read_config, write_config
from flowgen.training.step import init_state

PROJECT = Path(__file__).parent.parent
DIGITS = PROJECT / "configs" / "tarflow_digits.py"
PUBLISHED = Shape(channels=1, width=64, num_blocks=2, layers_per_block=1)
# The published names tell patch size and noise: here 2, width 64, 2 blocks of 1 layer, 0.1.
PUBLISHED_NAME = "digits_model_2_64_2_1_0.1.safetensors"
# A folder of things that a user could give by mistake, of which nothing may change.
TINY = """from flowgen.experiments import FlowExperiment
from flowgen.flows import TARFlowConfig

def config():
    model = TARFlowConfig(image_size=8, channels=1, patch_size=2, num_classes=10, {model})
    return FlowExperiment(name="mine", model=model)
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
def museum(tmp_path_factory):
    """The folder, and its contents."""
    root = tmp_path_factory.mktemp("museum")
    for name in ("file.txt", "out.png", "out.npz", "mine/letter.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine\n")
    (root / "empty").mkdir()
    (root / "gone").symlink_to("unmounted")
    make_configs(root)
    make_runs(root)
    make_photos(root)
    make_weights(root)
    return root, contents(root)


def make_configs(root):
    for name, text in {
        "tiny": TINY.format(model=""),
        "raises": "def config():\n    raise RuntimeError('no cluster')\n",
        "syntax": "def config(:\n",
        "argument": TINY.format(model="widht=64"),
        "value": TINY.format(model="width=0"),
    }.items():
        (root / f"{name}.py").write_text(text)


def make_runs(root):
    """A run that has two checkpoints, one without classes, and copies of the first that something happened to."""
    experiment = experiments.load_config(DIGITS).debug().with_provenance()
    variables = init(experiment.build(), jax.random.key(0))
    state = jax.tree.map(np.asarray, init_state(variables, experiment.optim, experiment.train.steps))
    (root / "run").mkdir()
    write_config(root / "run", experiment.to_json())
    with CheckpointStore(root / "run" / CHECKPOINTS) as store:
        for step in (4, 8):
            store.save(step, state.replace(step=np.int32(step)), config=experiment.to_json())
    flow, variables = convert.tarflow(state_dict(PUBLISHED), image_size=8, patch_size=2, channels=1)
    classless = experiments.FlowExperiment(name="classless", model=flow.config)
    checkpoint.write_run(root / "classless", classless, variables)
    for name in ("flipped", "other_model", "not_json", "alien"):
        shutil.copytree(root / "run", root / name)
    data = max((root / "flipped" / "checkpoints" / "8" / "ema").rglob("d/*"), key=lambda file: file.stat().st_size)
    flip_byte(data)
    change_config(root / "other_model", "model", width=64)
    change_config(root / "alien", "model", type="GLOW")
    (root / "not_json" / "config.json").write_text("{")


def make_photos(root):
    for folder in ("corrupt/zero", "flat"):
        (root / "photos" / folder).mkdir(parents=True)
    for name in ("corrupt/zero/a", "flat/a", "flat/b"):
        Image.new("L", (8, 8), 128).save(root / "photos" / f"{name}.png")
    (root / "photos" / "corrupt" / "zero" / "b.png").write_bytes(b"not an image")
    np.savez(root / "photos" / "float.npz", images=np.zeros((20, 8, 8)), labels=np.zeros(20, np.int64))


def make_weights(root):
    weights = state_dict(PUBLISHED)
    folder = root / "weights"
    folder.mkdir()
    good = write_safetensors(folder / PUBLISHED_NAME, weights)
    shutil.copy(good, folder / "unnamed.safetensors")
    (folder / "truncated.safetensors").write_bytes(good.read_bytes()[:-100])
    (folder / "intruder.pth").write_bytes(pickle.dumps(Intruder(), protocol=2))
    del weights["blocks.1.proj_in.bias"]
    write_safetensors(folder / "incomplete.safetensors", weights)


def contents(root):
    return {path: path.is_file() and zlib.crc32(path.read_bytes()) for path in root.rglob("*")}


TRAIN = "train --debug --workdir new --config tiny.py"
SAMPLE = "sample --out out.png --checkpoint"
CONVERT = f"convert weights/{PUBLISHED_NAME} --image-size 8 --channels 1"
FROM = "convert --to new --image-size 8 --channels 1 --patch-size 2 --noise-std 0.1 weights"
MISTAKES = {
    # Command lines.
    "": r"arguments are required: COMMAND; see python -m flowgen --help",
    "trian": r"'trian' is not a command; choose one of train, sample, .*, info; did you mean train\?",
    "zzzz": r"'zzzz' is not a command; choose one of train, sample, .*, info\.$",
    "train tarflow_digits --workdir new": r"'tarflow_digits' is not understood; did you mean --config tarflow_digits\?",
    "train --workdir new --debug tiny.py": r"did you mean --config tiny\.py\?",
    "evaluate --step 8 run": r"'run' is not understood; did you mean --checkpoint run\?",
    "train tarflow --workdir new": r"arguments are required: --config; see",
    "train --workdir new": r"arguments are required: --config; see",
    "sample": r"arguments are required: --checkpoint; see",
    "convert --to new": r"arguments are required: file; see",
    "info": r"One of the arguments --config --checkpoint is required; see",
    "info --config tiny.py --checkpoint run": r"--checkpoint: not allowed with argument --config",
    "info --checkpoint run --debug": r"--debug is not an option of info --checkpoint",
    "info --checkpoint run --optim.lr 1": r"--optim\.lr is not an option of info --checkpoint",
    "info --checkpoint run optim seed": r"seed is not a field of this config; did you mean train\.seed\?",
    f"{SAMPLE} run --number 3": r"--number is not an option .* did you mean --num\?",
    f"{SAMPLE} run --method heun": r"--method is not an option .* for a TARFlow",
    f"{SAMPLE} run --frames 3": r"--frames is not an option .* for a TARFlow",
    f"{SAMPLE} run --autoencoder mine": r"--autoencoder is not an option .* for a TARFlow",
    f"{SAMPLE} run --zzzzzzzz 1": r"it accepts options --seed, .* and --sampling\.\*\.$",
    f"{TRAIN} --number 3": r"--number is not an option .* did you mean --num\?",
    f"{TRAIN} --seed 3": r"--seed is not an option .* did you mean --train\.seed\?",
    "evaluate --checkpoint run --samples 1": r"samples is 1",
    "evaluate --checkpoint run --split test": r"split is 'test'; it must be 'train' or 'eval' or 'all'",
    # Overrides.
    f"{TRAIN} --optim.learning_rate 1": r"optim\.learning_rate is not a field of this config",
    f"{TRAIN} --model.lr 1e-3": r"model\.lr is not a field .* did you mean optim\.lr\?",
    f"{TRAIN} steps 3": r"'steps' is not understood; set a field as in --sampling\.num 4\.$",
    f"{TRAIN} model.width=64": r"'model\.width=64' is not understood; set a field as in --model\.width 64\.$",
    f"{TRAIN} --set model.width=64": r"--set is not an option .*; set a field as in --model\.width 64\.$",
    f"{TRAIN} --model.image_size 9": r"model\.image_size has height 9 and width 9, which patch_size 2 does not",
    f"{TRAIN} --model.num_classes -1": r"model\.num_classes is -1; it must be 0",
    f"{TRAIN} --train.batch_size 6": r"train\.batch_size is 6; it must be a multiple of 4 devices",
    f"{TRAIN} --train.seed -1": r"train\.seed is -1; it must be 0 or more",
    f"{TRAIN} --sampling.num 0": r"sampling\.num is 0; it must be at least 1",
    f"{TRAIN} --optim.name sgd --optim.b1 0.8": r"optim\.b1 is .*, but sgd does not use it; set .* default, 0\.9\.",
    f"{TRAIN} --optim.name lion --optim.b2 0.8": r"lion does not use it; .* 0\.95, and set optim\.options\.b2 instead",
    f"{TRAIN} --optim.name muon --optim.beta 0.9": r"optim\.beta is not .* did you mean optim\.options\.beta\?",
    f"{TRAIN} --optim.name Muon": r"optim\.name is 'Muon'; choose one of .*; did you mean muon\?",
    f"{TRAIN} --optim.schedule Cosin": r"optim\.schedule is 'Cosin'; .*; did you mean 'cosine'\?",
    f"{TRAIN} --train.mesh 4": r"it must be a tuple of 2 integers or none, as in --train\.mesh 4,1\.$",
    f"{TRAIN} --optim.options beta=0.9": r"set its entries one by one, as in --optim\.options\.beta 0\.9\.$",
    f"{TRAIN} --data.path photos/flat/a.png photos/flat/b.png": r"takes one path, .* as in --data\.path photos/flat\.$",
    # Config files.
    "train --workdir new --config none.py": r"config none\.py does not exist",
    "train --workdir new --config tarflow_digit": r"config tarflow_digit does not exist; did you mean tarflow_digits\?",
    "train --workdir new --config raises.py": r"config raises\.py fails on line 2 \(RuntimeError: no cluster\); corr",
    "train --workdir new --config syntax.py": r"config syntax\.py fails on line 1 \(SyntaxError: invalid syntax",
    "train --workdir new --config argument.py": r"config argument\.py fails on line 5 \(TypeError: .*'widht'\); corr",
    "train --workdir new --config value.py": r"config value\.py fails on line 5 \(width is 0; it must be at lea",
    # Data.
    f"{TRAIN} --data.name emoji": r"data\.name is 'emoji'; choose one of digits,",
    f"{TRAIN} --data.name folder --data.path photos/flat": r"the data have no labels; .* model\.num_classes",
    f"{TRAIN} --data.name folder --data.path photos/corrupt --model.num_classes 1": r"1 image .*/b\.png' \(not",
    f"{TRAIN} --data.name npz --data.path photos/float.npz": r"'images' .* is float64; save uint8 levels",
    # Run directories to write.
    "train --debug --config tiny.py --workdir mine": r"workdir mine contains files but no flowgen run; give a new",
    "train --debug --config tiny.py --workdir file.txt": r"workdir file\.txt is a file; give a new or empty directory",
    "train --debug --config tiny.py --workdir gone/new": r"'gone' is a link to 'unmounted', which is missing",
    f"train --debug --config {DIGITS} --workdir run --model.width 64 --optim.lr 0.1": (
        r"the run was started with another config \(model\.width: 32 -> 64; optim\.lr: \S+ -> 0\.1\); undo the change"
    ),
    f"train --config {DIGITS} --workdir run": r"the run was started with --debug; add --debug, or train in a new",
    f"train --debug --config {DIGITS} --workdir classless": r"started with another config \(.*num_classes: 0 -> 10",
    f"train --debug --config {DIGITS} --workdir flipped": r"Checkpoint 8 .* is damaged \(ema/\S+ has changed since",
    f"train --debug --config {DIGITS} --workdir not_json": r"not_json/config\.json does not contain a JSON object",
    f"{CONVERT} --to gone/new": r"'gone' is a link to 'unmounted', which is missing; create it, or choose another",
    f"{CONVERT} --to mine": r"mine already exists; give another directory",
    f"{CONVERT} --to file.txt/new": r"file\.txt/new cannot be created because \S*file\.txt is a file; give another",
    # Run directories to read.
    f"{SAMPLE} mine": r"checkpoint mine is not a flowgen run, because it has no config\.json",
    f"{SAMPLE} alien": r"model\.type is 'GLOW'; choose one of TARFlow, STARFlow\.",
    f"{SAMPLE} other_model": r"Checkpoint 8 of other_model does not fit config\.json: .*\(model\.width: 32 -> 64\)",
    f"{SAMPLE} flipped": r"Checkpoint 8 .* is damaged \(ema/\S+ has changed since .*\); remove that folder",
    f"{SAMPLE} run --step last": r"--step: 'last' is neither a number nor best; see",
    f"{SAMPLE} run --step -1": r"--step: '-1' is neither a number nor best; see",
    "sample --checkpoint ''": r"--checkpoint is empty; give a path",
    "info --checkpoint '' model.width": r"--checkpoint is empty; give a path",
    "info --config ''": r"--config is empty; give a path",
    "export '' --out new": r"run is empty; give a path",
    "report run --out ''": r"--out is empty; give a path",
    "evaluate --checkpoint mine": r"checkpoint mine is not a flowgen run",
    "evaluate --checkpoint digit": r"checkpoint digit is not a directory; .* \(digits, .*\); did you mean digits\?",
    # Sampling.
    f"{SAMPLE} run --classes 10": r"--classes has '10', which is not a class of this model",
    f"{SAMPLE} run --classes=-2,1": r"--classes has '-2', which is not a class of this model",
    f"{SAMPLE} run --classes 1.5": r"--classes has '1\.5', which is not a class of this model",
    f"{SAMPLE} run --classes 1,,2": r"--classes has '', which is not a class of this model",
    f"{SAMPLE} run --classes 99999999999": r"--classes has '99999999999', which is not a class of this model",
    f"{SAMPLE} classless --classes 1": r"--classes is 1, but this model has no classes; leave it out",
    f"{SAMPLE} run --guidance -1": r"sampling\.guidance is -1; it must be 0 or more",
    f"{SAMPLE} run --denoise -0.5": r"sampling\.denoise is -0\.5; it must be 0 or more",
    f"{SAMPLE} run --plan jacobi --tol -1": r"sampling\.tol is -1; it must be 0 or more",
    f"{SAMPLE} run --plan jacobi --window 0": r"sampling\.window is 0; it must be at least 1",
    f"{SAMPLE} run --window 4": r"--window, --tol and --init need --plan jacobi or sliding; add it",
    f"{SAMPLE} run --num 0": r"sampling\.num is 0; it must be at least 1",
    f"{SAMPLE} run --batch 0": r"--batch is 0; it must be at least 1",
    f"{SAMPLE} run --seed -1": r"--seed is -1; it must be 0 or more",
    f"{SAMPLE} run --seed 4294967296": r"--seed is 4294967296; it must be from 0 to 4294967295",
    # Outputs.
    "sample --checkpoint run --out file.txt/a.png": r"Cannot write 'file\.txt/a\.png': 'file\.txt' is a file, not a f",
    "sample --checkpoint run --out gone/a.png": r"'gone' is a link to 'unmounted', which is missing; create it",
    "sample --checkpoint run --out empty": r"--out is 'empty'; it must end in one of \.png",
    "sample --checkpoint run --out a.gif": r"--out is a\.gif, but this model does not draw videos; use \.png",
    "sample --checkpoint run --single mine": r"mine already exists; give another directory",
    "sample --checkpoint run --out a.png --single a.png": r"--single and --out are both a\.png; give --single",
    # Published weights.
    f"{FROM}/truncated.safetensors": r"'weights/truncated\.safetensors' is damaged .*; download the file again",
    f"{FROM}/intruder.pth": r"'weights/intruder\.pth' cannot be imported: the pickle uses 'io\.open'",
    f"{FROM}/incomplete.safetensors": r"do not fit the model \(1 problem\): 'blocks\.1\.proj_in\.bias' is missing",
    f"{FROM}/unnamed.safetensors --entry ema": r"has no entry 'ema'; leave out entry",
    f"{CONVERT} --to new --image-size 12": r"image_size 12x12 .* but the weights have 16; use image_size=8",
    f"{CONVERT} --to new --image-size big": r"--image-size is 'big'; give one side, such as 64, or height,width",
    f"{CONVERT} --to new --channels 0": r"--channels: '0' is not a whole number of at least 1; see",
    "convert weights/unnamed.safetensors --to new --image-size 8 --noise-std 0": r"--patch-size is missing, and",
    "convert weights/unnamed.safetensors --to new --image-size 8 --patch-size 2": r"--noise-std is missing, and",
}


@pytest.mark.parametrize(("command", "sentence"), MISTAKES.items(), ids=lambda text: text.replace(str(PROJECT), ""))
def test_a_mistake_is_one_sentence_and_changes_nothing(museum, monkeypatch, command, sentence):
    root, before = museum
    monkeypatch.chdir(root)
    assert re.search(sentence, refused(command))
    assert contents(root) == before
