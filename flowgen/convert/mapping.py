"""Copies the tensors of a weight file to the leaves of a parameter tree, and checks that none is missing or unused.

A `Rule` states which tensors fill which leaf, and how they are transformed. Its source and its target are name
templates with indices in braces. If an index occurs only in the source, the tensors for its values 0, 1, ... are
stacked along the leading axis of the leaf. Such rules fill the scanned layers of a block.

    Rule("blocks.{block}.mlp.{layer}.weight", "params/blocks_{block}/mlp/kernel", transpose)

The parameter tree determines which tensors are needed, so blocks of unequal depth or width need no special rules.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_INDEX = re.compile(r"\{(\w+)\}")
_MAX_LISTED = 12


def as_is(x: np.ndarray) -> np.ndarray:
    """Returns x unchanged.

    Example:
        Rule("var", "prior/variance", as_is)
    """
    return x


def transpose(x: np.ndarray) -> np.ndarray:
    """Returns the transpose of a matrix.

    The weight of a PyTorch Linear has shape (out, in), whereas the kernel of a Flax Dense has shape (in, out).

    Example:
        Rule("proj.weight", "params/proj/kernel", transpose)
    """
    return x.T


class Requirement(NamedTuple):
    """A condition that a tensor of the weight file must satisfy.

    words: what the condition requires, for an error message of the form "'<name of the tensor>' is not <words>".
    holds: a function that returns whether a tensor satisfies the condition.

    Example:
        ones = Requirement("all ones", lambda x: bool((x == 1).all()))
    """

    words: str
    holds: Callable[[np.ndarray], bool]


@dataclass(frozen=True)
class Rule:
    """Maps the tensors named `source` to the leaf `target` of a parameter tree.

    source: template for the names of the tensors, with indices in braces, such as "blocks.{block}.proj_in.weight".
    target: template for the path of the leaf, with the same indices. One index may be missing; the tensors for its
    values 0, 1, ... are then stacked along the leading axis of the leaf. None drops the tensors.
    transform: a function that is applied to each tensor before it is copied.
    requirement: a condition that each tensor must satisfy before it is transformed; None for no condition.

    Example:
        Rule("blocks.{block}.attn_mask", None, requirement=Requirement("causal", is_causal))
    """

    source: str
    target: str | None
    transform: Callable[[np.ndarray], np.ndarray] = as_is
    requirement: Requirement | None = None

    def __post_init__(self):
        if self.target is not None and len(self.stacked) > 1:
            raise ValueError(
                f"Rule '{self.source}' stacks {', '.join(self.stacked)}, but a rule can stack only one index."
            )

    @property
    def stacked(self) -> list[str]:
        """The names of the indices that occur in `source` but not in `target`."""
        kept = set(_INDEX.findall(self.target or ""))
        return [name for name in _INDEX.findall(self.source) if name not in kept]

    def sources(self, leaf: str, shape: tuple[int, ...]) -> list[str] | None:
        """Returns the names of the tensors that fill a leaf, in stacking order; None if this rule fills other leaves.

        leaf: path of the leaf. shape: shape of the leaf; if the rule stacks tensors, shape[0] is their number.
        """
        indices = None if self.target is None else match(self.target, leaf)
        if indices is None:
            return None
        if not self.stacked:
            return [self.source.format(**indices)]
        return [self.source.format(**indices, **{self.stacked[0]: index}) for index in range(shape[0])]


class MappingError(ValueError):
    """Raised if the weights do not fit the model; `failures` contains a description of each problem."""

    def __init__(self, failures: Iterable[str]):
        self.failures = tuple(failures)
        listed = self.failures[:_MAX_LISTED]
        more = len(self.failures) - len(listed)
        plural = "problem" if len(self.failures) == 1 else "problems"
        super().__init__(
            f"The weights do not fit the model ({len(self.failures)} {plural}): "
            + "; ".join(listed)
            + (f"; and {more} more." if more else ".")
        )


def match(template: str, name: str) -> dict[str, int] | None:
    """Returns the index values with which a template produces this name, or None if the name does not match.

    Example:
        match("blocks.{block}.proj_in.weight", "blocks.3.proj_in.weight")  # {"block": 3}
    """
    found = _pattern(template).fullmatch(name)
    return None if found is None else {index: int(value) for index, value in found.groupdict().items()}


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = _INDEX.split(template)
    literals, indices = parts[::2], parts[1::2]
    groups = [f"(?P<{index}>0|[1-9][0-9]*)" for index in indices]
    return re.compile("".join(re.escape(text) + group for text, group in zip(literals, [*groups, ""], strict=True)))


def fill(target: Any, state_dict: Mapping[str, np.ndarray], rules: Iterable[Rule]) -> tuple[Any, tuple[str, ...]]:
    """Fills a tree of numpy arrays from a state dict. Returns the tree and the names of the dropped tensors.

    Exactly one rule must fill each leaf. Every tensor must be used exactly once, or dropped by a rule.

    target: a tree of arrays or `jax.ShapeDtypeStruct`; the resulting tree has the same shapes and dtypes.

    Raises:
        MappingError: a leaf is filled by no rule or by several, or a tensor is missing, unexpected, used twice, not
            finite, of the wrong shape or dtype, or violates the requirement of its rule; `failures` lists all problems.

    Example:
        variables, dropped = fill(jax.eval_shape(model.init, key, x), state_dict, RULES)
    """
    rules = tuple(rules)
    failures: list[str] = []
    used: set[str] = set()

    def filled(path, leaf) -> np.ndarray:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = [(rule, sources) for rule in rules if (sources := rule.sources(name, leaf.shape)) is not None]
        if len(found) != 1:
            failures.append(f"{len(found)} rules fill '{name}' instead of one")
            return _nothing(leaf)
        ((rule, sources),) = found
        numbers = sum(state_dict[source].size for source in sources if source in state_dict)
        # A malicious config could describe arrays far larger than the file. A leaf is therefore not allocated if the
        # tensors have too few elements to fill it.
        out = np.empty(leaf.shape, leaf.dtype) if numbers >= math.prod(leaf.shape) else _nothing(leaf)
        for index, source in enumerate(sources):
            part = out[index, ...] if rule.stacked else out
            if source not in state_dict:
                failures.append(f"'{source}' is missing")
            elif source in used:
                failures.append(f"'{source}' fills a second leaf, '{name}'")
            elif (problem := _place(part, state_dict[source], rule)) is not None:
                failures.append(f"'{source}' {problem}")
            used.add(source)
        return out

    variables = jax.tree_util.tree_map_with_path(filled, target)
    dropped = tuple(name for name in state_dict if name not in used)
    for name in dropped:
        rule = next((rule for rule in rules if rule.target is None and match(rule.source, name) is not None), None)
        if rule is None:
            failures.append(f"{name[:200]!r} is not expected")
        elif (problem := _violation(state_dict[name], rule)) is not None:
            failures.append(f"{name[:200]!r} {problem}")
    if failures:
        raise MappingError(failures)
    return variables, dropped


def _nothing(leaf: Any) -> np.ndarray:
    """Returns a read-only array that occupies almost no memory, with the shape and dtype of a leaf."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def _violation(x: np.ndarray, rule: Rule) -> str | None:
    if rule.requirement is None or rule.requirement.holds(x):
        return None
    return f"is not {rule.requirement.words}"


def _place(out: np.ndarray, x: np.ndarray, rule: Rule) -> str | None:
    """Writes a transformed tensor to `out`; returns a description of the problem if this fails, otherwise None."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return f"is {x.dtype}, not floating point"
    try:
        value = rule.transform(x)
    except ValueError:
        return f"has shape {x.shape}, which its rule does not accept"
    if value.shape != out.shape:
        return f"has shape {x.shape}, which becomes {value.shape}, but the model needs {out.shape}"
    if not out.flags.writeable:
        return None
    with np.errstate(over="ignore"):  # the check below detects overflow
        out[...] = value
    if not np.isfinite(out).all():
        return f"has values that are not finite in {out.dtype}"
    return _violation(x, rule)
