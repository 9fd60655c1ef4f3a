"""Frozen networks beside a flow: autoencoders between pictures and latents, and text encoders."""

from flowgen.codecs.autoencoder import AUTOENCODER_PRESETS, Autoencoder, AutoencoderConfig, init
from flowgen.codecs.bert import BertConfig, BertEncoder
from flowgen.codecs.codec import AutoencoderCodec, Codec, LatentNormalisation, PixelCodec
from flowgen.codecs.t5 import T5Config, T5Encoder
from flowgen.codecs.text import (
    FrozenTextEncoder,
    HashedWords,
    JsonTokenizer,
    SentencePieceTokenizer,
    TextEncoder,
    Tokenizer,
)

__all__ = [
    "AUTOENCODER_PRESETS",
    "Autoencoder",
    "AutoencoderCodec",
    "AutoencoderConfig",
    "BertConfig",
    "BertEncoder",
    "Codec",
    "FrozenTextEncoder",
    "HashedWords",
    "JsonTokenizer",
    "LatentNormalisation",
    "PixelCodec",
    "SentencePieceTokenizer",
    "T5Config",
    "T5Encoder",
    "TextEncoder",
    "Tokenizer",
    "init",
]
