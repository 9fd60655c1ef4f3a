"""Converts Inception v3 weights in the layout of torchvision, which the usual FID weights for PyTorch share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.convert.mapping import Rule, fill
from flowgen.evaluation.inception import InceptionV3, Variant

FID_CLASSES = 1008  # rows of the classifier in the weights of the FID; torchvision's has 1,000
_NAMES = {
    ("params", "kernel"): "weight",
    ("params", "scale"): "weight",
    ("params", "bias"): "bias",
    ("batch_stats", "mean"): "running_mean",
    ("batch_stats", "var"): "running_var",
}


def inception(state_dict: Mapping[str, np.ndarray]) -> tuple[InceptionV3, dict[str, Any]]:
    """Converts a state dict of Inception v3. Returns the network, and its variables as float32 numpy arrays.

    The classifier tells the variant: one of 1,008 classes means "fid", and any other "torchvision". The classifiers
    themselves are not used.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected or of the wrong shape; `failures` lists them all.
        ValueError: there is no classifier, so the variant is unknown.

    Example:
        network, variables = inception(read_state_dict("pt_inception-2015-12-05-6726825d.pth"))
    """
    if "fc.weight" not in state_dict:
        raise ValueError(
            "the weights have no 'fc.weight', which tells the FID network from torchvision's; give the state dict of "
            "the whole Inception v3."
        )
    variant: Variant = "fid" if len(state_dict["fc.weight"]) == FID_CLASSES else "torchvision"
    network = InceptionV3(variant)
    target = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))
    kept = {name: x for name, x in state_dict.items() if not name.startswith(("AuxLogits.", "fc."))}
    rules = (*_rules(target), *(Rule(name, None) for name in kept if name.endswith(".bn.num_batches_tracked")))
    variables, _ = fill(target, kept, rules)
    return network, variables


def _rules(target: Any) -> list[Rule]:
    """Returns one rule for each leaf; the modules have the published names."""
    rules = []
    for path, _ in jax.tree_util.tree_leaves_with_path(target):
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        collection, *modules, last = leaf.split("/")
        source = ".".join([*modules, _NAMES[collection, last]])
        rules.append(Rule(source, leaf, _kernel) if last == "kernel" else Rule(source, leaf))
    return rules


def _kernel(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, (0, 1), (-1, -2))
