"""The benchmark of accelerators writes every row, on a CPU in its toy size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "accelerator.py"


@pytest.mark.slow
def test_every_row_is_measured(tmp_path):
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(tmp_path / "rows.jsonl")]
    subprocess.run(command, check=True, capture_output=True)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert not [row for row in rows if "error" in row]
    assert all(row["tokens_per_second"] > 0 and row["versions"]["jax"] for row in rows)
    assert [row["name"].split(",")[0] for row in rows[:3]] == ["softmax attention"] * 2 + ["training step"]


def test_the_time_is_kept(tmp_path):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, str(SCRIPT), "--toy", "--out", str(rows), "--minutes", "0.02"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert not rows.exists() or len(rows.read_text().splitlines()) < 6
