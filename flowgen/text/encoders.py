"""Text encoders map texts to conditions of a fixed length, by a frozen network or by hashes of the words."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import jax
import numpy as np
from flax import linen as nn
from jaxtyping import Float, PyTree

from flowgen.backend import TEXTS_AT_ONCE, in_parts
from flowgen.conditioning import TextCondition
from flowgen.text.tokenizers import Tokenizer, shortened, tokenize


@runtime_checkable
class TextEncoder(Protocol):
    """A function that encodes each text as `length` tokens with `dim` features each, for models conditioned on text.

    Shorter texts are padded; the features of padding are 0. The function raises ValueError if a text has more than
    `length` tokens, unless `truncate` is True, in which case the text is cut off.

    Example:
        cond = encoder(["a cat", ""])
    """

    @property
    def length(self) -> int: ...

    @property
    def dim(self) -> int: ...

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> TextCondition: ...

    def __hash__(self) -> int: ...


@dataclass(frozen=True, eq=False)
class FrozenTextEncoder:
    """A `TextEncoder` that consists of a tokenizer and a frozen network, such as a `T5Encoder`, with its variables.

    length: number of tokens to which texts are padded. dim: number of features that the network returns per token.

    Texts are encoded in batches of up to 64. Batch sizes are powers of two, so few programs are compiled.

    Example:
        encoder = FrozenTextEncoder(tokenizer, T5Encoder(config), params, length=128, dim=2048)
    """

    tokenizer: Tokenizer
    network: nn.Module
    variables: PyTree
    length: int
    dim: int

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> TextCondition:
        """Returns the float32 features `b n e` and the mask `b n` of texts, as numpy arrays."""
        ids, mask = tokenize(self.tokenizer, texts, self.length, truncate=truncate)
        if ids.max(initial=0) >= self.network.config.vocab_size:
            raise ValueError(
                f"the tokenizer returned token {ids.max()}, but the text encoder knows only "
                f"{self.network.config.vocab_size} tokens; use the tokenizer that belongs to these weights."
            )
        if not len(texts):
            return TextCondition(np.zeros((0, self.length, self.dim), np.float32), mask)
        (features,) = in_parts(lambda *part: (_run(self.network, self.variables, *part),), TEXTS_AT_ONCE, ids, mask)
        return TextCondition(features, mask)


@dataclass(frozen=True)
class HashedWords:
    """A `TextEncoder` whose tokens are the words of a text, in lower case, and an end token.

    The features of a word are pseudo-random signs ±1 that depend only on its SHA-256 hash.

    This encoder needs no download, but words of similar meaning have unrelated features. Use it for tests and for
    small, fixed vocabularies.

    Example:
        cond = HashedWords(length=8, dim=16)(["red apple"])
    """

    length: int
    dim: int

    def __call__(self, texts: Sequence[str], *, truncate: bool = False) -> TextCondition:
        """Returns the float32 features `b n e` and the mask `b n` of texts, as numpy arrays."""
        features = np.zeros((len(texts), self.length, self.dim), np.float32)
        mask = np.zeros((len(texts), self.length), bool)
        for row, text in enumerate(texts):
            words = [*text.lower().split(), "</s>"]
            if len(words) > self.length:
                if not truncate:
                    raise ValueError(
                        f"the text {shortened(text)!r} has {len(words)} tokens, but the limit is {self.length}; "
                        "shorten it."
                    )
                words = [*words[: self.length - 1], words[-1]]
            features[row, : len(words)] = [self._feature(word) for word in words]
            mask[row, : len(words)] = True
        return TextCondition(features, mask)

    def _feature(self, word: str) -> Float[np.ndarray, " e"]:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "little")
        # The raw bits of the generator are the same in every NumPy version, and each feature needs only one bit.
        return np.where(np.random.Philox(seed).random_raw(self.dim) >> np.uint64(63), 1.0, -1.0)


@partial(jax.jit, static_argnums=0)
def _run(network, variables, ids, mask):
    return network.apply(variables, ids, mask)
