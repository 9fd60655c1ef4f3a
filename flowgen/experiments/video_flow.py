"""Experiments that train a STARFlowV and its denoiser jointly, and sample clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import jax
import numpy as np
from jaxtyping import Int

from flowgen.conditioning import TextCondition
from flowgen.data import ClipsConfig, LatentsConfig
from flowgen.data.clip_views import CONTINUED
from flowgen.data.dataset import OF_FILES, Dataset, Split
from flowgen.decoding import Clip, Denoiser
from flowgen.evaluation import Estimate, Evaluation, flow_bits_per_dim, flow_nats_per_dim
from flowgen.experiments.autoregressive import AutoregressiveExperiment
from flowgen.experiments.clips import (
    check_length,
    clips_alone,
    denoised_psnr,
    denoising_step,
    frame_distances,
    latent_frames,
    of_batch,
    of_whole_clips,
    read_given,
    with_noise,
)
from flowgen.experiments.conditions import chosen_texts
from flowgen.experiments.debug import debug_clips, debug_flow, debug_run
from flowgen.experiments.decoding import decoded_by_all, decoding_line
from flowgen.experiments.drawing import AT_ONCE, check_samples, draw_in_batches, on_devices
from flowgen.experiments.experiment import Samples
from flowgen.experiments.flow_options import FlowDrawOptions, FlowEvaluateOptions
from flowgen.experiments.latents import flow_dataset, pixel_dataset
from flowgen.experiments.likelihoods import check_likelihood, evaluate_likelihood
from flowgen.experiments.plots import strips
from flowgen.flows import STARFlowVConfig, denoiser_variables, flow_score_objective
from flowgen.flows.objective import nll_objective
from flowgen.guidance import Guidance
from flowgen.settings import config
from flowgen.settings.ranges import Frames, Within
from flowgen.training import Job
from flowgen.training.step import Objective

DENOISED = 64  # number of held-out clips to denoise for the PSNR
NOISY = "as they are"
PSNR_METRICS = {NOISY: "psnr_noisy", "by the score": "psnr_score", "by the denoiser": "psnr_denoiser"}
WHOLE = Clip()  # a clip of the flow's length
SMALL_SIDE = 10  # smallest side in which digits of 8 pixels can move
DEFAULT_FPS = 8.0
# The frame rates that both mp4 and GIF support. GIF counts time in hundredths of a second.
LEAST_FPS, MOST_FPS = 0.1, 100.0


@config
class ClipDrawOptions(FlowDrawOptions):
    """Options for drawing clips, in addition to those in the experiment's field `sampling`.

    frames: frames per clip, possibly more than in training; by default, as many as in training.
    given: image or video with which clips begin; a video is cut so that it is shorter than the clips.
    context: number of known latent frames with which each restart begins when a long clip is decoded.
    fps: frames per second of the output; by default, the rate of the training clips.
    progress: show a progress bar of decoded tokens.
    """

    frames: Frames | None = None
    given: str = ""
    context: Frames | None = None
    fps: Annotated[float, Within(LEAST_FPS, MOST_FPS)] | None = None
    progress: bool = False


@config(kw_only=True)
class VideoFlowExperiment(AutoregressiveExperiment):
    """An experiment that trains a flow on clips by maximum likelihood, and trains the flow's denoiser, if it has one,
    jointly.

    model: the flow; if `model.denoiser_layers` is above 0, it has a denoiser.
    data: the clips to train on, or latents of clips that `python -m flowgen encode` has cached.

    Raises ValueError if the fields do not fit together.

    Example:
        experiment = VideoFlowExperiment(name="digits", model=STARFlowVConfig(image_size=16, frames=6))
    """

    draw_options = ClipDrawOptions
    evaluate_options = FlowEvaluateOptions

    model: STARFlowVConfig
    data: ClipsConfig | LatentsConfig = ClipsConfig()

    def __post_init__(self):
        self.check_parts()
        self._check_denoiser()
        if self.data.drop_first and self.model.frames < 3:
            raise ValueError(
                f"data.drop_first is {self.data.drop_first}, but if model.frames is {self.model.frames}, clips without "
                "their first frame are single images; set data.drop_first to 0, or model.frames to at least 3."
            )
        told = None if self.text is None else self.text.frames_per_second
        fps = self.data.fps if isinstance(self.data, ClipsConfig) and self.data.name in ("real", *OF_FILES) else 0
        if told and fps and told != fps:
            raise ValueError(f"text.frames_per_second is {told}, but data.fps is {fps:g}; set both to the same value.")
        denoiser = self.likelihood.denoiser
        self.check_warmups({} if denoiser is None else {"likelihood.denoiser.warmup_steps": denoiser.warmup_steps})

    def _check_denoiser(self) -> None:
        model, likelihood = self.model, self.likelihood
        if not model.denoiser_layers:
            if likelihood.denoiser is not None:
                raise ValueError(
                    "likelihood.denoiser is given, but model.denoiser_layers is 0; set it above 0, or leave "
                    "likelihood.denoiser out."
                )
            return
        if likelihood.norm_penalty:
            raise ValueError(
                f"likelihood.norm_penalty is {likelihood.norm_penalty}, which would distort the score that the "
                "denoiser learns; set it to 0, or set model.denoiser_layers to 0."
            )
        if model.noise_std == 0:
            raise ValueError(
                "model.noise_std is 0, so a denoiser has nothing to remove; set it above 0, or set "
                "model.denoiser_layers to 0."
            )
        if self.sampling.denoise not in (0, 1):
            raise ValueError(
                f"sampling.denoise is {self.sampling.denoise}, but a learned denoiser takes only full steps; "
                "set it to 0 or 1."
            )

    def dataset(self, split: Split) -> Dataset:
        """Returns the clips in a split of `data`, resized so that their latents have the size that the flow expects."""
        return clips_alone(pixel_dataset(of_whole_clips(self.data), self.encoding, split))

    def job(self, *, dataset: Dataset | None = None, held_out: Dataset | None = None, model: Any = None) -> Job:
        """Opens the data, encodes them if necessary, and returns the training job.

        Encoding is necessary if the flow needs latents or encoded texts that are not cached.

        dataset, held_out, model: see `fit`.
        """
        flow = self.build() if model is None else model
        self.check_sampling(flow)
        trained_on, evaluated = self.opened(dataset, held_out)
        evaluated = None if evaluated is None else clips_alone(evaluated)
        likelihood, has_denoiser = self.likelihood, self.model.denoiser_layers > 0
        return self.flow_job(
            flow,
            trained_on,
            held_out=evaluated,
            evaluate=None if evaluated is None else self._evaluator(flow, evaluated),
            sample=self.sampler(
                flow, evaluated or clips_alone(trained_on), self.draw_batch, lambda drawn, classes: strips(drawn)
            ),
            optims={"denoiser": likelihood.denoiser or self.optim} if has_denoiser else {},
        )

    def objective(self, flow: Any, **options: Any) -> Objective:
        """Returns the joint training objective of `flow` and its denoiser or, without a denoiser, that of `flow` alone.

        options: further arguments, such as label_dropout, of `flowgen.flows.flow_score_objective` or, without a
        denoiser, of `flowgen.flows.objective.nll_objective`.
        """
        likelihood = self.likelihood
        if self.model.denoiser_layers:
            return flow_score_objective(flow, jacobi=likelihood.jacobi, **options)
        return nll_objective(flow, norm_penalty=likelihood.norm_penalty, jacobi=likelihood.jacobi, **options)

    def draw_batch(
        self,
        flow: Any,
        variables: Any,
        key: jax.Array,
        numbers: Int[np.ndarray, " b"],
        cond: Any,
        *,
        guidance: Guidance | None = None,
        clip: Clip = WHOLE,
        **checks: bool,
    ) -> tuple[np.ndarray, str]:
        """Returns clips `b frames height width c`, and a line of text about their decoding: passes per block and
        residual.

        Each clip depends only on `key`, its entry of `numbers` and its condition, not on the other clips of the batch.
        If the experiment has a codec, the flow draws latents, which the codec decodes to clips.

        cond: the conditions of the clips: a `TextCondition` if the flow is conditioned on texts; otherwise labels or
        contexts, as the flow requires, or None for unconditional clips. guidance: None for the guidance that `sampling`
        describes. clip: the length and the first frames of all clips, counted in latent frames; by default, the flow's
        own length and no given frames. `clip.given` contains latents `1 given height width c` without noise, with which
        every clip begins. `clip.restart_cond` may contain any number n of texts; the clip with number i takes text i
        modulo n. checks: the options `certify` and `strict` of `flowgen.decoding.sample`.
        """
        given, restarts = clip.given, clip.restart_cond
        noisy = None if given is None else with_noise(flow, given, key, numbers)
        restarts = chosen_texts(restarts, numbers) if isinstance(restarts, TextCondition) else restarts
        result = decoded_by_all(
            flow,
            variables,
            key,
            numbers,
            cond,
            dataclasses.replace(clip, given=noisy, restart_cond=restarts),
            partial(self.denoiser, flow),
            plan=self.sampling.to_plan(),
            guidance=guidance or self.guidance(flow),
            **checks,
        )
        latents = np.array(result.x)
        if given is not None:
            latents[:, : given.shape[1]] = given
        return np.asarray(self.encoding.open_codec().decode(latents)), decoding_line(result)

    def draw(
        self,
        model: Any,
        variables: Any,
        options: ClipDrawOptions,
        say: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Samples:
        """Returns `sampling.num` clips, and calls `say` with a line about the speed of each batch.

        progress: a function that follows the decoding, as `progress` of `flowgen.decoding.Clip`; None for none.

        Raises ValueError if the codec cannot encode clips of `options.frames` frames, or if the file `options.given`
        cannot be used, and FileNotFoundError if this file does not exist.
        """
        flow = self.sized(model, options.aspect)
        clip = self._clip(flow, options)
        conditions, about = self.asked(flow, options.classes)
        clip = dataclasses.replace(clip, restart_cond=self._restart_texts(flow), progress=progress)
        variables = on_devices(variables, min(options.batch or AT_ONCE, self.sampling.num))
        draw_batch = partial(
            self.draw_batch, flow, variables, guidance=self.guidance(flow), clip=clip, **options.checks
        )
        return Samples(draw_in_batches(draw_batch, conditions, self.sampling.num, options, say), about)

    def _clip(self, flow: Any, options: ClipDrawOptions) -> Clip:
        """Returns the `Clip` that the options request, in latent frames. Its given frames have no noise."""
        codec, given = self.encoding.open_codec(), None
        check_length(codec, self.model.frames, options.frames, options.context)
        if options.given:
            images = read_given(codec, flow, options.given, frames=options.frames, fps=self.data.fps or None)
            given, _ = codec.moments(images[None])
        return Clip(
            frames=None if options.frames is None else latent_frames(codec, options.frames),
            given=given,
            context=options.context,
        )

    def _restart_texts(self, flow: Any) -> TextCondition | None:
        """Returns the encoded prompts for restarts, with the prefix from training; None to use the clips' prompts."""
        if not (self.model.text_dim and self.data.drop_first):
            return None
        return self.encoding.condition([CONTINUED + prompt for prompt in self.sampling.prompts], flow.config.image_hw)

    def fps(self, asked: float | None) -> float:
        """Returns the rate, in frames per second, at which to write sampled clips.

        asked: the requested rate; None for the rate of the training clips, or for 8 if their rate is unknown or is
        outside the range from 0.1 to 100 that video files support.
        """
        if asked is not None:
            return asked
        # For cached latents, the frame rate may be known only from the text config.
        told = None if self.text is None else self.text.frames_per_second
        fps = float(told or self.data.fps)
        return fps if LEAST_FPS <= fps <= MOST_FPS else DEFAULT_FPS

    def evaluate(self, model: Any, variables: Any, options: FlowEvaluateOptions) -> Evaluation:
        """Returns the likelihood of clips under the flow, the PSNR of denoised clips and, if requested, frame
        distances.

        The likelihood is that of all clips in the split `options.split`. The PSNR in dB is measured on up to 64 of
        these clips, before and after the training noise is removed. If `options.samples` is above 0, this many clips
        are drawn, and two distances are reported for them and for clips of the split: the root mean square distance
        between consecutive frames, and that between any two frames of a clip. The PSNR and the distances are those of
        pixels, also for a flow on latents.
        """
        check_likelihood(model, options, latent=self.is_latent)
        if options.samples:
            self.check_sampling(model)
        data, labelled = of_whole_clips(self.data), not options.unconditional
        codec, guidance = self.encoding.open_codec(), self.guidance(model) if options.samples else None
        dataset = clips_alone(flow_dataset(data, self.encoding, options.split, labelled=labelled))
        evaluation = evaluate_likelihood(model, variables, dataset, options, latent=self.is_latent)
        key = jax.random.key(options.seed)
        ratios = denoised_psnr(codec, model, variables, dataset, key, most=DENOISED)
        line = "PSNR of noisy clips " + ", ".join(f"{how} {ratio:.2f} dB" for how, ratio in ratios.items())
        evaluation += Evaluation((line,), {PSNR_METRICS[how]: Estimate(ratio) for how, ratio in ratios.items()})
        if not options.samples or model.config.frames == 1:  # A clip of one frame has no frame distances.
            return evaluation
        conditions = self.conditions_of(dataset, unconditional=options.unconditional)
        cond = None if conditions is None else conditions(np.arange(options.samples) % len(dataset))
        clips, _ = self.draw_batch(model, variables, key, np.arange(options.samples), cond, guidance=guidance)
        check_samples(clips)
        real = codec.decode(of_batch(dataset[np.arange(min(len(dataset), options.samples))]))
        for name, frames in (("samples", clips), ("data", real)):
            near, far = frame_distances(np.clip(frames, -1, 1))
            line = f"frames of {len(frames)} {name}: distance to the next {near:.4f}, to any other {far:.4f}"
            values = {"next": near, "other": far}
            distances = {f"{name}_{to}_frame": Estimate(value, count=len(frames)) for to, value in values.items()}
            evaluation += Evaluation((line,), distances)
        return evaluation

    def debug(self) -> VideoFlowExperiment:
        """Returns a copy of the experiment that trains a tiny flow of this kind on bouncing digits for a few steps."""
        changes = debug_flow(self)
        changes["model"] = dataclasses.replace(
            changes["model"],
            image_size=-(-SMALL_SIDE // changes["model"].patch_size) * changes["model"].patch_size,
            frames=min(self.model.frames, 3),
            denoiser_layers=min(self.model.denoiser_layers, 1),
        )
        if (optim := self.likelihood.denoiser) is not None:
            optim = dataclasses.replace(optim, warmup_steps=min(optim.warmup_steps, 2))
            changes["likelihood"] = dataclasses.replace(changes["likelihood"], denoiser=optim)
        return debug_run(self, **changes, data=debug_clips(self.data))

    def denoiser(self, flow: Any, variables: Any) -> float | Denoiser:
        """Returns the learned denoiser or, if the flow has none, `sampling.denoise`, the strength of the Tweedie step.

        The result is 0 if `sampling.denoise` is 0, so that samples keep the training noise.
        """
        strength = self.sampling.denoise
        if not flow.config.denoiser_layers or strength == 0:
            return strength
        return Denoiser(denoising_step(flow), denoiser_variables(variables))

    def _evaluator(self, flow: Any, held_out: Any) -> Callable[[Any], dict[str, float]]:
        codec = self.encoding.open_codec()

        def evaluated(variables):
            key = jax.random.key(0)
            density = flow_nats_per_dim if self.is_latent else flow_bits_per_dim
            metrics = {self.best_metric: density(flow, variables, held_out, key, batch_size=DENOISED)}
            ratios = denoised_psnr(codec, flow, variables, held_out, key, most=DENOISED)
            # The PSNR without denoising depends only on the training noise.
            return metrics | {PSNR_METRICS[how]: ratio for how, ratio in ratios.items() if how != NOISY}

        return evaluated
