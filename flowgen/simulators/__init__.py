"""Simulators with known likelihoods and reference samples of the posterior, for tests of estimated posteriors."""

from flowgen.simulators.simulator import Simulator
from flowgen.simulators.slcp import SLCP
from flowgen.simulators.two_moons import TwoMoons

__all__ = ["SLCP", "Simulator", "TwoMoons"]
