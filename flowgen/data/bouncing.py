"""Generates clips of the built-in digits, which bounce off the borders of the frame."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int, Int32, UInt8

from flowgen.batch import Batch
from flowgen.data.dataset import DataConfig, Split, hold_out
from flowgen.data.named import read_digits


@dataclasses.dataclass(frozen=True)
class BouncingDigits:
    """A dataset of clips that each show one moving digit. Indexing generates the clips.

    With n digits, clip i shows digit i mod n. The digit moves in a straight line and bounces off the borders. Along
    each axis, it moves by 3.75 % to 8.75 % of the clip's shorter side per frame. Digits at fractional pixel positions
    are drawn with bilinear interpolation. The clips are the same in every NumPy version.

    Example:
        dataset = BouncingDigits(digits, labels, num=1000, event_shape=(8, 16, 16, 1), seed=0)
    """

    digits: UInt8[np.ndarray, "n side side"]
    labels: Int32[np.ndarray, " n"]
    class_names: tuple[str, ...]
    _: dataclasses.KW_ONLY
    num: int
    event_shape: tuple[int, int, int, int]
    seed: int

    captions: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        digits = self.digits[indices % len(self.digits)] / np.float32(255)
        rows, columns = self._courses(indices)
        _, height, width, channels = self.event_shape
        down, across = (_weights(at, length, digits.shape[1]) for at, length in ((rows, height), (columns, width)))
        clips = np.einsum("bfyk,bkl,bfxl->bfyx", down, digits, across, optimize=True)
        clips = np.rint(255 * np.clip(clips, 0, 1)).astype(np.uint8)[..., None].repeat(channels, axis=-1)
        return Batch(clips, self.labels[indices % len(self.digits)])

    def _courses(self, indices: Int[np.ndarray, " b"]) -> tuple[Float[np.ndarray, "b f"], Float[np.ndarray, "b f"]]:
        """Returns the row and the column of the digit's top left corner in every frame of each clip, in pixels."""
        raw = [
            np.random.Philox(np.random.SeedSequence(self.seed), counter=[index, 0, 0, 0]).random_raw(8)
            for index in indices.tolist()
        ]
        draws = (np.stack(raw) >> np.uint64(11)).astype(np.float64) / 2**53
        frames, height, width, _ = self.event_shape
        pace = min(height, width) / 16
        courses = []
        for axis, length in enumerate((height, width)):
            room = length - self.digits.shape[1]
            speed = pace * (0.6 + 0.8 * draws[:, axis + 2]) * np.where(draws[:, axis + 4] < 0.5, -1, 1)
            way = room * draws[:, axis][:, None] + speed[:, None] * np.arange(frames)
            courses.append(room - np.abs(np.mod(way, 2 * room) - room))
        return courses[0], courses[1]


def _weights(at: Float[np.ndarray, "b f"], length: int, side: int) -> Float[np.ndarray, "b f length side"]:
    """Returns the bilinear weights that draw `side` pixels from position `at` into a line of `length` pixels."""
    centres = at[:, :, None, None] + np.arange(side)
    return np.maximum(0, 1 - np.abs(np.arange(length)[:, None] - centres)).astype(np.float32)


def bouncing_digits(
    num: int, eval_fraction: float, *, frames: int, image_size: tuple[int, int], channels: int, split: Split
) -> BouncingDigits:
    """Returns the clips of a split. The side of a digit is half the clip's shorter side, but at least 8 pixels.

    num: number of clips in both splits combined. eval_fraction: fraction of the digits, and also of the clips, to hold
    out.

    Example:
        dataset = bouncing_digits(1000, 0.1, frames=8, image_size=(16, 16), channels=1, split="train")
    """
    side = max(8, min(image_size) // 2)
    if min(image_size) <= side:
        raise ValueError(
            f"clips of {image_size[0]} x {image_size[1]} pixels are too small for 8 x 8 digits; use at least 10 x 10."
        )
    dataset = read_digits(DataConfig(), (side, side))
    dataset = dataset.select(hold_out(len(dataset), eval_fraction, split))
    return BouncingDigits(
        dataset.x[..., 0],
        dataset.labels,
        dataset.class_names,
        num=len(hold_out(num, eval_fraction, split)),
        event_shape=(frames, *image_size, channels),
        seed=("train", "eval", "all").index(split),
    )
