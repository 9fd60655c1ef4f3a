"""What one device trains and several: a table of variables, objectives and batches that the device laws run over.

As a program it trains some of them on all devices, of several processes too, and saves their parameters:
python device_cases.py OUT.npz NAME,NAME data|FSDPxTENSOR [ADDRESS PROCESSES PROCESS]
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import flowgen
from flowgen import matching as fm
from flowgen.backend import shards
from flowgen.codecs import AutoencoderConfig
from flowgen.conditioning import TextCondition
from flowgen.data import Batch, Moments
from flowgen.experiments.autoencoder import AutoencodingConfig, autoencoding_objective
from flowgen.experiments.codecs import STATISTICS
from flowgen.flows import STARFlowVConfig, flow_score_objective
from flowgen.flows.objective import nll_objective
from flowgen.nn import init
from flowgen.training import OptimConfig, make_step
from flowgen.training.fsdp import FullySharded
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state

BATCH, STEPS, CLASSES = 16, 20, 3
OPTIM = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, clip_norm=1.0, ema_decay=0.9)


@dataclasses.dataclass(frozen=True)
class Case:
    """make() -> (variables, objective). batch(random) -> arrays of the whole batch.

    linear: whether accumulation changes nothing but the order of sums.
    """

    make: Callable[[], tuple[Any, Callable[..., tuple]]]
    batch: Callable[[np.random.Generator], dict[str, Any]]
    linear: bool = True


def perturbed(variables):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + 0.05 * random.standard_normal(x.shape).astype(x.dtype), variables)


def labels(random):
    return random.integers(-1, CLASSES, BATCH).astype(np.int32)


def images(random, shape=(4, 4, 1)):
    return Batch(random.integers(0, 256, (BATCH, *shape)).astype(np.uint8), labels(random))


def flow_case(make_objective=nll_objective, config=flowgen.TARFlowConfig, **options):
    small = {"image_size": 4, "channels": 1, "patch_size": 2, "width": 16, "num_blocks": 2, "layers_per_block": 1}
    settings = {**small, "head_dim": 8, "num_classes": CLASSES, **options}

    def make():
        flow = config(**settings, dtype="float64" if jax.config.jax_enable_x64 else "float32").build()
        return perturbed(init(flow, jax.random.key(0))), make_objective(flow, label_dropout=0.3)

    return make


STAR = {"image_size": 4, "channels": 2, "patch_size": 2, "width": 20, "head_dim": 20, "layers_per_block": (1, 1)}


def text_case():
    def objective(flow, **options):
        null = TextCondition(jnp.ones((1, 3, 5)), jnp.ones((1, 3), bool))
        return nll_objective(flow, null_text=lambda shape: null, **options)

    config = flowgen.STARFlowConfig(**STAR, text_dim=5, text_length=3)
    return flow_case(objective, lambda dtype, **_: dataclasses.replace(config, dtype=dtype))


def latents_of_texts(random):
    mean, std = random.standard_normal((2, BATCH, 4, 4, 2))
    texts = random.standard_normal((BATCH, 3, 5)), random.random((BATCH, 3)) < 0.7
    return Batch(Moments(mean, np.abs(std)), TextCondition(*texts))


def clips_case():
    config = STARFlowVConfig(**STAR, frames=3, num_classes=CLASSES, denoiser_layers=1)
    return flow_case(flow_score_objective, lambda dtype, **_: dataclasses.replace(config, dtype=dtype))


class Network:
    """A velocity with few parameters that computes in their precision, whatever it is asked for."""

    config = None

    def apply(self, variables, t, x, cond, interval=None):
        params = variables["params"]
        t = t if interval is None else t + 0.3 * interval
        features = [x, t[:, None].astype(x.dtype), (0 if cond is None else cond[:, None]) * jnp.ones_like(x[:, :1])]
        return jnp.tanh(jnp.concatenate(features, axis=1) @ params["up"]) @ params["down"]


def matching_case(loss=fm.flow_matching_loss, conditional=True, **options):
    def pairs(key, batch):
        return {"x1": batch["x"], "cond": batch["label"] if conditional else None}

    def make():
        random = np.random.default_rng(0)
        params = {"up": random.standard_normal((4, 8)), "down": random.standard_normal((8, 2))}
        matching = fm.MatchingConfig(coupling=options.get("coupling", fm.Independent()))
        variables = {"params": jax.tree.map(jnp.asarray, params), **matching.state()}
        variables = jax.tree.map(lambda x: x.astype(jnp.result_type(float)), variables)
        dropout = 0.3 if conditional else 0.0
        return variables, fm.matching_objective(Network(), loss(**options, label_dropout=dropout), pairs)

    return make


def points(random):
    return {"x": 1 + 2 * random.standard_normal((BATCH, 2)).astype(jnp.result_type(float)), "label": labels(random)}


def unet_case():
    config = fm.UNetConfig(
        image_size=4, channels=1, width=8, multipliers=(1,), blocks_per_level=1, attention_factors=(), head_dim=8,
        num_groups=4, num_classes=CLASSES, dropout=0.3,
    )  # fmt: skip

    def pairs(key, batch):
        return {"x1": flowgen.data.from_uint8(batch.x), "cond": batch.context}

    def make():
        network = fm.UNet(config)
        loss = fm.flow_matching_loss(coupling=fm.MinibatchOT(class_aware=True))
        return perturbed(init(network, jax.random.key(0))), fm.matching_objective(network, loss, pairs)

    return make


def autoencoder_case():
    def make():
        model = AutoencoderConfig(channels=1, latent_channels=2, widths=(8,), num_groups=4, layers_per_block=1).build()
        variables = perturbed(init(model, jax.random.key(0)))
        statistics = {"mean": jnp.zeros(2), "variance": jnp.ones(2)}
        settings = AutoencodingConfig(image_size=4, noise=0.2, kl_weight=0.1)
        return {**variables, STATISTICS: statistics}, autoencoding_objective(model, settings)

    return make


ring = partial(matching_case, conditional=False)
CASES = {
    "flow": Case(flow_case(noise_std=0.1), images),
    "flow of levels": Case(flow_case(noise_std=0.0), images),
    "volume preserving": Case(flow_case(scale_parameterisation="volume_preserving"), images),
    "texts": Case(text_case(), latents_of_texts),
    "clips": Case(clips_case(), partial(images, shape=(3, 4, 4, 2))),
    "independent": Case(matching_case(time=fm.Uniform(stratified=True), path=fm.CondOT(0.1)), points),
    "running weights": Case(matching_case(coupling=fm.GibbsWeights(1.0)), points, linear=False),
    "batch weights": Case(matching_case(coupling=fm.GibbsWeights(1.0, normalize="batch")), points, linear=False),
    "swept weights": Case(matching_case(coupling=fm.GibbsWeights(1.0, sinkhorn_sweeps=5)), points, linear=False),
    "exact transport": Case(matching_case(coupling=fm.MinibatchOT()), points, linear=False),
    "entropic transport": Case(ring(coupling=fm.MinibatchOT("sinkhorn")), points, linear=False),
    "transport by class": Case(matching_case(coupling=fm.MinibatchOT(class_aware=True)), points, linear=False),
    "mean flow": Case(matching_case(fm.mean_flow_loss, coupling=fm.GibbsWeights(2.0)), points, linear=False),
}
# Those that compute in float32 alone.
SINGLE = {
    "u-net with dropout": Case(unet_case(), images, linear=False),
    "autoencoder": Case(autoencoder_case(), partial(images, shape=(4, 4, 1)), linear=False),
}


def train(
    case: Case,
    devices: int | None,
    *,
    steps: int = STEPS,
    accumulation: int = 1,
    state: Any = None,
    mesh: tuple[int, int] | None = None,
) -> tuple[Any, Any]:
    """The state after `steps` steps in all, and the metrics of each; from `state` on where it is given.

    devices: how many, None for all of all processes. mesh: the shape of the mesh for sharded training, if any.
    """
    used = None if devices is None else jax.devices()[:devices]
    parallel = DataParallel(used) if mesh is None else FullySharded(used, mesh)
    variables, objective = case.make()
    options = {"steps": STEPS, "accumulation": accumulation, "axis_name": parallel.axis_name}
    update = parallel.compile(make_step(objective, OPTIM, **options))
    state = init_state(variables, OPTIM, STEPS) if state is None else state
    first, rows = int(state.step), []
    state, key = parallel.place(state), parallel.replicate_key(jax.random.key(1))
    for step in range(first, steps):
        whole = case.batch(np.random.default_rng([step]))
        share = jax.tree.map(lambda x: np.split(x, jax.process_count())[jax.process_index()], whole)
        state, metrics = update(state, parallel.shard(share), key)
        rows.append(parallel.to_host(metrics))
    return parallel.to_host(state), rows


def difference(a: Any, b: Any) -> float:
    """The largest difference of two trees of floats, relative to the largest value of each leaf."""

    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-6)) if x.dtype.kind == "f" else float((x != y).any())

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((one(x, y) for x, y in pairs), default=0.0)


def main(out: str, names: str, form: str, *group: str) -> None:
    if group:
        jax.distributed.initialize(group[0], int(group[1]), int(group[2]))
    mesh = None if form == "data" else tuple(map(int, form.split("x")))
    shards.MIN_SIZE = 1
    with jax.enable_x64(True):
        params = {name: train(CASES[name], None, mesh=mesh)[0].params for name in names.split(",")}
    np.savez(out, **{f"{name}/{i}": x for name, p in params.items() for i, x in enumerate(jax.tree.leaves(p))})


if __name__ == "__main__":
    main(*sys.argv[1:])
