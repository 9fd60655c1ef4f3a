"""Datasets of numbers in memory: vectors, sequences and sets from an .npz file or a simulator, with their contexts."""

from __future__ import annotations

import dataclasses
import functools
import zipfile
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from flowgen.batch import Batch
from flowgen.conditioning import UNCONDITIONAL, ContextTokens, Padded, split_padded
from flowgen.contexts import Context, ImageContext, TokenContext
from flowgen.data.bounds import Bounds, bounds_of, check_bounds, within_bounds
from flowgen.data.bucket_files import bucket_file
from flowgen.data.casting import as_float32
from flowgen.data.dataset import Split, hold_out
from flowgen.data.stored import StoredFile
from flowgen.documents import ARRAY_DAMAGE
from flowgen.nn.checks import image_sides
from flowgen.places import is_remote
from flowgen.settings import config
from flowgen.settings.ranges import ProperFraction, Seed, Within
from flowgen.simulators import SLCP, Simulator, TwoMoons

_ARRAYS = ("x", "context", "context_mask", "labels", "mask")
_SIMULATORS: dict[str, type[Simulator]] = {"two_moons": TwoMoons, "slcp": SLCP}


@config
class NumbersConfig:
    """Selects the numbers to train on from an .npz file, as written by `np.savez(path, x=..., context=...)`.

    The file contains `num` samples as an array `x` of floats: vectors `num d` or sequences `num n c`. For a conditional
    model, it also contains one context per sample, as an array of floats `context` (vectors `num k`, tokens `num m k`
    or images `num height width c`), or one class number per sample, as an integer array `labels` of shape `num`, where
    -1 means no class. If context tokens are padded, the file contains a boolean array `context_mask` of shape `num m`
    that is False for padding. If sequences are padded, it contains a boolean array `mask` of shape `num n` that is
    False for the rows of `x` that are padding. Numbers at padding are ignored. Other floats are converted to float32.

    path: path or URL of the .npz file.
    eval_fraction: fraction of the samples that is held out for evaluation; 0 to hold out none.
    shuffle_rows: whether to put the rows of each sequence, except padding, in a new random order at every training
    step. Use it for sets, whose rows have no meaningful order. Rows of held-out samples keep the order of the file.
    low: lower bound of x, such as that of a uniform prior: one number, or a tuple with one number or None for each
    entry of a vector or channel of a sequence; None for no bound. The flow draws only samples within the bounds.
    high: upper bound of x, in the same form as low. If an entry or channel has both bounds, values equal to one of them
    are moved inside by 2^-24 of the distance between the bounds; if it has only one, values equal to it cause an error.

    Raises ValueError unless low is below high wherever both are given, and tuples have equal lengths.

    Example:
        data = NumbersConfig(path="measurements.npz")
    """

    path: str = ""
    eval_fraction: ProperFraction = 0.1
    shuffle_rows: bool = False
    low: Bounds = None
    high: Bounds = None

    def __post_init__(self):
        check_bounds(self.low, self.high)


@config
class SimulatedConfig:
    """Selects a simulator. Samples are parameters drawn from its prior, and their contexts are simulated observations.

    name: the simulator: "two_moons", or "slcp" (simple likelihood, complex posterior); see `flowgen.simulators`.
    simulations: number of simulations, held-out ones included.
    seed: random seed of the simulations.
    eval_fraction: fraction of the simulations that is held out for evaluation; 0 to hold out none.

    Example:
        data = SimulatedConfig("slcp", simulations=30_000)
    """

    name: Literal["two_moons", "slcp"] = "two_moons"
    simulations: Annotated[int, Within(2, 1 << 24)] = 10_000
    seed: Seed = 0
    eval_fraction: ProperFraction = 0.1

    @property
    def simulator(self) -> Simulator:
        """The simulator called `name`, which samples parameters and observations."""
        return _SIMULATORS[self.name]()


