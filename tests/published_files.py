"""Files in the layouts in which weights are published."""

import json

import jax.numpy as jnp
import numpy as np

_NAMES = {"float32": "F32", "bfloat16": "BF16"}


def write_safetensors(path, tensors, dtype="float32"):
    """Layout: length of the header as little-endian uint64, header as JSON, tensors without gaps."""
    tensors = {name: np.asarray(x, jnp.dtype(dtype)) for name, x in tensors.items()}
    header, position = {}, 0
    for name, x in tensors.items():
        span = [position, position + x.nbytes]
        header[name] = {"dtype": _NAMES[dtype], "shape": list(x.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header).encode()
    path.write_bytes(np.array(len(text), "<u8").tobytes() + text + b"".join(x.tobytes() for x in tensors.values()))
    return path


def publish(folder, config, tensors, name):
    """A folder with config.json and one file of weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_safetensors(folder / name, tensors)
    return folder
