"""Converts published video autoencoders: AutoencoderKLWan from diffusers, for Wan 2.1 and 2.2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowgen.codecs import LatentNormalisation, VideoAutoencoder, VideoAutoencoderConfig
from flowgen.convert.frozen import StateDict, abstract, refuse, told
from flowgen.convert.mapping import Rule, fill
from flowgen.convert.tables import conv, point

# The type and the published default of each option in the config.
_DEFAULTS: dict[str, tuple[Any, Any]] = {
    "base_dim": (int, 96),
    "decoder_base_dim": (int | None, None),
    "z_dim": (int, 16),
    "dim_mult": (tuple[int, ...], [1, 2, 4, 4]),
    "num_res_blocks": (int, 2),
    "temperal_downsample": (tuple[bool, ...], [False, True, True]),
    "is_residual": (bool, False),
    "in_channels": (int, 3),
    "out_channels": (int, 3),
    "patch_size": (int | None, None),
}


def video_autoencoder(state_dict: StateDict, config: Mapping[str, Any]) -> tuple[VideoAutoencoder, dict[str, Any]]:
    """Converts an AutoencoderKLWan of diffusers. Returns the autoencoder, and its variables as float32 numpy arrays.

    state_dict: the published tensors by name.
    config: the contents of the published config.json.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        ValueError: the config is invalid, or describes a network that flowgen does not support.

    Example:
        autoencoder, params = video_autoencoder(read_state_dict("diffusion_pytorch_model.safetensors"), config)
    """
    refuse(config, "AutoencoderKLWan", {"attn_scales": []})
    known = {name: told(config, name, annotation, default) for name, (annotation, default) in _DEFAULTS.items()}
    multiples, patch_size = known["dim_mult"], known["patch_size"] or 1
    if not multiples or multiples[0] != 1:
        raise ValueError(f"dim_mult is {list(multiples)}; its first entry must be 1.")
    if known["in_channels"] != known["out_channels"]:
        raise ValueError(
            f"in_channels is {known['in_channels']} and out_channels is {known['out_channels']}; they must be equal."
        )
    channels, rest = divmod(known["in_channels"], patch_size**2)
    if rest:
        raise ValueError(
            f"in_channels is {known['in_channels']}; with patch_size {patch_size}, it must be a multiple of "
            f"{patch_size**2}."
        )
    decoder_dim = known["decoder_base_dim"] or known["base_dim"]
    autoencoder = VideoAutoencoder(
        VideoAutoencoderConfig(
            channels=channels,
            latent_channels=known["z_dim"],
            widths=tuple(known["base_dim"] * multiple for multiple in multiples),
            decoder_widths=tuple(decoder_dim * multiple for multiple in multiples),
            halve_time=tuple(known["temperal_downsample"]),
            layers_per_block=known["num_res_blocks"],
            patch_size=patch_size,
            shortcuts=known["is_residual"],
        )
    )
    variables, _ = fill(abstract(autoencoder), state_dict, _rules(autoencoder.config))
    return autoencoder, variables


def wan_normalisation(config: Mapping[str, Any]) -> LatentNormalisation:
    """Returns the normalisation (latents - latents_mean) / latents_std, with both values taken from a published config.

    Raises ValueError unless both are lists of z_dim finite numbers, and latents_std contains only positive numbers.

    Example:
        normalisation = wan_normalisation(config)
    """
    count = told(config, "z_dim", *_DEFAULTS["z_dim"])
    names = ("latents_mean", "latents_std")
    mean, std = (np.asarray(told(config, name, tuple[float, ...]), np.float32) for name in names)
    for name, values in (("latents_mean", mean), ("latents_std", std)):
        if values.shape != (count,) or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape}; it must be a list of z_dim = {count} finite numbers.")
    if (std <= 0).any():
        raise ValueError(f"latents_std contains {std.min()}; all its values must be positive.")
    return LatentNormalisation(shift=mean, scale=1 / std)


def _norm(source: str, target: str) -> Rule:
    # The published shape is (c, 1, 1) or (c, 1, 1, 1). `fill` reports any other shape as an error.
    return Rule(f"{source}.gamma", f"{target}/weight", lambda x: x.reshape(x.shape[:1]))


def _block_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        _norm(f"{source}.norm1", f"{target}/norm_in"),
        *conv(f"{source}.conv1", f"{target}/conv_in"),
        _norm(f"{source}.norm2", f"{target}/norm_out"),
        *conv(f"{source}.conv2", f"{target}/conv_out"),
        *point(f"{source}.conv_shortcut", f"{target}/skip"),
    )


def _rules(config: VideoAutoencoderConfig) -> tuple[Rule, ...]:
    rules: list[Rule] = [*point("quant_conv", "params/quant_conv"), *point("post_quant_conv", "params/post_quant_conv")]
    for side in ("encoder", "decoder"):
        middle, target = f"{side}.mid_block", f"params/{side}"
        rules += conv(f"{side}.conv_in", f"{target}/conv_in/conv")
        rules += _block_rules(f"{middle}.resnets.{{i}}", f"{target}/middle/block_{{i}}")
        rules.append(_norm(f"{middle}.attentions.0.norm", f"{target}/middle/attention/norm"))
        rules += point(f"{middle}.attentions.0.to_qkv", f"{target}/middle/attention/qkv")
        rules += point(f"{middle}.attentions.0.proj", f"{target}/middle/attention/proj")
        rules.append(_norm(f"{side}.norm_out", f"{target}/head/norm"))
        rules += conv(f"{side}.conv_out", f"{target}/head/conv")
    levels = len(config.widths)
    for level in range(levels):
        down, up = f"params/encoder/down_{level}", f"params/decoder/up_{level}"
        blocks, halving = (_names_22 if config.shortcuts else _names_21)(level, config.layers_per_block)
        for i, block in enumerate(blocks):
            rules += _block_rules(block, f"{down}/block_{i}")
        rules += conv(f"{halving}.resample.1", f"{down}/halve/conv")
        rules += conv(f"{halving}.time_conv", f"{down}/halve_time/conv")
        source = f"decoder.up_blocks.{levels - 1 - level}"
        doubling = f"{source}.upsampler" if config.shortcuts else f"{source}.upsamplers.0"
        rules += _block_rules(f"{source}.resnets.{{i}}", f"{up}/block_{{i}}")
        rules += conv(f"{doubling}.resample.1", f"{up}/double/conv")
        rules += conv(f"{doubling}.time_conv", f"{up}/double_time/conv")
    return tuple(rules)


def _names_22(level: int, count: int) -> tuple[list[str], str]:
    """Returns the names of an encoder level's blocks and of its downsampler in Wan 2.2."""
    source = f"encoder.down_blocks.{level}"
    return [f"{source}.resnets.{i}" for i in range(count)], f"{source}.downsampler"


def _names_21(level: int, count: int) -> tuple[list[str], str]:
    """Returns the names of an encoder level's blocks and of its downsampler in Wan 2.1.

    In Wan 2.1, the blocks and downsamplers of all levels are numbered consecutively.
    """
    names = [f"encoder.down_blocks.{(count + 1) * level + i}" for i in range(count + 1)]
    return names[:-1], names[-1]
