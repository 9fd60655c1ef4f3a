"""Tests a conditional density by classifier two-sample tests (C2ST), simulation-based calibration, and coverage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from flowgen.data.dataset import permutation
from flowgen.data.numbers import NumbersDataset
from flowgen.evaluation import Estimate, Evaluation, c2st, expected_coverage, mean_of, rank_uniformity, sbc_ranks
from flowgen.evaluation.calibration import LEAST_EXPECTED
from flowgen.evaluation.two_samples import classifier_modules
from flowgen.simulators import Simulator

# (key, context with one row per sample) -> one sample given each context, as NumPy arrays.
DrawUnder = Callable[[jax.Array, Any], np.ndarray]

RANKED = 99  # samples per observation, so that 100 ranks are possible
MOST_BINS = 10
LEAST_TRUTHS = 20  # for a histogram of four bins
CLASSIFIER = "scikit-learn's MLPClassifier, two hidden layers of 10 d units, 5 folds"


def check_observations(simulator: Simulator, key: jax.Array, num: int) -> None:
    """Raises an error if scikit-learn is missing, or if the simulator has fewer than `num` reference samples.

    Example:
        check_observations(TwoMoons(), key, 1000)
    """
    classifier_modules()
    simulator.reference_samples(key, num, 0)


def evaluate_observations(simulator: Simulator, draw: DrawUnder, key: jax.Array, num: int) -> Evaluation:
    """Returns the C2ST of `num` samples against `num` reference samples for each fixed observation, and the mean C2ST.

    The standard error of the mean comes from the differences between the observations.

    Raises the errors of `c2st` and of the simulator's `reference_samples`.

    Example:
        evaluation = evaluate_observations(TwoMoons(), draw, key, 1000)
    """
    found = {}
    for index, observation in enumerate(np.asarray(simulator.observations)):
        draw_key, reference_key, test_key = jax.random.split(jax.random.fold_in(key, index), 3)
        reference = simulator.reference_samples(reference_key, num, index)
        samples = draw(draw_key, np.repeat(observation[None], num, axis=0))
        found[f"c2st/{index}"] = c2st(test_key, reference, samples)
    mean = mean_of(np.array([one.value for one in found.values()]))._replace(count=2 * num)
    lines = (
        f"C2ST {mean}, the mean of {len(found)} observations ({num} samples of each; {CLASSIFIER})",
        *(f"C2ST of observation {index} {one}" for index, one in enumerate(found.values())),
    )
    about = {"c2st": {"classifier": CLASSIFIER, "samples": num, "observations": len(found)}}
    return Evaluation(lines, {"c2st": mean, **found}, about)


def evaluate_calibration(
    draw: DrawUnder,
    log_prob: Callable[[np.ndarray, Any], np.ndarray],
    dataset: NumbersDataset,
    key: jax.Array,
    num: int,
) -> Evaluation:
    """Tests calibration and coverage on at most `num` samples of a dataset of vectors.

    log_prob: the function (x, context) -> log p(x | context) in nats.

    With fewer than 20 samples, no test is made. The histogram of ranks has ten bins if there are 50 samples or more,
    and four or five bins otherwise.

    Example:
        evaluation = evaluate_calibration(draw, log_prob, held_out, key, 500)
    """
    num = min(num, len(dataset))
    if num < LEAST_TRUTHS:
        return Evaluation((f"Calibration is not measured: it needs at least {LEAST_TRUTHS} samples, not {num}.",))
    truths = dataset.select(np.sort(permutation(np.random.Philox(0), len(dataset))[:num]))
    repeated = jax.tree.map(lambda array: np.repeat(array, RANKED, axis=0), truths.context)
    samples = draw(key, repeated)
    log_probs = log_prob(samples, repeated).reshape(num, RANKED)
    samples = samples.reshape(num, RANKED, *truths.event_shape)
    coverage = expected_coverage(log_probs, log_prob(truths.x, truths.context))
    uniformity = rank_uniformity(sbc_ranks(samples, truths.x, seed=1), RANKED, bins=_bins(num))
    joint = min(1.0, float(uniformity.p_value.min()) * len(uniformity.p_value))
    lines = (
        f"SBC: smallest p-value {joint:.3f} for {len(uniformity.p_value)} entries, corrected for their number",
        f"expected coverage - credibility {coverage.area}; largest deviation {coverage.max_deviation:.3f}, p-value "
        f"{coverage.p_value:.3f} ({num} samples, {RANKED} draws of each)",
    )
    metrics = {
        "sbc_p_value": Estimate(joint, count=num),
        "coverage_area": coverage.area,
        "coverage_deviation": Estimate(coverage.max_deviation, count=num),
        "coverage_p_value": Estimate(coverage.p_value, count=num),
    }
    about = {
        "calibration": {
            "samples": num,
            "draws": RANKED,
            "rank_counts": uniformity.counts.tolist(),
            "rank_p_values": uniformity.p_value.tolist(),
            "levels": coverage.levels.tolist(),
            "coverage": coverage.coverage.tolist(),
        }
    }
    return Evaluation(lines, metrics, about)


def _bins(num: int) -> int:
    """Returns the largest number of equal bins of ranks in each of which at least five of `num` truths are expected."""
    equal = (bins for bins in range(2, MOST_BINS + 1) if (RANKED + 1) % bins == 0)
    return max(bins for bins in equal if LEAST_EXPECTED * bins <= num)
