"""Clips of the game Crafter: what a player sees who repeats an action."""

import os
import subprocess
import sys
import types

import crafter
import numpy as np
import pytest

from flowgen.data import ClipsConfig, load_clips
from flowgen.data.crafter import CLIPS_PER_WORLD


def clips_of(num=20, frames=4, size=(27, 36), channels=3, split="eval", **changes):
    config = ClipsConfig(name="crafter", num=num, **changes)
    return load_clips(config, frames=frames, image_size=size, channels=channels, split=split)


def test_clips_are_what_playing_their_actions_shows():
    dataset = clips_of(num=80)
    batch = dataset[np.arange(8)]
    assert batch.x.shape == (8, 4, 27, 36, 3)
    assert dataset.class_names == ("noop", "left", "right", "up", "down", "do")
    assert len(set(batch.context.tolist())) > 2
    game = crafter.Env(size=(36, 27), seed=1)
    seen = game.reset()
    names = {"left": "move_left", "right": "move_right", "up": "move_up", "down": "move_down"}
    # The game itself decides by the order of a set in every tenth step: the first clips are before that.
    for clip, label in zip(batch.x[:3], batch.context[:3], strict=True):
        np.testing.assert_array_equal(clip[0], seen)
        action = game.action_names.index(names.get(dataset.class_names[label], dataset.class_names[label]))
        for frame in clip[1:]:
            seen, *_ = game.step(action)
            np.testing.assert_array_equal(frame, seen)


@pytest.mark.slow  # a minute of play in two processes
def test_clips_are_the_same_in_every_process():
    program = """
import hashlib, numpy
from flowgen.data import ClipsConfig, load_clips
config = ClipsConfig(name="crafter", num=600)
clips = load_clips(config, frames=12, image_size=(27, 27), channels=3, split="eval")
print(hashlib.sha256(clips[numpy.arange(60)].x.tobytes()).hexdigest())
"""
    players = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONHASHSEED": s}
        )
        for s in ("1", "2")
    ]
    digests = {player.communicate(timeout=200)[0] for player in players}
    assert len(digests) == 1
    assert len(digests.pop()) == 65


class Counting:
    """A game in which every image is new; the player dies in the third step of the first world."""

    action_names = ("do", "move_down", "move_up", "move_right", "move_left", "noop")
    _world = types.SimpleNamespace(objects=[], _chunks={})

    def __init__(self, size, seed):
        self.shape, self.world, self.images, self.steps = (*size[::-1], 3), 0, 0, 0

    def reset(self):
        self.world, self.steps = self.world + 1, 0
        return self.image()

    def step(self, action):
        self.steps += 1
        return self.image(), 0.0, self.world == 1 and self.steps == 3, {}

    def image(self):
        self.images += 1
        return np.full(self.shape, self.images % 256, np.uint8)


def test_a_clip_in_which_the_player_dies_is_played_again_in_the_next_world(monkeypatch):
    monkeypatch.setattr(crafter, "Env", Counting)
    seen = clips_of(frames=3, size=(9, 9), split="all")[np.arange(3)].x[:, :, 0, 0, 0]
    # The first clip ends with the second step; the player dies in the second one, whose images are lost.
    np.testing.assert_array_equal(seen, [[1, 2, 3], [5, 6, 7], [7, 8, 9]])
    many = clips_of(num=CLIPS_PER_WORLD + 2, frames=2, size=(9, 9), split="all")[np.arange(CLIPS_PER_WORLD + 2)]
    images = many.x[:, :, 0, 0, 0].astype(int)
    begins, ends = images[1:, 0], images[:-1, 1]
    # Clips go on where the last one ended, but for the first in a new world.
    np.testing.assert_array_equal(np.flatnonzero(begins != ends), [1, CLIPS_PER_WORLD - 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 1}, "data.name 'crafter' has colour clips; set model.channels to 3"),
        ({"frames": 1}, "clips of 1 frame are too short for data.name 'crafter'"),
        ({"size": (8, 16)}, "clips of 8 x 16 pixels are too small for data.name 'crafter', which shows 9 x 9 tiles"),
        ({"eval_fraction": 0.0}, "data.eval_fraction is 0, so nothing is held out for evaluation"),
        (
            {"num": 2, "eval_fraction": 0.9, "split": "train"},
            "data.eval_fraction is 0.9, which leaves none of the 2 images to train",
        ),
    ],
)
def test_what_the_game_cannot_show_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        clips_of(**changes)


def test_without_the_package_the_sentence_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ModuleNotFoundError, match="needs the package crafter; install it with"):
        clips_of()
