"""Inference with flows: importance weights, annealing, and objectives that fit a flow to a density.

densities      log-densities as functions, and the geometric path between two of them
importance     importance weights, effective sample size, normalising constants, weighted means, resampling
annealing      annealed importance sampling and sequential Monte Carlo
objectives     reverse KL, forward KL, maximum likelihood and their weighted sum
mixtures       densities and stratified samples of mixtures of flows
targets        densities with a known normalising constant
"""

from flowgen.inference.annealing import MALA, Annealed, Move, anneal, anneal_adaptively, next_beta
from flowgen.inference.densities import LogDensity, flow_log_density, tempered
from flowgen.inference.importance import (
    WeightedEstimate,
    WeightedSamples,
    forward_effective_sample_size,
    importance_sample,
    log_normaliser,
    log_weights,
    resample,
    self_normalised,
)
from flowgen.inference.mixtures import Component, mixture_log_prob, sample_mixture, stratified_counts
from flowgen.inference.objectives import forward_kl, maximum_likelihood, reverse_kl, weighted_sum
from flowgen.inference.targets import ManyWell
from flowgen.weights import effective_sample_size

__all__ = [
    "MALA",
    "Annealed",
    "Component",
    "LogDensity",
    "ManyWell",
    "Move",
    "WeightedEstimate",
    "WeightedSamples",
    "anneal",
    "anneal_adaptively",
    "effective_sample_size",
    "flow_log_density",
    "forward_effective_sample_size",
    "forward_kl",
    "importance_sample",
    "log_normaliser",
    "log_weights",
    "maximum_likelihood",
    "mixture_log_prob",
    "next_beta",
    "resample",
    "reverse_kl",
    "sample_mixture",
    "self_normalised",
    "stratified_counts",
    "tempered",
    "weighted_sum",
]
