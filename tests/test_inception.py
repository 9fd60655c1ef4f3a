"""Inception features equal those of the original PyTorch code, at recorded outputs for weights by formula."""

import inception_weights
import numpy as np
import pytest

from flowgen.convert import MappingError, inception
from flowgen.data import from_uint8
from flowgen.evaluation.networks import NetworkFeatures

# Sums of thousands of float32 products in another order, through 20 layers; the features are about 2.
RELATIVE = 1e-4

RECORDED = inception_weights.recorded()


def state_dict(variant, *, classes=None):
    names, shapes = RECORDED[f"{variant}_names"], RECORDED[f"{variant}_shapes"]
    weights = {}
    for name, shape in zip(names.tolist(), shapes.tolist(), strict=True):
        dims = tuple(int(side) for side in shape.split(",") if side)
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros((), np.int64)
        elif name.startswith(("fc.", "AuxLogits.")):
            weights[name] = np.zeros(dims, np.float32)
        else:
            weights[name] = inception_weights.weight(name, dims)
    return weights


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fid", "torchvision"])
def test_features_are_those_of_the_original_code(variant):
    network, variables = inception(state_dict(variant))
    assert network.variant == variant
    features = NetworkFeatures(network, variables)
    for size in inception_weights.SIZES:
        expected = RECORDED[f"{variant}_{size}"]
        found = features(from_uint8(inception_weights.pixels(size)))
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < RELATIVE


def test_other_weights_are_refused():
    weights = state_dict("fid")
    with pytest.raises(ValueError, match=r"no 'fc\.weight'"):
        inception({name: x for name, x in weights.items() if not name.startswith("fc.")})
    missing = {name: x for name, x in weights.items() if name != "Mixed_7c.branch_pool.conv.weight"}
    with pytest.raises(MappingError, match=r"'Mixed_7c\.branch_pool\.conv\.weight' is missing"):
        inception({**missing, "Mixed_8a.conv.weight": np.zeros(3, np.float32)})
