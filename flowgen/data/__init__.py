"""Pictures and points: sources by name, stateless batches, and media files."""

from flowgen.data.clips import ClipsConfig, load_clips
from flowgen.data.loader import Loader, fixed_batches, prefetch
from flowgen.data.media import (
    atomic_file,
    check_image_path,
    check_writable,
    from_uint8,
    image_grid,
    save_image,
    to_uint8,
)
from flowgen.data.points import PointsConfig, blank_batches
from flowgen.data.registry import load
from flowgen.data.sources import ArraySource, Batch, DataConfig, Source, check_classes, hold_out

__all__ = [
    "ArraySource",
    "Batch",
    "ClipsConfig",
    "DataConfig",
    "Loader",
    "PointsConfig",
    "Source",
    "atomic_file",
    "blank_batches",
    "check_classes",
    "check_image_path",
    "check_writable",
    "fixed_batches",
    "from_uint8",
    "hold_out",
    "image_grid",
    "load",
    "load_clips",
    "prefetch",
    "save_image",
    "to_uint8",
]
