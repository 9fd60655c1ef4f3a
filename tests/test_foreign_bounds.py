"""Foreign files and numbers cost no more than their size: pickles, archives, headers, configs, and what is shown."""

import dataclasses
import json
import os
import struct
import sys
import time
import tracemalloc

import codec_weights as cw
import numpy as np
import pytest
import starflow_weights as sw
from conftest import rows
from published_files import publish, write_safetensors
from soak.torch_programs import ARCHIVES, LAYOUTS, PROGRAMS, SLOW_KEYS, dictionary, push, tensor, zip_layout

import flowgen
from flowgen import convert, experiments
from flowgen.cli import main
from flowgen.codecs import AutoencoderConfig
from flowgen.convert import load_autoencoder, load_text_encoder, read_state_dict
from flowgen.data import read_latents
from flowgen.flows import STARFlowConfig, STARFlowVConfig
from flowgen.matching import DiTConfig, MLPConfig, UNetConfig
from flowgen.text import JsonTokenizer, T5Config

DIGITS = "configs/tarflow_digits.py"
MOST_SECONDS, MOST_BYTES = 10, 1 << 27


def refused(call, *parts, error=ValueError):
    """Asserts one sentence with the parts in it, soon and without much memory."""
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(error) as caught:
            call()
        assert time.process_time() - began < MOST_SECONDS
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 2000
    for part in parts:
        assert str(part) in message
    return message


@pytest.mark.parametrize("layout", rows(LAYOUTS, ("legacy",)))
@pytest.mark.parametrize("name", rows(PROGRAMS, ("forty names of one dictionary, four deep", "lists in lists")))
def test_pickles_cost_no_more_than_their_size(layout, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = LAYOUTS[layout](tmp_path / "weights.pth", PROGRAMS[name])
    refused(lambda: read_state_dict(path), path)
    assert [file.name for file in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("name", rows(SLOW_KEYS, ("many numbers",)))
def test_keys_that_take_long_to_find_are_refused(name, tmp_path):
    path = zip_layout(tmp_path / "weights.pth", SLOW_KEYS[name])
    refused(lambda: read_state_dict(path), path, "integer keys" if name == "many numbers" else "neither text")


def test_numbers_of_parameters_are_keys_of_an_optimizer(tmp_path):
    ids = b"}" + b"".join(push(number) + b"}s" for number in (0, 1, -1, 140_737_488_355_328))
    program = b"}" + push("state") + ids + b"s" + push("model") + dictionary({"w": tensor((2, 2), (2, 1))}) + b"s"
    assert read_state_dict(zip_layout(tmp_path / "w.pth", program), entry="model")["w"].shape == (2, 2)


def test_tensors_that_share_a_storage_hold_no_more_than_some_copies_of_the_file(tmp_path):
    kept = tensor((1024,), (1,), count=1024) + b"q\x010"
    few = dictionary({f"w{index}": b"h\x01" for index in range(4)})
    assert len(read_state_dict(zip_layout(tmp_path / "few.pth", kept + few, bytes(4096)))) == 4
    many = dictionary({f"w{index}": b"h\x01" for index in range(1000)})
    path = zip_layout(tmp_path / "many.pth", kept + many, bytes(4096))
    refused(lambda: read_state_dict(path), path, "4,096,000")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_lie_about_themselves_are_refused(name, tmp_path):
    path = tmp_path / "weights.pth"
    ARCHIVES[name](path)
    refused(lambda: read_state_dict(path), path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b'{"a":' * 200_000, "deep"),
        (json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 9]} for i in range(9000)}), "9"),
        (b'{"a":{"dtype":"F32","shape":[99999999999999999999],"data_offsets":[0,16]}}', "size"),
        (b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,1e999]}}', "1e999"),
    ],
)
def test_safetensors_headers_cost_no_more_than_their_size(header, why, tmp_path):
    text = header if isinstance(header, bytes) else header.encode()
    path = tmp_path / "weights.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refused(lambda: read_state_dict(path), path, why)
    path.write_bytes(struct.pack("<Q", 1 << 63) + b"{" + bytes(1 << 10))
    refused(lambda: read_state_dict(path), path, "truncated")


def test_weights_are_regular_files(tmp_path):
    os.mkfifo(tmp_path / "fifo.pth")
    (tmp_path / "zero.pth").symlink_to("/dev/zero")
    for name in ("fifo.pth", "zero.pth"):
        refused(lambda name=name: read_state_dict(tmp_path / name), "regular file")


