"""Imports published STARFlow and STARFlow-V checkpoints.

The YAML file that was published with the weights of a model contains the arguments that determine its architecture.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.arrays import shown
from flowgen.convert.mapping import Rule, fill
from flowgen.convert.published import check_state_dict, unwrapped
from flowgen.convert.tables import starflow as starflow_rules
from flowgen.convert.tables import starflow_v as starflow_v_rules
from flowgen.documents import read_yaml
from flowgen.flows import STARFlowConfig, STARFlowVConfig
from flowgen.flows.flow import AutoregressiveFlow
from flowgen.nn import init
from flowgen.settings import check
from flowgen.settings.ranges import MAX_BLOCKS, Within

# The arguments that determine the architecture, with their published defaults.
_DEFAULTS: dict[str, Any] = {
    "img_size": 32,
    "channel_size": 3,
    "patch_size": 4,
    "channels": 512,
    "top_block_channels": None,
    "blocks": 4,
    "layers_per_block": "8",
    "head_dim": 64,
    "num_heads": None,
    "num_kv_heads": None,
    "pt_seq_len": None,
    "vae": None,
    "text": None,
    "txt_size": 0,
    "seq_order": "R2L",
    "cond_top_only": 0,
    "soft_clip": 0,
    "norm_type": "layer_norm",
    "use_bias": 1,
    "use_qk_norm": 0,
    "use_post_norm": 0,
    "use_swiglu": 0,
    "noise_std": 0.3,
    "rope": 0,
    "sos": 0,
    "use_softplus": 0,
    "use_final_norm": 0,
    "vid_size": None,
    "temporal_causal": 0,
    "shallow_block_local": 0,
    "learnable_self_denoiser": 0,
    "conditional_denoiser": 0,
    "denoiser_window": None,
    "cond_noise_level": 0,
    "fps_cond": 0,
}
# The first three tuples list the options that must be set for every model, for every video model, and for every model
# with a denoiser. The next two list the options that only video models may set, and the options that are not supported.
_REQUIRED = ("rope", "sos", "use_softplus", "use_final_norm")
_REQUIRED_OF_CLIPS = ("temporal_causal", "shallow_block_local", "cond_top_only", "txt_size")
_REQUIRED_OF_DENOISERS = ("conditional_denoiser", "denoiser_window", "noise_std", "cond_noise_level")
_ONLY_OF_CLIPS = ("temporal_causal", "shallow_block_local", "learnable_self_denoiser", "fps_cond")
_REFUSED = ("local_attn_window", "use_pretrained_lm")
# Arguments that are ignored, because they concern training, data or sampling, or have no effect in the published code.
_OTHER = """
    acc adaln batch_size caption_column cfg compile data dataset drop_image drop_label dry_run epoch_length
    epochs finetuned_vae fp8 fsdp fsdp_text_encoder grad_clip grad_skip gradient_checkpoint
    gradient_checkpoint_mlp last_frame_cond latent_norm_regularization logdir loss_scaling lr min_lr
    mix_aspect model_config_path no_flip noise_embed_denoiser noise_type num_samples nvp resume_epoch
    resume_path sample_batch_size sample_freq save_every secondary_batch_size secondary_dataset
    secondary_img_size secondary_ratio secondary_vid_size train_seed use_8bit_adam use_mm_attn
    vae_decoder_factor video_to_video wandb_name warmup_steps wds
