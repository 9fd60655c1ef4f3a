"""Writes samples as an image, a video or arrays, and optionally as one file per sample."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from flowgen.checkpoint import check_new
from flowgen.data import atomic_file, check_image_path, check_writable, save_image, to_uint8
from flowgen.data.media import IMAGE_SUFFIXES, pillow
from flowgen.data.video import VIDEO_SUFFIXES, check_video_path, write_video
from flowgen.experiments import MatchingExperiment, Samples, TokenFlowExperiment, VideoFlowExperiment
from flowgen.experiments.drawing import DrawOptions, drawn_classes
from flowgen.experiments.experiment import Experiment
from flowgen.experiments.plots import DRAWABLE_CHANNELS, matplotlib, sample_grid, side_by_side, strips
from flowgen.settings import words_of

KINDS = {2: "points", 4: "images", 5: "clips"}  # by the number of axes


@dataclass(frozen=True)
class Output:
    """The files to which samples are written.

    path: an image file or .npz; for clips, also .gif or .mp4. single: a new directory for one file per sample, or None.

    Example:
        output = Output(Path("samples.png"))
        output.check()
        output.write(experiment, model, params, samples, options)
    """

    path: Path
    single: Path | None = None

    @property
    def is_arrays(self) -> bool:
        return self.path.suffix == ".npz"

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEO_SUFFIXES

    def check(self) -> None:
        """Raises an error if the files cannot be written or the suffix is unknown."""
        suffix = self.path.suffix.lower()
        if suffix not in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".npz"):
            raise ValueError(
                f"--out is '{self.path}'; it must end in one of {', '.join(IMAGE_SUFFIXES)} for an image, "
                f"{', '.join(VIDEO_SUFFIXES)} for clips, or .npz for arrays."
            )
        check: Callable[[Path], Any] = check_image_path
        if self.is_arrays or self.is_video:
            check = check_writable if self.is_arrays else check_video_path
        check(self.path)
        if self.single is not None:
            if self.single == self.path:
                raise ValueError(f"--single and --out are both {self.path}; give --single a different path.")
            check_new(self.single)
            pillow()

    def check_fits(self, experiment: Experiment, options: DrawOptions) -> None:
        """Raises ValueError if samples of this experiment cannot be written to these types of files."""
        is_clips = isinstance(experiment, VideoFlowExperiment)
        if self.is_video and not is_clips:
            raise ValueError(f"--out is {self.path}, but this model does not draw videos; use .png or .npz.")
        if (fps := getattr(options, "fps", None)) is not None and not self.is_video and self.single is None:
            raise ValueError(
                f"--fps is {fps:g}, but --out {self.path} is not a video; use .gif or .mp4, or leave out --fps."
            )
        if experiment.drawn_channels is None:  # points and other numbers
            matplotlib()
            if self.single is not None:
                raise ValueError("--single writes images, but this model draws numbers; leave out --single.")
        elif (not self.is_arrays or self.single) and experiment.drawn_channels not in DRAWABLE_CHANNELS:
            raise ValueError(
                f"The samples have {experiment.drawn_channels} channels, but images have 1 or 3; use --out samples.npz "
                "without --single."
            )

    def write(self, experiment: Experiment, model: Any, variables: Any, samples: Samples, options: Any) -> None:
        """Writes the samples."""
        arrays = samples.arrays
        fps = experiment.fps(options.fps) if isinstance(experiment, VideoFlowExperiment) else 0.0
        if self.is_arrays:
            with atomic_file(self.path) as file:
                # Numbers are written as a NumbersConfig reads them.
                name = "x" if isinstance(experiment, TokenFlowExperiment) else KINDS[arrays.ndim]
                np.savez(file, allow_pickle=False, **{name: arrays}, **samples.conditions)
        elif self.is_video:
            write_video(self.path, side_by_side(arrays), fps=fps)
        elif isinstance(experiment, TokenFlowExperiment):
            save_image(self.path, experiment.plot(samples))
        elif arrays.ndim == 5:
            save_image(self.path, strips(arrays))
        elif arrays.ndim == 4:
            asked = options.classes
            classes = drawn_classes(experiment.model, experiment.data) if not asked else len(words_of(asked, ""))
            save_image(self.path, sample_grid(arrays, classes))
        else:
            assert isinstance(experiment, MatchingExperiment)
            save_image(self.path, experiment.plot(model, variables, arrays, jax.random.key(options.seed)))
        if self.single is not None:
            self.single.mkdir(parents=True, exist_ok=True)
            for index, sample in enumerate(arrays):
                if arrays.ndim == 5:
                    write_video(self.single / f"{index:06d}.gif", to_uint8(sample), fps=fps)
                else:
                    save_image(self.single / f"{index:06d}.png", to_uint8(sample))
