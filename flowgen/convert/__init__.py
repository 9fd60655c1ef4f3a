"""Imports published weights, without executing code in their files. Missing or unexpected tensors raise an error."""

from flowgen.convert.folders import is_video_autoencoder, load_autoencoder, load_text_encoder, load_video_autoencoder
from flowgen.convert.frozen import autoencoder_kl, bert_encoder, t5_encoder
from flowgen.convert.frozen_video import video_autoencoder
from flowgen.convert.image_features import efficientnet_file, efficientnet_lite0, inception
from flowgen.convert.mapping import MappingError, Requirement, Rule, fill
from flowgen.convert.published import parse_file_name, tarflow
from flowgen.convert.published_starflow import clip_size, read_arguments, starflow
from flowgen.convert.readers import read_state_dict

__all__ = [
    "MappingError",
    "Requirement",
    "Rule",
    "autoencoder_kl",
    "bert_encoder",
    "clip_size",
    "efficientnet_file",
    "efficientnet_lite0",
    "fill",
    "inception",
    "is_video_autoencoder",
    "load_autoencoder",
    "load_text_encoder",
    "load_video_autoencoder",
    "parse_file_name",
    "read_arguments",
    "read_state_dict",
    "starflow",
    "t5_encoder",
    "tarflow",
    "video_autoencoder",
]
