"""Weight files: every layout and dtype, against values written out; and everything that is refused."""

import contextlib
import json
import os
import pickle
import re
import struct
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from soak.torch_programs import LAYOUTS, dictionary, push, tensor, zip_layout

from flowgen.convert import read_state_dict
from flowgen.convert.torch_files import open_torch

FIXTURES = Path(__file__).parent / "fixtures"
RAMP = np.arange(12, dtype=np.float32).reshape(3, 4)
EXPECTED = {
    "f32": RAMP,
    "f64": RAMP.astype(np.float64) / 3,
    "f16": (RAMP / 8).astype(np.float16),
    "bf16": (RAMP * 16).astype(jnp.bfloat16),
    "i64": RAMP.astype(np.int64) - 5,
    "i32": RAMP.astype(np.int32),
    "i16": RAMP.astype(np.int16),
    "i8": RAMP.astype(np.int8) - 5,
    "u8": RAMP.astype(np.uint8) + 200,
    "bool": RAMP > 4,
    "scalar": np.float32(2.5),
    "empty": np.zeros((0, 3), np.float32),
    "transposed": RAMP.T,
    "window": RAMP[1:, 1:3],
    "every_other": RAMP[:, ::2],
    "expanded": np.array([[1, 1, 1], [2, 2, 2]], np.float32),
    "parameter": RAMP[0] + 0.5,
}
EXPECTED_F8 = RAMP.astype(jnp.float8_e4m3fn)
# Linear(3, 2) and LayerNorm(2), each parameter counting up from its shift.
LAYERS = {
    "0.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "0.bias": np.arange(2, dtype=np.float32),
    "1.weight": np.arange(2, dtype=np.float32),
    "1.bias": np.arange(2, dtype=np.float32),
}


def assert_same(got, expected):
    assert list(got) == list(expected)
    for name, want in expected.items():
        assert got[name].dtype == want.dtype, name
        np.testing.assert_array_equal(got[name], want, err_msg=name)
        assert not got[name].flags.writeable or got[name].size == 0


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth", "tensors.safetensors"])
def test_every_dtype_and_stride_reads_as_written(name):
    expected = EXPECTED if name == "torch_legacy.pth" else EXPECTED | {"f8": EXPECTED_F8}
    got = read_state_dict(FIXTURES / name)
    if name == "tensors.safetensors":  # sorted by dtype and name in the file
        assert set(got) == set(expected)
        got = {key: got[key] for key in expected}
    assert_same(got, expected)


def test_views_of_a_file_convert_to_float32_also_where_they_are_not_aligned():
    for name, x in read_state_dict(FIXTURES / "torch_legacy.pth").items():
        np.testing.assert_array_equal(x.astype(np.float32), EXPECTED[name].astype(np.float32), err_msg=name)


def test_the_only_dictionary_of_tensors_is_found_inside_others():
    assert_same(read_state_dict(FIXTURES / "torch_nested.pth"), LAYERS)
    assert_same(read_state_dict(FIXTURES / "torch_nested.pth", entry="model"), LAYERS)


def test_one_of_several_is_chosen_by_name():
    path = FIXTURES / "torch_several.pth"
    assert_same(read_state_dict(path, entry="model"), LAYERS)
    assert_same(read_state_dict(path, entry="ema.weights"), {key: x + 1 for key, x in LAYERS.items()})
    refused(path, r"has 2 state dicts; choose one with entry: 'model', 'ema\.weights'")
    refused(path, "no state dict 'emma'; it has 'model'", entry="emma")
    refused(FIXTURES / "tensors.safetensors", "no entry 'ema'", entry="ema")


def read_all(path, **arguments):
    for x in read_state_dict(path, **arguments).values():
        x.tobytes()


def refused(path, pattern, error=ValueError, **arguments):
    """Asserts that reading raises one sentence that names the file."""
    with pytest.raises(error) as caught:
        read_all(path, **arguments)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert str(path) in message
    assert message.endswith(".")
    assert "\n" not in message


def write(path, content):
    path.write_bytes(content)
    return path


# What is not a weight file.


