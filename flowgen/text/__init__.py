"""Text conditions: tokenizers, frozen encoders, and the prompt template that models were trained with."""

from flowgen.conditioning import TextCondition
from flowgen.text.bert import BertConfig, BertEncoder
from flowgen.text.encoders import FrozenTextEncoder, HashedWords, TextEncoder
from flowgen.text.prompts import ASPECTS, PromptTemplate, aspect_size, nearest_aspect
from flowgen.text.t5 import T5Config, T5Encoder
from flowgen.text.tokenizers import JsonTokenizer, SentencePieceTokenizer, Tokenizer

__all__ = [
    "ASPECTS",
    "BertConfig",
    "BertEncoder",
    "FrozenTextEncoder",
    "HashedWords",
    "JsonTokenizer",
    "PromptTemplate",
    "SentencePieceTokenizer",
    "T5Config",
    "T5Encoder",
    "TextCondition",
    "TextEncoder",
    "Tokenizer",
    "aspect_size",
    "nearest_aspect",
]
