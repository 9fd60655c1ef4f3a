"""Evaluates one run of benchmarks/quality.py with flowgen, whichever side has trained it."""

import argparse
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import quality_budget as shared
import quality_models as models
import quality_runs as runs

SAMPLES = 2000
CLASSIFIER_STEPS = 1000
GRID_ROWS = 5
SOLVED = 100  # images whose likelihood under a velocity field is computed; each takes 600 passes or so


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, required=True, help="the .npz of images that quality.py wrote")
    parser.add_argument("--core", type=int, required=True, help="number of the core to run on")
    arguments = parser.parse_args()
    shared.confine(arguments.core)
    record = json.loads((arguments.run / "record.json").read_text())
    model, variables, experiment = trained(arguments.run, record)
    draw = partial(experiment.draw_batch, model, variables)
    of_mnist = experiment.data.name == "mnist"
    train, test = runs.mnist() if of_mnist else runs.images_of(experiment)
    row = likelihood(model, variables, experiment, test)
    if record["kind"] in ("tarflow", "published"):
        curve = runs.tarflow_curve(experiment, arguments.data)
        row["curve_difference"] = abs(curve(variables) - record["curve"][-1]["value"])
    if of_mnist:
        extractor, floor = trained_extractor(arguments.run.parent, train, test)
        row |= compared(draw, test, extractor, floor)
    row |= drawing(draw, experiment.model.num_classes, arguments.run / "samples.png")
    (arguments.run / "evaluation.json").write_text(json.dumps(row, indent=1) + "\n")


def trained(folder: Path, record: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Returns the model, its variables and its experiment; weights of the published code are imported."""
    from flowgen import checkpoint
    from flowgen.convert import read_state_dict, tarflow

    if record["kind"] != "published":
        return checkpoint.load(folder / "model")
    experiment = models.experiment("tarflow", record["seed"])
    weights = read_state_dict(folder / "weights.pth")
    flow, variables = tarflow(weights, image_size=28, patch_size=4, channels=1, noise_std=shared.NOISE_STD)
    assert flow.config == experiment.model
    return flow, variables, experiment


def likelihood(model: Any, variables: Any, experiment: Any, test: Any) -> dict[str, Any]:
    """Returns the bits/dim of test images, or the nats/dim of their latents, with the standard error."""
    import jax
    import numpy as np

    from flowgen.evaluation import bits_of_nats, flow_nats, mean_of
    from flowgen.experiments import MatchingExperiment
    from flowgen.experiments.drawing import EvaluateOptions
    from flowgen.experiments.latents import as_taken
    from flowgen.experiments.likelihoods import evaluate_velocity
    from flowgen.matching import velocity_field

    if isinstance(experiment, MatchingExperiment):
        field = velocity_field(model, {"params": variables["params"]}, experiment.matching)
        found = evaluate_velocity(
            field, test.select(np.arange(SOLVED)), EvaluateOptions(batch=SOLVED), conditional=True
        )
        name, estimate, noise = "bits_per_dim", found.metrics["bits_per_dim"], "uniform dequantisation"
    else:
        latent = experiment.is_latent
        data = as_taken(test, experiment.data, experiment.encoding, flip=False)
        nats = flow_nats(model, variables, data, jax.random.key(0))
        name = "nats_per_dim" if latent else "bits_per_dim"
        estimate = mean_of(nats if latent else bits_of_nats(nats))
        noise = f"Gaussian, std {model.config.noise_std:g}{' on latents' if latent else ''}"
    return {
        name: round(estimate.value, 5),
        "standard_error": round(estimate.standard_error, 5),
        "noise": noise,
        "likelihood_images": estimate.count,
    }


def compared(draw: Any, test: Any, extractor: Any, floor: dict[str, float]) -> dict[str, Any]:
    """Returns distances of samples to the test images, in the features of a classifier trained on the training
    images.
    """
    from flowgen.evaluation import feature_statistics
    from flowgen.experiments.distances import data_features, draw_features

    labels = test.labels
    drawn = draw_features(draw, extractor, test, SAMPLES, conditions=lambda positions: labels[positions])
    reference = feature_statistics(data_features(extractor, test), len(test))
    metrics = distances(drawn.statistics, reference) | {"class_accuracy": round(drawn.class_accuracy.value, 4)}
    return metrics | {
        "samples": SAMPLES,
        "compared_with": f"{len(test)} test images",
        "features": f"{extractor.name}, {CLASSIFIER_STEPS} steps",
        **floor,
    }


def distances(statistics: Any, reference: Any) -> dict[str, float]:
    """Returns the distances, precision and recall of features with respect to reference features."""
    from flowgen.evaluation import kernel_distance, manifold_metrics

    frechet, kernel = statistics.frechet(reference), kernel_distance(statistics.features, reference.features).mean
    manifolds = manifold_metrics(statistics.features, reference.features)._asdict()
    return {name: round(value, 4) for name, value in {"frechet": frechet, "kernel": kernel, **manifolds}.items()}


def trained_extractor(folder: Path, train: Any, test: Any) -> tuple[Any, dict[str, float]]:
    """Returns an extractor whose classifier is trained once per folder, its accuracy, and the metrics of real images.

    The metrics whose names end in `of_training_images` compare as many training images as there are samples. They are
    the values of a perfect model.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import serialization

    from flowgen.evaluation import Classifier, feature_statistics, train_classifier
    from flowgen.experiments.distances import FeatureExtractor, data_features

    file = folder / "classifier.msgpack"
    if file.exists():
        network = train_classifier(train, jax.random.key(0), steps=1).network
        classifier = Classifier(network, jax.tree.map(jnp.asarray, serialization.msgpack_restore(file.read_bytes())))
    else:
        classifier = train_classifier(train, jax.random.key(0), steps=CLASSIFIER_STEPS)
        file.write_bytes(serialization.msgpack_serialize(jax.tree.map(np.asarray, classifier.variables)))
    extractor = FeatureExtractor("a classifier of the training data", classifier.features, classifier.classes)
    real = train.select(np.arange(SAMPLES))
    of_real, of_test = (feature_statistics(data_features(extractor, data), len(data)) for data in (real, test))
    right = extractor.classes(test.x / np.float32(127.5) - 1) == test.labels
    return extractor, {"classifier_accuracy": round(float(right.mean()), 4)} | {
        f"{name}_of_training_images": value for name, value in distances(of_real, of_test).items()
    }


def drawing(draw: Any, num_classes: int, picture: Path) -> dict[str, Any]:
    """Writes a picture of samples, one class per column, and returns the processor time of drawing 256 samples."""
    import jax
    import numpy as np

    from flowgen.data import image_grid, save_image, to_uint8

    labels = (np.arange(256) % num_classes).astype(np.int32)
    images, how = draw(jax.random.key(0), np.arange(256), labels)  # already compiled
    began = time.process_time()
    draw(jax.random.key(1), np.arange(256), labels)
    seconds = time.process_time() - began
    save_image(picture, image_grid(to_uint8(images[: GRID_ROWS * num_classes]), columns=num_classes, scale=2))
    return {"seconds_per_256_samples": round(seconds, 2), "sampler": how}


if __name__ == "__main__":
    main()
