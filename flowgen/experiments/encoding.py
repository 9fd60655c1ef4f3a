"""The codec and text encoder of a flow. Both encode the flow's data; the codec also decodes samples."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp

from flowgen.codecs import Codec
from flowgen.conditioning import TextCondition
from flowgen.data.latent_files import Provenance
from flowgen.experiments.codecs import CodecConfig, PretrainedAutoencoder, codec_digest, open_codec
from flowgen.experiments.texts import TextConfig, encoded_text, open_text_encoder, text_digest
from flowgen.flows import STARFlowConfig, TARFlowConfig
from flowgen.text import TextEncoder, aspect_size


@dataclass(frozen=True)
class Encoding:
    """The codec and the text encoder of a flow. Each is opened once, on first use.

    model: config of the flow that uses the latents and the encoded texts.
    codec: config of the codec; None for a flow on pixels.
    text: config of the text encoder; None for a flow without texts.

    Example:
        images = Encoding(flow.config, SpaceToDepth(2)).open_codec().decode(latents)
    """

    model: TARFlowConfig | STARFlowConfig
    codec: CodecConfig | None = None
    text: TextConfig | None = None

    def open_codec(self) -> Codec:
        """Returns the codec. Raises the same errors as `flowgen.experiments.codecs.open_codec`."""
        return open_codec(self.codec, self.model.channels)

    def open_text_encoder(self) -> TextEncoder:
        """Returns the text encoder. Raises the same errors as `flowgen.experiments.texts.open_text_encoder`."""
        assert isinstance(self.model, STARFlowConfig)  # Only STARFlow accepts texts.
        return open_text_encoder(self.text, length=self.model.text_length, dim=self.model.text_dim)

    def condition(
        self,
        prompts: Sequence[str],
        grid: tuple[int, int] | None = None,
        *,
        truncate: bool = False,
        still: bool = False,
    ) -> TextCondition:
        """Returns the encoded prompts as a condition. Prompts are wrapped in the same template as training captions.

        grid: the (height, width) of the samples in latents, from which a template computes the aspect ratio; by
        default, `image_hw` of the model. truncate: whether to cut prompts that are too long. still: whether the prompts
        describe single images for a video flow. If so, a template with a frame rate states "An image" instead.
        """
        encoder = self.open_text_encoder()
        wrapped = [self._wrapped(prompt, grid, still) for prompt in prompts]
        return TextCondition(*map(jnp.asarray, encoder(wrapped, truncate=truncate)))

    def empty_text(self, grid: tuple[int, int] | None = None, *, still: bool = False) -> TextCondition:
        """Returns the encoded empty text, in the same template as prompts. Later calls return the same result.

        The empty text is the condition of the unconditional branch in guidance and label dropout.

        grid, still: see `condition`.
        """
        return encoded_text(self.open_text_encoder(), self._wrapped("", grid, still))

    def _wrapped(self, prompt: str, grid: tuple[int, int] | None, still: bool) -> str:
        assert self.text is not None
        template = self.text.template(self.model.noise_std, still=still)
        return template(prompt, self.model.image_hw if grid is None else grid)

    def latent_size(self, aspect: str) -> tuple[int, int]:
        """Returns the (height, width) of latents with this aspect ratio and about the same area as the model's latents.

        Raises ValueError if the aspect ratio is not one of the nine supported ones.
        """
        factor = self.open_codec().factor
        side = round(math.sqrt(math.prod(self.model.image_hw)) * factor)
        height, width = aspect_size(aspect, side, factor * self.model.patch_size)
        return height // factor, width // factor

    def with_digests(self, cached: Provenance | None = None) -> Encoding:
        """Returns the encoding with the digests of its autoencoder and text encoder filled in.

        cached: provenance of cached latents. If it contains a text encoder of the same name, that encoder's digest is
        used without opening the encoder. If it contains no text encoder, the digest stays None.

        The digest of a network without a path stays None.
        """
        codec, text = self.codec, self.text
        if isinstance(codec, PretrainedAutoencoder) and codec.digest is None and codec.path:
            codec = dataclasses.replace(codec, digest=codec_digest(self.open_codec()))
        if text is not None and text.digest is None and text.encoder:
            by = None if cached is None else cached.text
            if by is not None and Path(by.encoder).name == Path(text.encoder).name:
                text = dataclasses.replace(text, digest=by.digest)
            elif cached is None or by is not None:
                text = dataclasses.replace(text, digest=text_digest(self.open_text_encoder()))
        return dataclasses.replace(self, codec=codec, text=text)
