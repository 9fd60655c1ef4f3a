"""The PyTorch side of `input.py`: torchvision's ImageFolder, read by a DataLoader, in an interpreter with torchvision.

It answers one JSON request per line; the first contains the folder, the number of workers, the batch size and the side.
"""

import json
import sys
import time


def serve() -> None:
    """Answers requests on standard input until it closes; each but the first asks for one pass over the images."""
    import torch
    from torchvision import datasets, transforms

    setup = json.loads(sys.stdin.readline())
    side = setup["side"]
    change = transforms.Compose([transforms.Resize(side), transforms.CenterCrop(side), transforms.PILToTensor()])
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(setup["path"], change),
        batch_size=setup["batch"],
        shuffle=True,
        drop_last=True,
        num_workers=setup["workers"],
        persistent_workers=True,
    )
    print(json.dumps(torch.__version__), flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        for images, _labels in loader:
            assert images.shape[1:] == (3, side, side)
        print(json.dumps(time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    serve()
