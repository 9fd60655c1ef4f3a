"""The command `sample`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from flowgen.cli.options import (
    MAX_SEED,
    check_options,
    class_numbers_of,
    class_words,
    fields_of,
    finite_number,
    group_help,
    per_second,
    say,
    step_or_best,
    whole_number,
)
from flowgen.fields import built
from flowgen.packages import missing

PICTURES_AT_ONCE = 64
DEFAULT_FPS = 8.0
# What both mp4 and GIF, which counts in hundredths of a second, can hold.
LEAST_FPS, MOST_FPS = 0.1, 100.0


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--num", type=whole_number(1), help="how many samples (default: as in the run's config)")
    parser.add_argument(
        "--classes",
        help="classes to draw in turn, by name or number: cat,dog or 0,1,2; -1 is unconditional (--classes=-1,3)",
    )
    parser.add_argument("--guidance", type=finite_number, help="guidance weight, 0 for none")
    texts = parser.add_argument_group("flows of texts and latents")
    texts.add_argument("--prompt", action="append", help="text to draw; again for more, drawn in turn")
    texts.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    texts.add_argument("--aspect", help="aspect ratio, such as 16:9, at about the area of the model's pictures")
    texts.add_argument("--autoencoder", metavar="DIR", help="where the autoencoder is, if not where the run says")
    texts.add_argument("--text-encoder", metavar="DIR", help="where the text encoder is, if not where the run says")
    flows = parser.add_argument_group("autoregressive flows")
    flows.add_argument("--plan", choices=("sequential", "jacobi", "sliding", "auto"), help="how tokens are decoded")
    flows.add_argument("--window", type=whole_number(1), help="tokens solved together in parallel (default: all)")
    flows.add_argument("--tol", type=finite_number, help="largest change at which --plan jacobi or sliding stops")
    flows.add_argument("--init", choices=("noise", "zeros", "previous_frame"), help="what sweeps start from")
    flows.add_argument("--denoise", type=finite_number, help="strength of the Tweedie step, 0 for none")
    flows.add_argument("--certify", action="store_true", help="check the decoding by a forward pass")
    velocities = parser.add_argument_group("velocity networks")
    velocities.add_argument("--method", help="solver: euler, midpoint, heun, rk4, dopri5, mean_flow")
    velocities.add_argument("--num-steps", type=whole_number(1), help="steps of the solver")
    parser.add_argument("--batch", type=whole_number(1), help="samples per compiled call (default: 64; all points)")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0)
    clips = parser.add_argument_group("flows of clips")
    clips.add_argument("--frames", type=whole_number(1), help="of a clip, any number (default: as in training)")
    clips.add_argument(
        "--given", metavar="FILE", help="picture that clips begin with, or video, cut to fewer than --frames"
    )
    clips.add_argument("--context", type=whole_number(1), help="frames of latents that longer clips are continued from")
    clips.add_argument(
        "--fps", type=finite_number, help="frames per second of what is written (default: as in training)"
    )
    clips.add_argument("--progress", action="store_true", help="show a bar of the tokens that are decoded")
    parser.add_argument(
        "--out", default="samples.png", help="picture to write, of clips also .gif or .mp4; or .npz with floats"
    )
    parser.add_argument("--single", metavar="DIR", help="also write every sample there: as PNG, clips as GIF")
    parser.add_argument("--no-ema", action="store_true", help="take the trained parameters, not their average")
    parser.epilog = (
        "Every field of sampling can be set by its name, as in training: --sampling.rule product --sampling.blocks "
        "(0,1); info --checkpoint lists them."
    )


def fields_help() -> str:
    """Returns the fields that can be set by name."""
    from flowgen.tasks import SamplingConfig, SolverConfig

    return (
        f"fields of autoregressive flows:\n{group_help('sampling', SamplingConfig())}\n\n"
        f"fields of velocity networks:\n{group_help('sampling', SolverConfig())}"
    )


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
    import jax
    import numpy as np

    from flowgen import checkpoint, config
    from flowgen.data import PointsConfig, atomic_file, save_image, to_uint8
    from flowgen.data.media import pillow
    from flowgen.data.video import write_video
    from flowgen.models import CodecConfig
    from flowgen.tasks import clips, task_of
    from flowgen.tasks.frozen import latent_grid, with_codec
    from flowgen.tasks.images import drawn_classes
    from flowgen.tasks.matching import plot_points
    from flowgen.tasks.pictures import DRAWABLE_CHANNELS, matplotlib, picture

    out = Path(options.out)
    _check_out(out)
    _check_fps(options, out)
    single = None if options.single is None else Path(options.single)
    if single is not None:
        if single == out:
            raise ValueError(f"--single and --out are both {out}; give the single pictures a directory of their own.")
        checkpoint.check_new(single)
        pillow()
    prompts = _prompts(options)
    names = _sampling_fields(options, rest)
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step, ema=not options.no_ema)
    if isinstance(experiment.model, CodecConfig):
        raise ValueError(
            f"{options.checkpoint} is the run of an Autoencoder, which draws no samples; train a flow on its latents."
        )
    check_options(options, experiment.model, "sample")
    experiment = with_codec(experiment, autoencoder=options.autoencoder, text_encoder=options.text_encoder)
    points, task = isinstance(experiment.data, PointsConfig), task_of(experiment.model)
    if _is_video(out) and task is not clips:
        raise ValueError(f"--out is {out}, a video, and this model draws none; use .png or .npz.")
    if points:
        matplotlib()
        if single is not None:
            raise ValueError("--single writes pictures, and this model draws points; leave it out.")
    elif (out.suffix != ".npz" or single) and (channels := task.drawn_channels(experiment)) not in DRAWABLE_CHANNELS:
        raise ValueError(f"The model has {channels} channels, pictures 1 or 3; use only --out samples.npz.")
    experiment = config.override(experiment, rest)
    experiment = dataclasses.replace(experiment, sampling=_overridden(experiment, options, prompts, names))
    if options.aspect is not None:
        flow = flow.with_image_size(*latent_grid(experiment, options.aspect))
    more: dict[str, Any] = {"certify": options.certify} if "certify" in task.SAMPLE_OPTIONS else {}
    if task is clips:
        clips.check_length(experiment, options.frames, options.context)
        given = None
        if options.given is not None:
            given = clips.read_given(experiment, flow, options.given, frames=options.frames)
        more |= {"frames": options.frames, "given": given, "context": options.context}
        more |= {"progress": _progress_bar() if options.progress else None}
    conditions, about = _conditions(experiment, flow, options)
    samples = np.concatenate(list(_draw(task, experiment, flow, params, conditions, options, more)))
    bad = int((~np.isfinite(samples.reshape(len(samples), -1)).all(axis=1)).sum())
    if out.suffix == ".npz":
        with atomic_file(out) as file:
            kind = "points" if points else "clips" if task is clips else "images"
            np.savez(file, allow_pickle=False, **{kind: samples}, **({} if points else about))
    elif points:
        save_image(out, plot_points(experiment, flow, params, samples, jax.random.key(options.seed)))
    elif task is clips:
        _write_clips(out, samples, _fps(experiment, options.fps))
    else:
        classes = drawn_classes(experiment) if options.classes is None else len(class_words(options.classes))
        save_image(out, picture(samples, classes))
    if single is not None:
        single.mkdir(parents=True, exist_ok=True)
        for index, sample in enumerate(samples):
            if task is clips:
                write_video(single / f"{index:06d}.gif", to_uint8(sample), fps=_fps(experiment, options.fps))
            else:
                save_image(single / f"{index:06d}.png", to_uint8(sample))
    say(f"Wrote {out}")
    if bad:
        raise FloatingPointError(f"{bad} of {len(samples)} samples are not finite; lower --guidance.")
    return 0


def _progress_bar() -> Callable[[int, int], None]:
    """What is told of decoded tokens, and draws a bar of those of each batch on standard error."""
    try:
        from tqdm import tqdm
    except ModuleNotFoundError as error:
        raise missing("--progress", "tqdm", otherwise="leave it out") from error
    bars: list[Any] = []  # of the batch at hand, from when it is compiled until it is decoded

    def progress(solved: int, total: int) -> None:
        if not bars:
            bars.append(tqdm(total=total, file=sys.stderr, unit="token", dynamic_ncols=True))
        bars[0].update(solved)
        if bars[0].n >= total:
            bars.pop().close()

    return progress


def _check_out(out: Path) -> None:
    """Raises where the file cannot be written, or its suffix says nothing."""
    from flowgen.data import check_image_path, check_writable
    from flowgen.data.video import check_video_path

    if out.suffix == ".npz":
        check_writable(out)
    elif _is_video(out):
        check_video_path(out)
    else:
        check_image_path(out)


def _is_video(out: Path) -> bool:
    from flowgen.data.video import VIDEO_SUFFIXES

    return out.suffix.lower() in VIDEO_SUFFIXES


def _check_fps(options: argparse.Namespace, out: Path) -> None:
    """Raises ValueError where no video of that rate can be, or none is asked for."""
    if options.fps is None:
        return
    if not LEAST_FPS <= options.fps <= MOST_FPS:
        raise ValueError(f"--fps is {options.fps:g}; videos have {LEAST_FPS:g} to {MOST_FPS:g} frames per second.")
    if not _is_video(out) and options.single is None:
        raise ValueError(f"--fps is {options.fps:g}, and --out {out} is no video; use .gif or .mp4, or leave it out.")


def _fps(experiment: Any, asked: float | None) -> float:
    """Frames per second of videos: as asked for, else those of the clips that the flow was trained on."""
    if asked is not None:
        return asked
    # Of encoded data the texts know it, where they say it.
    told = None if experiment.text is None else experiment.text.frames_per_second
    fps = float(told or experiment.data.fps)
    return fps if LEAST_FPS <= fps <= MOST_FPS else DEFAULT_FPS


def _write_clips(out: Path, clips: Any, fps: float) -> None:
    """Clips side by side as one video, or under each other as strips of their frames."""
    from flowgen.data import save_image
    from flowgen.data.video import write_video
    from flowgen.tasks.pictures import side_by_side, strips

    if _is_video(out):
        write_video(out, side_by_side(clips), fps=fps)
    else:
        save_image(out, strips(clips))


def _prompts(options: argparse.Namespace) -> tuple[str, ...]:
    """The prompts of the command line; ValueError where a file has none."""
    if options.prompt is not None and options.prompts is not None:
        raise ValueError(
            "--prompt and --prompts are both given; put all prompts into the file, or on the command line."
        )
    if options.prompts is None:
        return tuple(options.prompt or ())
    from flowgen.documents import read_bytes

    try:
        lines = read_bytes(options.prompts).decode("utf-8-sig").splitlines()
    except OSError as error:
        raise FileNotFoundError(
            f"--prompts {options.prompts} cannot be read ({error.strerror or error}); give a text file with one "
            "prompt per line."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts {options.prompts} is not UTF-8 text ({error}); convert it.") from error
    if not any(line.strip() for line in lines):
        raise ValueError(f"--prompts {options.prompts} has no prompt; write one per line.")
    return tuple(line.strip() for line in lines if line.strip())


def _conditions(experiment: Any, flow: Any, options: argparse.Namespace) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """What gives the condition of samples by their numbers, with other options of `draw` that depend on the sample; and
    what an .npz file says of the samples."""
    import numpy as np

    from flowgen.data.clip_views import CONTINUED
    from flowgen.tasks.texts import prompt_condition

    num = experiment.sampling.num
    if not getattr(flow.config, "text_dim", 0):
        labels = _labels(options.classes, num, experiment)
        known = np.full(num, -1) if labels is None else labels
        return lambda numbers: (None if labels is None else labels[numbers % num], {}), {"labels": known}
    if options.classes is not None:
        raise ValueError(f"--classes is {options.classes}, but this model takes texts; give --prompt.")
    prompts = experiment.sampling.prompts
    if not prompts:
        raise ValueError("this model takes texts; give --prompt.")
    encoded = {"cond": prompt_condition(experiment, prompts, flow.config.image_hw)}
    if getattr(experiment.data, "drop_first", 0):
        # Restarts of long clips are told as in training.
        marked = [CONTINUED + prompt for prompt in prompts]
        encoded["restart_cond"] = prompt_condition(experiment, marked, flow.config.image_hw)
    asked = np.resize(np.array(prompts), num)

    def conditions(numbers):
        chosen = {
            name: type(texts)(*(part[numbers % len(prompts)] for part in texts)) for name, texts in encoded.items()
        }
        return chosen.pop("cond"), chosen

    return conditions, {"prompts": asked}


def _draw(
    task: ModuleType,
    experiment: Any,
    flow: Any,
    params: Any,
    conditions: Callable[[Any], Any],
    options: argparse.Namespace,
    more: dict[str, Any],
):
    """Batches of samples, with what each cost on standard output."""
    import jax
    import numpy as np

    from flowgen.data import PointsConfig

    num = experiment.sampling.num
    # One compiled program: the last batch is drawn whole and cut.
    whole = num if isinstance(experiment.data, PointsConfig) else PICTURES_AT_ONCE
    size = min(options.batch or whole, num)
    for first in range(0, num, size):
        count = min(size, num - first)
        cond, by_sample = conditions(np.resize(np.arange(first, first + count), size))
        began = time.perf_counter()
        samples, line = task.draw(
            experiment, flow, params, jax.random.key(options.seed), size, cond, first=first, **by_sample, **more
        )
        seconds = time.perf_counter() - began
        compiled = " (with compilation)" if first == 0 else ""
        say(f"samples {first}..{first + count - 1}: {per_second(count / seconds)}{compiled}; {line}")
        yield samples[:count]


def _sampling_fields(options: argparse.Namespace, rest: list[str]) -> set[str]:
    """The fields of sampling that are set by their dotted names. ValueError where one has its short name beside it."""
    from flowgen.tasks import SamplingConfig, SolverConfig

    names = {name.partition(".")[2] for name in fields_of(rest, groups=("sampling",), command="sample")}
    known = {field.name for kind in (SamplingConfig, SolverConfig) for field in dataclasses.fields(kind)}
    for name in sorted(names & known):
        for option in ("prompt", "prompts") if name == "prompts" else (name,):
            if getattr(options, option, None) is not None:
                short = f"--{option.replace('_', '-')}"
                raise ValueError(f"{short} and --sampling.{name} set the same field; leave one out.")
    return names


def _overridden(experiment: Any, options: argparse.Namespace, prompts: tuple[str, ...], names: set[str]) -> Any:
    """The sampling of an experiment, in which the fields of these names are set, with short options as well."""
    sampling = experiment.sampling
    known = [field.name for field in dataclasses.fields(sampling) if hasattr(options, field.name)]
    given = {name: value for name in known if (value := getattr(options, name)) is not None}
    if prompts:
        if not getattr(experiment.model, "text_dim", 0):
            raise ValueError(f"--prompt is {prompts[0]!r}, but this model takes no texts; leave it out.")
        given |= {"prompts": prompts}
    drawn = prompts or (sampling.prompts if "prompts" in names else ())
    if drawn and "num" not in names:
        given = {"num": len(drawn), **given}
    plan = given.get("plan", getattr(sampling, "plan", None))
    if {"window", "tol", "init"} & (given.keys() | names) and plan not in ("jacobi", "sliding"):
        raise ValueError("--window, --tol and --init are for --plan jacobi or sliding; add it, or leave them out.")
    return built(lambda: dataclasses.replace(sampling, **given), "sampling")


def _labels(text: str | None, num: int, experiment: Any) -> Any:
    import numpy as np

    from flowgen.tasks.images import drawn_classes
    from flowgen.tasks.pictures import grid_labels

    if text is None:
        return grid_labels(num, drawn_classes(experiment))
    num_classes = experiment.model.num_classes
    if num_classes == 0:
        raise ValueError(f"--classes is {text}, but this model has no classes; leave it out.")
    return np.resize(np.array(class_numbers_of(text, experiment.data.classes, num_classes), np.int32), num)
