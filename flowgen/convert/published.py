"""Imports published TARFlow checkpoints.

Some settings are inferred from the shapes of the tensors; the caller must provide the others.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax
import numpy as np

from flowgen.arrays import shown
from flowgen.convert.mapping import fill
from flowgen.convert.tables import ALL_ONES, TARFLOW
from flowgen.flows import TARFlow, TARFlowConfig
from flowgen.flows.tarflow import Scale
from flowgen.nn import init

_WRAPPERS = ("module.", "_orig_mod.")  # prefixes added by DistributedDataParallel and torch.compile
_MAX_WRAPPERS = 4  # the maximum number of these prefixes in a name
_STARFLOW_MARKS = ("blocks.0.sos_embed", "feat_rope.freqs_cos")
_FILE_NAME = re.compile(r".*?_?model_(\d+)_(\d+)_(\d+)_(\d+)_(\d+\.\d+|uniform)\.\w+")


class FileName(TypedDict):
    """The settings that are encoded in the name of a published TARFlow file."""

    patch_size: int
    width: int
    num_blocks: int
    layers_per_block: int
    noise_std: float


def parse_file_name(path: str | os.PathLike[str]) -> FileName | None:
    """Returns the settings in the name of a published TARFlow file, or None if the name does not have the form below.

    <data>_model_<patch size>_<width>_<number of blocks>_<layers per block>_<σ>.<extension>

    σ is the standard deviation of the Gaussian noise that was added in training. If σ is "uniform", the model was
    trained with uniform dequantisation instead, and `noise_std` is 0.

    Example:
        parse_file_name("afhq_model_8_768_8_8_0.07.pth")["noise_std"]  # 0.07
    """
    found = _FILE_NAME.fullmatch(Path(path).name)
    if found is None:
        return None
    patch_size, width, num_blocks, layers_per_block = map(int, found.groups()[:4])
    return FileName(
        patch_size=patch_size,
        width=width,
        num_blocks=num_blocks,
        layers_per_block=layers_per_block,
        noise_std=0.0 if found[5] == "uniform" else float(found[5]),
    )


def tarflow(
    state_dict: Mapping[str, np.ndarray],
    *,
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int = 3,
    noise_std: float = 0.0,
) -> tuple[TARFlow, dict[str, Any]]:
    """Converts a published TARFlow state dict. Returns the flow, and its variables as float32 numpy arrays.

    Width, depth, MLP expansion, number of classes and scale parameterisation are inferred from the shapes of the
    tensors. The arguments `image_size`, `patch_size` and `channels` must agree with these shapes. The tensor `var`, the
    variance of the prior, is imported unless all its values are 1.

    image_size: side of square images in pixels, or (height, width).
    patch_size: side of a patch in pixels.
    noise_std: standard deviation of the Gaussian noise that was added in training, which cannot be inferred from the
    tensors; 0 for uniform dequantisation.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        ValueError: the weights are not from a TARFlow, or the arguments contradict the shapes.

    Example:
        flow, params = tarflow(read_state_dict("afhq_model_8_768_8_8_0.07.pth"), image_size=256, patch_size=8)
    """
    check_state_dict(state_dict)
    state_dict = unwrapped(state_dict)
    config = _tarflow_config(state_dict, image_size, patch_size, channels, noise_std)
    flow = TARFlow(config)
    target = dict(jax.eval_shape(lambda key: init(flow, key), jax.random.key(0)))
    if "var" in state_dict and not ALL_ONES.holds(state_dict["var"]):
        shape = (config.num_tokens, config.token_dim)
        target["prior"] = {"variance": jax.ShapeDtypeStruct(shape, np.float32)}
    variables, dropped = fill(target, state_dict, TARFLOW)
    logging.getLogger(__name__).info(
        "%d tensors imported, %d dropped: %s",
        len(state_dict) - len(dropped),
        len(dropped),
        ", ".join(dropped),
    )
    return flow, variables


def check_state_dict(state_dict: Any) -> None:
    """Raises ValueError if `state_dict` is not a mapping, for example if it is a path.

    Example:
        check_state_dict({"weight": weight})
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"state_dict is {shown(state_dict)}; read the weights with flowgen.convert.read_state_dict.")


