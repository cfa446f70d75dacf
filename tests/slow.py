"""What is left out of a run of all tests for its time."""

import os

import pytest

slow = pytest.mark.skipif(
    "MVSPLIT_SLOW_TESTS" not in os.environ,
    reason="takes ten seconds or more; MVSPLIT_SLOW_TESTS=1 runs it",
)
