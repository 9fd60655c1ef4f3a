"""Converts published networks that stay frozen: AutoencoderKL from diffusers, T5 and BERT from transformers."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from flowgen import settings
from flowgen.codecs import Autoencoder, AutoencoderConfig
from flowgen.convert.mapping import Rule, fill, transpose
from flowgen.convert.tables import conv, layer_norm, linear, point
from flowgen.nn import init
from flowgen.text import BertConfig, BertEncoder, T5Config, T5Encoder

StateDict = Mapping[str, np.ndarray]
# The scaling factor of Stable Diffusion's latents, used if the config has no scaling_factor.
SCALING_FACTOR = 0.18215


def autoencoder_kl(state_dict: StateDict, config: Mapping[str, Any]) -> tuple[Autoencoder, dict[str, Any]]:
    """Converts an AutoencoderKL of diffusers. Returns the autoencoder, and its variables as float32 numpy arrays.

    state_dict: the published tensors by name. The names that old versions of diffusers gave to the attention tensors,
    such as `query` for `to_q`, are also accepted.
    config: the contents of the published config.json.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        ValueError: the config is invalid, or describes a network that flowgen does not support.

    Example:
        autoencoder, params = autoencoder_kl(read_state_dict("diffusion_pytorch_model.safetensors"), config)
    """
    fixed = {"act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
    refuse(config, "AutoencoderKL", {**fixed, "latents_mean": None, "latents_std": None})
    for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        others = {*told(config, name, tuple[str, ...], ())} - {kind}
        if others:
            raise ValueError(
                f"{name} has {others.pop()}; flowgen can only import autoencoders whose blocks are all {kind}."
            )
    if config.get("in_channels", 3) != config.get("out_channels", 3):
        raise ValueError(
            f"in_channels is {config['in_channels']} and out_channels is {config['out_channels']}; they must be equal."
        )
    autoencoder = Autoencoder(
        AutoencoderConfig(
            channels=told(config, "in_channels", int, 3),
            latent_channels=told(config, "latent_channels", int, 4),
            widths=told(config, "block_out_channels", tuple[int, ...], (64,)),
            layers_per_block=told(config, "layers_per_block", int, 1),
            num_groups=told(config, "norm_num_groups", int, 32),
            attention=told(config, "mid_block_add_attention", bool, True),
        )
    )
    target = abstract(autoencoder)
    old = "encoder.mid_block.attentions.0.query.weight" in state_dict
    names = ("query", "key", "value") if old else ("to_q", "to_k", "to_v")
    rules = _autoencoder_rules(len(autoencoder.config.widths), old)
    variables, _ = fill(target, _with_joined(state_dict, names), rules)
    return autoencoder, variables


def _with_joined(state_dict: StateDict, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Returns the tensors with the query, key and value projections of each attention layer concatenated.

    Projections are left separate if one of them is missing or their shapes differ.
    """
    joined = dict(state_dict)
    for side in ("encoder", "decoder"):
        for kind in ("weight", "bias"):
            source = f"{side}.mid_block.attentions.0"
            tensors = [f"{source}.{name}.{kind}" for name in names]
            parts = [state_dict[tensor] for tensor in tensors if tensor in state_dict]
            if len(parts) == len(names) and len({part.shape for part in parts}) == 1 and parts[0].ndim:
                joined[f"{source}.qkv.{kind}"] = np.concatenate(parts)
                for tensor in tensors:
                    del joined[tensor]
    return joined


