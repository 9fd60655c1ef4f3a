"""Tar files that are damaged, changed or mistaken for something else: what is left out, and what is refused by name."""

import dataclasses
import gzip
import io
import os
import re
import subprocess
import tarfile

import numpy as np
import pytest
from commands import one_sentence
from tar_files import (
    SHAPE,
    add,
    all_of,
    by_class,
    levels_of,
    packed,
    paint,
    png,
    samples,
    three,
)

from flowgen.data import DataConfig, load
from flowgen.data.tar import list_tar, local_shards
from flowgen.data.tar_headers import members

WRONG_CLASSES = {
    "one is missing": ([0, None, 1], r"has classes for only 2 of 3 files; add '.*/001\.cls', or remove"),
    "empty": ([0, " ", 1], r"'.*a\.tar/001\.cls' in data\.path is ''; write one class number"),
    "two lines": ([0, "a\nb", 1], "write one class number or one class name"),
    "a name among numbers": (
        [0, 1, "dog"],
        r"002\.cls' in data\.path contains 'dog', but classes must be either all n",
    ),
    "a number among names": (["cat", "3", "dog"], r"001\.cls' in data\.path contains '3', but classes must be either"),
    "below none": ([0, -2, 1], r"001\.cls' in data\.path contains '-2', but classes must be either all numbers"),
    "fractions": ([0, "1.0", 2], r"001\.cls' in data\.path contains '1\.0', but classes must be either all numbers"),
    "ten digits": ([0, 1_234_567_890, 1], r"001\.cls' in data\.path contains '1234567890', but classes must"),
    "far too large": ([0, 99_999_999, 1], "contains 99999999, which is too large for 3 samples"),
}


@pytest.mark.parametrize("case", WRONG_CLASSES)
def test_class_files_without_a_class_are_named(tmp_path, case):
    classes, sentence = WRONG_CLASSES[case]
    samples(tmp_path / "a.tar", classes, texts=False)
    with pytest.raises(ValueError, match=sentence) as error:
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="all")
    one_sentence(error)


