"""Files of `torch.save` made by hand, of instructions that torch would never write."""

import itertools
import pickle
import struct
import zipfile

HUGE = 1 << 28


def push(value):
    """Instructions that push a plain value."""
    return pickle.dumps(value, protocol=2)[2:-1]


def tensor(shape=(2, 2), strides=(2, 1), count=4, key="0", offset=0, kind=b"FloatStorage", metadata=b""):
    """Instructions for a tensor over a storage."""
    storage = b"(" + push("storage") + b"ctorch\n" + kind + b"\n" + push(key) + push("cpu") + push(count) + b"tQ"
    view = push(offset) + push(shape) + push(strides) + b"\x89}" + metadata
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"


def dictionary(pairs):
    """Instructions for a dictionary of names to what instructions push."""
    return b"}" + b"".join(push(name) + value + b"s" for name, value in pairs.items())


def tower(levels, width, level, bottom=b"}"):
    """Instructions for containers of which each holds the one before it many times: width ** levels in all."""
    program = bottom + b"q\x00"
    for index in range(levels):
        program += b"0" + level([b"h" + bytes([index])] * width) + b"q" + bytes([index + 1])
    return program


def dicts(parts):
    return b"}" + b"".join(push(f"n{index}") + part + b"s" for index, part in enumerate(parts))


def tuples(parts):
    return b"(" + b"".join(parts) + b"t"


def keys(values, close=b"u"):
    """Instructions for a dictionary with these keys; with another close, a set."""
    if close == b"u":
        return b"}(" + b"".join(push(value) + b"N" for value in values) + close
    return b"\x8f(" + b"".join(map(push, values)) + close


ALIKE = [2.0 ** (61 * power) for power in range(-16, 17)]  # Their hash is 1.
# Keys that Python compares each with all before it, and numbers of which so many can be found.
SLOW_KEYS = {
    "tuples": keys(itertools.product(ALIKE[:8], repeat=3)),
    "tuples in a set": keys(itertools.product(ALIKE[:8], repeat=3), b"\x90"),
    "numbers of one hash": keys(index * (2**61 - 1) for index in range(1, 4)),
    "many numbers": keys(index << 20 for index in range(17_000)),
}
TUPLES = tower(60, 2, tuples, b")")
# What each program costs a reader that does what it says: gigabytes, or no end. All have a few kilobytes.
PROGRAMS = {
    "a memo of 2^28 entries": b"}r" + struct.pack("<I", HUGE),
    "a memo of 2^32 entries": b"}r\xff\xff\xff\xff",
    "dictionaries of dictionaries": tower(40, 4, dicts),
    "forty names of one dictionary, four deep": tower(4, 40, dicts),
    "tuples of tuples as a name": b"}" + TUPLES + b"Ns",
    "tuples of tuples as a size": dictionary({"w": tensor((2, 2), (2, 1)).replace(push((2, 2)), TUPLES)}),
    "a tensor without strides": dictionary({"w": tensor((1 << 16, 1 << 15), (0, 0))}),
    "a text of 2^32 letters": b"X\xff\xff\xff\xffabc",
    "a text of 2^63 letters": b"\x8d" + struct.pack("<Q", 1 << 63) + b"abc",
    "an array of 2^63 bytes": b"\x96" + struct.pack("<Q", 1 << 63),
    "lists in lists": b"]" * 20_000 + b"a" * 19_999,
    "tuples in tuples": b")" + b"\x85" * 20_000,
    "a number of many digits": b"L" + b"9" * 100_000 + b"L\n",
    "a dictionary of one list, many times": push([["a", 1]] * 500)
    + b"q\x00"
    + b"0ccollections\nOrderedDict\nq\x010"
    + b"h\x01h\x00\x85R0" * 500
    + b"}",
    "marks alone": b"(" * 20_000,
    "nothing": b"",
    "a call of the system": b"cos\nsystem\n" + push(("touch executed",)) + b"R",
}


def zip_layout(path, program, storage=bytes(16), compression=zipfile.ZIP_STORED, byteorder=None):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02" + program + b".")
        archive.writestr("archive/data/0", storage)
        if byteorder:
            archive.writestr("archive/byteorder", byteorder)
    return path


def legacy_layout(path, program):
    head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
    pickles = b"".join(pickle.dumps(value, protocol=2) for value in head)
    tail = pickle.dumps(["0"], protocol=2) + struct.pack("<q", 4) + bytes(16)
    path.write_bytes(pickles + b"\x80\x02" + program + b"." + tail)
    return path


LAYOUTS = {"zip": zip_layout, "legacy": legacy_layout}
GOOD = dictionary({"w": tensor((2, 2), (2, 1))})


def _twice(path):
    zip_layout(path, GOOD)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")


def _lying_local_name(path):
    zip_layout(path, GOOD)
    path.write_bytes(path.read_bytes().replace(b"archive/data/0", b"archive/data/1", 1))


def _changed(offset, form, value):
    """The end of the directory with another number in it."""

    def make(path):
        content = bytearray(zip_layout(path, GOOD).read_bytes())
        end = content.rfind(b"PK\5\6")
        struct.pack_into(form, content, end + offset, value)
        path.write_bytes(bytes(content))

    return make


def _many_entries(path):
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(3000):
            archive.writestr(f"archive/data/{index}", b"")
    entry = path.read_bytes()
    end = entry.rfind(b"PK\5\6")
    size, start = struct.unpack_from("<II", entry, end + 12)
    directory = entry[start : start + size]
    times = 70
    record = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, 3000 * times, 3000 * times, size * times, start)
    at = start + size * times
    tail = (
        record
        + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1)
        + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    )
    path.write_bytes(entry[:start] + directory * times + tail)


ARCHIVES = {
    "a name twice": _twice,
    "local names that lie": _lying_local_name,
    "65,535 entries that are not there": _changed(10, "<H", 65_535),
    "a directory of 4 GB": _changed(12, "<I", 0xFFFFFFFF),
    "a directory beyond the end": _changed(16, "<I", 0x7FFFFFFF),
    "two hundred thousand entries": _many_entries,
    "a bomb": lambda path: zip_layout(path, GOOD, bytes(1 << 24), zipfile.ZIP_DEFLATED),
    "a bomb of bzip2": lambda path: zip_layout(path, GOOD, bytes(1 << 24), zipfile.ZIP_BZIP2),
}