def t5_encoder(state_dict: StateDict, config: Mapping[str, Any]) -> tuple[T5Encoder, dict[str, Any]]:
    """Converts a T5 v1.1 or Flan-T5 state dict. Returns the encoder, and its variables as float32 numpy arrays.

    The tensors of a decoder and of an output head are ignored.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        KeyError: the config lacks an option that has no default.
        ValueError: the config is invalid, or describes a network that flowgen does not support.

    Example:
        encoder, params = t5_encoder(read_state_dict("model.safetensors"), config)
    """
    if config.get("model_type", "t5") != "t5":
        raise ValueError(f"model_type is {config['model_type']!r:.80}; it must be 't5'.")
    if config.get("feed_forward_proj") != "gated-gelu":
        raise ValueError(
            f"feed_forward_proj is {config.get('feed_forward_proj', 'relu')!r:.80}; it must be 'gated-gelu', as in "
            "T5 v1.1 and Flan-T5."
        )
    refuse(config, None, {"layer_norm_epsilon": 1e-6})
    encoder = T5Encoder(
        T5Config(
            vocab_size=told(config, "vocab_size", int),
            width=told(config, "d_model", int),
            num_layers=told(config, "num_layers", int),
            num_heads=told(config, "num_heads", int),
            head_dim=told(config, "d_kv", int),
            hidden=told(config, "d_ff", int),
            num_buckets=told(config, "relative_attention_num_buckets", int, 32),
            max_distance=told(config, "relative_attention_max_distance", int, 128),
        )
    )
    kept = {name: x for name, x in state_dict.items() if not name.startswith(("decoder.", "lm_head."))}
    table = "shared.weight" if "shared.weight" in kept else "encoder.embed_tokens.weight"
    layer, layers = "encoder.block.{layer}.layer", "params/layers"
    attention = {"q": "query", "k": "key", "v": "value", "o": "proj"}
    mlp = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    rules = (
        Rule(table, "params/embed/embedding"),
        Rule("encoder.embed_tokens.weight", None),
        Rule(f"{layer}.0.SelfAttention.relative_attention_bias.weight".format(layer=0), "params/position_bias"),
        *(
            Rule(f"{layer}.0.SelfAttention.{theirs}.weight", f"{layers}/{ours}/kernel", transpose)
            for theirs, ours in attention.items()
        ),
        Rule(f"{layer}.0.layer_norm.weight", f"{layers}/attention_norm/weight"),
        *(
            Rule(f"{layer}.1.DenseReluDense.{theirs}.weight", f"{layers}/{ours}/kernel", transpose)
            for theirs, ours in mlp.items()
        ),
        Rule(f"{layer}.1.layer_norm.weight", f"{layers}/mlp_norm/weight"),
        Rule("encoder.final_layer_norm.weight", "params/norm_out/weight"),
    )
    variables, _ = fill(abstract(encoder), kept, rules)
    return encoder, variables


def bert_encoder(state_dict: StateDict, config: Mapping[str, Any]) -> tuple[BertEncoder, dict[str, Any]]:
    """Converts a BERT state dict. Returns the encoder, and its variables as float32 numpy arrays.

    The tensors of a pooler or of output heads are ignored.

    Raises:
        MappingError (a ValueError): tensors are missing, unexpected, not finite, or of the wrong shape or dtype; its
            attribute `failures` lists all problems.
        KeyError: the config lacks an option that has no default.
        ValueError: the config is invalid, or describes a network that flowgen does not support.

    Example:
        encoder, params = bert_encoder(read_state_dict("model.safetensors"), config)
    """
    if config.get("model_type") != "bert":
        raise ValueError(f"model_type is {config.get('model_type')!r:.80}; it must be 'bert'.")
    refuse(config, None, {"hidden_act": "gelu", "position_embedding_type": "absolute", "layer_norm_eps": 1e-12})
    encoder = BertEncoder(
        BertConfig(
            vocab_size=told(config, "vocab_size", int),
            width=told(config, "hidden_size", int),
            num_layers=told(config, "num_hidden_layers", int),
            num_heads=told(config, "num_attention_heads", int),
            hidden=told(config, "intermediate_size", int),
            max_length=told(config, "max_position_embeddings", int),
            num_segments=told(config, "type_vocab_size", int, 2),
        )
    )
    bare = {name.removeprefix("bert."): x for name, x in state_dict.items()}
    left_out = ("pooler.", "cls.", "embeddings.position_ids")
    kept = {name: x for name, x in bare.items() if not name.startswith(left_out)}
    layer, layers = "encoder.layer.{layer}", "params/layers"
    maps = {
        "attention.self.query": "query",
        "attention.self.key": "key",
        "attention.self.value": "value",
        "attention.output.dense": "proj",
        "intermediate.dense": "up",
        "output.dense": "down",
    }
    rules = (
        Rule("embeddings.word_embeddings.weight", "params/embed/embedding"),
        Rule("embeddings.position_embeddings.weight", "params/positions/embedding"),
        Rule("embeddings.token_type_embeddings.weight", "params/segments/embedding"),
        *layer_norm("embeddings.LayerNorm", "params/norm_in"),
        *itertools.chain.from_iterable(
            linear(f"{layer}.{theirs}", f"{layers}/{ours}") for theirs, ours in maps.items()
        ),
        *layer_norm(f"{layer}.attention.output.LayerNorm", f"{layers}/attention_norm"),
        *layer_norm(f"{layer}.output.LayerNorm", f"{layers}/mlp_norm"),
    )
    variables, _ = fill(abstract(encoder), kept, rules)
    return encoder, variables


