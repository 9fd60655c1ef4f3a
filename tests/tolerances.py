"""How closely float32 results are asked to agree, in one place.

Processors, thread counts and versions of the compiler add in different orders, so that results differ in their last
digits. How much follows from the largest of the terms, not from a value that is small because they cancel: hence the
tolerances are shares of the largest expected magnitude. Each is about ten times what several instruction sets, thread
counts and levels of optimisation were seen to differ by, and hundreds of times below what a wrong sign, a missing term
or a shifted index changes. Comparisons that need more digits are made in float64.
"""

import jax
import numpy as np

EPS = float(np.finfo(np.float32).eps)
# A few operations per value.
FORMULA = 32 * EPS  # 4e-6
# One layer or kernel: sums of up to some hundreds of terms, whose roundings add up to the root of that number.
LAYER = 256 * EPS  # 3e-5
# Several layers one after the other, their inverse, their gradients; also sums with cancellation.
NETWORK = 1024 * EPS  # 1.2e-4
# A linear system with a ridge of 0.01, whose solution multiplies roundings by up to 100.
RIDGE = 100 * FORMULA  # 4e-4


def assert_close(actual, expected, rtol, *, scale=None, err_msg=""):
    """Asserts that arrays agree to `rtol` of the largest expected magnitude.

    Where the expected values are 0 or cancel, `scale` is the size of the terms that they are made of.
    """
    expected = np.asarray(expected)
    if scale is None:
        scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * float(scale), err_msg=err_msg)


def assert_trees_close(actual, expected, rtol):
    """Asserts `assert_close` of every leaf, each relative to its own size."""
    leaves, others = (jax.tree.leaves_with_path(tree) for tree in (actual, expected))
    for (path, leaf), (other_path, other) in zip(leaves, others, strict=True):
        assert path == other_path
        assert_close(leaf, other, rtol, err_msg=jax.tree_util.keystr(path))
