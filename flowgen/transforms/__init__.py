"""Invertible transforms: of bounded to unbounded variables, and of elements by the CDF of a mixture.

They are pure functions and pytrees of JAX, usable in any model, and they import no other package of flowgen but
settings.
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
