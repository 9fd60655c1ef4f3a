"""Lists the images or videos in a bucket, stored as single files or in tar files."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from flowgen.data.bucket_files import BucketFolder, BucketShard
from flowgen.data.entries import RUN, Entries, Listing
from flowgen.data.inventory import quoted
from flowgen.data.tar import BESIDE, TAR, Shards, check_uncompressed
from flowgen.places import RemoteFolder
from flowgen.printable import composed

# Files by which a folder is a run: its config, if it has a digest, or the metadata of a checkpoint.
_OF_RUN = re.compile(r"(.+)/(config\.json|checkpoints/[0-9]+/meta\.json)")


def list_bucket(url: str, suffixes: Collection[str], what: str) -> Listing:
    """Lists the files with these suffixes in a folder of a bucket, by the same rules as `list_files`.

    Raises FileNotFoundError if the folder does not exist or is empty, and ValueError in the same cases as `list_files`.

    Example:
        listing = list_bucket("gs://bucket/photos", (".png", ".jpg"), "images")
    """
    folder = RemoteFolder(url)
    sizes = folder.sizes()
    if not sizes:
        raise FileNotFoundError(f"data.path '{url}' does not exist or is empty; give the folder that has the {what}.")
    entries, runs, hidden = Entries(tuple(suffixes)), _runs(folder, sizes), set()
    owners: dict[str, str] = {}
    for name in sorted(sizes):
        parts = name.split("/")
        depth = next((i for i, part in enumerate(parts) if part.startswith(".")), None)
        folders = {"/".join(parts[:i]) for i in range(1, len(parts))}
        if depth is not None:
            hidden.add("/".join(parts[: depth + 1]))
        elif not folders & runs:
            owner = composed(parts[0]) if folders else ""
            if owner and owners.setdefault(owner, parts[0]) != parts[0]:
                raise ValueError(f"data.path '{url}' has two folders named {quoted(owner)}; rename one.")
            if owner:
                entries.taken.setdefault(owner, [])
            entries.take(name, owner)
    entries.hidden = len(hidden)
    for run in sorted(runs):
        entries.leave(run, RUN)
    if not any(entries.taken.values()) and any(name.lower().endswith(TAR) for name in entries.others):
        raise ValueError(f"data.path '{url}' has no {what}, but .tar files; set data.name to 'tar' to read these.")
    return entries.listing(BucketFolder(folder, sizes), what)


def bucket_shards(url: str, what: str) -> Shards:
    """Returns the tar file at this URL or, if the URL is a folder, all tar files in the folder, ordered by name.

    Raises FileNotFoundError if there are none, and ValueError if one of them is compressed.

    Example:
        shards = bucket_shards("gs://bucket/photos", "images")
    """
    if url.lower().endswith(TAR):
        place, _, name = url.rpartition("/")
        folder, names = RemoteFolder(place), (name,)
        sizes = folder.sizes(name)
    else:
        folder, names = RemoteFolder(url), ()
        sizes = folder.sizes()
    shown = [name for name in sizes if not name.startswith(".")]
    files = [name for name in shown if "/" not in name]
    check_uncompressed(url, files)
    names = names or tuple(sorted(name for name in files if name.lower().endswith(TAR)))
    if not names or names[0] not in sizes:
        raise FileNotFoundError(
            f"data.path '{url}' has no .tar files; check the name of the bucket and path, or set "
            f"data.name to 'folder' to read {what} that are not in tar files."
        )
    return Shards(
        url,
        tuple(BucketShard(folder, name, sizes[name]) for name in names),
        names,
        others=tuple(name for name in files if name not in {*names}),
        left_out=tuple((inner, BESIDE) for inner in sorted({name.partition("/")[0] for name in shown if "/" in name})),
        hidden=len({name.partition("/")[0] for name in sizes} - {name.partition("/")[0] for name in shown}),
    )


def _runs(folder: RemoteFolder, sizes: Mapping[str, int]) -> set[str]:
    """Returns the outermost folders that flowgen runs have written; see `was_trained_in`."""
    runs = set()
    for found in filter(None, map(_OF_RUN.fullmatch, sorted(sizes))):
        if found[2] != "config.json" or b'"sha256"' in folder.read(found[0]):
            runs.add(found[1])
    return {run for run in runs if not any(run.startswith(f"{other}/") for other in runs)}