@dataclasses.dataclass(frozen=True)
class NumbersDataset:
    """A `Dataset` of `n` vectors `n d` or sequences `n rows c` in memory, with their contexts.

    context: a pytree of arrays whose first axis has length n, in the form that the model accepts; None for no context.

    Example:
        dataset = NumbersDataset(parameters, observations)
        batch = dataset[np.arange(16)]  # Batch: x float32 `16 d`, context float32 `16 k`
    """

    x: Float[np.ndarray, "n *event"]
    context: Any = None
    class_names: tuple[str, ...] = ()

    @property
    def event_shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        return Batch(self.x[indices], jax.tree.map(lambda array: array[indices], self.context))

    def select(self, indices: Int[np.ndarray, " m"]) -> NumbersDataset:
        """Returns a dataset of the samples at `indices`, in the order of `indices`."""
        batch = self[indices]
        return dataclasses.replace(self, x=np.asarray(batch.x), context=batch.context)


def load_numbers(data: NumbersConfig | SimulatedConfig, model: Any, split: Split) -> NumbersDataset:
    """Reads the file or runs the simulator that `data` selects; returns the samples and contexts of one split.

    model: the config of the model that will be trained on them: a `TokenFlowConfig`, or another config with the fields
    shape, context, num_classes and padded. It determines which arrays the file must contain, and their shapes.

    Raises FileNotFoundError if the file does not exist, and ValueError if its arrays do not fit the model, or if
    float32 cannot represent their numbers accurately (see `flowgen.data.casting`).

    Example:
        dataset = load_numbers(SimulatedConfig(), TokenFlowConfig(shape=(2,), context=VectorContext(2)), "train")
    """
    where = f"data.name '{data.name}'" if isinstance(data, SimulatedConfig) else f"data.path '{data.path}'"
    if isinstance(data, SimulatedConfig):
        whole = _simulated(data)
    else:
        path = _file(data.path)
        whole = _bounded(_of_arrays(_read(path), where, model), data, where)
    found = whole if split == "all" else whole.select(hold_out(len(whole), data.eval_fraction, split))
    mask, _ = split_padded(found.context)
    if mask is not None and not np.any(mask):
        raise ValueError(
            f"'mask' in {where} is False everywhere in the split '{split}'; set it to True for the rows that exist."
        )
    return found


def numbers_marks(path: str) -> dict[str, int]:
    """Returns the checksums that an .npz file stores for its arrays of numbers.

    Example:
        numbers_marks("measurements.npz")  # {"x.npy": 2774512934}
    """
    with _file(path).open("rb") as opened, zipfile.ZipFile(opened) as file:
        return {part.filename: part.CRC for part in file.infolist() if Path(part.filename).stem in _ARRAYS}


@functools.lru_cache(maxsize=2)
def _simulated(data: SimulatedConfig) -> NumbersDataset:
    simulator = data.simulator
    parameters, observations = simulator.sample_joint(jax.random.key(data.seed), data.simulations)
    # The prior has its lower bounds, but the transform to unbounded numbers does not.
    low, high = (np.array([bounds], np.float32) for bounds in (simulator.low, simulator.high))
    inside = np.clip(np.asarray(parameters), np.nextafter(low, high), np.nextafter(high, low))
    return NumbersDataset(inside, np.asarray(observations))


def _file(path: str) -> StoredFile:
    if not path:
        raise ValueError("data.path is empty; give the path of an .npz file with an array x.")
    return bucket_file(path) if is_remote(path) else Path(path)


def _read(path: StoredFile) -> dict[str, np.ndarray]:
    fix = "save it with np.savez(path, x=..., context=...)"
    if isinstance(path, Path) and not path.is_file():
        raise FileNotFoundError(f"data.path '{path}' is not a file; give the path of an .npz file.")
    try:
        # np.load would try to unpickle any file that is not a zip archive, and it leaks files that it opens itself.
        with path.open("rb") as file, zipfile.ZipFile(file), np.load(file, allow_pickle=False) as arrays:
            found, names = {name: arrays[name] for name in _ARRAYS if name in arrays.files}, sorted(arrays.files)
    except (*ARRAY_DAMAGE, OSError) as error:
        raise ValueError(f"data.path '{path}' is not a readable .npz file of plain arrays ({error}); {fix}.") from error
    if "x" not in found:
        raise ValueError(f"data.path '{path}' has the arrays {names}, but no 'x'; {fix}.")
    return found


