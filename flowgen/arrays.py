"""Checks the arrays, keys and counts that are passed to public functions.

Checks of shapes and dtypes also work on traced arrays.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def check_floating(name: str, x: Any) -> None:
    """Raises ValueError unless x is an array of real floating-point numbers.

    Example:
        check_floating("x", x)
    """
    if not (hasattr(x, "dtype") and hasattr(x, "shape")):
        raise ValueError(f"{name} is {shown(x)}; give an array of floating-point numbers.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} is {x.dtype}; give floating-point numbers. flowgen.data.from_uint8 converts bytes to pixels in "
            "[-1, 1], as x / 127.5 - 1."
        )


def check_bytes(name: str, x: Any) -> None:
    """Raises ValueError unless x is a uint8 array.

    Example:
        check_bytes("batch.x", batch.x)
    """
    if getattr(x, "dtype", None) != jnp.uint8:
        raise ValueError(f"{name} is {shown(x)}; give bytes (uint8). flowgen.data.to_uint8 converts floats in [-1, 1].")


def check_finite(**arrays: Any) -> None:
    """Raises ValueError if an array contains NaN or infinity; the message contains the array's name. The arrays must
    not be traced.

    Example:
        check_finite(x=x, y=y)
    """
    _check_none(lambda x: ~np.isfinite(x), "not finite", arrays)


def check_no_nan(**arrays: Any) -> None:
    """Raises ValueError if an array contains NaN; the message contains the array's name. The arrays must not be traced.

    Example:
        check_no_nan(scores=scores)
    """
    _check_none(np.isnan, "NaN", arrays)


def _check_none(find: Callable[[Any], Any], what: str, arrays: Mapping[str, Any]) -> None:
    for name, array in arrays.items():
        found = find(np.asarray(array))
        if count := int(np.sum(found)):
            first = tuple(map(int, np.argwhere(found)[0]))
            values = "1 value that is" if count == 1 else f"{count} values that are"
            ending = f"at index {first}; remove it." if count == 1 else f"the first at index {first}; remove them."
            raise ValueError(f"{name} has {values} {what}, {ending}")


def check_key(key: Any) -> None:
    """Raises ValueError unless key is a single jax.random key, typed or old-style.

    Example:
        check_key(jax.random.key(0))
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not (shape == () if typed else dtype == jnp.uint32 and len(shape or ()) == 1):
        raise ValueError(f"key is {shown(key)}; give a single key, such as jax.random.key(0).")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless the value is a whole number of at least 1.

    Example:
        check_count("num", num)
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {shown(value)}; give a whole number of at least 1.")


def is_number(value: Any) -> bool:
    """Returns whether a value is a real number: a Python or NumPy number, or a scalar array, which may be traced.

    Example:
        is_number(jnp.float32(0.5))  # True
    """
    if isinstance(value, bool | int | float):
        return True
    kind = getattr(value, "dtype", None)
    if kind is None or getattr(value, "shape", None) != ():
        return False
    return any(jnp.issubdtype(kind, real) for real in (jnp.bool_, jnp.integer, jnp.floating))


def shown(value: Any) -> str:
    """Returns a description of a value for error messages.

    Arrays are described by their dtype and shape, numbers and strings by their value, and other objects by their class.

    Example:
        shown(jnp.zeros((2, 3)))  # "float32 of shape (2, 3)"
    """
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value) if not isinstance(value, float) or math.isfinite(value) else str(value)
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def at_least_float32(name: str, x: Any) -> jax.Array:
    """Returns a floating-point array, converted to float32 if its precision is lower.

    Raises the same errors as `check_floating`.

    Example:
        x = at_least_float32("x", x)
    """
    check_floating(name, x)
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def digest_of(arrays: Iterable[Any]) -> str:
    """Returns the SHA-256 digest of the shapes, dtypes and values of arrays.

    Example:
        digest = digest_of(jax.tree.leaves(params))
    """
    content = hashlib.sha256()
    for array in map(np.asarray, arrays):
        content.update(f"{array.dtype.str}{array.shape}".encode())
        content.update(np.ascontiguousarray(array).data)
    return content.hexdigest()
