"""Experiments: a flow, velocity network or autoencoder, its data, and the options of its training and sampling."""

from flowgen.experiments.autoencoder import AutoencoderExperiment, AutoencodingConfig
from flowgen.experiments.codecs import PretrainedAutoencoder, SpaceToDepth
from flowgen.experiments.experiment import Experiment, Samples
from flowgen.experiments.files import from_json, load_config, override
from flowgen.experiments.fitting import fit
from flowgen.experiments.flow import FlowExperiment
from flowgen.experiments.matching import MatchingExperiment
from flowgen.experiments.options import LikelihoodConfig, SamplingConfig
from flowgen.experiments.solving import SolverConfig
from flowgen.experiments.texts import TextConfig
from flowgen.experiments.token_flow import TokenFlowExperiment
from flowgen.experiments.token_options import TokenSamplingConfig
from flowgen.experiments.video_flow import VideoFlowExperiment

__all__ = [
    "AutoencoderExperiment",
    "AutoencodingConfig",
    "Experiment",
    "FlowExperiment",
    "LikelihoodConfig",
    "MatchingExperiment",
    "PretrainedAutoencoder",
    "Samples",
    "SamplingConfig",
    "SolverConfig",
    "SpaceToDepth",
    "TextConfig",
    "TokenFlowExperiment",
    "TokenSamplingConfig",
    "VideoFlowExperiment",
    "fit",
    "from_json",
    "load_config",
    "override",
]
