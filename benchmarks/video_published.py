"""The PyTorch side of `video.py`: the published samplers of STARFlow-V, unchanged, in an interpreter with torch.

It answers one JSON request per line; the first contains the path of the checkout.
"""

import json
import sys

import measure
import numpy as np

sys.path.insert(0, str(measure.ROOT / "tests" / "fixtures"))
import starflow_v_weights as sv
import starflow_weights as sw

GUIDANCE = 2.5
BLOCK = 8  # half a frame; after the first frame, the published sampler uses four times as many tokens
THRESHOLD = 1e-3
SHAPE = sv.Clips(
    img_size=4,
    grid=(4, 4),
    channel_size=4,
    channels=64,
    top_block_channels=128,
    layers_per_block=(1, 1, 1, 4),
    head_dim=32,
    pt_seq_len=4,
    noise_std=0.5,
    frames=6,
)
METHODS = {
    "sequential": {},
    "published windows": {"jacobi": True, "jacobi_block_size": BLOCK, "jacobi_max_iter": 32, "jacobi_th": THRESHOLD},
}


def serve() -> None:
    """Answers requests on standard input until it closes."""
    setup = json.loads(sys.stdin.readline())
    sys.path.insert(0, setup["reference"])
    import record_starflow_v as record
    import torch
    import transformer_flow

    torch.set_num_threads(setup["threads"])
    torch.distributed.all_reduce = lambda *unused, **unused_too: None  # there are no other processes
    model = record.build(transformer_flow, SHAPE, torch.float32)
    noise = torch.from_numpy(sv.noise(SHAPE))
    text, null = (torch.from_numpy(e * m[..., None]) for e, m in (sw.text(SHAPE), sw.null_text(SHAPE)))
    both = torch.cat([text, null.expand(len(noise), -1, -1)])

    def run(name):
        with torch.no_grad():
            return model(noise, both, reverse=True, guidance=GUIDANCE, **METHODS[name])

    print(json.dumps(torch.__version__), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "time" in request:
            answer = measure.cost(lambda name=request["time"]: run(name))
        else:
            np.save(request["path"], run(request["result"]).numpy())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
