"""The benchmark of accelerators writes every row, on a CPU in its toy size."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowgen import backend

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"


# Stands for an interpreter that has torch: answers as published.py does.
FAKE = """#!{python}
import json, sys
sys.stdin.readline()
print(json.dumps(["2.0", "cpu"]), flush=True)
for line in sys.stdin:
    print(json.dumps([1e-3, 1e-3] if "time" in json.loads(line) else 10**9), flush=True)
"""


@pytest.mark.slow
def test_every_row_is_measured(tmp_path):
    out, torch_python = tmp_path / "rows.jsonl", tmp_path / "python"
    (tmp_path / "transformer_flow.py").touch()
    torch_python.write_text(FAKE.format(python=sys.executable))
    torch_python.chmod(0o755)
    theirs = ["--reference", str(tmp_path), "--torch-python", str(torch_python)]
    subprocess.run([sys.executable, str(SCRIPT), "--toy", "--out", str(out), *theirs], check=True, capture_output=True)
    rows = {row["name"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert not [row for row in rows.values() if "error" in row]
    assert all(row["tokens_per_second"] > 0 and row["versions"]["jax"] for row in rows.values())
    assert [name.split(",")[0] for name in rows][:3] == ["softmax attention"] * 2 + ["training step"]
    assert {row["share_of_peak"] for row in rows.values()} == {None}  # The peak of a CPU is not known.
    assert rows["training step, tarflow_afhq256"]["flop"]["bfloat16"] > 0
    for ours in ("training step, {}", "decoding, {}, sequential"):
        for config in ("tarflow_afhq256", "tarflow_imagenet64"):
            assert rows["published " + ours.format(config)]["baseline"] == ours.format(config)
    assert all(rows[f"decoding, tarflow_afhq256, {plan}"]["ratio"] > 0 for plan in ("jacobi", "auto"))
    assert rows["linear attention, 32 tokens"]["baseline"] == "softmax attention, auto, 32 tokens"


def test_shares_of_peak_and_ratios(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setattr(backend, "seconds_at_peak", lambda flop, kind: sum(flop.values()) / 1e12)
    from accelerator import compared
    from accelerator_rows import timed

    def call():
        time.sleep(0.01)
        return 0.01, 0.0

    ours = timed(call, 100, flop=lambda: {"bfloat16": 1e9, "float32": 1e9}, steps=2)
    assert 4 < ours["milliseconds"] < 50
    assert ours["flop"] == {"bfloat16": 5e8, "float32": 5e8}
    assert ours["share_of_peak"] == pytest.approx(1 / ours["milliseconds"], rel=0.1)  # 1 ms at 1 TFLOP/s
    assert timed(call, 100)["share_of_peak"] is None
    theirs = compared({"milliseconds": 3 * ours["milliseconds"], "torch": "2.0"}, "ours", ours)
    assert theirs["ratio"] == 3
    assert theirs["share_of_peak"] == pytest.approx(ours["share_of_peak"] / 3, rel=0.1)


def test_a_folder_without_the_published_code_is_refused(tmp_path):
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path / "rows"), "--reference", str(tmp_path)]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode
    assert "has no transformer_flow.py" in outcome.stderr


def test_the_time_is_kept(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(rows), "--minutes", "0.02"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert not rows.exists() or len(rows.read_text().splitlines()) < 6
