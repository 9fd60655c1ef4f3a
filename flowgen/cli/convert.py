"""The command `convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from flowgen.cli.options import finite_number, num_parameters, say, whole_number


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("file", help="published weights: torch (.pth) or safetensors")
    parser.add_argument("--to", required=True, help="run directory to write")
    parser.add_argument("--image-size", help="side of the images, or height,width", required=True)
    parser.add_argument("--patch-size", type=whole_number(1), help="default: from a published file name")
    parser.add_argument("--channels", type=whole_number(1), default=3)
    parser.add_argument(
        "--noise-std", type=finite_number, help="sigma of training; default: from a published file name"
    )
    parser.add_argument("--entry", help="which state dict, where the file holds several")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
    from flowgen import checkpoint, convert
    from flowgen.config import Experiment, SamplingConfig
    from flowgen.data import DataConfig

    checkpoint.check_new(options.to)
    named = convert.parse_file_name(options.file) or {}
    patch_size = named.get("patch_size") if options.patch_size is None else options.patch_size
    noise_std = named.get("noise_std") if options.noise_std is None else options.noise_std
    if patch_size is None or noise_std is None:
        missing = "--patch-size" if patch_size is None else "--noise-std"
        raise ValueError(f"{missing} is not in the name of {options.file}; give it.")
    state_dict = convert.read_state_dict(options.file, entry=options.entry)
    flow, variables = convert.tarflow(
        state_dict,
        image_size=_image_size(options.image_size),
        patch_size=patch_size,
        channels=options.channels,
        noise_std=noise_std,
    )
    experiment = Experiment(
        name=Path(options.file).stem,
        model=flow.config,
        data=DataConfig(source="folder"),  # The weights do not say what they were trained on.
        sampling=SamplingConfig(num=16),
    )
    checkpoint.write_run(options.to, experiment, variables)
    say(f"Wrote {options.to}: {num_parameters(flow):,} parameters; sample with --checkpoint {options.to}")
    return 0


def _image_size(text: str) -> int | tuple[int, int]:
    sides = text.split(",")
    if not all(side.isdecimal() for side in sides) or len(sides) not in (1, 2):
        raise ValueError(f"--image-size is {text!r}; give a side such as 64, or height,width such as 32,48.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
