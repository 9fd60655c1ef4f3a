"""Runs that are killed at random end as runs that nobody killed."""

import pytest
from soak.kills import KINDS, soak


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_twelve_kills():
    tally = soak(kills=12, seed=1, jobs=2, kinds=list(KINDS))
    assert tally.failures == []
    assert tally.kills.total() >= 12
