"""The projection of NaP: weight matrices keep their initial norms.

NaP means "normalise and project" (Lyle et al., 2024, arXiv 2407.01800). If a normalisation layer follows a matrix, the
matrix's gradient shrinks as the matrix grows. Growth therefore lowers the effective learning rate. To prevent this, NaP
scales every matrix back to its initial norm after each update: w <- |w₀| w / |w|. The other half of NaP, normalisation
layers before the nonlinearities, is part of the network.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flowgen.optimizers.matrices import are_matrices


def keep_norms(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `optimizer` with the projection of NaP, which preserves the Frobenius norm of each weight matrix.

    Only the arrays for which `are_matrices` is True are projected, and of these only those that are not 0 at the start,
    as the kernels of output layers may be.

    Example:
        tx = per_layer(keep_norms(optax.adamw(1e-3, weight_decay=0.0)))
    """

    def init(params):
        def norm(leaf, matrix):
            return jnp.linalg.norm(leaf) if matrix else jnp.zeros((), leaf.dtype)

        return jax.tree.map(norm, params, are_matrices(params)), optimizer.init(params)

    def update(updates, state, params=None):
        if params is None:
            raise ValueError("keep_norms needs the parameters; call update(updates, state, params).")
        norms, inner = state
        updates, inner = optimizer.update(updates, inner, params)

        def projected(update, w, norm):
            moved = w + update
            length = jnp.linalg.norm(moved)
            kept = (norm > 0) & (length > 0)
            return jnp.where(kept, moved * (norm / jnp.where(kept, length, 1)) - w, update)

        return jax.tree.map(projected, updates, params, norms), (norms, inner)

    return optax.GradientTransformation(init, update)
