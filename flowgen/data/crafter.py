"""Records clips of the game Crafter (Hafner 2021, arXiv 2109.06780) in which the player repeats a single action."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from flowgen.data.dataset import Split, hold_out
from flowgen.packages import need

# Only actions with a visible effect. Placing and making things would require materials, which the player lacks.
ACTIONS = ("noop", "move_left", "move_right", "move_up", "move_down", "do")
CLASS_NAMES = tuple(name.removeprefix("move_") for name in ACTIONS)
# Clips share a world, because generating a world takes about as long as playing 500 frames.
CLIPS_PER_WORLD = 100
VIEW = 9  # number of world tiles across the image


def record(
    num: int, eval_fraction: float, *, frames: int, image_size: tuple[int, int], channels: int, split: Split
) -> tuple[UInt8[np.ndarray, "n frames height width 3"], Int32[np.ndarray, " n"], tuple[str, ...]]:
    """Plays Crafter deterministically. Returns the clips of a split, their labels, and the names of the actions.

    Each clip begins where the previous one ended, and every hundred clips the game restarts in a new world. Different
    splits never share a world. If the player dies during a clip, the clip is played again in a new world.

    num: number of clips in both splits combined.

    Raises ModuleNotFoundError if the package crafter is missing, and ValueError if `frames` is below 2, `channels` is
    not 3 or a side of `image_size` is below 9.

    Example:
        clips, labels, names = record(1000, 0.1, frames=8, image_size=(64, 64), channels=3, split="train")
    """
    if channels != 3:
        raise ValueError("data.name 'crafter' has colour clips; set model.channels to 3.")
    if frames < 2:
        raise ValueError(
            f"clips of {frames} frame are too short for data.name 'crafter', because the player acts between frames; "
            "use at least 2."
        )
    if min(image_size) < VIEW:
        raise ValueError(
            f"clips of {image_size[0]} x {image_size[1]} pixels are too small for data.name 'crafter', which shows "
            f"{VIEW} x {VIEW} tiles; use at least 27 x 27."
        )
    seed, count = ("train", "eval", "all").index(split), len(hold_out(num, eval_fraction, split))
    game = _Game(_crafter().Env(size=image_size[::-1], seed=seed))
    labels = np.random.Philox(np.random.SeedSequence(seed)).random_raw(count) % len(ACTIONS)
    clips = np.empty((count, frames, *image_size, channels), np.uint8)
    for index, label in enumerate(labels.tolist()):
        if index % CLIPS_PER_WORLD == 0:
            seen = game.reset()
        alive = False
        while not alive:
            clips[index, 0], alive = seen, True
            for frame in range(1, frames):
                seen, over = game.step(ACTIONS[label])
                clips[index, frame] = seen
                if over:
                    seen, alive = game.reset(), False
                    break
    return clips, labels.astype(np.int32), CLASS_NAMES


class _Game:
    """A version of Crafter that is deterministic across processes.

    Crafter itself picks the creatures of a region from a set, whose order depends on memory addresses. This class
    replaces the set with one that keeps creatures in the order in which they were created.
    """

    def __init__(self, env: Any):
        self.env = env
        self.numbers = {name: number for number, name in enumerate(env.action_names)}

    def reset(self) -> UInt8[np.ndarray, "height width 3"]:
        seen, world = self.env.reset(), self.env._world
        made = {creature: number for number, creature in enumerate(world.objects)}
        regions = {
            place: _InOrder.fromkeys(sorted(some, key=made.__getitem__)) for place, some in world._chunks.items()
        }
        world._chunks = collections.defaultdict(_InOrder, regions)
        return seen

    def step(self, action: str) -> tuple[UInt8[np.ndarray, "height width 3"], bool]:
        """Returns the view after an action, and whether the player has died or the game is over."""
        seen, _, over, _ = self.env.step(self.numbers[action])
        return seen, over


class _InOrder(dict[Any, None]):
    """A set that iterates in insertion order."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


def _crafter() -> Any:
    return need("crafter", "data.name 'crafter'")
