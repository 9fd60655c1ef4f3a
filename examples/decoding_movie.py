"""An animation of a flow that decodes noise into images, block by block and token by token.

python examples/decoding_movie.py --checkpoint runs/mnist --out decoding.gif

A block replaces its tokens one after another, each computed from those before it. The first frame shows the samples
after the denoising step, and the other frames show the decoding from the start. Each class has its own colour.
"""

from __future__ import annotations

import argparse
import colorsys

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import flowgen
from flowgen.data import image_grid, to_uint8
from flowgen.decoding import Guidance, Sequential
from flowgen.decoding.block import guided_block, in_block_order, inverse
from flowgen.decoding.request import decode_request
from flowgen.decoding.weights import decoding_weights
from flowgen.flows import density
from flowgen.flows.decoding_form import decoding_config
from flowgen.flows.orders import permutation

LEVELS = 10  # of grey, so that the file stays small


def states(flow, params, labels, key, guidance: float, tokens_per_frame: int) -> list[np.ndarray]:
    """Returns the images `b height width c` in [-1, 1] at successive stages of sequential decoding."""
    config, weights = flow.config, decoding_weights(flow.config, params)
    z = jax.random.normal(key, (len(labels), config.num_tokens, config.token_dim))
    request = decode_request(flow, params, z, labels, "sequential", Guidance(guidance), None)
    shown = [z]
    for index in reversed(range(config.num_blocks)):
        block = guided_block(request, decoding_config(config.blocks[index]), index, weights[index])
        block, order = in_block_order(config.blocks[index], block)
        x = inverse(block, z, order, plan=Sequential(), layers=config.blocks[index].transformer.num_layers).x
        places = permutation(config.blocks[index].order, config.num_tokens)
        for count in range(tokens_per_frame, config.num_tokens + tokens_per_frame, tokens_per_frame):
            solved = np.isin(np.arange(config.num_tokens), places[:count])
            shown.append(jnp.where(solved[None, :, None], x, z))
        z = x
    clean = density.tweedie_step(flow, params, config.to_images(z), labels)
    return [*(np.asarray(config.to_images(each)) for each in shown), np.asarray(clean)]


def palette(classes: int) -> np.ndarray:
    """Returns colours `classes · LEVELS 3`: from black through the hue of a class to a light tint."""
    colours = np.zeros((classes, LEVELS, 3))
    for label in range(classes):
        for level in range(LEVELS):
            light = 0.85 * level / (LEVELS - 1)
            colours[label, level] = colorsys.hls_to_rgb(label / classes, light, 0.75)
    return np.rint(255 * colours.reshape(-1, 3)).astype(np.uint8)


def frame(images: np.ndarray, labels: np.ndarray, columns: int, scale: int, colours: np.ndarray) -> Image.Image:
    """Returns one frame: a grid of images in the colours of their classes."""
    level = np.rint(to_uint8(images)[..., :1] / 255 * (LEVELS - 1)).astype(np.uint8)
    grid = image_grid(level + LEVELS * labels[:, None, None, None].astype(np.uint8), columns, padding=0, scale=scale)
    picture = Image.fromarray(grid[..., 0])
    picture.putpalette(colours.tobytes())
    return picture


def main(arguments: list[str] | None = None) -> None:
    """Writes the animation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="directory of a run with grey images and classes")
    parser.add_argument("--out", required=True, help="a .gif file")
    parser.add_argument("--rows", type=int, default=4, help="number of images of each class")
    parser.add_argument("--scale", type=int, default=2, help="factor by which images are enlarged")
    parser.add_argument("--tokens-per-frame", type=int, default=7, help="number of tokens decoded between frames")
    parser.add_argument("--guidance", type=float, default=1.5, help="guidance weight; 0 for none")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    options = parser.parse_args(arguments)
    flow, params, _ = flowgen.load(options.checkpoint)
    classes = flow.config.num_classes
    labels = np.tile(np.arange(classes), options.rows)
    key = jax.random.key(options.seed)
    shown = states(flow, params, jnp.asarray(labels), key, options.guidance, options.tokens_per_frame)
    frames = [frame(images, labels, classes, options.scale, palette(classes)) for images in shown]
    frames = [frames[-1], *frames[:-1]]  # A still of the animation shows the samples.
    durations = [3000, 1000, *[100] * (len(frames) - 2)]
    frames[0].save(options.out, save_all=True, append_images=frames[1:], duration=durations, loop=0, optimize=True)
    print(f"{options.out}: {len(frames)} frames of {len(labels)} images")


if __name__ == "__main__":
    main()
