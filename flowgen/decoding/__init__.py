"""Inversion of autoregressive flows: sequential and parallel decoding, guidance, sampling."""

from flowgen.decoding.clips import sample_clips
from flowgen.decoding.guidance import Guidance, linear_rule, product_rule
from flowgen.decoding.plan import DecodePlan, Jacobi, MovingJacobi, Sequential, resolve_plan
from flowgen.decoding.sampler import Denoiser, Inversion, invert, sample

__all__ = [
    "DecodePlan",
    "Denoiser",
    "Guidance",
    "Inversion",
    "Jacobi",
    "MovingJacobi",
    "Sequential",
    "invert",
    "linear_rule",
    "product_rule",
    "resolve_plan",
    "sample",
    "sample_clips",
]
