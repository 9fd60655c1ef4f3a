"""Finds user-defined objects by name. Names in commands and saved JSON have the form "package.module:object".

Only a name in a command causes its module to be imported. A name in a file must belong to a module that is already
imported, so reading a file runs no code. Callers prepend the name of a field to the error messages.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from flowgen.settings.ranges import meant, shown

# The running program or notebook. Other programs cannot find the objects that it defines.
PROGRAM = "__main__"
_COPY = "__mp_main__"  # the program again, in a process that multiprocessing started
_NOTHING = object()


def is_name(value: Any) -> bool:
    """Returns whether a value is text in the form of an object's name."""
    return isinstance(value, str) and ":" in value


def import_module(module: str) -> None:
    """Imports a module. Its code runs, so import only modules that you trust.

    Raises ValueError if `module` is not the name of a module, or if the import fails.

    Example:
        import_module("my_couplings")
    """
    if not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"is {shown(module)}; give the name of a module, such as package.module.")
    try:
        importlib.import_module(module)
    except Exception as error:  # A user's module can raise anything.
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise ValueError(
                f"needs the module {error.name}, which was not found; add its folder to PYTHONPATH."
            ) from error
        reason = " ".join(str(error).split())
        raise ValueError(
            f"needs the module {module}, which cannot be imported ({type(error).__name__}: {reason})."
        ) from error


def resolve(name: str) -> Any:
    """Returns the object with a name of the form "package.module:object"; its module must already be imported.

    Raises ValueError if the name does not have this form, or if the module has not been imported, belongs to the
    standard library, or does not contain the object.

    Example:
        coupling = resolve("my_couplings:SlicedOT")
    """
    module, attributes = split_name(name)
    if module == PROGRAM and not hasattr(sys.modules[PROGRAM], attributes[0]):
        raise ValueError(
            f"is {shown(name)}, which the program or notebook that began the run defines; load the run there, or "
            f"define {attributes[0]} here, too."
        )
    if module not in sys.modules:
        raise ValueError(
            f"is {shown(name)}, but {module} is not imported; import it first, or add --import {module} to the command."
        )
    if _is_python(module):
        raise ValueError(f"is {shown(name)}, which belongs to Python itself; name an object that you define.")
    found: Any = sys.modules[module]
    for part in attributes:
        # Unlike `getattr`, `vars` runs no code of a module or class that computes missing attributes.
        following = vars(found).get(part, _NOTHING) if hasattr(found, "__dict__") else _NOTHING
        if following is _NOTHING:
            raise ValueError(f"is {shown(name)}, but {part} does not exist{meant(part, vars(found))}")
        found = following
    return found


def import_object(name: str) -> Any:
    """Returns the object with a name of the form "package.module:object", after importing its module.

    The module's code runs, so import only modules that you trust.

    Raises the same errors as `import_module` and `resolve`.

    Example:
        coupling = import_object("my_couplings:SlicedOT")
    """
    import_module(split_name(name)[0])
    return resolve(name)


def split_name(name: str) -> tuple[str, list[str]]:
    """Splits an object's name into its module and attributes. Raises ValueError if the name does not have this form."""
    module, _, path = name.partition(":")
    attributes = path.split(".")
    if not all(part.isidentifier() for part in [*module.split("."), *attributes]):
        raise ValueError(f"is {shown(name)}; write it as package.module:object.")
    return module, attributes


def name_of(value: Any) -> str | None:
    """Returns a name by which `resolve` finds the object `value`; None if there is none, as for a local function.

    Example:
        name_of(my_couplings.SlicedOT)  # "my_couplings:SlicedOT"
    """
    module, path = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    where = f"{module}:{path}" if _is_there(module, path, value) else None
    if where is not None and not _is_private(str(module)):
        return where
    package = str(module).partition(".")[0]
    names = [
        (module, name)
        for module, contents in list(sys.modules.items())
        if isinstance(contents, ModuleType) and module != _COPY and not _is_python(module)
        for name, held in list(vars(contents).items())
        if held is value and name.isidentifier()
    ]
    if where is not None:  # A public module of the same package may re-export an object of a private one.
        names = [found for found in names if found[0].partition(".")[0] == package and not _is_private(found[0])]

    def rank(found: tuple[str, str]) -> tuple[bool, ...]:
        """Returns a sort key that puts the running program last, and the object's package and original name first."""
        module, name = found
        # Notebooks also keep the last results under names such as _12.
        return module == PROGRAM, module.partition(".")[0] != package, name != path, name.startswith("_")

    return ":".join(min(names, key=rank)) if names else where


def fields_of_program(plain: Any, path: str = "") -> list[str]:
    """Returns the dotted names of fields whose plain values are names of objects in the running program.

    Example:
        fields_of_program({"matching": {"coupling": "__main__:SlicedOT"}})  # ["matching.coupling"]
    """
    if isinstance(plain, Mapping):
        inside = {name: ".".join(filter(None, (path, name * (name != "type")))) for name in plain}
        return [field for name, item in plain.items() for field in fields_of_program(item, inside[name])]
    return [path] if isinstance(plain, str) and plain.startswith(f"{PROGRAM}:") else []


def _is_python(module: str) -> bool:
    """Returns whether a module is part of the standard library, whose objects cannot be given by name."""
    return module.partition(".")[0] in sys.stdlib_module_names


def _is_private(module: str) -> bool:
    """Returns whether a part of a module's name begins with an underscore."""
    return any(part.startswith("_") for part in module.split("."))


def _is_there(module: Any, path: Any, value: Any) -> bool:
    """Returns whether `module` and `path` lead to `value`."""
    if not (isinstance(module, str) and isinstance(path, str)):
        return False
    found: Any = None if module == _COPY or _is_python(module) else sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found is value