def _of_arrays(arrays: dict[str, np.ndarray], where: str, model: Any) -> NumbersDataset:
    """Builds the dataset from the arrays of a file. Raises ValueError if an array is missing, invalid or unused."""
    count = len(arrays["x"]) if arrays["x"].ndim else 0
    if count < 1:
        raise ValueError(f"'x' in {where} has shape {arrays['x'].shape}; save at least one sample.")
    mask = _mask("mask", arrays.pop("mask", None), (count, model.shape[0]), where) if model.padded else None
    x = _floats("x", arrays.pop("x"), (count, *model.shape), where, mask)
    context = _context(arrays, model, count, where)
    if arrays:
        raise ValueError(
            f"{where} has the array {next(iter(arrays))!r}, which this model does not use; leave it out, or change "
            "model.context, model.num_classes or model.padded."
        )
    return NumbersDataset(
        x, context if mask is None else Padded(mask, context), tuple(map(str, range(model.num_classes)))
    )


def _bounded(dataset: NumbersDataset, data: NumbersConfig, where: str) -> NumbersDataset:
    """Returns the dataset with samples strictly within the bounds. Raises ValueError if a value is outside of them."""
    if data.low is None and data.high is None:
        return dataset
    mask, _ = split_padded(dataset.context)
    low, high = bounds_of(data.low, data.high, dataset.x.shape[-1])
    x = within_bounds(dataset.x, None if mask is None else np.asarray(mask), low, high, where)
    return dataclasses.replace(dataset, x=x)


def _context(arrays: dict[str, np.ndarray], model: Any, count: int, where: str) -> Any:
    described: Context | None = model.context
    if described is None:
        return _labels(arrays.pop("labels", None), model.num_classes, count, where) if model.num_classes else None
    given = arrays.pop("context", None)
    if isinstance(described, ImageContext):
        shape = (count, *image_sides(described.image_size), described.channels)
        return _floats("context", given, shape, where)
    if not isinstance(described, TokenContext):
        return _floats("context", given, (count, described.dim), where)
    shape = (count, described.length, described.dim)
    mask = _mask("context_mask", arrays.pop("context_mask", np.ones(shape[:2], bool)), shape[:2], where)
    return ContextTokens(_floats("context", given, shape, where, mask), mask)


def _floats(
    name: str, array: np.ndarray | None, shape: tuple[int, ...], where: str, mask: np.ndarray | None = None
) -> np.ndarray:
    """Returns the numbers as float32, with 0 at padding. Raises ValueError if they are missing or invalid."""
    if array is None or array.dtype.kind != "f" or array.shape != shape:
        raise ValueError(f"{name!r} in {where} {_told(array)}; this model needs floats of shape {shape}.")
    return as_float32(name, array, mask, where)


def _mask(name: str, array: np.ndarray | None, shape: tuple[int, ...], where: str) -> Bool[np.ndarray, "n m"]:
    if array is None or array.dtype != bool or array.shape != shape:
        raise ValueError(f"{name!r} in {where} {_told(array)}; this model needs booleans of shape {shape}.")
    return array


def _labels(array: np.ndarray | None, classes: int, count: int, where: str) -> Int[np.ndarray, " n"]:
    if array is None or array.dtype.kind not in "iu" or array.shape != (count,):
        raise ValueError(f"'labels' in {where} {_told(array)}; this model needs integers of shape ({count},).")
    low, high = int(array.min()), int(array.max())
    if low < UNCONDITIONAL or high >= classes:
        raise ValueError(
            f"'labels' in {where} are from {low} to {high}; this model needs labels from 0 to {classes - 1}, or -1 "
            "for none."
        )
    return array.astype(np.int32)


def _told(array: np.ndarray | None) -> str:
    return "is missing" if array is None else f"is {array.dtype} of shape {array.shape}"
