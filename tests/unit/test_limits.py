"""Limits of a run, by hand."""

import pytest

from rlsf_ray.stream.limits import NO_LIMITS, Limits


@pytest.mark.parametrize(
    ("limits", "seconds", "tokens", "said"),
    [
        (NO_LIMITS, 1e9, 10**12, None),
        (Limits(hours=2.0), 7199.0, 0, None),
        (Limits(hours=2.0), 7200.0, 0, "has run for 2.00 h of at most 2"),
        (Limits(tokens=100), 0.0, 99, None),
        (Limits(tokens=100), 0.0, 130, "has written 130 tokens of at most 100"),
        (Limits(hours=0.0, tokens=100), 1.0, 130, "has run for 0.00 h of at most 0"),
    ],
)
def test_what_has_been_reached_is_said_in_words(limits: Limits, seconds: float, tokens: int, said: str | None) -> None:
    assert limits.reached(seconds, tokens) == said
