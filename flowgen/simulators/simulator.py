"""The interface of simulators: a uniform prior, random observations given parameters, and their likelihood."""

from __future__ import annotations

from abc import abstractmethod
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from flowgen.arrays import shown


@runtime_checkable
class Simulator(Protocol):
    """Maps parameters to random observations, from which inference methods estimate the posterior of the parameters.
    Subclasses define the fields, `simulate`, `log_likelihood` and `reference_samples`.

    name: a short name, such as "two_moons".
    low, high: the bounds of the parameters, one number per parameter. The prior is uniform between them.
    observation_dim: the number of values of an observation.
    fixed_observations: observations for which inference methods are compared; they never change.

    All methods except `reference_samples` and `check_index` can be compiled with `jax.jit`. They compute in float32, or
    in float64 if `jax_enable_x64` is set and their arguments are float64.

    Example:
        simulator: Simulator = TwoMoons()
        parameters, observations = simulator.sample_joint(key, 10_000)
    """

    name: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    observation_dim: int
    fixed_observations: tuple[tuple[float, ...], ...]

    @property
    def parameter_dim(self) -> int:
        """Returns the number of parameters."""
        return len(self.low)

    @property
    def observations(self) -> Float[Array, "i k"]:
        """Returns `fixed_observations` as an array, with one observation per row.

        Example:
            observation = TwoMoons().observations[0]
        """
        return jnp.array(self.fixed_observations)

    def sample_prior(self, key: Key[Array, ""], num: int) -> Float[Array, "num d"]:
        """Returns `num` independent parameter vectors from the prior.

        Example:
            parameters = simulator.sample_prior(key, 1000)
        """
        low, high = jnp.array([self.low]), jnp.array([self.high])
        return low + (high - low) * jax.random.uniform(key, (num, self.parameter_dim))

    @abstractmethod
    def simulate(self, key: Key[Array, ""], parameters: Float[Array, "n d"]) -> Float[Array, "n k"]:
        """Returns one random observation for each row of parameters.

        Example:
            observations = simulator.simulate(key, parameters)
        """
        ...

    def sample_joint(self, key: Key[Array, ""], num: int) -> tuple[Float[Array, "num d"], Float[Array, "num k"]]:
        """Returns `num` independent parameter vectors from the prior, and one simulated observation for each.

        Example:
            parameters, observations = simulator.sample_joint(key, 10_000)
        """
        prior_key, noise_key = jax.random.split(key)
        parameters = self.sample_prior(prior_key, num)
        return parameters, self.simulate(noise_key, parameters)

    @abstractmethod
    def log_likelihood(
        self, parameters: Float[Array, "n d"], observation: Float[Array, " k"] | Float[Array, "n k"]
    ) -> Float[Array, " n"]:
        """Returns log p(observation | parameters) in nats, normalised as a density of the observation.

        observation: one observation for all rows of parameters, or one for each row.

        Example:
            log_prob = simulator.log_likelihood(parameters, observations)
        """
        ...

    def log_prior(self, parameters: Float[Array, "n d"]) -> Float[Array, " n"]:
        """Returns the log-density of the prior in nats; -inf outside the bounds.

        Example:
            log_prob = simulator.log_prior(parameters)
        """
        low, high = jnp.array([self.low]), jnp.array([self.high])
        inside = ((parameters >= low) & (parameters <= high)).all(axis=1)
        return jnp.where(inside, -jnp.log(high - low).sum(), -jnp.inf)

    def log_posterior(
        self, parameters: Float[Array, "n d"], observation: Float[Array, " k"] | Float[Array, "n k"]
    ) -> Float[Array, " n"]:
        """Returns log p(parameters, observation): the log-density of the posterior plus the log-evidence, in nats.

        Example:
            unnormalised = simulator.log_posterior(parameters, simulator.observations[0])
        """
        prior = self.log_prior(parameters)
        likelihood = self.log_likelihood(parameters, observation)
        return jnp.where(jnp.isneginf(prior), prior, prior + likelihood)

    @abstractmethod
    def reference_samples(self, key: Key[Array, ""], num: int, index: int) -> Float[Array, "num d"]:
        """Returns `num` reference samples of the posterior given fixed_observations[index], in float32.

        They are independent and exact for `TwoMoons`. For `SLCP`, they come from a long run of the No-U-Turn sampler.

        Raises ValueError if there is no such observation, if `num` is not a whole number of at least 1, or if fewer
        than `num` samples are recorded.

        Example:
            reference = simulator.reference_samples(key, 10_000, 0)
        """
        ...

    def check_index(self, index: int) -> None:
        """Raises ValueError if `fixed_observations` has no entry with this index; indices count from 0.

        Example:
            simulator.check_index(0)
        """
        count = len(self.fixed_observations)
        if not hasattr(index, "__index__") or not 0 <= index < count:
            raise ValueError(f"index is {shown(index)}; {self.name} has the observations 0 to {count - 1}.")
