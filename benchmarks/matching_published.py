"""The PyTorch side of benchmarks/matching.py: training steps as in torchcfm's tutorial, run in the interpreter
--torch-python.

As a script, it answers one JSON request per line; `Published` is the client.
"""

import json
import math
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import measure
from measure import Cost, cost

ICFM, OTCFM = "torchcfm I-CFM", "torchcfm OT-CFM exact"
OWN_SAMPLERS = ", own samplers"
# Steps per call, chosen so that a call takes a few tenths of a second. torchcfm's own samplers loop in Python.
STEPS = {ICFM: 200, OTCFM: 50, ICFM + OWN_SAMPLERS: 20, OTCFM + OWN_SAMPLERS: 20}


class Published:
    """Training steps of torchcfm in another interpreter, which measures its own time on `threads` cores."""

    def __init__(self, python: Path, threads: int, batch: int, learning_rate: float):
        self.process = measure.Process(python, Path(__file__).resolve())
        self.versions = self.process.ask({"threads": threads, "batch": batch, "learning_rate": learning_rate})
        self.close = self.process.close

    def time(self, name: str) -> Cost:
        """Returns the cost of one call, which does STEPS[name] training steps."""
        return Cost(*self.process.ask({"time": name}))

    def loss(self, name: str) -> float:
        """Returns the median over calls of each call's last loss."""
        return self.process.ask({"loss": name})


class Training(NamedTuple):
    """A network in training. call: does STEPS[name] steps and records the last loss."""

    call: Callable[[], Any]
    losses: list[float]


def serve() -> None:
    """Answers requests on standard input until it closes."""
    setup = json.loads(sys.stdin.readline())
    measure.confine(setup["threads"])
    import torch

    torch.set_num_threads(setup["threads"])
    torch.manual_seed(0)
    trainings = {name: train(name, setup["batch"], setup["learning_rate"]) for name in STEPS}
    answer: Any = {"torch": torch.__version__, "torchcfm": metadata.version("torchcfm"), "pot": metadata.version("POT")}
    print(json.dumps(answer), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "time" in request:
            answer = cost(trainings[request["time"]].call)
        else:
            answer = statistics.median(trainings[request["loss"]].losses)
        print(json.dumps(answer), flush=True)


def train(name: str, batch: int, learning_rate: float) -> Training:
    """Returns a network that is trained from 8 Gaussians to moons, eagerly in float32, with fresh points at each
    step.
    """
    import torch
    from torchcfm import conditional_flow_matching as cfm
    from torchcfm import utils
    from torchcfm.models.models import MLP

    own = name.endswith(OWN_SAMPLERS)
    draw_x0, draw_x1 = (utils.sample_8gaussians, utils.sample_moons) if own else (eight_gaussians, moons)
    exact = name.startswith(OTCFM)
    matcher = (cfm.ExactOptimalTransportConditionalFlowMatcher if exact else cfm.ConditionalFlowMatcher)(sigma=0.0)
    network = MLP(dim=2, w=64, time_varying=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    losses: list[float] = []

    def call():
        for _ in range(STEPS[name]):
            optimizer.zero_grad()
            t, x_t, u_t = matcher.sample_location_and_conditional_flow(draw_x0(batch), draw_x1(batch))
            loss = torch.mean((network(torch.cat([x_t, t[:, None]], dim=-1)) - u_t) ** 2)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())

    return Training(call, losses)


def eight_gaussians(num: int):
    """Draws the points of `flowgen.matching.toy.gaussian_ring` with torch."""
    import torch

    angle = torch.randint(8, (num,)) * (2 * math.pi / 8)
    return 5 * torch.stack([torch.cos(angle), torch.sin(angle)], dim=1) + 0.1**0.25 * torch.randn(num, 2)


def moons(num: int):
    """Draws the points of `flowgen.matching.toy.moons` with torch."""
    import torch

    upper, angle = torch.rand(num) < 0.5, math.pi * torch.rand(num)
    x = torch.where(upper, torch.cos(angle), 1 - torch.cos(angle))
    y = torch.where(upper, torch.sin(angle), 0.5 - torch.sin(angle))
    return 3 * (torch.stack([x, y], dim=1) + 0.2 * torch.rand(num, 1)) - 1


if __name__ == "__main__":
    serve()
