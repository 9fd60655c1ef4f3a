"""Reads a run or an exported model, on this machine or in a bucket."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flowgen.places import is_remote
from flowgen.runs.checkpoints import CheckpointReader
from flowgen.runs.directory import CHECKPOINTS, CONFIG_FILE, check_workdir, read_config
from flowgen.runs.exported import FILES as EXPORTED_FILES
from flowgen.runs.exported import MODEL_FILE, ExportedReader, is_exported
from flowgen.runs.files import is_regular
from flowgen.runs.lock import LOCK_FILE
from flowgen.runs.mirror import Mirror, is_of_checkpoint
from flowgen.runs.remote_lock import TAKEOVER_FILE, check_free


class RunReader:
    """Reads a run. If the run is in a bucket, downloads each file to a temporary directory before reading it.

    An exported model is read as if it were a run with a single checkpoint.

    run_dir: the directory or URL of the run. directory: the directory on this machine from which files are read; for a
    run in a bucket, this is the temporary directory. mirror: the local copy of a run in a bucket; None for other runs.
    checkpoints: the reader of the run's checkpoints; for a run in a bucket, it finds only the checkpoints that existed
    when the `RunReader` was created.

    Example:
        run = RunReader("gs://bucket/digits")
        with run.named():
            config, step = run.config(), run.checkpoints.latest_step()
    """

    def __init__(self, run_dir: str | os.PathLike[str]):
        self.mirror = Mirror(run_dir) if is_remote(run_dir) else None
        self.directory = Path(run_dir) if self.mirror is None else self.mirror.path
        self.shown = os.fspath(run_dir)
        if self.mirror is not None:
            self.mirror.fetch([CONFIG_FILE])
        self.checkpoints = self._reader()

    def named(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which error messages contain the URL of a run in a bucket, not the path of its copy."""
        return contextlib.nullcontext() if self.mirror is None else self.mirror.named()

    def _reader(self) -> CheckpointReader:
        if is_exported(self.directory) or self._is_damaged_export():
            if self.mirror is not None:
                self.mirror.fetch(EXPORTED_FILES)
            return ExportedReader(self.directory)
        fetch = {} if self.mirror is None else {"fetch": self.mirror.fetch_checkpoint_files}
        return CheckpointReader(self.directory / CHECKPOINTS, **fetch)

    def _is_damaged_export(self) -> bool:
        """Returns, for a folder that is not `is_exported`, whether it has exported weights but no checkpoints."""
        if self.mirror is not None:
            return MODEL_FILE in self.mirror.sizes and not any(map(is_of_checkpoint, self.mirror.sizes))
        return is_regular(self.directory / MODEL_FILE) and not os.path.lexists(self.directory / CHECKPOINTS)

    def config(self) -> dict[str, Any]:
        """Returns the run's config. Raises the errors of `read_config` and `ExportedReader.config`."""
        if isinstance(self.checkpoints, ExportedReader):
            return self.checkpoints.config()
        if self.mirror is not None and not self.mirror.sizes:
            raise FileNotFoundError(f"checkpoint {self.shown} does not exist; give the --workdir of a training run.")
        return read_config(self.directory)

    def free(self) -> None:
        """Frees the disk space of downloaded arrays. Arrays that are needed later are downloaded again."""
        if self.mirror is not None:
            self.mirror.free()

    def check(self, check_config: Callable[[dict[str, Any]], None], *, locks: bool = True) -> None:
        """Raises an error if training cannot start or resume in the directory; see `check_workdir`. Writes nothing."""
        if isinstance(self.checkpoints, ExportedReader):
            raise FileExistsError(
                f"workdir {self.shown} contains an exported model, which cannot be resumed; train in a new --workdir "
                f"with --init-from {self.shown}."
            )
        if self.mirror is not None:
            if locks:
                check_free(self.mirror.remote)
            first = {name.partition("/")[0] for name in self.mirror.sizes} - {LOCK_FILE, TAKEOVER_FILE, CHECKPOINTS}
            if first and CONFIG_FILE not in first and self.checkpoints.latest_step() is None:
                raise FileExistsError(
                    f"workdir {self.shown} contains files but no flowgen run; give a new or empty directory."
                )
        check_workdir(self.directory, check_config, locks=locks)
