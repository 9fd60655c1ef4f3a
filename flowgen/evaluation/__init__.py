"""Evaluation of trained models: likelihoods, distances between samples and data, and image features."""

from flowgen.evaluation.features import Classifier, train_classifier
from flowgen.evaluation.likelihood import (
    flow_bits_per_dim,
    flow_nats_per_dim,
    gaussian_bits_per_dim,
    velocity_bits_per_dim,
)
from flowgen.evaluation.metrics import frechet_distance, psnr
from flowgen.evaluation.points import PointSamples, point_metrics, point_samples

__all__ = [
    "Classifier",
    "PointSamples",
    "flow_bits_per_dim",
    "flow_nats_per_dim",
    "frechet_distance",
    "gaussian_bits_per_dim",
    "point_metrics",
    "point_samples",
    "psnr",
    "train_classifier",
    "velocity_bits_per_dim",
]