def _tarflow_config(
    state_dict: Mapping[str, np.ndarray],
    image_size: int | tuple[int, int],
    patch_size: int,
    channels: int,
    noise_std: float,
) -> TARFlowConfig:
    _check_family(state_dict)
    num_tokens, width = _shape(state_dict, "blocks.0.pos_embed", 2)
    _, token_dim = _shape(state_dict, "blocks.0.proj_in.weight", 2)
    outputs, _ = _shape(state_dict, "blocks.0.proj_out.weight", 2)
    hidden, _ = _shape(state_dict, "blocks.0.attn_blocks.0.mlp.main.0.weight", 2)
    scales: dict[int, Scale] = {2 * token_dim: "exponential", token_dim: "volume_preserving"}
    if outputs not in scales:
        raise ValueError(
            f"'blocks.0.proj_out.weight' has {outputs} rows, but TARFlow weights have one or two for each "
            f"channel of a token ({token_dim} channels)."
        )
    if token_dim != channels * patch_size**2:
        side = math.isqrt(token_dim // channels) if channels > 0 else 0
        fitting = side > 0 and channels * side**2 == token_dim
        raise ValueError(
            f"patch_size {patch_size} with {channels} channels gives tokens of {channels * patch_size**2} numbers, "
            f"but the weights have {token_dim}; use "
            + (f"patch_size={side}." if fitting else "the patch_size and channels that the model was trained with.")
        )
    config = TARFlowConfig(
        image_size=image_size,
        channels=channels,
        patch_size=patch_size,
        width=width,
        num_blocks=_count(state_dict, "blocks.{index}.pos_embed"),
        layers_per_block=_count(state_dict, "blocks.0.attn_blocks.{index}.mlp.main.0.weight"),
        expansion=max(1, hidden // width),
        num_classes=_shape(state_dict, "blocks.0.class_embed", 3)[0] if "blocks.0.class_embed" in state_dict else 0,
        scale_parameterisation=scales[outputs],
        noise_std=noise_std,
    )
    if config.num_tokens != num_tokens:
        height, length = config.image_hw
        side = math.isqrt(num_tokens)
        raise ValueError(
            f"image_size {height}x{length} with patch_size {patch_size} gives {config.num_tokens} tokens, "
            f"but the weights have {num_tokens}; use "
            + (
                f"image_size={side * patch_size}."
                if side**2 == num_tokens
                else "the image_size that the model was trained with."
            )
        )
    return config


def _check_family(state_dict: Mapping[str, np.ndarray]) -> None:
    mark = next((name for name in _STARFLOW_MARKS if name in state_dict), None)
    if mark is not None:
        raise ValueError(f"These are STARFlow weights (they have '{mark}'); import them with flowgen.convert.starflow.")
    if "blocks.0.pos_embed" not in state_dict:
        names = ", ".join(repr(name[:80]) for name in list(state_dict)[:4]) or "nothing"
        raise ValueError(
            f"These are not TARFlow weights: 'blocks.0.pos_embed' is missing from the {len(state_dict)} tensors "
            f"({names}, ...); give a published TARFlow state dict."
        )


def _shape(state_dict: Mapping[str, np.ndarray], name: str, ndim: int) -> tuple[int, ...]:
    if name not in state_dict:
        raise ValueError(f"These TARFlow weights are incomplete: '{name}' is missing.")
    shape = state_dict[name].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"'{name}' has shape {shape}, but in TARFlow weights it has {ndim} axes and is not empty.")
    return shape


def _count(state_dict: Mapping[str, np.ndarray], template: str) -> int:
    """Returns the smallest index for which the state dict lacks the name that the template produces."""
    return next(index for index in itertools.count() if template.format(index=index) not in state_dict)


def unwrapped(state_dict: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Returns the tensors by name, without the prefixes that DistributedDataParallel and torch.compile add.

    Example:
        state_dict = unwrapped(read_state_dict("model.pth"))
    """
    for _ in range(_MAX_WRAPPERS):
        for prefix in _WRAPPERS:
            if state_dict and all(name.startswith(prefix) for name in state_dict):
                state_dict = {name.removeprefix(prefix): x for name, x in state_dict.items()}
    return state_dict