# -- numbers ----------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "blocks": (lambda: flowgen.TARFlowConfig(image_size=8, num_blocks=10**6), "num_blocks is 1000000"),
    "layers": (lambda: flowgen.TARFlowConfig(image_size=8, layers_per_block=10**7), "layers_per_block"),
    "width": (lambda: flowgen.TARFlowConfig(image_size=8, width=10**9), "width is 1000000000"),
    "sides": (lambda: flowgen.TARFlowConfig(image_size=(8, 10**9)), "image_size"),
    "tokens": (lambda: flowgen.TARFlowConfig(image_size=1 << 14, patch_size=1), "tokens"),
    "patches of 0": (lambda: flowgen.TARFlowConfig(image_size=8, patch_size=0), "patch_size is 0"),
    "heads of 0": (lambda: flowgen.TARFlowConfig(image_size=8, head_dim=0), "head_dim is 0"),
    "text as width": (lambda: flowgen.TARFlowConfig(image_size=8, width="wide"), "width is 'wide'"),
    "no number": (lambda: flowgen.TARFlowConfig(image_size=8, width=float("nan")), "width is nan"),
    "a long number": (lambda: flowgen.TARFlowConfig(image_size=8, width=10**5000), "width is over 10^"),
    "entries": (lambda: STARFlowConfig(image_size=8, layers_per_block=(1,) * 10**5), "has 100000 entries"),
    "frames": (lambda: STARFlowVConfig(image_size=8, frames=10**12), "frames"),
    "layers of a DiT": (lambda: DiTConfig(image_size=8, num_layers=10**7), "num_layers is 10000000"),
    "positions of a DiT": (lambda: DiTConfig(image_size=1 << 14, patch_size=2, width=64), "position table"),
    "levels": (lambda: UNetConfig(image_size=1 << 14, multipliers=(1,) * 14), "multipliers has 14 entries"),
    "blocks of a level": (lambda: UNetConfig(image_size=32, blocks_per_level=10**6), "blocks_per_level"),
    "layers of an MLP": (lambda: MLPConfig(num_layers=10**6), "num_layers"),
    "buckets": (lambda: T5Config(num_buckets=0), "num_buckets is 0"),
    "distance": (lambda: T5Config(max_distance=8), "max_distance is 8"),
    "widths": (lambda: AutoencoderConfig(widths=(32,) * 30), "widths has 30 entries"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_that_cannot_be_are_refused_before_anything_is_built(name, untyped):
    make, message = OUT_OF_RANGE[name]
    refused(make, message)


FLAGS = {
    "--train.steps 1099511627776": "train.steps is 1099511627776; it must be from 1 to 2147483647",
    "--train.batch_size 1000000000000": "train.batch_size",
    "--model.width 1000000000": "model.width",
    "--sampling.num 100000000000": "sampling.num",
    f"--optim.lr {'9' * 400}": "optim.lr",
    f"--model.width {'9' * 4000}": "model.width",
    f"--model.width {'(' * 5000}": "model.width",
    "--log.keep 99999999999": "log.keep",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_numbers_on_the_command_line_have_the_same_ranges(flags, capsys):
    assert main(["info", "--config", DIGITS, *flags.split()]) == 2
    error = capsys.readouterr().err
    assert FLAGS[flags] in error
    assert error.count("\n") == 1
    assert len(error) < 2000


def test_numbers_in_the_config_of_a_run_have_the_same_ranges():
    plain = experiments.load_config(DIGITS).to_json()
    for group, name, value in (("model", "num_blocks", 10**6), ("model", "width", 10**9), ("train", "steps", 2**40)):
        damaged = {**plain, group: {**plain[group], name: value}}
        refused(lambda damaged=damaged: experiments.from_json(damaged), f"{group}.{name} is {value}")


def test_a_model_larger_than_the_memory_is_told_before_it_is_made(tmp_path, capsys):
    words = ["train", "--config", DIGITS, "--workdir", str(tmp_path / "run"), "--model.width", "65536"]
    assert main([*words, "--model.layers_per_block", "1024"]) == 2
    assert "parameters take" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# -- published YAML, configs and tokenizers -----------------------------------------------------------------------

CHANGES = {
    "blocks": {"layers_per_block": "2", "blocks": 10**8},
    "layers_per_block": {"layers_per_block": "2 " * 10**6},
    "head_dim": {"head_dim": 0},
    "patch_size": {"patch_size": 0},
    "channels": {"channels": 10**9},
    "img_size": {"img_size": "big"},
    "vae": {"vae": 3},
    "noise_std": {"noise_std": float("nan")},
    "use_bias": {"use_bias": [1]},
    "vid_size": {"vid_size": "9" * 5000 + ":1"},
}


def test_names_wrapped_without_end_are_refused():
    weights = {"module." * 20_000 + "blocks.0.pos_embed": np.zeros((4, 8), np.float32)}
    refused(lambda: convert.tarflow(weights, image_size=8, patch_size=2), "not TARFlow weights")


@pytest.mark.parametrize("name", CHANGES)
def test_published_arguments_that_cannot_be_are_refused_by_name(name):
    shape = sw.CASES["text"]
    weights = sw.state_dict(shape)
    refused(lambda: convert.starflow(weights, shape.arguments() | CHANGES[name]), name)


T5_CHANGES = [
    ({"num_layers": 10**7}, "num_layers is 10000000"),
    ({"num_layers": "2"}, "num_layers is '2'"),
    ({"d_model": 10**9}, "width"),
    ({"vocab_size": 1 << 24, "d_model": 1 << 16}, "do not fit"),
    ({"d_kv": [1]}, "d_kv is [1]"),
    ({"relative_attention_num_buckets": 0}, "num_buckets is 0"),
    ({"num_heads": None}, "num_heads is None"),
    ({"model_type": {"a": 1}}, "has model_type"),
]


@pytest.mark.parametrize(("change", "message"), T5_CHANGES)
def test_configs_of_text_encoders_that_cannot_be_are_refused(change, message, tmp_path):
    folder = publish(tmp_path / "t5", cw.T5 | change, cw.state_dict("t5"), "model.safetensors")
    (folder / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    refused(lambda: load_text_encoder(folder, length=8), folder, message)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link"])
def test_parts_of_weights_stay_in_their_folder(name, tmp_path):
    (tmp_path / "secret").write_bytes(b"secret of somebody else")
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "link").symlink_to("../secret")
    (folder / "config.json").write_text(json.dumps(cw.AUTOENCODER))
    index = {"weight_map": {"encoder.conv_in.weight": name}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    message = refused(lambda: load_autoencoder(folder), "a file named in", name)
    assert "somebody" not in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "tokenizer.json"])
def test_files_of_a_folder_that_are_nested_without_end_are_refused(name, tmp_path):
    folder = publish(tmp_path / "t5", cw.T5, cw.state_dict("t5"), "model.safetensors")
    if name != "tokenizer.json":
        (folder / "spiece.model").write_bytes((cw.HERE / "spiece.model").read_bytes())
    if name == "model.safetensors.index.json":
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b'{"a":' * 100_000)
    refused(lambda: load_text_encoder(folder, length=8), folder / name, "deep")


