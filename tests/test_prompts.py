"""Prompt templates word for word as published, and the nine aspect ratios at the published sizes."""

import pytest

from flowgen.text import ASPECTS, PromptTemplate, aspect_size, nearest_aspect

# (side, multiple): height x width of the ratios at least as wide as high, as published; others are transposed.
PUBLISHED = {
    (256, 8): {"1:1": (256, 256), "3:2": (208, 312), "16:9": (192, 344), "5:4": (232, 288), "21:9": (168, 392)},
    (512, 8): {"1:1": (512, 512), "3:2": (416, 624), "16:9": (384, 680), "5:4": (456, 576), "21:9": (336, 784)},
    (1024, 8): {"1:1": (1024,) * 2, "3:2": (840, 1256), "16:9": (768, 1368), "5:4": (912, 1144), "21:9": (672, 1568)},
    (640, 16): {"1:1": (640, 640), "3:2": (528, 784), "16:9": (480, 848), "5:4": (576, 720), "21:9": (416, 976)},
}


@pytest.mark.parametrize("base", PUBLISHED)
def test_aspects_have_the_published_sizes(base):
    side, multiple = base
    for aspect, (height, width) in PUBLISHED[base].items():
        assert aspect_size(aspect, side, multiple) == (height, width)
        transposed = ":".join(reversed(aspect.split(":")))
        assert aspect_size(transposed, side, multiple) == (width, height)
        assert nearest_aspect(height, width) == aspect


def test_every_aspect_is_nearest_to_itself():
    assert all(nearest_aspect(100 * high, 100 * wide) == name for name, (wide, high) in ASPECTS.items())


def test_unknown_and_impossible_aspects_are_refused():
    with pytest.raises(ValueError, match=r"aspect is '4:3'; choose one of 1:1, 2:3"):
        aspect_size("4:3", 256)
    with pytest.raises(ValueError, match=r"needs a side larger than .* multiples of 64"):
        aspect_size("21:9", 32, 64)


# The texts that the published code makes of "a cat" and of the empty text, at 0.3 and 192 x 344.
WRAPPED = {
    "nothing": (PromptTemplate(), "a cat", ""),
    "noise": (PromptTemplate(noise_std=0.3), "Noise Level 300:\na cat", "Noise Level 300:\n"),
    "image": (PromptTemplate(frames_per_second=0), "An image:\na cat\n", "An image:\n\n"),
    "video": (PromptTemplate(frames_per_second=16), "A video with 16 fps:\na cat\n", "A video with 16 fps:\n\n"),
    "aspect": (
        PromptTemplate(aspect=True),
        "a cat\n in a 16:9 aspect ratio.\n",
        "\n in a 16:9 aspect ratio.\n",
    ),
    "all": (
        PromptTemplate(noise_std=0.3, frames_per_second=16, aspect=True),
        "Noise Level 300:\nA video with 16 fps:\na cat\n\n in a 16:9 aspect ratio.\n",
        "Noise Level 300:\nA video with 16 fps:\n\n\n in a 16:9 aspect ratio.\n",
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_templates_wrap_texts_as_published(name):
    template, text, null = WRAPPED[name]
    assert template("a cat", (192, 344)) == text
    assert template("", (192, 344)) == null
