"""Autoencoders for images and clips, and the codecs with which latent flows convert between pixels and latents."""

from flowgen.codecs.autoencoder import AUTOENCODER_PRESETS, Autoencoder, AutoencoderConfig
from flowgen.codecs.codec import AutoencoderCodec, Codec, LatentNormalisation, PixelCodec
from flowgen.codecs.video_autoencoder import (
    VIDEO_AUTOENCODER_PRESETS,
    VideoAutoencoder,
    VideoAutoencoderConfig,
    decode_in_chunks,
    encode_in_chunks,
)
from flowgen.codecs.video_codec import VideoAutoencoderCodec

__all__ = [
    "AUTOENCODER_PRESETS",
    "VIDEO_AUTOENCODER_PRESETS",
    "Autoencoder",
    "AutoencoderCodec",
    "AutoencoderConfig",
    "Codec",
    "LatentNormalisation",
    "PixelCodec",
    "VideoAutoencoder",
    "VideoAutoencoderCodec",
    "VideoAutoencoderConfig",
    "decode_in_chunks",
    "encode_in_chunks",
]
