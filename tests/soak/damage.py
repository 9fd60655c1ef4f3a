"""Damage in good files, and values where others should be."""

import json
import os
import random
import struct

ODD_TEXTS = [
    *(
        "",
        " ",
        "-1",
        "0",
        "1e999",
        "nan",
        "inf",
        "-inf",
        "1_0",
        "0x10",
        "None",
        "true",
        "[]",
        "()",
        "{}",
        "'",
        '"',
        "\\",
    ),
    *("\x1b[2J", "\u202e", "\x00"[:0] + "\x7f", "é", "日本", "😀", "\udcff", "a" * 10_000, "9" * 5000, "(" * 3000),
    *("../../x", "/etc/passwd", "/dev/zero", "/dev/null", ".", "..", "/", "~", "$HOME", "%s%n", "{0}", "x\ny"),
    *(str(2**31), str(2**32), str(2**63), str(2**64), str(10**12), "1e308", "1" + "0" * 300, "[1, 2]", "(1,)", "1,2"),
]
ODD_VALUES = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**40,
        2**63,
        10**30,
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "\x1b[31m",
        "../x",
        "a" * 5000,
    ),
    *([], {}, [[]], [None], {"a": 1}, [1] * 1000, list(range(5)), {"type": "x"}, [[[[[[1]]]]]], "9" * 5000),
]
ODD_TREES = [
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"",
    b"null",
    b"5",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"{",
    b'{"a":1,"a":2}',
    b"NaN",
]


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes with some changed, left out, repeated or put in, or cut."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16, 200))):
        if not out:
            break
        at, kind = rng.randrange(len(out)), rng.random()
        if kind < 0.6:
            out[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind < 0.7:
            del out[at : at + rng.randrange(1, 64)]
        elif kind < 0.8:
            out[at:at] = out[at : at + rng.randrange(1, 64)] * rng.choice((1, 1, 2, 1000))
        elif kind < 0.95:
            size = rng.choice((2, 4, 8))
            out[at : at + size] = rng.choice((b"\xff" * size, b"\0" * size, struct.pack("<Q", 1 << 31)[:size]))
        else:
            del out[at:]
    return bytes(out)


def damaged_tree(rng: random.Random, content: bytes) -> bytes:
    """JSON with other values, names or branches in it; sometimes none."""
    if rng.random() < 0.25:
        return rng.choice(ODD_TREES)
    if rng.random() < 0.2:
        return damaged(rng, content)
    tree = [json.loads(content)]
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, name = rng.choice(list(_places(tree)))
        if rng.random() < 0.15 and isinstance(holder, dict):
            del holder[name]
        elif rng.random() < 0.15 and isinstance(holder, dict):
            holder[rng.choice(ODD_TEXTS[:40]).encode("utf-8", "replace").decode()] = rng.choice(ODD_VALUES)
        else:
            holder[name] = rng.choice(ODD_VALUES)
    return json.dumps(tree[0]).encode()


def _places(tree):
    names = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for name in list(names):
        yield tree, name
        yield from _places(tree[name])


def hand_made(rng, path):
    """A file under the name of a good one: empty, of another kind, a FIFO, a link or a folder."""
    if path.exists():
        path.unlink()
    kind = rng.randrange(6)
    if kind == 0:
        path.write_bytes(b"")
    elif kind == 1:
        path.write_bytes(
            rng.choice((b"<html>", b"%!PS-Adobe\n(x) run", b"version https://git-lfs", b"#!/bin/sh\ntouch x"))
        )
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.symlink_to(rng.choice(("/dev/zero", "/etc/passwd", path.name, "nowhere", "..")))
    elif kind == 4:
        path.mkdir()
    else:
        path.write_bytes(rng.randbytes(5000))


def damage_file(rng, path, tree=False):
    if rng.random() < 0.15:
        hand_made(rng, path)
    else:
        content = path.read_bytes()
        path.write_bytes(damaged_tree(rng, content) if tree else damaged(rng, content))
