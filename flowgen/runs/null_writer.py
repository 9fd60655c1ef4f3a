"""Replaces the run writer in processes other than the first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowgen.data.inventory import Inventory


class NullWriter:
    """Takes the place of a `RunWriter`, but writes nothing."""

    def __init__(self, workdir: str | Path):
        self.workdir = Path(workdir)

    def __enter__(self) -> NullWriter:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def begin(
        self,
        config: dict[str, Any],
        *,
        first_step: int | None,
        last_step: int,
        tensorboard: bool,
        bar: bool,
        tracker: str,
    ) -> None: ...

    def describe_data(self, inventory: Inventory, *, resumed: bool) -> None: ...

    def describe_start(self, lines: Sequence[str]) -> None: ...

    def say(self, line: str) -> None: ...

    def warn(self, sentence: str) -> None: ...

    def advance(self, step: int) -> None: ...

    def write(self, step: int, metrics: dict[str, float]) -> None: ...

    def show(self, step: int, metrics: dict[str, float], seconds_left: float | None) -> None: ...

    def profile_folder(self) -> None: ...

    def save(self, step: int, state: Any) -> None: ...

    def save_last(self, step: int, state: Any) -> None: ...

    def score(self, step: int, metrics: dict[str, float]) -> None: ...

    def holds(self, step: int) -> bool:
        return True
