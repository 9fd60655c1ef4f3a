"""The command `sample`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

from flowgen.cli.options import MAX_SEED, finite_number, say, step_or_best, whole_number


def declare(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument("--checkpoint", required=True, help="directory of a run")
    parser.add_argument("--step", type=step_or_best, help="checkpoint to take: a number, or best (default: the latest)")
    parser.add_argument("--num", type=whole_number(1), help="how many samples (default: as in the run's config)")
    parser.add_argument("--classes", help="labels to draw in turn: 3, or 0,1,2; -1 is unconditional (--classes=-1,3)")
    parser.add_argument("--guidance", type=finite_number, help="guidance scale, 0 for none")
    parser.add_argument("--plan", choices=("sequential", "jacobi", "auto"), help="how tokens are decoded")
    parser.add_argument("--window", type=whole_number(1), help="tokens solved together by --plan jacobi (default: all)")
    parser.add_argument("--tol", type=finite_number, help="largest change at which --plan jacobi stops")
    parser.add_argument("--denoise", type=finite_number, help="strength of the score step, 0 for none")
    parser.add_argument("--batch", type=whole_number(1), default=64, help="samples per compiled call")
    parser.add_argument("--seed", type=whole_number(0, MAX_SEED), default=0)
    parser.add_argument("--out", default="samples.png", help="grid to write: .png, or .npz with the images as floats")
    parser.add_argument("--single", metavar="DIR", help="also write every sample as a PNG into this directory")
    parser.add_argument("--certify", action="store_true", help="check the decoding by a forward pass")
    parser.add_argument("--no-ema", action="store_true", help="take the trained parameters, not their average")


def run(options: argparse.Namespace, rest: list[str]) -> int:
    """Returns the exit code."""
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
    say(f"Wrote {out}")
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
        say(line)
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
