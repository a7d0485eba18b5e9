"""Hypothesis profiles.

`repeatable` draws the same examples every time: scripts/test.sh and CI. `explore` draws new ones, ten times as many,
and prints how to repeat a failure: scripts/explore.sh.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

EXPLORING = os.environ.get("HYPOTHESIS_PROFILE") == "explore"
TIMES = 10 if EXPLORING else 1

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, print_blob=True)
settings.register_profile(
    "explore",
    max_examples=100 * TIMES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],  # ten times the examples are slow on purpose
)


def examples(count: int) -> settings:
    """Decorator of a test that draws `count` examples (ten times as many when exploring)."""
    return settings(max_examples=count * TIMES)