"""
# The types and ranges of numeric arguments. The published models have at most 512 pixels along a side, 4,096 channels,
# 6 blocks and a window of 9 frames.
_NUMBERS = {
    **dict.fromkeys(("img_size", "channels", "top_block_channels", "txt_size"), Annotated[int, Within(0, 1 << 16)]),
    **dict.fromkeys(
        ("channel_size", "patch_size", "head_dim", "num_heads", "num_kv_heads"), Annotated[int, Within(1, 1 << 12)]
    ),
    "blocks": Annotated[int, Within(1, MAX_BLOCKS)],
    "pt_seq_len": Annotated[int, Within(0, 1 << 20)],
    **dict.fromkeys(("temporal_causal", "denoiser_window"), Annotated[int, Within(0, 1 << 10)]),
    **dict.fromkeys(("soft_clip", "noise_std"), Annotated[float, Within(0, 1e6)]),
}
_TEXTS = ("vae", "text", "seq_order", "norm_type")
_MAX_DIGITS = 6  # of the number of frames, and of the frame rate
_MAX_LETTERS = 1000  # in layers_per_block
# For each autoencoder, the number of pixels per latent along a side, and the number of frames per latent frame.
_VAE_FACTORS = {"sd-vae": (8, 1), "Wan2.2": (16, 4), "Wan2.1": (8, 4)}
# The token order of block 0 for each published name. A published name gives the order of the last block. The order
# alternates from block to block, and the number of blocks is even, so block 0 has the opposite order.
_ORDERS = {"L2R": "reversed", "R2L": "raster"}
# Two constants of the published code: the number of layers of the denoiser, and the factor 0.3 in its step x - 0.3 s,
# where s is the denoiser's output.
_DENOISER_LAYERS = 8
_DENOISER_STEP = 0.3


def read_arguments(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the arguments in the YAML file of a published STARFlow, by name, as `starflow` needs them.

    The file must contain a list `arguments` whose items have the form `name: value`.

    Raises FileNotFoundError if there is no such file, and ValueError if it is not a YAML file of this form.

    Example:
        arguments = read_arguments("starflow_3B_t2i_256x256.yaml")
    """
    try:
        document = read_yaml(path, fix="give the file that came with the weights")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file '{path}'; give the YAML that was published with the weights."
        ) from error
    rows = document.get("arguments") if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"'{path}' does not list 'name: value' under 'arguments'; give the YAML file that came with the weights."
        )
    return {name: value for row in rows for name, value in row.items()}


def starflow(
    state_dict: Mapping[str, np.ndarray],
    arguments: Mapping[str, Any],
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> tuple[AutoregressiveFlow, dict[str, Any]]:
    """Converts a published STARFlow or STARFlow-V. Returns the flow, and its variables as numpy arrays of type `dtype`.

    The buffers `var`, `attn_mask` and `feat_rope.*` are dropped, because the published code does not use them. If
    `state_dict` comes from `read_state_dict`, its tensors are views of the file, so only the result occupies memory.

    arguments: the arguments in the published YAML file, as `read_arguments` returns them. Missing arguments have the
    defaults of the published code. The argument `img_size` is in pixels if the argument `vae` is set, and in latents
    otherwise. If `text` ends in ".vocab", the model is conditioned on classes, which the published code represents as
    texts with a single one-hot token. If `vid_size` is set, the model is a STARFlowV; the value '81:16', for example,
    means 81 frames at 16 frames per second. A STARFlowV has a denoiser if `learnable_self_denoiser` is set.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        ValueError: `dtype` or an argument is unknown or invalid, the arguments do not fit the tensors, or they describe
            a kind of model that was not published.

    Example:
        flow, params = starflow(read_state_dict("starflow_3B_t2i_256x256.pth"), arguments)
    """
    check_state_dict(state_dict)
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"arguments is {shown(arguments)}; it must be the contents of the YAML file, which "
            "flowgen.convert.read_arguments reads."
        )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype is {dtype!r}; choose 'float32' or 'bfloat16'.")
    state_dict = unwrapped(state_dict)
    try:
        config = model_config(state_dict, arguments)
    except TypeError as error:
        raise ValueError(f"an argument has an invalid value ({error}); give the published YAML's arguments.") from error
    flow = config.build()
    shapes = jax.eval_shape(lambda key: init(flow, key), jax.random.key(0))
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype)), shapes)
    rules = _rules(config)
    variables, dropped = fill(target, _without_identities(state_dict, config.layers_per_block), rules)
    logging.getLogger(__name__).info(
        "%d tensors imported, %d dropped: %s",
        len(state_dict) - len(dropped),
        len(dropped),
        ", ".join(dropped),
    )
    return flow, variables


def _rules(config: STARFlowConfig) -> tuple[Rule, ...]:
    gated = config.activation == "geglu"
    if not isinstance(config, STARFlowVConfig) or not config.denoiser_layers:
        return starflow_rules(gated=gated)
    # The published denoiser predicts s and steps to x - 0.3 s. Ours predicts t = -σ ∇ log p and steps to x - σ t. The
    # two steps are equal if t = 0.3 s / σ.
    return starflow_v_rules(gated=gated, denoiser_scale=_DENOISER_STEP / config.noise_std)


