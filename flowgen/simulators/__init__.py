"""Simulators with known likelihoods, on which estimated posteriors are compared with reference samples."""

from flowgen.simulators.simulator import Simulator
from flowgen.simulators.slcp import SLCP
from flowgen.simulators.two_moons import TwoMoons

__all__ = ["SLCP", "Simulator", "TwoMoons"]
