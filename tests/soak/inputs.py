"""Malformed inputs of the commands: good files with damage in them, files made by hand, and words without sense.

Each kind is a function (rng, base, folder) that writes what it needs into an empty folder and returns the words of a
command that reads it. base: a folder of good files, which `write_base` makes.
"""

import json
import shutil
import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "fixtures"))

import codec_weights as cw
import reference_weights as rw
import starflow_weights as sw
from published_files import publish, write_safetensors
from soak import torch_programs
from soak.damage import ODD_TEXTS, ODD_VALUES, damage_file, damaged_tree

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
DIGITS = str(ROOT / "configs" / "tarflow_digits.py")
DEBUG = [
    "--debug",
    "--log.progress",
    "false",
    "--log.tensorboard",
    "false",
    "--train.steps",
    "2",
    "--optim.warmup_steps",
    "0",
]
TINY = [*DEBUG, "--model.width", "16", "--model.num_blocks", "2", "--model.layers_per_block", "1"]
T2I = sw.Shape(channel_size=4, txt_size=24, txt_dim=24)
YAML = """arguments:
- img_size: 32
- txt_size: 24
- channel_size: 4
- patch_size: 1
- channels: 64
- head_dim: 32
- blocks: 2
- layers_per_block: 1 2
- rope: 1
- sos: 1
- seq_order: L2R
- use_softplus: 1
- cond_top_only: 1
- use_final_norm: 1
- vae: stabilityai/sd-vae-ft-ema
- text: google/flan-t5-xl
- cfg: 2.5
- soft_clip: 4
- noise_std: 0.3
"""
LATENT_CONFIG = """
from flowgen.data import LatentsConfig
from flowgen.experiments import FlowExperiment, SpaceToDepth
from flowgen.flows import STARFlowConfig
def config():
    model = STARFlowConfig(image_size=4, channels=4, width=32, head_dim=16, layers_per_block=(1, 1))
    data = LatentsConfig(path="latents")
    return FlowExperiment(name="latents", model=model, data=data, codec=SpaceToDepth(2))
"""
CLIPS_CONFIG = """
from flowgen.data import ClipsConfig
from flowgen.experiments import VideoFlowExperiment
from flowgen.flows import STARFlowVConfig
def config():
    model = STARFlowVConfig(
        image_size=8, frames=3, channels=3, patch_size=4, width=32, head_dim=16, layers_per_block=(1, 1, 1)
    )
    data = ClipsConfig(name="folder", path="videos", eval_fraction=0.0)
    return VideoFlowExperiment(name="clips", model=model, data=data)
"""


def write_base(folder, main):
    """Good files of every kind; main: the commands, by which a run is trained."""
    folder.mkdir(parents=True)
    weights = rw.state_dict(rw.Shape(width=64, num_blocks=2, layers_per_block=1))
    write_safetensors(folder / "tarflow.safetensors", weights)
    write_torch(folder / "tarflow.pth", weights)
    published = folder / "published"
    published.mkdir()
    write_safetensors(published / "weights.safetensors", sw.state_dict(T2I))
    (published / "arguments.yaml").write_text(YAML)
    publish(published / "vae", cw.AUTOENCODER, cw.state_dict("autoencoder"), "diffusion_pytorch_model.safetensors")
    t5 = publish(published / "t5", cw.T5, cw.state_dict("t5"), "model.safetensors")
    shutil.copy(cw.HERE / "spiece.model", t5)
    write_data(folder)
    if main(["train", "--config", DIGITS, "--workdir", str(folder / "run"), *TINY]) != 0:
        raise RuntimeError("the run that damage is done to was not trained")
    # What is compiled for it is then known, where compiled programs are kept.
    main(["sample", "--checkpoint", str(folder / "run"), "--num", "2", "--out", str(folder / "samples.png")])


def write_torch(path, weights):
    """A file in the zip layout of torch.save."""
    import zipfile

    storages = {str(index): np.ascontiguousarray(x, np.float32) for index, x in enumerate(weights.values())}
    pairs = {}
    for name, (key, x) in zip(weights, storages.items(), strict=True):
        strides = tuple(stride // 4 for stride in x.strides)
        pairs[name] = torch_programs.tensor(x.shape, strides, count=x.size, key=key)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + torch_programs.dictionary(pairs) + b".")
        for key, x in storages.items():
            archive.writestr(f"archive/data/{key}", x.tobytes())


