from collections import Counter

import pytest


@pytest.fixture(scope="session", autouse=True)
def outcomes():
    """How the cases ended, counted by exit status, and printed at the end."""
    counted = Counter()
    yield counted
    print(f"\n{sum(counted.values())} fuzzed inputs: {counted[0]} successes, {counted[2]} clear errors")
