"""Evaluation of trained models."""

from flowgen.evaluation.likelihood import flow_bits_per_dim, gaussian_bits_per_dim

__all__ = ["flow_bits_per_dim", "gaussian_bits_per_dim"]
