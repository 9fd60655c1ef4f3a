"""Compares AdamW, Muon, AdamP, AuON, Conda and NaP after equal numbers of steps.

python benchmarks/optimizers.py --out benchmarks/results/optimizers.json [--steps 600]

For each optimizer, the program tries three learning rates on digits with seed 0, and chooses the rate with the lowest
held-out bits/dim. With this rate, it trains on digits with two more seeds, and on moons and STARFlow digits with one
seed. STARFlow needs an autoencoder: without --autoencoder RUN, the program trains one first.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measure

import flowgen
from flowgen.experiments import PretrainedAutoencoder
from flowgen.training import LogConfig, OptimConfig

Row = dict[str, Any]
RATES = (4e-3, 8e-3, 16e-3)
# Fields of OptimConfig, and three learning rates. AuON needs larger ones, because its steps scale with the gradients.
RACERS: dict[str, tuple[dict[str, Any], tuple[float, ...]]] = {
    "adamw": ({}, RATES),
    "muon": ({"name": "muon"}, RATES),
    "adamp": ({"name": "adamp"}, RATES),
    "auon": ({"name": "auon", "adam_lr": 2e-3}, (0.3, 1.0, 3.0)),
    "conda": ({"name": "conda", "options": {"update_every": 200}}, RATES),
    "nap": ({"keep_norms": True, "weight_decay": 0.0}, RATES),
}
SEEDS = (0, 1, 2)


def optim(steps: int, racer: str, rate: float) -> OptimConfig:
    """Returns the config of an optimizer: warm-up over a tenth of the run, then cosine decay to a hundredth of the
    rate.
    """
    fields, _ = RACERS[racer]
    return OptimConfig(**{"lr": rate, "min_lr": rate / 100, "warmup_steps": steps // 10, "ema_decay": 0.995, **fields})


def trained(experiment: Any, optim: OptimConfig, *, steps: int, seed: int, metric: str) -> Row:
    """Trains in a temporary folder, and returns the held-out metric and the time in seconds."""
    experiment = dataclasses.replace(
        experiment,
        optim=optim,
        train=dataclasses.replace(experiment.train, steps=steps, seed=seed),
        log=LogConfig(log_every=steps, checkpoint_every=0, tensorboard=False, progress=False),
    )
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            result = flowgen.fit(experiment, Path(folder) / "run")
        except FloatingPointError as error:
            return {"diverged": str(error)}
    if result.signal:
        raise KeyboardInterrupt
    return {metric: round(float(result.metrics[metric]), 4), "seconds": round(time.perf_counter() - began, 1)}


def autoencoder(folder: Path) -> Path:
    """Trains an autoencoder on digits, and returns its run directory."""
    flowgen.fit(flowgen.load_config("autoencoder_digits"), folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="file to append JSON rows to, one per line")
    parser.add_argument(
        "--steps", type=int, default=600, help="steps of each run on digits; moons have five times more"
    )
    parser.add_argument("--autoencoder", type=Path, help="a run of autoencoder_digits")
    given = parser.parse_args()
    try:
        given.out.open("a").close()
    except OSError as error:
        parser.error(f"--out {given.out} cannot be written ({error.strerror}).")
    where = measure.environment(len(os.sched_getaffinity(0)), None)

    def write(row: Row) -> Row:
        with given.out.open("a") as file:
            file.write(json.dumps(row | where) + "\n")
        print(row, flush=True)
        return row

    def run(racer: str, config: str, experiment: Any, rate: float, seed: int, metric: str, steps: int) -> Row:
        result = trained(experiment, optim(steps, racer, rate), steps=steps, seed=seed, metric=metric)
        return write({"optimizer": racer, "config": config, "lr": rate, "seed": seed, "steps": steps, **result})

    digits, best = flowgen.load_config("tarflow_digits"), {}
    for racer, (_, rates) in RACERS.items():
        rows = [run(racer, "tarflow_digits", digits, rate, 0, "bits_per_dim", given.steps) for rate in rates]
        finished = [row for row in rows if "bits_per_dim" in row]
        if not finished:
            continue
        chosen = min(finished, key=lambda row: row["bits_per_dim"])
        best[racer] = chosen["lr"]
        others = [
            run(racer, "tarflow_digits", digits, chosen["lr"], seed, "bits_per_dim", given.steps) for seed in SEEDS[1:]
        ]
        values = [row["bits_per_dim"] for row in (chosen, *others) if "bits_per_dim" in row]
        summary = {"mean": round(statistics.mean(values), 4), "spread": round(max(values) - min(values), 4)}
        write({"optimizer": racer, "config": "tarflow_digits", "lr": chosen["lr"], "seeds": len(values), **summary})
    with tempfile.TemporaryDirectory() as folder:
        codec = PretrainedAutoencoder(str(given.autoencoder or autoencoder(Path(folder) / "autoencoder")))
        starflow = dataclasses.replace(flowgen.load_config("starflow_digits"), codec=codec)
        moons = flowgen.load_config("cfm_moons")
        for racer, rate in best.items():
            run(racer, "cfm_moons", moons, rate, 0, "w2", 5 * given.steps)
            run(racer, "starflow_digits", starflow, rate, 0, "nats_per_dim", given.steps)


if __name__ == "__main__":
    main()
