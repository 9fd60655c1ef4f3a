"""Loads datasets of images, clips, points and numbers, computes training batches, and reads and writes media files."""

from flowgen.batch import Batch, Moments
from flowgen.data.classes import check_classes
from flowgen.data.clips import ClipsConfig, load_clips
from flowgen.data.dataset import ArrayDataset, BucketedDataset, DataConfig, Dataset, buckets_of, hold_out
from flowgen.data.found import found_classes, take_inventory
from flowgen.data.inventory import Inventory, told_once
from flowgen.data.latent_files import LatentsConfig, read_latents
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
from flowgen.data.numbers import NumbersConfig, NumbersDataset, SimulatedConfig, load_numbers
from flowgen.data.points import PointsConfig, blank_batches
from flowgen.data.registry import load

__all__ = [
    "ArrayDataset",
    "Batch",
    "BucketedDataset",
    "ClipsConfig",
    "DataConfig",
    "Dataset",
    "Inventory",
    "LatentsConfig",
    "Loader",
    "Moments",
    "NumbersConfig",
    "NumbersDataset",
    "PointsConfig",
    "SimulatedConfig",
    "atomic_file",
    "blank_batches",
    "buckets_of",
    "check_classes",
    "check_image_path",
    "check_writable",
    "fixed_batches",
    "found_classes",
    "from_uint8",
    "hold_out",
    "image_grid",
    "load",
    "load_clips",
    "load_numbers",
    "prefetch",
    "read_latents",
    "save_image",
    "take_inventory",
    "to_uint8",
    "told_once",
]
