"""Invertible transforms: of bounded to unbounded variables, and of elements by the CDF of a mixture.

The transforms are pure functions and JAX pytrees, usable in any model. This package imports no other package of flowgen
than settings.
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