def abstract(network: nn.Module) -> Any:
    """Returns a network's variables as `jax.ShapeDtypeStruct`, without allocating them.

    Example:
        target = abstract(autoencoder)
    """
    return jax.eval_shape(lambda: init(network, jax.random.key(0)))


def told(config: Mapping[str, Any], name: str, annotation: Any, *default: Any) -> Any:
    """Returns an option's value from a published config, or the default if the config does not have the option.

    Raises KeyError if the option is missing and there is no default, and ValueError if its value has the wrong type.

    Example:
        width = told(config, "d_model", int)
    """
    return settings.check(annotation, config.get(name, *default) if default else config[name], path=name)


def refuse(config: Mapping[str, Any], kind: str | None, fixed: Mapping[str, Any]) -> None:
    """Raises ValueError if a published config describes a network that flowgen does not support.

    kind: the required class name; None accepts any.
    fixed: maps the names of options to their only supported values.

    Example:
        refuse(config, "AutoencoderKL", {"act_fn": "silu"})
    """
    if kind is not None and config.get("_class_name", kind) != kind:
        raise ValueError(f"_class_name is {config['_class_name']!r:.80}; it must be {kind!r}.")
    for name, value in fixed.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} is {config[name]!r:.80}; flowgen supports only {value!r}.")


def _block_rules(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *layer_norm(f"{source}.norm1", f"{target}/norm_in"),
        *conv(f"{source}.conv1", f"{target}/conv_in"),
        *layer_norm(f"{source}.norm2", f"{target}/norm_out"),
        *conv(f"{source}.conv2", f"{target}/conv_out"),
        *point(f"{source}.conv_shortcut", f"{target}/skip"),
    )


def _autoencoder_rules(levels: int, old: bool) -> tuple[Rule, ...]:
    names = {"qkv": "qkv", "proj_attn" if old else "to_out.0": "proj"}
    rules: list[Rule] = [*conv("quant_conv", "params/quant_conv"), *conv("post_quant_conv", "params/post_quant_conv")]
    for side in ("encoder", "decoder"):
        target = f"params/{side}"
        rules += conv(f"{side}.conv_in", f"{target}/conv_in")
        rules += _block_rules(f"{side}.mid_block.resnets.{{i}}", f"{target}/middle/block_{{i}}")
        rules += layer_norm(f"{side}.mid_block.attentions.0.group_norm", f"{target}/middle/attention/norm")
        for theirs, ours in names.items():
            source, leaf = f"{side}.mid_block.attentions.0.{theirs}", f"{target}/middle/attention/{ours}"
            rules += point(source, leaf)
        rules += layer_norm(f"{side}.conv_norm_out", f"{target}/norm_out")
        rules += conv(f"{side}.conv_out", f"{target}/conv_out")
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        rules += _block_rules(f"{down}.resnets.{{i}}", f"params/encoder/down_{level}_{{i}}")
        rules += conv(f"{down}.downsamplers.0.conv", f"params/encoder/halve_{level}")
        rules += _block_rules(f"{up}.resnets.{{i}}", f"params/decoder/up_{level}_{{i}}")
        rules += conv(f"{up}.upsamplers.0.conv", f"params/decoder/double_{level}")
    return tuple(rules)
