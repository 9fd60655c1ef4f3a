"""Datasets of images or clips that are decoded from files for every batch."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int, Int32, UInt8

from flowgen.batch import Batch
from flowgen.data.dataset import ArrayDataset
from flowgen.data.file_reader import FileReader


@dataclasses.dataclass(frozen=True)
class FileDataset:
    """A dataset of images or clips that decodes files on all cores for every batch.

    reader: reads the sample at a position. If the reader may skip files, an unreadable sample and its label are
    replaced by those at the next readable position, so the result depends only on the position. Each unreadable file
    causes one warning. If samples have captions, it causes an error instead, because the caption would not match the
    replacement.

    captions, file_names: as in `Dataset`.

    Example:
        reader = FileReader(job, files, "refuse", what=("image", "images"), split="train")
        dataset = FileDataset(reader, labels, event_shape=(64, 64, 3), class_names=("cat", "dog"))
    """

    reader: FileReader[UInt8[np.ndarray, "*event"]]
    labels: Int32[np.ndarray, " n"]
    _: dataclasses.KW_ONLY
    event_shape: tuple[int, ...]
    class_names: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    file_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Int[np.ndarray, " b"]) -> Batch:
        answers = self.reader.read(indices.tolist())
        positions = np.array([position for position, _ in answers])
        return Batch(np.stack([sample for _, sample in answers]), self.labels[positions])

    def checked(self, *, may_be_empty: bool = False) -> FileDataset:
        """Returns this dataset. Raises ValueError if files may be skipped but none can be read."""
        if not may_be_empty:
            self.reader.check_any()
        return self

    def decoded(self, *, may_be_empty: bool = False) -> ArrayDataset:
        """Decodes all samples into memory. Either skips all unreadable files or reports them in one error.

        may_be_empty: whether to return an empty dataset, instead of raising an error, if no sample is left.
        """
        x = np.empty((len(self), *self.event_shape), np.uint8)
        kept = self.reader.read_all(x.__setitem__, may_be_empty=may_be_empty)
        whole = ArrayDataset(x, self.labels, self.class_names, self.captions, self.file_names)
        return whole if len(kept) == len(x) else whole.select(kept)
