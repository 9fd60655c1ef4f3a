"""Records samples of SLCP's posteriors for `flowgen.simulators.SLCP.reference_samples`.

    pip install numpyro
    python benchmarks/reference_posteriors.py --out flowgen/simulators/slcp.npz

The samples come from a long run of the No-U-Turn sampler of numpyro (Hoffman and Gelman, arXiv 1111.4246) in float64,
with ten chains that start in each of the four modes. The modes are mirror images of one another, because the likelihood
does not depend on the signs of parameters 3 and 4. Chains rarely change modes, so these signs are redrawn at random
before the samples are stored. For each observation, 10,000 samples are kept, evenly from all chains and steps. They are
stored as 16-bit numbers: 0 is -3, 65535 is 3.

For each observation, the script prints the mean and the standard deviation, the largest split R-hat and the smallest
effective number of samples with all modes folded onto one, and the number of divergent steps. For the chains of each
mode, it prints the share of signs that equal the initial signs.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro import distributions
from numpyro.diagnostics import effective_sample_size, split_gelman_rubin
from numpyro.infer import MCMC, NUTS, init_to_value

from flowgen.simulators import SLCP
from flowgen.simulators.slcp import STORED_LEVELS

NUM_SAMPLES = 10_000
CHAINS, WARMUP = 40, 2000


def model(observation: jax.Array) -> None:
    """The posterior as a model of numpyro."""
    simulator = SLCP()
    prior = distributions.Uniform(jnp.array(simulator.low), jnp.array(simulator.high)).to_event(1)
    parameters = numpyro.sample("parameters", prior)
    numpyro.factor("likelihood", simulator.log_likelihood(parameters[None], observation)[0])


def chain(key: jax.Array, number: int, signs: tuple[int, int], steps: int) -> tuple[np.ndarray, int]:
    """Returns the samples `chains steps 5` of chains that start in one mode, and the number of divergent steps."""
    points = np.array(SLCP().fixed_observations[number]).reshape(4, 2)
    spread = np.sqrt(np.clip(points.std(axis=0), 0.1, 8.0)) * signs
    start = np.clip([*points.mean(axis=0), *spread, 0.0], -2.9, 2.9)
    kernel = NUTS(model, init_strategy=init_to_value(values={"parameters": start}), target_accept_prob=0.95)
    run = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=steps,
        num_chains=CHAINS // 4,
        chain_method="vectorized",
        progress_bar=False,
    )
    run.run(key, jnp.array(SLCP().fixed_observations[number]), extra_fields=("diverging",))
    return np.array(run.get_samples(group_by_chain=True)["parameters"]), int(run.get_extra_fields()["diverging"].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    parser.add_argument("--steps", type=int, default=10_000, help="steps of each of the 40 chains")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    simulator, stored = SLCP(), {}
    low, high = np.array(simulator.low), np.array(simulator.high)
    for number in range(len(simulator.fixed_observations)):
        keys = jax.random.split(jax.random.key(number), 4)
        modes = [(first, second) for first in (-1, 1) for second in (-1, 1)]
        runs = [chain(key, number, signs, arguments.steps) for key, signs in zip(keys, modes, strict=True)]
        chains = np.concatenate([samples for samples, _ in runs])
        stayed = [
            np.mean(np.sign(samples[:, :, 2:4]) == signs) for (samples, _), signs in zip(runs, modes, strict=True)
        ]
        folded = np.concatenate([chains[:, :, :2], np.abs(chains[:, :, 2:4]), chains[:, :, 4:]], axis=2)
        samples = folded[:, :: arguments.steps * CHAINS // NUM_SAMPLES].reshape(-1, 5)
        samples[:, 2:4] *= np.random.default_rng(number).choice([-1, 1], (len(samples), 2))
        stored[f"observation_{number}"] = np.rint((samples - low) / (high - low) * STORED_LEVELS).astype(np.uint16)
        print(f"observation {number}: {samples.shape[0]} of {chains[..., 0].size} samples")
        print(f"  mean {np.round(samples.mean(axis=0), 3)}, standard deviation {np.round(samples.std(axis=0), 3)}")
        print(
            f"  split R-hat {split_gelman_rubin(folded).max():.4f}, effective {effective_sample_size(folded).min():.0f}"
        )
        print(f"  divergent {sum(count for _, count in runs)}, signs of the start kept {np.round(stayed, 4)}")
    np.savez_compressed(arguments.out, **stored)


if __name__ == "__main__":
    main()
