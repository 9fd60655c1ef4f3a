"""Evaluation of trained models: likelihoods, distances between samples and data, image features, and calibration."""

from flowgen.evaluation.anomaly import SCORES, AnomalyScores, anomaly_scores, auroc
from flowgen.evaluation.calibration import (
    ExpectedCoverage,
    RankUniformity,
    expected_coverage,
    rank_uniformity,
    sbc_ranks,
)
from flowgen.evaluation.corruptions import CORRUPTIONS
from flowgen.evaluation.estimate import Estimate, Evaluation, mean_of, ratio_of
from flowgen.evaluation.features import Classifier, train_classifier
from flowgen.evaluation.kernel import KernelDistance, kernel_distance
from flowgen.evaluation.likelihood import (
    bits_of_nats,
    flow_bits_per_dim,
    flow_nats,
    flow_nats_per_dim,
    gaussian_bits,
    gaussian_bits_per_dim,
    velocity_bits,
    velocity_bits_per_dim,
)
from flowgen.evaluation.manifolds import ManifoldMetrics, manifold_metrics, nearest_in, perfect_coverage
from flowgen.evaluation.metrics import frechet_between, frechet_distance, psnr
from flowgen.evaluation.points import PointSamples, point_metrics, point_samples
from flowgen.evaluation.statistics import FeatureStatistics, feature_statistics, read_statistics, save_statistics
from flowgen.evaluation.two_samples import c2st

__all__ = [
    "CORRUPTIONS",
    "SCORES",
    "AnomalyScores",
    "Classifier",
    "Estimate",
    "Evaluation",
    "ExpectedCoverage",
    "FeatureStatistics",
    "KernelDistance",
    "ManifoldMetrics",
    "PointSamples",
    "RankUniformity",
    "anomaly_scores",
    "auroc",
    "bits_of_nats",
    "c2st",
    "expected_coverage",
    "feature_statistics",
    "flow_bits_per_dim",
    "flow_nats",
    "flow_nats_per_dim",
    "frechet_between",
    "frechet_distance",
    "gaussian_bits",
    "gaussian_bits_per_dim",
    "kernel_distance",
    "manifold_metrics",
    "mean_of",
    "nearest_in",
    "perfect_coverage",
    "point_metrics",
    "point_samples",
    "psnr",
    "rank_uniformity",
    "ratio_of",
    "read_statistics",
    "save_statistics",
    "sbc_ranks",
    "train_classifier",
    "velocity_bits",
    "velocity_bits_per_dim",
]
