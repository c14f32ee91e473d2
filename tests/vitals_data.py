"""The vitals of a healthy version, for tests of the guard and of what listens to it."""

from __future__ import annotations

from rlsf_ray.stream.guard import Vitals

HEALTHY = Vitals(
    agreement=0.2,
    answer_prob=0.6,
    commonest=0.1,
    distinct=4.0,
    surprisal=0.5,
    length=40.0,
    repetition=0.1,
    parsed=0.9,
    votes={str(prompt): "4" for prompt in range(12)},
    prompts=40,
    agreed=0.25,
)
