"""Text that somebody else wrote: what is read, what is refused, and that neither takes more than the size of it."""

import json
import os
import time
import tracemalloc

import pytest

from flowgen.documents import inside, parse_json, read_bytes, read_json, read_yaml
from flowgen.printable import printable


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refused(call, *parts, error=ValueError):
    """Asserts one sentence with the parts in it."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    for part in parts:
        assert str(part) in message
    return message


def test_json_reads_as_the_standard_library_reads_it(tmp_path):
    value = {"a": [1, -2.5, 1e-7, True, None, 'x [{ " \\ é\u2028'], "b": {"c": {}}, "long": 10**30}
    assert read_json(written(tmp_path, "a.json", json.dumps(value))) == value
    assert read_json(written(tmp_path, "b.json", b"\xef\xbb\xbf" + json.dumps(value).encode())) == value


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("[" * 65 + "]" * 65, "65 levels deep"),
        ("[" * 1_000_000, "1000000 levels deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "100000 levels deep"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN"),
        ("[-Infinity]", "-Infinity"),
        ("[1e999]", "1e999"),
        ("[" + "9" * 5000 + "]", "too many digits (5000)"),
        ("{", "Expecting property name"),
        (b"\xff\xfe{}", "utf-8"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_nothing_to_read_is_refused_by_name(content, why, tmp_path):
    path = written(tmp_path, "config.json", content)
    refused(lambda: read_json(path, fix="encode again"), path, why, "encode again")


@pytest.mark.parametrize("part", [b'"\\', b'"', b"\\"], ids=["both", "quotes", "slashes"])
def test_every_byte_is_looked_at_once(part):
    began = time.process_time()
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(part * 200_000)
    assert time.process_time() - began < 2


ODD_YAML = [
    *("!!bool abc", "!!int ''", "!!timestamp abc", "a: !!set {b}", "a: " + "9:" * 1500 + "9.5", 'a: "\\UFFFFFFFF"'),
    *("a: 1\nb: 2\na: 3", "2001-99-99", "? [1, 2]\n: 3", "a: {<<: 5}"),
]


@pytest.mark.parametrize("content", ODD_YAML)
def test_yaml_that_looks_like_a_value_and_is_none_is_refused_by_name(content, tmp_path):
    path = written(tmp_path, "a.yaml", content)
    refused(lambda: read_yaml(path), path)


def test_brackets_in_texts_are_no_depth():
    assert parse_json(json.dumps(["[" * 1000, '\\"[' * 1000]).encode())[0] == "[" * 1000


def test_files_that_are_too_large_are_not_read(tmp_path):
    path = tmp_path / "large.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    refused(lambda: read_json(path), path, "larger than")
    refused(lambda: read_yaml(path), path, "larger than")
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("read", [read_bytes, read_json, read_yaml])
def test_what_is_no_regular_file_is_refused_at_once(read, kind, tmp_path):
    path = tmp_path / "config.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    refused(lambda: read(path), path, error=(ValueError, IsADirectoryError))


LAUGHS = "\n".join(f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" if i else 'l0: &l0 ["lol"]' for i in range(12))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (LAUGHS, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("[" * 10_000, "nested more than"),
        ("a: " + "1:" * 30_000 + "1", "characters"),
        ("a: !!python/object/apply:os.system [true]", "python/object"),
        ("a: [", "expected the node"),
        ("a: 2001-99-99", "month"),
        ("? [1]\n: 2", "unhashable"),
    ],
)
def test_yaml_that_is_nothing_to_read_is_refused_by_name(content, why, tmp_path):
    path = written(tmp_path, "arguments.yaml", content)
    began = time.perf_counter()
    refused(lambda: read_yaml(path), path, why)
    assert time.perf_counter() - began < 5


def test_yaml_of_plain_values_is_read(tmp_path):
    path = written(tmp_path, "a.yaml", "arguments:\n- a: 1\n- b: 6.4e-5\n- c: x\n- d: null\n")
    assert read_yaml(path) == {"arguments": [{"a": 1}, {"b": 6.4e-5}, {"c": "x"}, {"d": None}]}


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "..", "", ".", "a\0b", "C:\\x", "..\\x", None, 3])
def test_names_that_lead_out_of_a_folder_are_refused(name, tmp_path):
    refused(lambda: inside(tmp_path / "model", name, what="a part"), "a part is", "must be a path inside")


def test_links_may_lead_to_the_folder_and_to_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    (snapshot / "vae").mkdir(parents=True)
    written(blobs, "abcd", "weights")
    (snapshot / "vae" / "model").symlink_to("../../../blobs/abcd")
    (snapshot / "vae" / "same").symlink_to("model")
    (snapshot / "vae" / "out").symlink_to("/etc/passwd")
    (snapshot / "vae" / "circle").symlink_to("circle")
    for name in ("model", "same"):
        assert read_bytes(inside(snapshot / "vae", name, what="a part")) == b"weights"
    refused(lambda: inside(snapshot / "vae", "out", what="a part"), "leads out")
    refused(lambda: inside(snapshot / "vae", "circle", what="a part"), "link")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é日本\u3000字 😀", "plain, é日本\u3000字 😀"),
        ("\x1b[2J\x07", "\\x1b[2J\\x07"),
        ("a\u202egnp.exe", "a\\u202egnp.exe"),
        ("a\u2028b\x85c\rd\ne", "a\\u2028b\\x85c\\x0dd\\x0ae"),
        ("\udcff\U000e0001", "\\udcff\\U000e0001"),
    ],
)
def test_what_controls_a_terminal_is_written_out(text, shown):
    assert printable(text) == shown
    printable(text).encode()
