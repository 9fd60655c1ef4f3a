"""The sbi side of benchmarks/posteriors.py: neural posterior estimation by the package sbi, with its own defaults.

It runs in an interpreter with sbi, and does not import flowgen. sbi holds out a tenth of the simulations, and stops
after 20 epochs without a better held-out likelihood. Samples outside the prior are rejected.
"""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from sbi.inference import NPE
from sbi.utils import BoxUniform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="the .npz that posteriors.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="the .npz of samples to write")
    parser.add_argument("--estimator", choices=("maf", "nsf"), required=True, help="sbi's density estimator")
    parser.add_argument("--samples", type=int, required=True, help="samples of each fixed observation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    with np.load(arguments.data, allow_pickle=False) as arrays:
        parameters, observations, fixed, low, high = (
            torch.from_numpy(arrays[name].astype(np.float32))
            for name in ("parameters", "observations", "fixed", "low", "high")
        )
    inference = NPE(BoxUniform(low, high), density_estimator=arguments.estimator, show_progress_bars=False)
    began = time.process_time()
    inference.append_simulations(parameters, observations).train()
    seconds = time.process_time() - began
    posterior = inference.build_posterior()
    samples = [posterior.sample((arguments.samples,), x=one[None], show_progress_bars=False) for one in fixed]
    about = {
        "processor_seconds": round(seconds, 1),
        "epochs": int(inference.summary["epochs_trained"][-1]),
        "sbi": metadata.version("sbi"),
        "torch": torch.__version__,
    }
    np.savez(arguments.out, samples=torch.stack(samples).numpy(), about=json.dumps(about))


if __name__ == "__main__":
    main()
