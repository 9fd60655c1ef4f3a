"""The prompt template of published models, and the nine aspect ratios that it can mention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flowgen.arrays import check_count

# width : height, in the published order (arXiv 2506.06276).
ASPECTS: dict[str, tuple[int, int]] = {
    "1:1": (1, 1),
    "2:3": (2, 3),
    "3:2": (3, 2),
    "16:9": (16, 9),
    "9:16": (9, 16),
    "4:5": (4, 5),
    "5:4": (5, 4),
    "21:9": (21, 9),
    "9:21": (9, 21),
}


def aspect_size(aspect: str, side: int, multiple: int = 1) -> tuple[int, int]:
    """Returns the (height, width) of an image with about side² pixels whose aspect ratio is close to `aspect`.

    aspect: a key of `ASPECTS`, such as "16:9", which means width : height = 16 : 9.

    With r = width / height, the height is side / √r and the width is side √r, each rounded to the nearest multiple of
    `multiple`; ties are rounded to an even multiple.

    Raises ValueError if `aspect` is not in `ASPECTS`, if `side` or `multiple` is below 1, or if a length rounds to 0.

    Example:
        aspect_size("16:9", 256, 8)  # (192, 344)
    """
    if aspect not in ASPECTS:
        raise ValueError(f"aspect is {aspect!r}; choose one of {', '.join(ASPECTS)}.")
    check_count("side", side)
    check_count("multiple", multiple)
    wide, high = ASPECTS[aspect]
    stretch = math.sqrt(wide / high)
    height, width = (round(length / multiple) * multiple for length in (side / stretch, side * stretch))
    if min(height, width) == 0:
        raise ValueError(f"aspect {aspect} needs a side larger than {side} if lengths are multiples of {multiple}.")
    return height, width


def nearest_aspect(height: int, width: int) -> str:
    """Returns the key of `ASPECTS` whose ratio is closest to width / height on a logarithmic scale.

    Because of the logarithm, swapping height and width swaps the numbers in the result, as in "16:9" and "9:16".

    Example:
        nearest_aspect(1080, 1920)  # "16:9"
    """
    ratio = math.log(width / height)
    return min(ASPECTS, key=lambda name: abs(math.log(ASPECTS[name][0] / ASPECTS[name][1]) - ratio))


@dataclass(frozen=True)
class PromptTemplate:
    """The template with which published STARFlow models add noise level, frame rate and aspect ratio to a text.

    For guidance, apply it to the empty text too.

    noise_std: standard deviation of the training noise, written in thousandths, as in "Noise Level 300:"; None leaves
    this part out. frames_per_second: frame rate, written as in "A video with 16 fps:", or as "An image:" if it is 0;
    None leaves this part out. aspect: whether the prompt ends with the aspect ratio of the image, rounded to the
    nearest one in `ASPECTS`.

    Example:
        template = PromptTemplate(noise_std=0.3)
        template("a cat", (32, 32))  # "Noise Level 300:\\na cat"
    """

    noise_std: float | None = None
    frames_per_second: int | None = None
    aspect: bool = False

    def __call__(self, text: str, grid: tuple[int, int]) -> str:
        """Returns the template filled with the text. grid: (height, width) of the image, in any unit."""
        if self.frames_per_second is not None:
            kind = f"A video with {self.frames_per_second} fps" if self.frames_per_second else "An image"
            text = f"{kind}:\n{text}\n"
        if self.noise_std is not None:
            text = f"Noise Level {int(self.noise_std * 1000)}:\n{text}"
        if self.aspect:
            text = f"{text}\n in a {nearest_aspect(*grid)} aspect ratio.\n"
        return text