def test_a_template_without_its_special_tokens_is_refused(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    known = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "[CLS]": 1, "a": 2}, unk_token="[UNK]"))
    known.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 1)])
    good = json.loads(known.to_str())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(good))
    assert JsonTokenizer(path)("a") == [1, 2]
    good["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(good))
    refused(lambda: JsonTokenizer(path), path, "[CLS]")


# -- latents ------------------------------------------------------------------------------------------------------


@pytest.fixture
def latents(tmp_path):
    folder = tmp_path / "latents"
    (folder / "train-00000").mkdir(parents=True)
    for part, array in (("mean", np.zeros((3, 2, 2, 1), np.float32)), ("label", np.zeros(3, np.int32))):
        np.save(folder / "train-00000" / f"{part}.npy", array)
    np.save(folder / "train-00000" / "std.npy", np.zeros((3, 2, 2, 1), np.float32))
    shard = {
        "folder": "train-00000",
        "split": "train",
        "count": 3,
        "shape": [2, 2, 1],
        "has_text": False,
        "kind": "image",
    }
    index = {"format": "flowgen latents 3", "class_names": [], "provenance": {}, "shards": [shard]}
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def changed(directory, **change):
    index = json.loads((directory / "dataset.json").read_text())
    index["shards"][0] |= change
    (directory / "dataset.json").write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../latents/train-00000", "/tmp", "link"])
def test_parts_of_latents_stay_in_their_folder(name, latents, tmp_path):
    assert len(read_latents(latents, "train")) == 3
    (latents / "train-00000").rename(tmp_path / "elsewhere")
    (latents / "link").symlink_to("../elsewhere")
    changed(latents, folder=name)
    refused(lambda: read_latents(latents, "train"), name)


@pytest.mark.parametrize("change", [{"count": 1 << 60}, {"count": "3"}, {"shape": [2] * 1000}, {"shape": [2, 2, 1e3]}])
def test_indices_that_cannot_be_are_refused(change, latents):
    changed(latents, **change)
    refused(lambda: read_latents(latents, "train"), "dataset.json")


NPY_HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4611686018427387904, 4)}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 150 + ")" * 150 + "}",
    "{'descr': '|O', 'fortran_order': False, 'shape': (3, 2, 2, 1)}",
    "{'descr': '|V999999999', 'fortran_order': False, 'shape': (3,)}",
    "__import__('os').system('touch executed')",
    "",
]