def write_data(folder):
    """Images, arrays, clips and latents."""
    from PIL import Image

    from flowgen.data import Moments
    from flowgen.data.latent_files import LatentWriter
    from flowgen.data.latents import Shard
    from flowgen.data.video import write_video

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 8, 8), np.uint8)
    np.savez_compressed(folder / "images.npz", images=pixels[..., None], labels=np.arange(24) % 3)
    for suffix, mode in (("png", "L"), ("png", "P"), ("jpg", "L"), ("gif", "P"), ("webp", "RGB"), ("tif", "L")):
        (folder / "photos").mkdir(exist_ok=True)
        image = Image.fromarray(pixels[0])
        image = image.quantize(16) if mode == "P" else image.convert(mode)
        image.save(folder / "photos" / f"{mode}.{suffix}")
    frames = rng.integers(0, 256, (12, 16, 16, 3), np.uint8)
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "a.mp4", frames, fps=8)
    write_video(folder / "videos" / "b.gif", frames, fps=10)
    writer = LatentWriter(folder / "latents")
    for split in ("train", "eval"):
        moments = rng.normal(size=(2, 4, 4, 4, 4)).astype(np.float32)
        writer.add(split, Shard(Moments(moments[0], np.abs(moments[1])), np.zeros(4, np.int32)), kind="image")
    writer.finish(class_names=("a",))


# -- kinds ------------------------------------------------------------------------------------------------------

TARFLOW = ["--image-size", "8", "--patch-size", "2", "--noise-std", "0.1", "--to", "out"]


def torch_file(rng, base, folder):
    path = folder / "weights.pth"
    kind = rng.random()
    if kind < 0.35:
        torch_programs.LAYOUTS[rng.choice(list(torch_programs.LAYOUTS))](
            path, torch_programs.PROGRAMS[rng.choice(list(torch_programs.PROGRAMS))]
        )
    elif kind < 0.5:
        torch_programs.ARCHIVES[rng.choice(list(torch_programs.ARCHIVES))](path)
    else:
        fixture = rng.choice([*sorted((TESTS / "fixtures").glob("*.pth")), base / "tarflow.pth"])
        shutil.copy(fixture, path)
        damage_file(rng, path)
    return ["convert", path.name, *TARFLOW]


