"""Invertible transforms from bounded to unbounded variables, and elementwise maps by the CDF of a mixture.

Transforms are JAX pytrees with pure functions, so any model can use them. Of flowgen's other packages, this one imports
only `flowgen.settings`.
"""

from flowgen.transforms.bounded import Box, Positive, Simplex
from flowgen.transforms.elementwise import ElementwiseMap, MixtureMap, mixture_parameters
from flowgen.transforms.mixture import mixture_forward, mixture_inverse
from flowgen.transforms.transform import Chain, Standardise, Transform, transformed_log_prob

__all__ = [
    "Box",
    "Chain",
    "ElementwiseMap",
    "MixtureMap",
    "Positive",
    "Simplex",
    "Standardise",
    "Transform",
    "mixture_forward",
    "mixture_inverse",
    "mixture_parameters",
    "transformed_log_prob",
]
