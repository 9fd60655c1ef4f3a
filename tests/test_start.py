"""What docs/start.md tells a newcomer to do works, on tiny models and built-in digits (`--debug`)."""

import pytest
from commands import succeed


@pytest.mark.parametrize("config", ["photos", pytest.param("photos_captions", marks=pytest.mark.slow)])
def test_a_newcomer_trains_and_samples(tmp_path, config):
    run, out = tmp_path / "run", tmp_path / "new.png"
    found = succeed(f"train --config {config} --debug --workdir {run}")
    assert "train" in found
    prompt = " --prompt 3" if config == "photos_captions" else ""
    succeed(f"sample --checkpoint {run} --num 4 --out {out}{prompt}")
    assert out.stat().st_size > 0
    assert "bits/dim" in succeed(f"evaluate --checkpoint {run}") or config == "photos_captions"