def _known(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that determine the architecture, with the published defaults for missing ones.

    Raises ValueError if an argument is unknown or has an unsupported value.
    """
    for name, value in arguments.items():
        if name in _REFUSED and value not in (0, None):
            raise ValueError(f"{name} is {value!r:.80}; models with this option cannot be imported.")
        if name not in _DEFAULTS and name not in _OTHER.split() and name not in _REFUSED:
            raise ValueError(f"{name!r:.80} is not an argument of the published STARFlow; remove it.")
    known = _DEFAULTS | {name: value for name, value in arguments.items() if name in _DEFAULTS}
    _check_values(known)
    clips = known["vid_size"] is not None
    for kind, names in (
        ("models", _REQUIRED),
        ("video models (vid_size)", _REQUIRED_OF_CLIPS if clips else ()),
        ("denoisers (learnable_self_denoiser)", _REQUIRED_OF_DENOISERS if known["learnable_self_denoiser"] else ()),
    ):
        for name in names:
            if not known[name]:
                raise ValueError(
                    f"{name} is {known[name]}; all published {kind} use it, and models without it cannot be imported."
                )
    if known["seq_order"] not in _ORDERS:
        raise ValueError(f"seq_order is {known['seq_order']!r:.80}; it must be 'L2R' or 'R2L'.")
    if clips and known["seq_order"] != "L2R":
        raise ValueError(
            f"seq_order is {known['seq_order']!r}; it must be 'L2R' for video models, which run in time order."
        )
    for name in () if clips else _ONLY_OF_CLIPS:
        if known[name]:
            raise ValueError(
                f"{name} is {known[name]}, but vid_size is missing; give both for a video model, or neither."
            )
    return known


def _check_values(known: dict[str, Any]) -> None:
    """Raises ValueError if the value of an argument is out of range or has the wrong type."""
    for name, default in _DEFAULTS.items():
        value = known[name]
        if value is None and default is None:
            continue
        if name in _TEXTS and not isinstance(value, str):
            raise ValueError(f"{name} is {value!r:.80}; it must be a string.")
        if name in _NUMBERS:
            known[name] = check(_NUMBERS[name], value, path=name)
        elif isinstance(default, int) and type(value) not in (int, bool):
            raise ValueError(f"{name} is {value!r:.80}; it must be 0 or 1.")
    layers = known["layers_per_block"]
    if not isinstance(layers, str | int) or len(f"{layers!s:.{_MAX_LETTERS + 1}}") > _MAX_LETTERS:
        raise ValueError(f"layers_per_block is {layers!r:.80}; give numbers separated by spaces, such as '2 2 24'.")


def model_config(state_dict: Mapping[str, np.ndarray], arguments: Mapping[str, Any]) -> STARFlowConfig:
    """Returns the config that the arguments of a published model describe.

    The weights are used only to infer the number of classes or the dimension of the text features.
    """
    known = _known(arguments)
    if not str(known["layers_per_block"]).replace(" ", "").isdecimal():
        raise ValueError(
            f"layers_per_block is {known['layers_per_block']!r}; give numbers separated by spaces, such as '2 2 24'."
        )
    layers = tuple(int(count) for count in str(known["layers_per_block"]).split())
    layers = layers * known["blocks"] if len(layers) == 1 else layers
    projection = state_dict.get(f"blocks.{len(layers) - 1}.proj_txt.weight")
    text_dim = 0 if projection is None or not projection.ndim else projection.shape[-1]
    is_class = str(known["text"] or "").endswith(".vocab")
    if (text_dim > 0) != (known["txt_size"] > 0):
        raise ValueError(
            f"txt_size is {known['txt_size']}, but the deep block has {'a' if text_dim else 'no'} text projection "
            "('proj_txt'); give the arguments that were published with the weights."
        )
    if is_class and known["txt_size"] != 1:
        raise ValueError(
            f"txt_size is {known['txt_size']}; it must be 1 if text ends in .vocab, because a class is one token."
        )
    if known["num_heads"] not in (None, known["channels"] // known["head_dim"]):
        raise ValueError(f"num_heads is {known['num_heads']}; it must be channels / head_dim, the default.")
    side = known["img_size"] // _vae_factors(known["vae"])[0]
    shape: dict[str, Any] = {
        "image_size": side,
        "channels": known["channel_size"],
        "patch_size": known["patch_size"],
        "width": known["channels"],
        "layers_per_block": layers,
        "deep_width": known["top_block_channels"],
        "order": _ORDERS[known["seq_order"]],
        "head_dim": known["head_dim"],
        "num_kv_heads": known["num_kv_heads"],
        "norm": known["norm_type"],
        "qk_norm": bool(known["use_qk_norm"]),
        "post_norm": bool(known["use_post_norm"]),
        "activation": "geglu" if known["use_swiglu"] else "gelu",
        "use_bias": bool(known["use_bias"]),
        "soft_clip": float(known["soft_clip"]),
        "num_classes": text_dim - 1 if is_class else 0,
        "text_dim": 0 if is_class else text_dim,
        "text_length": 0 if is_class else known["txt_size"],
        "conditioned_blocks": "deep" if known["cond_top_only"] else "all",
        "rope_base_grid": float(known["pt_seq_len"] or side // known["patch_size"]),
        "noise_std": float(known["noise_std"]),
    }
    return STARFlowConfig(**shape) if known["vid_size"] is None else STARFlowVConfig(**shape, **_of_clips(known))


def _of_clips(known: Mapping[str, Any]) -> dict[str, int]:
    """Returns the config fields that exist only for video flows."""
    frames, _ = clip_size(known["vid_size"])
    shape = {"frames": 1 + (frames - 1) // _vae_factors(known["vae"])[1]}
    if not known["learnable_self_denoiser"]:
        return shape
    # A query in frame q attends to frames q + A - 1 - G to q + A - 1, where A is temporal_causal and G is
    # denoiser_window.
    lookahead = int(known["temporal_causal"]) - 1
    past = int(known["denoiser_window"]) - lookahead
    if past < 0:
        raise ValueError(
            f"denoiser_window is {known['denoiser_window']} and temporal_causal is {known['temporal_causal']}, so no "
            "frame attends to itself; give the values that were published with the weights."
        )
    return shape | {
        "denoiser_layers": _DENOISER_LAYERS,
        "denoiser_past_frames": past,
        "denoiser_lookahead_frames": lookahead,
    }


def clip_size(vid_size: str) -> tuple[int, int]:
    """Returns (frames, frames per second) from `vid_size`, an argument that is published with video models.

    If `vid_size` contains several frame rates, the first one is returned. Raises ValueError if `vid_size` is malformed.

    Example:
        clip_size("81:16")  # (81, 16)
    """
    numbers = str(vid_size).split(":")
    if len(numbers) < 2 or not all(
        number.isdecimal() and len(number) <= _MAX_DIGITS and int(number) > 0 for number in numbers
    ):
        raise ValueError(f"vid_size is {vid_size!r:.80}; give frames and frames per second, such as '81:16'.")
    return int(numbers[0]), int(numbers[1])


def _vae_factors(vae: str | None) -> tuple[int, int]:
    """Returns the number of pixels per latent along a side, and the number of frames per latent frame."""
    if vae is None:
        return 1, 1
    factors = next((factors for name, factors in _VAE_FACTORS.items() if name in vae), None)
    if factors is None:
        raise ValueError(
            f"vae is {vae!r}, which is not a known autoencoder; leave out vae and give img_size in latents."
        )
    return factors


def _without_identities(state_dict: Mapping[str, np.ndarray], layers: tuple[int, ...]) -> Mapping[str, np.ndarray]:
    """Returns the tensors with renumbered blocks, so that blocks with 0 layers are not counted.

    This is the numbering of `STARFlowConfig.blocks`.
    """
    if all(layers):
        return state_dict
    kept = {f"blocks.{index}.": position for position, index in enumerate(i for i, n in enumerate(layers) if n)}

    def renamed(name: str) -> str:
        for prefix, position in kept.items():
            if name.startswith(prefix):
                return f"blocks.{position}.{name.removeprefix(prefix)}"
        if name.startswith("blocks."):
            raise ValueError(
                f"'{name}' belongs to a block with 0 layers in layers_per_block; give the published layers_per_block."
            )
        return name

    return {renamed(name): x for name, x in state_dict.items()}
