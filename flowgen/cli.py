"""The commands: `python -m flowgen {train,sample,evaluate,convert,info}`; `train.py` and `sample.py` are doors to two.

A mistake of the user ends in one sentence on standard error and exit code 2, before anything is computed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

EXIT_MISTAKE = 2
EXIT_NOT_FINITE = 3
EXIT_INTERRUPTED = 130
MISTAKES = (ValueError, OSError, ImportError)
MAX_SEED = 2**32 - 1  # Without 64-bit integers jax would cut what is above, and two seeds would give one image.


class Parser(argparse.ArgumentParser):
    """argparse, with one sentence instead of a usage text before an error."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[0].upper()}{message[1:]}; see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code of a command line: 0, 2 for a mistake, 3 for numbers that are not finite,
    128 + signal where a signal stopped a training run.

    Example:
        main(["info", "--config", "configs/tarflow_digits.py"])
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = Parser(prog="python -m flowgen", description="Transformer normalizing flows in JAX.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (declare, _, summary) in COMMANDS.items():
        declare(commands.add_parser(name, help=summary, description=summary, allow_abbrev=False))
    try:
        options, rest = parser.parse_known_args(words)
        if rest and options.command not in TAKES_FIELDS:
            raise ValueError(
                f"{rest[0]} is not an option of {options.command}; see {parser.prog} {options.command} --help."
            )
        return COMMANDS[options.command][1](options, rest)
    except FloatingPointError as error:
        return _fail(error, EXIT_NOT_FINITE)
    except KeyboardInterrupt:
        return _fail("Interrupted without saving; checkpoints are as they were.", EXIT_INTERRUPTED)
    except MISTAKES as error:
        return _fail(error, EXIT_MISTAKE)


def _fail(error: Exception | str, code: int) -> int:
    sentence = " ".join(str(error).split())
    sys.stderr.write(f"flowgen: {sentence}\n")
    return code


def _number(text: str) -> float:
    """A finite number; argparse puts the option's name before what is wrong."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return value


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns the parser of whole numbers from least to most."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {bounds}")
        return value

    return parse


def _declare_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, help="Python file with config()")
    parser.add_argument("--workdir", required=True, help="directory of the run; resumed if it holds a checkpoint")
    parser.add_argument("--debug", action="store_true", help="shrink the experiment to seconds on a CPU")
    parser.epilog = "Any field of the config can be set: --optim.lr 3e-4 --train.steps 1000; info lists them."


def _train(options: argparse.Namespace, rest: list[str]) -> int:
    from flowgen.training import fit

    experiment = _experiment(options, rest)
    _say(f"{experiment.name}: {_size(experiment.flow()):,} parameters, {experiment.train.steps} steps")
    if options.debug:
        _say("--debug: a tiny model on the built-in digits, to see that everything runs; its numbers mean nothing.")
    result = fit(experiment, options.workdir)
    if result.signal:
        _say(f"Stopped at step {result.state.step}, saved in {options.workdir}; the same command goes on from there.")
        return 128 + result.signal
    if result.metrics:
        bits, baseline = result.metrics["bits_per_dim"], result.metrics["gaussian_bits_per_dim"]
        _say(f"Held-out bits/dim {bits:.3f}; a Gaussian fit of the same data {baseline:.3f}.")
    if result.samples:
        _say(f"Samples: {result.samples}")
    return 0


def _experiment(options: argparse.Namespace, rest: list[str]) -> Any:
    from flowgen import config

    try:
        experiment = config.load(options.config)
    except Exception as error:  # The file is the user's program, which can raise anything.
        line = _line_of(options.config, error)
        if line is None:
            raise
        reason = str(error).rstrip(".") if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"config {options.config} fails in line {line} ({reason}); correct it there.") from error
    # Dataclasses do not look at types; the way through JSON does, and names the field.
    experiment = config.from_json(config.to_json(experiment))
    if options.debug:
        experiment = config.shrink(experiment)
    return config.override(experiment, rest)


def _line_of(path: str, error: Exception) -> int | None:
    """The line of a config file at which an error arose; None where the file is not to blame."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    return lines[-1] if lines else None


def _declare_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=_step, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--num", type=_whole(1), help="how many samples (default: as in the run's config)")
    parser.add_argument("--classes", help="labels to draw in turn: 3, or 0,1,2; -1 is unconditional (--classes=-1,3)")
    parser.add_argument("--guidance", type=_number, help="guidance scale, 0 for none")
    parser.add_argument("--plan", choices=("sequential", "jacobi", "auto"), help="how tokens are decoded")
    parser.add_argument("--window", type=_whole(1), help="tokens solved together by --plan jacobi (default: all)")
    parser.add_argument("--tol", type=_number, help="largest change at which --plan jacobi stops")
    parser.add_argument("--denoise", type=_number, help="strength of the score step, 0 for none")
    parser.add_argument("--batch", type=_whole(1), default=64, help="samples per compiled call")
    parser.add_argument("--seed", type=_whole(0, MAX_SEED), default=0)
    parser.add_argument("--out", default="samples.png", help="grid to write: .png, or .npz with the images as floats")
    parser.add_argument("--single", metavar="DIR", help="also write every sample as a PNG into this directory")
    parser.add_argument("--certify", action="store_true", help="check the decoding by a forward pass")
    parser.add_argument("--no-ema", action="store_true", help="take the trained parameters, not their average")


def _sample(options: argparse.Namespace, rest: list[str]) -> int:
    import numpy as np

    from flowgen import checkpoint
    from flowgen.config import DRAWABLE_CHANNELS, picture
    from flowgen.data import atomic_file, check_image_path, check_writable, save_image, to_uint8
    from flowgen.data.media import pillow

    out = Path(options.out)
    check_writable(out) if out.suffix == ".npz" else check_image_path(out)
    single = None if options.single is None else Path(options.single)
    if single is not None:
        if single == out:
            raise ValueError(f"--single and --out are both {out}; give the single pictures a directory of their own.")
        checkpoint.check_new(single)
        pillow()
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step, ema=not options.no_ema)
    if (out.suffix != ".npz" or single) and flow.config.channels not in DRAWABLE_CHANNELS:
        raise ValueError(f"The model has {flow.config.channels} channels, pictures 1 or 3; use only --out samples.npz.")
    sampling = _overridden(experiment.sampling, options)
    labels = _labels(options.classes, sampling.num, flow.config.num_classes)
    images = np.concatenate(list(_draw(flow, params, labels, sampling, options)))
    bad = int((~np.isfinite(images).all(axis=(1, 2, 3))).sum())
    if out.suffix == ".npz":
        with atomic_file(out) as file:
            np.savez(file, images=images, labels=np.full(len(images), -1) if labels is None else labels)
    else:
        classes = flow.config.num_classes if options.classes is None else options.classes.count(",") + 1
        save_image(out, picture(to_uint8(images), classes))
    if single is not None:
        single.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(to_uint8(images)):
            save_image(single / f"{index:06d}.png", image)
    _say(f"Wrote {out}")
    if bad:
        raise FloatingPointError(f"{bad} of {len(images)} samples are not finite; lower --guidance.")
    return 0


def _draw(flow: Any, params: Any, labels: Any, sampling: Any, options: argparse.Namespace):
    """Batches of images, with what each cost on standard output."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from flowgen.decoding import sample

    key = jax.random.key(options.seed)
    # One compiled program: the last batch is drawn whole and cut.
    size = min(options.batch, sampling.num)
    for first in range(0, sampling.num, size):
        count = min(size, sampling.num - first)
        cond = None if labels is None else jnp.asarray(np.resize(labels[first : first + count], size))
        began = time.perf_counter()
        result = sample(
            flow,
            params,
            key,
            size,
            cond,
            plan=sampling.to_plan(),
            guidance=sampling.to_guidance(),
            denoise=sampling.denoise,
            first=first,
            certify=options.certify,
        )
        images = np.asarray(result.x)[:count]
        seconds = time.perf_counter() - began
        passes = ", ".join(str(int(block.sum())) for block in result.sweeps)
        line = f"samples {first}..{first + count - 1}: {count / seconds:.1f} images/s"
        line += " (with compilation)" if first == 0 else ""
        line += f"; passes per block (data side first) {passes}; residual {float(result.residual[:count].max()):.1e}"
        if result.error is not None:
            line += f"; certified to {float(result.error[:count].max()):.1e}"
        _say(line)
        yield images


def _overridden(sampling: Any, options: argparse.Namespace) -> Any:
    names = ("num", "guidance", "plan", "window", "tol", "denoise")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    if ("window" in given or "tol" in given) and given.get("plan", sampling.plan) != "jacobi":
        raise ValueError("--window and --tol are for --plan jacobi; add it, or leave them out.")
    return dataclasses.replace(sampling, **given)


def _labels(text: str | None, num: int, num_classes: int) -> Any:
    import numpy as np

    from flowgen.conditioning import check_labels
    from flowgen.config import grid_labels

    if text is None:
        return grid_labels(num, num_classes)
    if num_classes == 0:
        raise ValueError(f"--classes is {text}, but this model has no classes; leave it out.")
    try:
        chosen = np.array([int(word) for word in text.split(",")], np.int32)
    except (ValueError, OverflowError) as error:
        raise ValueError(f"--classes is {text!r}; give labels such as 3 or 0,1,2.") from error
    check_labels(chosen, num_classes=num_classes, batch=len(chosen))
    return np.resize(chosen, num)


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor best")
    return text if text == "best" else int(text)


def _declare_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=_step, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--split", choices=("train", "eval", "all"), default="eval")
    parser.add_argument(
        "--noise",
        choices=("model", "uniform"),
        default="model",
        help="noise on the images: what the model was trained under, or uniform dequantisation",
    )
    parser.add_argument("--unconditional", action="store_true", help="do not give labels to a class model")
    parser.epilog = "Other data than the run's: --data.source folder --data.path DIR."
    parser.add_argument("--batch", type=_whole(1), default=256)
    parser.add_argument("--seed", type=_whole(0, MAX_SEED), default=0)


def _evaluate(options: argparse.Namespace, rest: list[str]) -> int:
    import jax

    from flowgen import checkpoint, config
    from flowgen.evaluation import flow_bits_per_dim, gaussian_bits_per_dim

    other = [word for word in rest if word.startswith("--") and not word.startswith("--data.")]
    if other:
        raise ValueError(f"{other[0]} is not an option of evaluate; of the config, only --data.* can be set.")
    flow, params, experiment = checkpoint.load(options.checkpoint, options.step)
    experiment = config.override(experiment, rest)
    source = experiment.source(options.split)
    sigma = flow.config.noise_std if options.noise == "model" else 0.0
    bits = flow_bits_per_dim(
        flow,
        params,
        source,
        jax.random.key(options.seed),
        noise_std=sigma,
        batch_size=options.batch,
        conditional=not options.unconditional,
    )
    fitted = experiment.source("train" if options.split == "eval" else options.split)
    baseline = gaussian_bits_per_dim(fitted, source, noise_std=sigma)
    noise = f"Gaussian noise of std {sigma:g}" if sigma else "uniform dequantisation"
    _say(f"{len(source)} images ({options.split}), {noise}")
    _say(f"bits/dim {bits:.4f}")
    _say(f"bits/dim of a Gaussian fit {baseline:.4f}")
    return 0


def _declare_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="published weights: torch (.pth) or safetensors")
    parser.add_argument("--to", required=True, help="run directory to write")
    parser.add_argument("--image-size", help="side of the images, or height,width", required=True)
    parser.add_argument("--patch-size", type=_whole(1), help="default: from a published file name")
    parser.add_argument("--channels", type=_whole(1), default=3)
    parser.add_argument("--noise-std", type=_number, help="sigma of training; default: from a published file name")
    parser.add_argument("--entry", help="which state dict, where the file holds several")


def _convert(options: argparse.Namespace, rest: list[str]) -> int:
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
    _say(f"Wrote {options.to}: {_size(flow):,} parameters; sample with --checkpoint {options.to}")
    return 0


def _image_size(text: str) -> int | tuple[int, int]:
    sides = text.split(",")
    if not all(side.isdecimal() for side in sides) or len(sides) not in (1, 2):
        raise ValueError(f"--image-size is {text!r}; give a side such as 64, or height,width such as 32,48.")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _declare_info(parser: argparse.ArgumentParser) -> None:
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--config", help="Python file with config()")
    group.add_argument("--checkpoint", help="directory of a run")
    parser.add_argument("--debug", action="store_true", help="with --config: as train.py --debug would run it")


def _info(options: argparse.Namespace, rest: list[str]) -> int:
    from flowgen import config, fields
    from flowgen.training import CheckpointReader
    from flowgen.training.loop import CHECKPOINTS, read_config

    if options.checkpoint:
        given = ["--debug"] * options.debug + rest
        if given:
            raise ValueError(f"{given[0]} is not an option of info --checkpoint; see --help.")
        experiment = config.from_json(read_config(options.checkpoint))
        steps = CheckpointReader(Path(options.checkpoint) / CHECKPOINTS).steps()
        _say(f"checkpoints: {', '.join(map(str, steps)) or 'none'}")
    else:
        experiment = _experiment(options, rest)
    _say(f"parameters: {_size(experiment.flow()):,}")
    for name in fields.leaf_names(experiment):
        value: Any = experiment
        for part in name.split("."):
            value = getattr(value, part)
        _say(f"--{name} {value}")
    return 0


def _size(flow: Any) -> int:
    import jax

    from flowgen.flows import init

    abstract = jax.eval_shape(lambda: init(flow, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(abstract["params"]))


def _say(line: str) -> None:
    print(line, flush=True)


# Commands after whose options any field of the config may be set.
TAKES_FIELDS = ("train", "info", "evaluate")

COMMANDS: dict[str, tuple[Callable[..., None], Callable[..., int], str]] = {
    "train": (_declare_train, _train, "Train a model, or go on training it."),
    "sample": (_declare_sample, _sample, "Draw samples from a trained model."),
    "evaluate": (_declare_evaluate, _evaluate, "Print the bits per dimension of a model on its data."),
    "convert": (_declare_convert, _convert, "Make a run directory of published weights."),
    "info": (_declare_info, _info, "Print the fields of a config or of a run."),
}