def test_only_plain_files_inside_are_read(tmp_path, caplog):
    secret = tmp_path / "secret.png"
    paint(secret, 0)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "a.tar", "w") as shard:
        add(shard, "cat/0.png", png(1))
        add(shard, "./cat//./1.png", png(2))
        add(shard, "cat/1.png", png(3))  # An appended version replaces the first, as when unpacking.
        add(shard, f"{secret}", png(4))
        add(shard, "../secret.png", png(5))
        add(shard, "cat/../../secret.png", png(6))
        add(shard, "cat/2.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add(shard, "cat/3.png", type=tarfile.LNKTYPE, linkname="cat/0.png")
        add(shard, "cat/4.png", type=tarfile.FIFOTYPE)
        add(shard, "cat/5.png", type=tarfile.CHRTYPE)
        add(shard, "cat/6.png", png(7), pax_headers={"GNU.sparse.map": "0,1"})
        add(shard, "cat/7.png", png(8), type=b"Q")
    (tmp_path / "shards" / "sizes.json").write_text("{}")
    (tmp_path / "shards" / "old").mkdir()
    (tmp_path / "shards" / "same.tar").symlink_to("a.tar")
    dataset = load(DataConfig("tar", path=str(tmp_path / "shards"), eval_fraction=0.0), **SHAPE, split="all")
    assert sorted(levels_of(dataset)) == [1, 3]
    assert caplog.messages == [
        f"Left out of data.path '{tmp_path / 'shards'}': 1 .json; "
        "1 file already listed under another name ('same.tar'); "
        "3 entries other than a file or a folder ('cat/4.png', ...); 1 folder next to the .tar files ('old'); "
        "1 file replaced by a later one of the same name ('cat/1.png'); "
        "3 entries with an absolute name, or with '..' in its name ('../secret.png', ...); "
        "2 links not followed in a tar file ('cat/2.png', ...); 1 sparse file not readable in a tar file ('cat/6.png')."
    ]


def header_at(content, name):
    return content.index(name.encode() + b"\0")


def changed(content, at, value):
    return content[:at] + value + content[at + len(value) :]


def with_checksum(content, at):
    block = content[at : at + 512]
    return changed(content, at + 148, b"%06o\0 " % (sum(block) - sum(block[148:156]) + 256))


def with_size(content, field):
    at = header_at(content, "001.png")
    return with_checksum(changed(content, at + 124, field), at)


def pax_of(records):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as shard:
        add(shard, "0.png", png(1))
        add(shard, "extra", records, type=tarfile.XHDTYPE)
        add(shard, "1.png", png(1))
    return file.getvalue()


DAMAGE = {
    "two joined by cat": (lambda c: c + c, "continues after its end mark"),
    "an empty block inside": (
        lambda c: c[: header_at(c, "002.png")] + bytes(512) + c[header_at(c, "002.png") :],
        "continues after its end mark",
    ),
    "empty": (lambda c: b"", "is not a tar file; pack it again"),
    "no tar": (lambda c: png(1) * 20, "is not a tar file; pack it again"),
    "gzip": (gzip.compress, "is compressed with gzip.*decompress it with `gunzip`"),
    "zstd": (lambda c: b"\x28\xb5\x2f\xfd" + c, "is compressed with zstd.*`unzstd`"),
    "cut in a file": (lambda c: c[: header_at(c, "002.png") + 600], "ends in the middle of '002.png' .*truncated"),
    "cut in a header": (lambda c: c[: header_at(c, "002.png") + 100], "no end mark after '001.json' .*truncated"),
    "cut between files": (lambda c: c[: header_at(c, "002.png")], "no end mark after '001.json' .*truncated"),
    "a changed name": (lambda c: changed(c, header_at(c, "001.png"), b"9"), "damaged after '000.json' .a checksum"),
    "noise": (lambda c: changed(c, header_at(c, "001.png"), bytes(range(256)) * 2), "damaged after '000.json'"),
    "no header": (lambda c: changed(c, 0, b"9"), "is not a tar file"),
    "a size beyond the file": (lambda c: with_size(c, b"77777777777\0"), "ends in the middle of '001.png'"),
    "a huge size": (lambda c: with_size(c, b"\x80" + b"\xff" * 11), "ends in the middle of '001.png'"),
    "a negative size": (lambda c: with_size(c, b"\xff" * 12), "damaged after '000.json' .*no valid size"),
    "a size of letters": (lambda c: with_size(c, b"abcdefghijk\0"), "damaged after '000.json' .*no valid size"),
    "pax without an end": (lambda c: pax_of(b"99 path=a"), "damaged after '0.png' .*pax header at byte"),
    "pax of length 0": (lambda c: pax_of(b"0 path=a\n"), "damaged after '0.png' .*pax header at byte"),
    "pax without numbers": (lambda c: pax_of(b"path=a\n" * 9), "damaged after '0.png' .*no valid size"),
    "pax with a size beyond the file": (lambda c: pax_of(b"18 size=999999999\n"), "ends in the middle of '1.png'"),
    "pax of megabytes": (lambda c: pax_of(b"1" * (2 << 20)), "damaged after '0.png' .*2,097,152 bytes"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_shards_are_named_with_a_remedy(tmp_path, case):
    damage, sentence = DAMAGE[case]
    path = tmp_path / "a.tar"
    path.write_bytes(damage(three(path)))
    with pytest.raises(ValueError, match=f"'{re.escape(str(path))}' .*{sentence}") as error:
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="all")
    one_sentence(error)


def test_cuts_and_changes_anywhere_never_change_what_is_read_in_silence(tmp_path):
    """Images are read as they were, or one sentence names the shard. Content has no checksum of its own in a tar."""
    path = tmp_path / "a.tar"
    content = three(path)
    random = np.random.default_rng(0)
    cuts = [content[:at] for at in random.integers(0, len(content) - 1025, 40)]
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    flips = [
        changed(content, at, bytes([content[at] ^ 1 << random.integers(8)]))
        for at in (random.choice(headers, 60) + random.integers(0, 512, 60)).tolist()
    ]
    for damaged in (*cuts, *flips):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=re.escape(str(path))) as error:
            list_tar(path, (".png",), "images")
        one_sentence(error)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_headers_are_read_as_by_tarfile(tmp_path, form):
    path = tmp_path / "a.tar"
    names = ["a", "b/" * 60 + "c", "plain/", "x" * 100, "y" * 90 + "/" + "z" * 90]
    if form != tarfile.USTAR_FORMAT:
        names += ["日本" * 200, "é" * 99, "line\nbreak", "n" * 5000]
    with tarfile.open(path, "w", format=form) as shard:
        for number, name in enumerate(names):
            is_folder = name.endswith("/")
            content = b"" if is_folder else b"." * (number * 511)
            add(shard, name, content, type=tarfile.DIRTYPE if is_folder else tarfile.REGTYPE)
        add(shard, "link" * 24, type=tarfile.SYMTYPE, linkname="elsewhere/" * 9)
        add(shard, "last", b"content", mtime=1e9 + 0.5, uname="ü")
    with tarfile.open(path) as shard:
        expected = [(entry.name, entry.offset_data, entry.size) for entry in shard]
    found = [
        (name.rstrip("/"), offset, size) for name, _, offset, size in members(local_shards(path, "images").files[0])
    ]
    assert found == expected


def test_the_command_writes_sparse_files_that_are_left_out(tmp_path):
    with (tmp_path / "hole.png").open("wb") as file:
        for place in range(40):  # more holes than fit into one header
            file.seek(place << 20)
            file.write(b"content")
    paint(tmp_path / "whole.png", 1)
    for form in ("gnu", "pax"):
        shard = tmp_path / f"{form}.tar"
        command = ["tar", "cf", shard, "--sparse", f"--format={form}", "-C", tmp_path, "hole.png", "whole.png"]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("this tar writes no sparse files")
        listing = list_tar(shard, (".png",), "images")
        assert listing.names == ("whole.png",)
        assert listing.files[0].read_bytes() == (tmp_path / "whole.png").read_bytes()
        if shard.stat().st_size < 10 << 20:  # some file systems have no holes
            assert "1 sparse file" in listing.left_out[0]


@pytest.mark.parametrize("in_memory_bytes", [0, 1 << 20])
def test_an_unreadable_image_is_refused_or_skipped_as_in_a_folder(tmp_path, in_memory_bytes, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        for number in range(4):
            add(shard, f"{number}.png", png(number) if number != 2 else png(number)[:-30])
    config = DataConfig("tar", path=str(tmp_path), eval_fraction=0.0, in_memory_bytes=in_memory_bytes)
    with pytest.raises(ValueError, match=r"1 image that cannot be read: '.*a\.tar/2\.png' \(") as error:
        all_of(load(config, **SHAPE, split="all"))
    one_sentence(error)
    dataset = load(dataclasses.replace(config, on_corrupt="skip"), **SHAPE, split="all")
    assert sorted(levels_of(dataset)) == [0, 1, 3]
    assert "Left out" in caplog.text
    assert "a.tar/2.png' (" in caplog.text


@pytest.mark.parametrize("on_corrupt", ["refuse", "skip"])
@pytest.mark.parametrize("change", ["longer", "touched", "shorter"])
def test_a_shard_that_changes_while_it_is_read_ends_the_run(tmp_path, on_corrupt, change):
    path = tmp_path / "a.tar"
    three(path)
    config = DataConfig("tar", path=str(path), eval_fraction=0.0, in_memory_bytes=0, on_corrupt=on_corrupt)
    dataset = load(config, **SHAPE, split="all")
    dataset[np.arange(3)]
    if change == "touched":
        os.utime(path, (1, 1))
    else:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + (512 if change == "longer" else -2048))
    with pytest.raises(ValueError, match=r"a\.tar' has changed since it was opened") as error:
        dataset[np.arange(3)]
    one_sentence(error)


def test_shards_and_folders_are_told_apart(tmp_path):
    photos, shards = packed(tmp_path, by_class)
    for config, sentence in (
        (DataConfig("folder", path=str(shards)), r"has no images, but \.tar files; set data\.name to 'tar'"),
        (DataConfig("folder", path=str(shards / "a.tar")), r"is a file; .*or set data\.name to 'tar'"),
        (DataConfig("tar", path=str(photos)), r"has no \.tar files; .*set data\.name to 'folder'"),
        (DataConfig("tar", path=str(tmp_path / "none")), r"does not exist; give a \.tar file"),
        (DataConfig("tar", path=str(photos / "cat" / "0.png")), "is not a tar file"),
        (DataConfig("tar"), r"data\.path is empty"),
    ):
        with pytest.raises((ValueError, OSError), match=sentence) as error:
            load(config, **SHAPE, split="train")
        one_sentence(error)
    (shards / "b.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"compressed tar files \(such as 'b\.tar\.gz'\).*decompress"):
        load(DataConfig("tar", path=str(shards)), **SHAPE, split="train")


def test_shards_without_images_say_what_they_have(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as shard:
        add(shard, "a.xcf", b"no image")
    with pytest.raises(ValueError, match=r"has no images; put .*\(it contains 1 \.xcf\)"):
        load(DataConfig("tar", path=str(tmp_path)), **SHAPE, split="train")
