"""Optimizers as optax transformations: those of optax by name, and AdamP, AuON, Conda and NaP, which optax lacks.

The networks of flowgen stack the parameters of equal layers along a leading axis. `per_layer` makes any optimizer
update each layer as if its parameters were not stacked. This package depends only on jax and optax.
"""

from flowgen.optimizers.adamp import adamp
from flowgen.optimizers.auon import auon
from flowgen.optimizers.conda import conda
from flowgen.optimizers.layers import STACK, names_of, per_layer
from flowgen.optimizers.matrices import are_kernels, are_matrices, for_matrices, muon
from flowgen.optimizers.named import OPTIMIZERS, Optimizer, check_options, make_named, options_of
from flowgen.optimizers.projection import keep_norms

__all__ = [
    "OPTIMIZERS",
    "STACK",
    "Optimizer",
    "adamp",
    "are_kernels",
    "are_matrices",
    "auon",
    "check_options",
    "conda",
    "for_matrices",
    "keep_norms",
    "make_named",
    "muon",
    "names_of",
    "options_of",
    "per_layer",
]