def test_foreign_files_are_refused(tmp_path):
    refused(tmp_path / "none.pth", "no file", FileNotFoundError)
    refused(tmp_path, "is a folder", IsADirectoryError)
    refused(write(tmp_path / "empty.pth", b""), "neither a safetensors nor a torch.save file")
    refused(write(tmp_path / "page.pth", b"<!DOCTYPE html><html>"), "begins with b'<!DOCTYPE html>")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    refused(write(tmp_path / "pointer.safetensors", pointer), "Git LFS pointer")
    np.savez(tmp_path / "arrays.npz", a=RAMP)
    refused(tmp_path / "arrays.npz", r"zip archive without data\.pkl")
    refused(write(tmp_path / "a.pkl", pickle.dumps({"a": 1})), "pickle that torch.save did not write")
    refused(
        FIXTURES / "torch_optimizer.pth",
        "'epoch', 'name', not a dictionary of tensors",
    )
    refused(FIXTURES / "torch_module.pth", r"uses 'torch\.nn\.modules\.linear\.Linear'.*state_dict")


# What a pickle could do.


each_layout = pytest.mark.parametrize("layout", LAYOUTS.values())


def weight(instructions):
    return dictionary({"w": instructions})


@each_layout
def test_hand_made_file_is_a_file(layout, tmp_path):
    for metadata in (b"", b"}"):
        path = layout(tmp_path / "good.pth", weight(tensor(metadata=metadata)))
        np.testing.assert_array_equal(read_state_dict(path)["w"], np.zeros((2, 2), np.float32))


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@each_layout
def test_code_in_a_file_is_not_executed(layout, tmp_path):
    marker = tmp_path / "executed"
    program = pickle.dumps(Payload(str(marker)), protocol=2)
    pickle.loads(program)
    assert marker.is_dir()
    marker.rmdir()
    refused(layout(tmp_path / "evil.pth", weight(program[2:-1])), r"uses '(posix|nt)\.mkdir'")
    assert not marker.exists()


@each_layout
@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "os.system",
        "functools.partial",
        "collections.OrderedDict.fromkeys",
        "collections.namedtuple",
        "numpy.load",
        "torch.load",
        "torch.storage._load_from_bytes",
        "torch._utils._rebuild_qtensor",
        "flowgen.convert.torch_pickle.TensorUnpickler",
    ],
)
def test_names_that_tensors_do_not_need_are_refused(layout, name, tmp_path):
    module, _, attribute = name.rpartition(".")
    program = f"c{module}\n{attribute}\n".encode()
    refused(layout(tmp_path / "evil.pth", weight(program)), f"uses {name!r}".replace(".", r"\."))


@each_layout
@pytest.mark.parametrize(
    "name",
    ["torch._utils\n_rebuild_tensor_v2", "torch\nSize", "torch\nFloatStorage", "collections\nOrderedDict"],
)
@pytest.mark.parametrize("state", [{"read": 1}, (None, {"read": 1, "__call__": 2})])
def test_a_pickle_cannot_change_the_stand_ins(layout, name, state, tmp_path):
    program = b"c" + name.encode() + b"\n" + push(state) + b"b"
    refused(layout(tmp_path / "evil.pth", weight(program)), "damaged")
    test_hand_made_file_is_a_file(layout, tmp_path)