def safetensors_file(rng, base, folder):
    path = folder / "weights.safetensors"
    content = (base / "tarflow.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    if rng.random() < 0.6:
        header = damaged_tree(rng, content[8 : 8 + length])
        length = rng.choice((len(header), len(header), len(header), 1 << 63, 1 << 24, 0))
        path.write_bytes(struct.pack("<Q", length) + header + content[8 + length :])
    else:
        path.write_bytes(content)
        damage_file(rng, path)
    return ["convert", path.name, *TARFLOW]


def published_folder(rng, base, folder):
    shutil.copytree(base / "published", folder / "published")
    name = rng.choice(("vae/config.json", "t5/config.json", "t5/spiece.model", "arguments.yaml", "index", "tokenizer"))
    path = folder / "published" / name
    if name == "index":
        names = rng.choice((["../x"], ["/etc/passwd"], [3], ["model.safetensors"], ["\x1b[2J"], ["a\0b"], []))
        (folder / "published/t5/model.safetensors").rename(folder / "published/t5/part.safetensors")
        tree = {"weight_map": {f"t{index}": part for index, part in enumerate([*names, "part.safetensors"])}}
        (folder / "published/t5/model.safetensors.index.json").write_bytes(damaged_tree(rng, json.dumps(tree).encode()))
    elif name == "tokenizer":
        tree = {"version": "1.0", "model": {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}}
        (folder / "published/t5/tokenizer.json").write_bytes(damaged_tree(rng, json.dumps(tree).encode()))
    elif name == "arguments.yaml":
        lines = path.read_text().splitlines()
        at = rng.randrange(1, len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {json.dumps(rng.choice(ODD_VALUES))}"
        odd = ("a: &a [*a]", "[" * 5000, "? {a: b}\n: c", "!!python/object/apply:os.system ['touch x']", "- x: *y")
        text = "\n".join(lines) if rng.random() < 0.7 else rng.choice(odd)
        path.write_text(text, encoding="utf-8")
    else:
        damage_file(rng, path, tree=name.endswith(".json"))
    places = ["--autoencoder", "published/vae", "--text-encoder", "published/t5"]
    return [
        "convert",
        "published/weights.safetensors",
        "--arguments",
        "published/arguments.yaml",
        *places,
        "--to",
        "out",
    ]


def latents(rng, base, folder):
    shutil.copytree(base / "latents", folder / "latents")
    (folder / "latents.py").write_text(LATENT_CONFIG)
    if rng.random() < 0.5:
        damage_file(rng, folder / "latents" / "dataset.json", tree=True)
    else:
        damage_file(rng, folder / "latents" / "train-00000" / rng.choice(("mean.npy", "std.npy", "label.npy")))
    return ["train", "--config", "latents.py", "--workdir", "out", *DEBUG[1:]]


def arrays(rng, base, folder):
    path = folder / "images.npz"
    if rng.random() < 0.6:
        shutil.copy(base / "images.npz", path)
        damage_file(rng, path)
    else:
        images, labels = np.zeros((6, 8, 8, 1), np.uint8), np.zeros(6, np.int64)
        odd = (2**62, -5, 3 * 10**7, 255)
        labels[0] = rng.choice(odd)
        shapes = ((6, 8, 8, 1), (0, 8, 8, 1), (6,), (6, 8, 8, 5), (6, 10**6, 1, 1), (6, 0, 8, 1))
        np.savez_compressed(
            path, images=images if rng.random() < 0.5 else np.zeros(rng.choice(shapes), np.uint8), labels=labels
        )
    return ["train", "--config", DIGITS, "--workdir", "out", *TINY, "--data.name", "npz", "--data.path", path.name]


def images(rng, base, folder):
    shutil.copytree(base / "photos", folder / "photos")
    for path in sorted((folder / "photos").iterdir()):
        if rng.random() < 0.5:
            damage_file(rng, path)
    skip = ["--data.on_corrupt", rng.choice(("skip", "refuse"))]
    where = ["--data.name", "folder", "--data.path", "photos"]
    return ["train", "--config", DIGITS, "--workdir", "out", *TINY, *where, *skip]


def videos(rng, base, folder):
    shutil.copytree(base / "videos", folder / "videos")
    for path in sorted((folder / "videos").iterdir()):
        if rng.random() < 0.7:
            damage_file(rng, path)
    (folder / "clips.py").write_text(CLIPS_CONFIG)
    fps = rng.choice(("0", "8", "1e9", "0.001"))
    return ["train", "--config", "clips.py", "--workdir", "out", *DEBUG[1:], "--data.fps", fps]


def run_directory(rng, base, folder):
    shutil.copytree(base / "run", folder / "run")
    files = sorted(path for path in (folder / "run").rglob("*") if path.is_file())
    config = rng.random() < 0.5
    path = folder / "run" / "config.json" if config else rng.choice(files)
    if rng.random() < 0.1:
        shutil.rmtree(path.parent) if rng.random() < 0.5 else path.unlink()
    else:
        damage_file(rng, path, tree=config)
    if config or rng.random() < 0.3:
        return ["info", "--checkpoint", "run"]
    return ["sample", "--checkpoint", "run", "--num", "2", "--out", "samples.png"]


def flags(rng, base, folder):
    from flowgen import experiments, settings

    names = settings.leaf_names(experiments.load_config(DIGITS))
    words = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        name = rng.choice(names) if rng.random() < 0.8 else rng.choice(ODD_TEXTS)
        words += [f"--{name}", rng.choice(ODD_TEXTS)] if rng.random() < 0.9 else [f"--{name}={rng.choice(ODD_TEXTS)}"]
    return ["info", "--config", DIGITS, *words]


def options(rng, base, folder):
    odd = rng.choice(ODD_TEXTS)
    run = ["--checkpoint", str(base / "run")]
    choices = (
        ["sample", *run, rng.choice(("--num", "--seed", "--step", "--classes", "--guidance", "--batch", "--tol")), odd],
        ["sample", *run, "--out", odd],
        ["sample", *run, "--plan", "jacobi", "--window", odd],
        ["sample", *run, "--prompt", odd],
        ["sample", *run, "--prompts", odd],
        ["sample", *run, "--given", odd],
        ["sample", "--checkpoint", odd, "--out", "x.png"],
        ["evaluate", *run, rng.choice(("--step", "--noise", "--samples", "--seed", "--split")), odd],
        ["evaluate", *run, "--data.name", "folder", "--data.path", odd],
        ["convert", odd, *TARFLOW],
        ["convert", str(base / "tarflow.pth"), *TARFLOW[:-1], odd],
        [
            "convert",
            str(base / "tarflow.pth"),
            "--to",
            "out",
            rng.choice(("--image-size", "--patch-size", "--entry")),
            odd,
        ],
        ["train", "--config", odd, "--workdir", "out"],
        ["train", "--config", DIGITS, "--workdir", odd, "--train.steps", "0"],
        ["encode", "--config", DIGITS, "--out", odd],
        ["info", "--checkpoint", odd],
        [odd, odd],
    )
    return list(rng.choice(choices))


KINDS = (
    *(torch_file, safetensors_file, published_folder, torch_file, safetensors_file, published_folder, flags, options),
    *(flags, options, run_directory, latents, arrays, images, videos, run_directory),
)
