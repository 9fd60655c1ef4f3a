"""Frozen networks beside a flow: autoencoders between pictures or clips and latents, and text encoders."""

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
from flowgen.codecs.video_autoencoder import (
    VIDEO_AUTOENCODER_PRESETS,
    VideoAutoencoder,
    VideoAutoencoderConfig,
    decode_in_chunks,
    encode_in_chunks,
)
from flowgen.codecs.video_codec import ClipCodec, FrameCodec, VideoAutoencoderCodec

__all__ = [
    "AUTOENCODER_PRESETS",
    "VIDEO_AUTOENCODER_PRESETS",
    "Autoencoder",
    "AutoencoderCodec",
    "AutoencoderConfig",
    "BertConfig",
    "BertEncoder",
    "ClipCodec",
    "Codec",
    "FrameCodec",
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
    "VideoAutoencoder",
    "VideoAutoencoderCodec",
    "VideoAutoencoderConfig",
    "decode_in_chunks",
    "encode_in_chunks",
    "init",
]
