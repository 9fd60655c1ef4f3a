"""The soak of malformed inputs, a part of it in one process."""

import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).parent / "soak"


@pytest.mark.slow
def test_a_hundred_malformed_inputs_are_answered_in_one_sentence_each():
    words = [sys.executable, str(SOAK / "malformed.py"), "--inputs", "100", "--workers", "1"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
