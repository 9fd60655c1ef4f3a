"""Tokenizers, which map texts to lists of token ids, and `tokenize`, which pads these lists to arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int

from flowgen.documents import MAX_TOKENIZER_BYTES, check_depth, read_bytes
from flowgen.packages import need

MAX_TOKEN = (1 << 31) - 1
_PROBE = "a 1, \u00e9\u65e5"  # letters of one, two and three bytes


@runtime_checkable
class Tokenizer(Protocol):
    """A function that returns the token ids of a text, including any start token and end token that the model expects.

    pad: token id of padding.

    Example:
        ids = tokenizer("a cat")
    """

    pad: int

    def __call__(self, text: str) -> list[int]: ...

    def cut(self, ids: list[int], length: int) -> list[int]:
        """Shortens `ids`, the tokens of a text that is too long, to the first `length` - 1 and an end token."""
        ...

    def content(self) -> bytes:
        """Returns bytes from which a digest of the tokenizer can be computed.

        They contain everything on which token ids depend.
        """
        ...


class JsonTokenizer:
    """A `Tokenizer` from a `tokenizer.json` file, run by the `tokenizers` package.

    Raises ModuleNotFoundError if that package is not installed, and ValueError if the file is not a valid tokenizer.

    Example:
        tokenizer = JsonTokenizer("all-MiniLM-L6-v2/tokenizer.json")
    """

    def __init__(self, path: str | os.PathLike[str]):
        tokenizers = need("tokenizers", f"Reading '{path}'")
        content = read_bytes(path, most=MAX_TOKENIZER_BYTES)
        try:
            check_depth(content)
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
            # `tokenize` checks lengths itself, so that it can raise an error for a text that is too long.
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            _check_template(self._tokenizer.post_processor)
            self._tokenizer.encode(_PROBE)
        except BaseException as error:
            _check_of_package(error)
            raise ValueError(
                f"'{path}' is not a valid tokenizer.json ({str(error)[:200]}); download the file again."
            ) from error
        ids = (self._tokenizer.token_to_id(token) for token in ("[PAD]", "<pad>"))
        self.pad = next((number for number in ids if number is not None), 0)

    def __call__(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text).ids
        except BaseException as error:
            _check_of_package(error)
            raise ValueError(
                f"the tokenizer cannot encode the text {shortened(text)!r} ({error}); change the text."
            ) from error

    def cut(self, ids: list[int], length: int) -> list[int]:
        """Returns the first `length` - 1 of these ids, followed by the last, which is the end token."""
        return [*ids[: length - 1], ids[-1]]

    def content(self) -> bytes:
        """Returns the tokenizer as JSON."""
        return self._tokenizer.to_str().encode()


class SentencePieceTokenizer:
    """A `Tokenizer` from a `spiece.model` file, used as in T5: </s> is appended to each text, and padding is token 0.

    Raises ModuleNotFoundError if the `sentencepiece` package is missing, and ValueError if the file is not a valid
    tokenizer.

    Example:
        tokenizer = SentencePieceTokenizer("flan-t5-xl/spiece.model")
    """

    def __init__(self, path: str | os.PathLike[str]):
        sentencepiece = need("sentencepiece", f"Reading '{path}'")
        content = read_bytes(path, most=MAX_TOKENIZER_BYTES)
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            self._processor.encode(_PROBE)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"'{path}' is not a valid SentencePiece model ({reason}); download the file again."
            ) from error
        if self._processor.eos_id() < 0:
            raise ValueError(f"'{path}' has no end-of-text token; download the file again.")
        self.pad = 0

    def __call__(self, text: str) -> list[int]:
        return [*self._processor.encode(text), self._processor.eos_id()]

    def cut(self, ids: list[int], length: int) -> list[int]:
        """Returns the first `length` - 1 of these ids, followed by that of the end token </s>."""
        return [*ids[: length - 1], ids[-1]]

    def content(self) -> bytes:
        """Returns the SentencePiece model as serialised bytes, as in the file."""
        return self._processor.serialized_model_proto()


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, truncate: bool
) -> tuple[Int[np.ndarray, "b n"], Bool[np.ndarray, "b n"]]:
    """Returns padded int32 token ids `b n`, and a mask `b n` that is False for padding.

    Raises ValueError if a text is too long and truncate is False.
    """
    ids = np.full((len(texts), length), tokenizer.pad, np.int32)
    mask = np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        tokens = tokenizer(text)
        if max(tokens, default=0) > MAX_TOKEN:
            raise ValueError(
                f"the tokenizer returned token {max(tokens)}, but the largest valid token is {MAX_TOKEN}; get the "
                "tokenizer again."
            )
        if len(tokens) > length:
            if not truncate:
                raise ValueError(
                    f"the text {shortened(text)!r} has {len(tokens)} tokens, but the limit is {length}; shorten it."
                )
            tokens = tokenizer.cut(tokens, length)
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = True
    return ids, mask


def shortened(text: str) -> str:
    """Returns the beginning of a text, for use in error messages."""
    return text if len(text) <= 60 else text[:57] + "..."


def _check_of_package(error: BaseException) -> None:
    """Re-raises errors that are not from the `tokenizers` package, which raises bare Exceptions and Rust panics."""
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _check_template(post_processor: Any) -> None:
    """Raises ValueError if the template names an undefined special token, which would make the package panic."""
    known = {} if post_processor is None else json.loads(post_processor.__getstate__())
    for step in known.get("processors", [known]):
        parts = [*(step.get("single") or ()), *(step.get("pair") or ())] if "special_tokens" in step else ()
        for name in (part["SpecialToken"]["id"] for part in parts if "SpecialToken" in part):
            if name not in step["special_tokens"]:
                raise ValueError(f"its template uses the token {name[:80]!r}, which the file does not define")
