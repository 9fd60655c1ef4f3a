"""Dataclasses whose values are looked at when they are made, wherever they come from."""

from __future__ import annotations

from typing import Any, TypeVar

from flowgen.fields import check, hints_of

T = TypeVar("T")


def typed(cls: type[T]) -> type[T]:
    """Returns the class with every value checked against its annotation before its own `__post_init__`: see `check`.

    Under `dataclass`, which checks nothing itself. The ValueError names the field, without the group that it is in.

    Example:
        @dataclass(frozen=True)
        @typed
        class TrainConfig:
            steps: int = 1000
    """
    own: Any = getattr(cls, "__post_init__", None)

    def __post_init__(self: Any) -> None:
        for name, annotation in hints_of(type(self)).items():
            value = getattr(self, name)
            checked = check(annotation, value, path=name)
            if checked is not value:
                object.__setattr__(self, name, checked)
        if own is not None:
            own(self)

    cls.__post_init__ = __post_init__  # ty: ignore[missing-attribute]
    return cls
