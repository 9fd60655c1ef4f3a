"""The layout of a run directory, and functions that check, read and write its files.

<run>/config.json      the experiment, with the digest of its values
<run>/data.json        a summary of the data, and the list of its files
<run>/plan.json        the decoding plan that `sample --tune` measured, with a digest
<run>/start.txt        which parameters came from another run, if the run started from one
<run>/checkpoints/     see `flowgen.runs.checkpoints`
<run>/metrics.jsonl    training metrics, averaged since the last report, and evaluation metrics
<run>/history.jsonl    when and where the run was trained, and its warnings
<run>/events.*         the same metrics, and the sample images, for TensorBoard
<run>/samples/         an image for each step at which samples were drawn
<run>/profile/         traces of training steps for a profiler, if requested
<run>/report.html      the page that the command `report` wrote, if any
<run>/lock             locked by the process that is training here
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowgen import settings
from flowgen.data.inventory import Inventory
from flowgen.data.media import nearest_place
from flowgen.places import check_local
from flowgen.runs.checkpoints import CHECKPOINTS, CheckpointReader
from flowgen.runs.exported import CONFIG_FILE
from flowgen.runs.files import DIGEST, is_regular, is_temporary, read_json, signed, verified, write_json
from flowgen.runs.history import HISTORY_FILE
from flowgen.runs.located import shipped_models
from flowgen.runs.lock import LOCK_FILE, check_unlocked
from flowgen.settings.ranges import meant

DATA_FILE = "data.json"
START_FILE = "start.txt"
PLAN_FILE = "plan.json"
SAMPLES = "samples"
PROFILE = "profile"


def is_run(run_dir: str | Path) -> bool:
    """Returns whether a directory is that of a run, which means that its config.json exists and contains a digest.

    Raises ValueError if config.json does not contain a JSON object.

    Example:
        is_run("runs/digits")
    """
    path = Path(run_dir) / CONFIG_FILE
    return is_regular(path) and DIGEST in read_json(path)


def was_trained_in(directory: str | Path) -> bool:
    """Returns whether a directory contains the config of a run, or a complete checkpoint in its folder `checkpoints`.

    Example:
        was_trained_in("photos/run")
    """
    try:
        if is_run(directory):
            return True
    except (OSError, ValueError):
        pass  # the config is damaged but may belong to a run
    try:
        return CheckpointReader(Path(directory) / CHECKPOINTS).latest_step() is not None
    except OSError:
        return False


def read_config(run_dir: str | Path) -> dict[str, Any]:
    """Returns a run's config as plain JSON values.

    Raises:
        FileNotFoundError: the directory does not exist or is not a run; the message says which.
        ValueError: the config is not a file, is not JSON, or has been changed; if a checkpoint contains the original
            config, the message names up to three changed values.

    Example:
        read_config("runs/digits")["model"]
    """
    check_local("the directory of a run", run_dir)
    path = Path(run_dir) / CONFIG_FILE
    if not Path(run_dir).is_dir():
        raise FileNotFoundError(
            f"checkpoint {run_dir} is not a directory; give the --workdir of a training run, an exported "
            f"folder, or a shipped model ({', '.join(shipped_models())}){meant(str(run_dir), shipped_models())}"
        )
    kept = CheckpointReader(Path(run_dir) / CHECKPOINTS).latest_step() is not None
    if not path.exists():
        if kept:
            raise FileNotFoundError(
                f"checkpoint {run_dir} has lost its {CONFIG_FILE}; run the training command again to recreate it."
            )
        hidden = " It hides the shipped model of this name." if str(run_dir) in shipped_models() else ""
        raise FileNotFoundError(
            f"checkpoint {run_dir} is not a flowgen run, because it has no {CONFIG_FILE}; give the --workdir of a run."
            f"{hidden}"
        )
    # The config can be recreated, because checkpoints also contain it.
    instead = ", or delete it and run the training command again to recreate it" if kept else ""
    try:
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} does not contain a JSON object; restore it from a copy{instead}.") from error
    try:
        return verified(config)
    except ValueError as error:
        changed = _changed(Path(run_dir), config)
        raise ValueError(f"{path} {error}{changed}; restore it from a copy{instead}.") from error


def write_config(run_dir: str | Path, config: dict[str, Any]) -> None:
    """Writes a run's config atomically.

    Example:
        write_config("runs/digits", experiment.to_json())
    """
    write_json(Path(run_dir) / CONFIG_FILE, signed(config))


def read_plan(run_dir: str | Path) -> dict[str, Any]:
    """Returns the decoding plan of a run as plain JSON values.

    Raises:
        OSError: there is no plan, or it cannot be read.
        ValueError: the file is damaged or has been changed; the message names it.

    Example:
        read_plan("runs/digits")["plan"]
    """
    path = Path(run_dir) / PLAN_FILE
    try:
        return verified(read_json(path))
    except ValueError as error:
        reason = str(error) if str(path) in str(error) else f"{path} {error}"
        raise ValueError(f"{reason.partition(';')[0].rstrip('.')}; delete it, and measure the plan again.") from error


def write_plan(run_dir: str | Path, plan: dict[str, Any]) -> None:
    """Writes the decoding plan of a run atomically.

    Example:
        write_plan("runs/digits", plan)
    """
    write_json(Path(run_dir) / PLAN_FILE, signed(plan))


def data_changes(run_dir: str | Path, inventory: Inventory) -> str:
    """Returns a line that describes how the data have changed since the last start of the run; "" if nothing changed.

    Example:
        data_changes("runs/photos", inventory)
    """
    path = Path(run_dir) / DATA_FILE
    try:
        return inventory.changes(read_json(path))
    except FileNotFoundError:
        return "The run has no list of its data files, so changes to its data cannot be detected."
    except (OSError, ValueError):
        return f"{path} cannot be read, so changes to the run's data cannot be detected."


def check_workdir(workdir: Path, check_config: Callable[[dict[str, Any]], None], *, locks: bool = True) -> None:
    """Raises ValueError or OSError unless training can start or resume in a directory. Writes nothing.

    check_config: a function that is called with the config of the run in the directory, if there is one; it raises
    ValueError if this run cannot be resumed. locks: whether to also raise BlockingIOError if another process is
    training in the directory.

    Example:
        check_workdir(Path("runs/digits"), experiment.check_resumable)
    """
    nearest = nearest_place(workdir)
    if nearest.is_dir() and not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"You have no permission to write to workdir {workdir}; give another directory.")
    if locks:
        check_unlocked(workdir)
    _check_kinds(workdir)
    if CheckpointReader(workdir / CHECKPOINTS).latest_step() is not None and not (workdir / CONFIG_FILE).exists():
        return  # the checkpoint's config is compared instead
    if (workdir / CONFIG_FILE).exists():
        try:
            check_config(read_config(workdir))
        except ValueError as error:
            raise ValueError(f"workdir {workdir}: {error}") from error
    elif workdir.exists() and not workdir.is_dir():
        raise NotADirectoryError(f"workdir {workdir} is a file; give a new or empty directory.")
    elif workdir.exists() and any(_is_foreign(path) for path in workdir.iterdir()):
        raise FileExistsError(f"workdir {workdir} contains files but no flowgen run; give a new or empty directory.")


def _check_kinds(workdir: Path) -> None:
    """Raises OSError if a path that must be a folder or a regular file is something else."""
    for name in (CHECKPOINTS, SAMPLES, PROFILE):
        if os.path.lexists(workdir / name) and not (workdir / name).is_dir():
            raise NotADirectoryError(f"{workdir / name} is not a folder; remove it.")
    for name in (DATA_FILE, START_FILE, PLAN_FILE, HISTORY_FILE, LOCK_FILE):
        path = workdir / name
        is_elsewhere = name == LOCK_FILE and path.is_symlink()  # a link would lock another directory
        if os.path.lexists(path) and (is_elsewhere or not is_regular(path)):
            raise FileExistsError(f"{path} is not a regular file; remove it.")


def _is_foreign(path: Path) -> bool:
    """Returns False for the files and folders that a run leaves behind if it is killed while it starts."""
    if path.name == CHECKPOINTS and path.is_dir():
        return any(path.iterdir())
    return path.name != LOCK_FILE and not is_temporary(path.name)


def _changed(run_dir: Path, config: dict[str, Any]) -> str:
    """Returns the part of an error message that lists the values which differ from the latest checkpoint's config."""
    try:
        reader = CheckpointReader(run_dir / CHECKPOINTS)
        step = reader.latest_step()
        if step is None:
            return ""
        saved = reader.meta(step)["config"]
        lines = settings.differences(saved, {name: value for name, value in config.items() if name != DIGEST})
    except (OSError, ValueError, RecursionError):
        return ""
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f" (compared with checkpoint {step}: {'; '.join(lines[:3])}{more})" if lines else ""
