"""Features of Inception v3 and EfficientNet-Lite0 equal recorded ones of the original code, for weights by formula."""

import inception_weights
import numpy as np
import pytest
from tolerances import assert_close

from flowgen.convert import MappingError, efficientnet_lite0, inception
from flowgen.data import from_uint8
from flowgen.evaluation.inception import InceptionV3
from flowgen.evaluation.networks import NetworkFeatures

# Sums of thousands of float32 products in another order, through 20 layers; the features are about 2.
RELATIVE = 1e-4

RECORDED = inception_weights.recorded(inception_weights.REFERENCE)


def state_dict(variant):
    return inception_weights.state_dict(RECORDED[f"{variant}_names"], RECORDED[f"{variant}_shapes"])


def assert_features(network, variables, recorded):
    features = NetworkFeatures(network, variables)
    for size, expected in recorded.items():
        found = features(from_uint8(inception_weights.pixels(size)))
        assert found.dtype == np.float32
        assert_close(found, expected, RELATIVE)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fid", "torchvision"])
def test_features_are_those_of_the_original_code(variant):
    network, variables = inception(state_dict(variant))
    assert network.variant == variant
    assert_features(network, variables, {size: RECORDED[f"{variant}_{size}"] for size in inception_weights.SIZES})


@pytest.mark.slow
def test_features_of_efficientnet_are_those_of_the_original_code():
    recorded = inception_weights.recorded(inception_weights.EFFICIENTNET)
    network, variables = efficientnet_lite0(inception_weights.state_dict(recorded["names"], recorded["shapes"]))
    assert_features(network, variables, {size: recorded[size] for size in inception_weights.SIZES})


def test_images_that_are_not_finite_have_no_features():
    features = NetworkFeatures(InceptionV3("fid"), {})
    with pytest.raises(ValueError, match="images has 1 value that is not finite"):
        features(np.full((2, 1, 1, 3), [[[[0.0, np.nan, 0.0]]], [[[0.0, 0.0, 0.0]]]], np.float32))


def test_weights_without_a_classifier_are_refused():
    with pytest.raises(ValueError, match=r"no 'fc\.weight', which tells the FID network from torchvision's"):
        inception({"Conv2d_1a_3x3.conv.weight": np.zeros((32, 3, 3, 3), np.float32)})


@pytest.mark.slow
def test_missing_and_unknown_weights_are_refused():
    names, shapes = RECORDED["fid_names"].tolist(), RECORDED["fid_shapes"].tolist()
    zero = np.zeros((), np.float32)
    weights = {
        name: np.broadcast_to(zero, [int(side) for side in shape.split(",") if side])
        for name, shape in zip(names, shapes, strict=True)
        if name != "Mixed_7c.branch_pool.conv.weight"
    }
    with pytest.raises(MappingError) as raised:
        inception({**weights, "Mixed_8a.conv.weight": np.zeros(3, np.float32)})
    assert raised.value.failures == (
        "'Mixed_7c.branch_pool.conv.weight' is missing",
        "'Mixed_8a.conv.weight' is not expected",
    )


def test_a_classifier_without_rows_is_that_of_no_inception():
    with pytest.raises(MappingError):
        inception({"fc.weight": np.ones((), np.float32)})
