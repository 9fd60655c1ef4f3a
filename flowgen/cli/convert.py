"""The command `convert`, which creates a run directory from published weights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowgen.cli.options import finite_number, num_parameters, say, whole_number
from flowgen.places import check_local


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the command's options to its parser."""
    parser.add_argument("file", help="published weights: torch (.pth) or safetensors")
    parser.add_argument("--to", required=True, help="run directory to create")
    tarflow = parser.add_argument_group("TARFlow")
    tarflow.add_argument("--image-size", help="side of the images, or height,width")
    tarflow.add_argument("--patch-size", type=whole_number(1), help="side of a patch (default: from the file name)")
    tarflow.add_argument("--channels", type=whole_number(1), help="channels of the images (default: 3)")
    tarflow.add_argument(
        "--noise-std", type=finite_number, help="standard deviation of the training noise (default: from the file name)"
    )
    starflow = parser.add_argument_group("STARFlow")
    starflow.add_argument("--arguments", metavar="YAML", help="arguments file published with the weights")
    starflow.add_argument("--dtype", choices=("float32", "bfloat16"), help="dtype of the parameters (default: float32)")
    starflow.add_argument("--autoencoder", metavar="DIR", help="folder of the autoencoder, recorded in the run")
    starflow.add_argument("--text-encoder", metavar="DIR", help="folder of the text encoder, recorded in the run")
    parser.add_argument("--entry", help="name of the state dict to read, if the file contains several")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Runs the command and returns its exit code."""
    from flowgen import checkpoint
    from flowgen.convert.readers import check_weight_file

    checkpoint.check_new(options.to)
    check_local("the weight file", options.file)
    check_weight_file(options.file)
    flow, variables, experiment = (_tarflow if options.arguments is None else _starflow)(options)
    checkpoint.write_run(options.to, experiment.with_provenance(), variables)
    say(f"Wrote {options.to}: {num_parameters(flow):,} parameters; sample with --checkpoint {options.to}")
    return 0


def _tarflow(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from flowgen import convert
    from flowgen.data import DataConfig
    from flowgen.experiments import FlowExperiment, SamplingConfig

    for name in ("dtype", "autoencoder", "text_encoder"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{option} is for STARFlow, which also needs --arguments; add --arguments, or leave out {option}."
            )
    if options.image_size is None:
        raise ValueError("--image-size is missing; give it for a TARFlow, or give --arguments for a STARFlow.")
    named = convert.parse_file_name(options.file) or {}
    patch_size = named.get("patch_size") if options.patch_size is None else options.patch_size
    noise_std = named.get("noise_std") if options.noise_std is None else options.noise_std
    if patch_size is None or noise_std is None:
        missing = "--patch-size" if patch_size is None else "--noise-std"
        raise ValueError(f"{missing} is missing, and the file name {options.file} does not contain its value; give it.")
    flow, variables = convert.tarflow(
        convert.read_state_dict(options.file, entry=options.entry),
        image_size=_image_size(options.image_size),
        patch_size=patch_size,
        channels=3 if options.channels is None else options.channels,
        noise_std=noise_std,
    )
    experiment = FlowExperiment(
        name=Path(options.file).stem,
        model=flow.config,
        data=DataConfig(name="folder"),  # The weights do not say what they were trained on.
        sampling=SamplingConfig(num=16),
    )
    return flow, variables, experiment


def _starflow(options: argparse.Namespace) -> tuple[Any, Any, Any]:
    from flowgen import convert
    from flowgen.data import ClipsConfig, DataConfig
    from flowgen.experiments import FlowExperiment, SamplingConfig, VideoFlowExperiment
    from flowgen.settings import check

    for name in ("image_size", "patch_size", "channels", "noise_std"):
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is already set by the file in --arguments; leave it out.")
    arguments = convert.read_arguments(options.arguments)
    codec = _codec(options, arguments) if arguments.get("vae") else None
    state_dict = convert.read_state_dict(options.file, entry=options.entry)
    flow, variables = convert.starflow(state_dict, arguments, dtype=options.dtype or "float32")
    size, guides = arguments.get("vid_size"), flow.config.num_classes or flow.config.text_dim
    guidance = check(float, arguments.get("cfg") or 0, path="cfg") if guides else 0.0
    # The weights do not say what they were trained on.
    kind: Any = FlowExperiment if size is None else VideoFlowExperiment
    experiment = kind(
        name=Path(options.file).stem,
        model=flow.config,
        data=DataConfig(name="folder") if size is None else ClipsConfig(fps=float(convert.clip_size(size)[1])),
        codec=codec,
        text=_text(options, arguments) if flow.config.text_dim else None,
        sampling=SamplingConfig(num=8, guidance=guidance, rule="product"),
    )
    return flow, variables, experiment


def _codec(options: argparse.Namespace, arguments: Any) -> Any:
    from flowgen.experiments import PretrainedAutoencoder

    # The published name of a video autoencoder may end with a scale for its latents.
    name, _, scale = str(arguments["vae"]).partition(":")
    try:
        temporal_scale = float(scale or 1)
    except ValueError as error:
        raise ValueError(
            f"vae in --arguments {options.arguments} is '{name}:{scale}', but the scale '{scale}' is "
            f"not a number; write, for example, '{name}:0.6', or leave out the scale."
        ) from error
    return PretrainedAutoencoder(_place(options.autoencoder), temporal_scale=temporal_scale)


def _text(options: argparse.Namespace, arguments: Any) -> Any:
    from flowgen import convert
    from flowgen.experiments import TextConfig

    return TextConfig(
        _place(options.text_encoder),
        noise_level=bool(arguments.get("cond_noise_level")),
        aspect=bool(arguments.get("mix_aspect")),
        frames_per_second=convert.clip_size(arguments["vid_size"])[1] if arguments.get("fps_cond") else None,
    )


def _place(path: str | None) -> str:
    """Returns the absolute path of a folder, or an empty string if none is given."""
    if path is None:
        return ""
    check_local("the published folder", path)
    if not Path(path).is_dir():
        raise FileNotFoundError(f"There is no folder '{path}'; give the path of the published folder.")
    return str(Path(path).absolute())


def _image_size(text: str) -> int | tuple[int, int]:
    sides = text.split(",")
    if not all(side.isdecimal() for side in sides) or len(sides) not in (1, 2):
        raise ValueError(f"--image-size is {text!r}; give one side, such as 64, or height,width, such as 32,48.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
