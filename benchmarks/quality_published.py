"""The published side of benchmarks/quality.py: trains the PyTorch TARFlow as in the notebook of its repository.

The model, the objective, the noise and AdamW are the notebook's, in eager float32 on a CPU. The batch size, the
learning rate and the length come from quality_budget.py, which our side also uses.
"""

import argparse
import math
import sys
from pathlib import Path

import quality_budget as shared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reference", type=Path, required=True, help="checkout of apple/ml-tarflow")
    parser.add_argument("--data", type=Path, required=True, help="the .npz of images that quality.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--core", type=int, required=True, help="number of the core to run on")
    parser.add_argument("--seconds", type=float, required=True, help="budget of processor time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    shared.confine(arguments.core)
    train(arguments)


def train(arguments: argparse.Namespace) -> None:
    import numpy as np
    import torch

    sys.path.insert(0, str(arguments.reference))
    import transformer_flow

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    with np.load(arguments.data, allow_pickle=False) as arrays:
        held_out, held_out_labels = (torch.from_numpy(arrays[name]) for name in ("noised", "noised_labels"))
        images, labels = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"]).long()
    images = (images.float() / 127.5 - 1)[:, None]
    held_out, held_out_labels = held_out.permute(0, 3, 1, 2).contiguous(), held_out_labels.long()
    model = transformer_flow.Model(
        in_channels=1, img_size=28, patch_size=4, channels=128, num_blocks=4, layers_per_block=4, num_classes=10
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), lr=shared.LEAST_RATE, weight_decay=1e-4)
    epoch: list[torch.Tensor] = []

    def step(fraction: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = shared.learning_rate(fraction)
        if not epoch:  # As with drop_last, an epoch ends with its last whole batch.
            order = torch.randperm(len(images))
            epoch.extend(order[: len(order) // shared.BATCH * shared.BATCH].split(shared.BATCH))
        chosen = epoch.pop()
        x = images[chosen]
        x = x + shared.NOISE_STD * torch.randn_like(x)
        optimizer.zero_grad()
        z, _, logdets = model(x, labels[chosen])
        loss = model.get_loss(z, logdets)
        loss.backward()
        optimizer.step()

    def evaluate() -> float:
        nats = []
        with torch.no_grad():
            for x, y in zip(held_out.split(100), held_out_labels.split(100), strict=True):
                z, _, logdets = model(x, y)
                nats.append(0.5 * z.pow(2).mean(dim=[1, 2]) + 0.5 * math.log(2 * math.pi) - logdets)
        return float((torch.cat(nats).double().mean() + math.log(128)) / math.log(2))

    record = shared.spend(shared.Budget(arguments.seconds), step, evaluate)
    torch.save(model.state_dict(), arguments.out / "weights.pth")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    about = {"kind": "published", "seed": arguments.seed, "parameters": parameters, "torch": torch.__version__}
    shared.save_record(arguments.out, about | record)


if __name__ == "__main__":
    main()