@pytest.mark.parametrize("header", NPY_HEADERS)
def test_arrays_that_are_none_are_refused(header, latents):
    text = header.encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(64)
    (latents / "train-00000" / "mean.npy").write_bytes(content)
    refused(lambda: read_latents(latents, "train"), "mean.npy")


def test_arrays_are_regular_files(latents):
    (latents / "train-00000" / "mean.npy").unlink()
    os.mkfifo(latents / "train-00000" / "mean.npy")
    refused(lambda: read_latents(latents, "train"), "mean.npy", "FIFO")


# -- what is shown --------------------------------------------------------------------------------------------------

ESCAPES = "a\x1b[2J\x1b]0;title\x07\u202egnp"


@pytest.mark.parametrize(
    "words",
    [
        ["info", "--checkpoint", ESCAPES],
        ["info", "--config", ESCAPES],
        pytest.param(["info", "--config", DIGITS, "--name", ESCAPES], marks=pytest.mark.slow),  # counts the cost
        ["info", "--config", DIGITS, f"--{ESCAPES}", "1"],
        ["sample", "--checkpoint", ESCAPES, "--out", f"{ESCAPES}.png"],
        ["info", "--config", DIGITS, "--num", ESCAPES],
        ["convert", ESCAPES, "--to", ESCAPES, "--image-size", "8", "--patch-size", "2", "--noise-std", "0"],
        ["train", "--config", DIGITS, "--workdir", "w", "--data.name", "folder", "--data.path", ESCAPES],
        [ESCAPES],
    ],
)
def test_what_controls_a_terminal_is_never_shown(words, capsys):
    main(words)
    shown = capsys.readouterr()
    for text in (shown.out, shown.err):
        assert not {"\x1b", "\x07", "\u202e"} & set(text)
    assert "\\x1b" in shown.out + shown.err


def test_warnings_and_log_lines_show_names_as_errors_do(capsys, monkeypatch):
    import logging
    import warnings

    from flowgen.cli import info

    def run(options, rest):
        warnings.warn(f"left out {ESCAPES}", stacklevel=1)
        logging.getLogger("flowgen.data.folder").warning("skipped %s", ESCAPES)
        return 0

    monkeypatch.setattr(info, "run", run)
    shown_by_others = logging.StreamHandler(sys.stderr)
    monkeypatch.setattr(logging.getLogger(), "handlers", [shown_by_others])
    assert main(["info", "--config", DIGITS]) == 0
    error = capsys.readouterr().err
    assert error.count("\\x1b[2J") == 2
    assert "\x1b" not in error
    assert error.count("\n") == 2


def test_ranges_leave_published_models_as_they_are():
    # The largest that is published of each kind.
    flowgen.TARFlowConfig(image_size=256, patch_size=8, width=1024, num_blocks=8, layers_per_block=8)
    T5Config(vocab_size=256384, width=4096, num_layers=24, num_heads=64, hidden=10240)
    DiTConfig(image_size=64, width=1152, num_layers=28, head_dim=72)
    clips = STARFlowVConfig(image_size=(30, 53), channels=48, width=3072, deep_width=4096, frames=121)
    assert dataclasses.replace(clips, denoiser_layers=8).denoiser_layers == 8


def test_views_of_one_storage_are_few(tmp_path):
    weights = {f"tied{index}": np.ones((64, 64), np.float32) for index in range(3)}
    got = read_state_dict(write_safetensors(tmp_path / "a.safetensors", weights))
    assert {name: x.shape for name, x in got.items()} == {name: x.shape for name, x in weights.items()}