@each_layout
@pytest.mark.parametrize(
    ("instructions", "pattern"),
    [
        (tensor(offset=1), "beyond its storage '0'"),
        (tensor(shape=(3, 2)), "beyond its storage"),
        (tensor(strides=(3, 1)), "beyond its storage"),
        (tensor(shape=(2**62, 2), strides=(2**62, 1)), "beyond its storage"),
        (tensor(shape=(2**61, 2**61), strides=(0, 0)), "damaged"),
        (tensor(shape=(1,) * 100, strides=(0,) * 100), "damaged"),
        (tensor(offset=-1), "offset is -1"),
        (tensor(strides=(-2, 1)), "stride or offset is -2"),
        (tensor(shape=(2.0, 2)), "size, stride or offset is 2.0"),
        (tensor(shape=(2,)), "an invalid storage, dtype or strides"),
        (tensor(kind=b"float32"), "damaged"),
        (tensor(metadata=push({"neg": True})), "lazy view"),
        (tensor(count=2**40), "truncated|16 bytes instead of"),
        (tensor() + b"0" + tensor(count=3, shape=(1,), strides=(1,)), "has two conflicting descriptions"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n" + push((1, 2, (3,), (4,))) + b"R", "damaged"),
        (b"(" + push("module") + b"tQ", "damaged"),
    ],
)
def test_tensors_that_are_not_inside_their_storage_are_refused(layout, instructions, pattern, tmp_path):
    refused(layout(tmp_path / "evil.pth", weight(instructions)), pattern)


def test_a_dictionary_inside_itself_ends(tmp_path):
    program = b"}q\x63" + push("self") + b"h\x63s"
    refused(zip_layout(tmp_path / "loop.pth", program), "not a dictionary of tensors")


def test_archives_unlike_those_of_torch_are_refused(tmp_path):
    program = weight(tensor())
    refused(zip_layout(tmp_path / "a.pth", program, compression=zipfile.ZIP_DEFLATED), "compressed")
    refused(zip_layout(tmp_path / "b.pth", program, byteorder="big"), "big-endian")
    refused(zip_layout(tmp_path / "c.pth", program, storage=bytes(12)), "12 bytes instead of 16")
    refused(zip_layout(tmp_path / "d.pth", program.replace(push("0"), push("1"))), "'data/1' is missing")


def test_a_flipped_bit_of_a_weight_is_found(tmp_path):
    path = zip_layout(tmp_path / "good.pth", weight(tensor()), storage=b"0123456789abcdef")
    content = path.read_bytes()
    damaged = write(tmp_path / "damaged.pth", content.replace(b"789a", b"789b"))
    refused(damaged, "'archive/data/0' does not match its checksum")


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth", "tensors.safetensors"])
def test_every_truncation_is_refused(name, tmp_path):
    content = (FIXTURES / name).read_bytes()
    for length in [*range(0, len(content), 37), len(content) - 1]:
        refused(write(tmp_path / name, content[:length]), "damaged|truncated|neither|not read")


@pytest.mark.parametrize("name", ["torch_zip.pth", "torch_legacy.pth", "tensors.safetensors"])
def test_damage_anywhere_is_a_sentence_or_harmless(name, tmp_path):
    content = (FIXTURES / name).read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.integers(len(content), size=150):
        damaged = bytearray(content)
        damaged[position] = rng.integers(256)
        path = write(tmp_path / name, bytes(damaged))
        with contextlib.suppress(ValueError):
            read_all(path)


# safetensors.


def safetensors(path, header, body=bytes(16)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return write(path, struct.pack("<Q", len(text)) + text + body)


def spec(start, stop, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "pattern"),
    [
        ({"a": spec(0, 16, [5])}, "'a' does not start where"),
        ({"a": spec(0, 8, [2])}, "16 bytes of tensors, but its header describes 8"),
        ({"a": spec(0, 8, [2]), "b": spec(4, 16, [3])}, "'b' does not start where"),
        ({"a": spec(0, 32, [8])}, "16 bytes of tensors, but its header describes 32"),
        ({"a": spec(0, 16, [-4])}, "not a list of sizes"),
        ({"a": spec(0, 16, [2.0, 2])}, "not a list of sizes"),
        ({"a": spec(0, 16, [4], "F6_E3M2")}, "F6_E3M2"),
        ({"a": {"dtype": "F32"}}, "data_offsets"),
        ({"a": 3}, "damaged"),
        (b'{"a": [1]', "damaged"),
        (b'{"a": 1, "a": 2}', "the key .a. occurs twice"),
        (b"{" * 100_000, "damaged"),
    ],
)
def test_safetensors_headers_that_contradict_the_file_are_refused(header, pattern, tmp_path):
    refused(safetensors(tmp_path / "bad.safetensors", header), pattern)


def test_safetensors_header_longer_than_the_file_is_refused(tmp_path):
    path = write(tmp_path / "bad.safetensors", struct.pack("<Q", 2**50) + b'{"a": 1}')
    refused(path, "header claims to have 1125899906842624 bytes")


def test_open_torch_gives_everything_that_was_saved():
    saved = open_torch(FIXTURES / "torch_nested.pth").saved
    assert saved["epoch"] == 3
    assert saved["name"] == "run"
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1e-3)
