"""The guard: what it says of versions, by numbers chosen by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from vitals_data import HEALTHY

from rlsf_ray.stream.guard import Guard, Vitals, flipped


def guard(*before: Vitals) -> Guard:
    made = Guard()
    for version, vitals in enumerate((HEALTHY, *before)):
        assert made.observe(version, vitals).action == "go_on"
    return made


def test_a_version_that_writes_like_the_base_model_goes_on() -> None:
    assert guard().observe(1, HEALTHY).reasons == ()


def test_a_model_that_gets_surer_shorter_and_more_unanimous_goes_on() -> None:
    healthy = replace(HEALTHY, agreement=0.6, answer_prob=0.8, distinct=2.0, surprisal=0.25, length=28.0, parsed=0.98)
    assert guard().observe(1, healthy).action == "go_on"


@pytest.mark.parametrize(
    ("name", "value", "numbers"),
    [
        ("commonest", 0.36, "commonest is 0.36, base model 0.1, expected at most 0.35"),
        ("surprisal", 0.9, "surprisal is 0.9, base model 0.5, expected at most 0.875"),
        ("length", 15.0, "length is 15, base model 40, expected at least 16"),
        ("length", 125.0, "length is 125, base model 40, expected at most 120"),
        ("repetition", 0.26, "repetition is 0.26, base model 0.1, expected at most 0.25"),
        ("parsed", 0.69, "parsed is 0.69, base model 0.9, expected at least 0.7"),
    ],
)
def test_each_sign_of_collapse_stops_the_run_with_its_numbers(name: str, value: float, numbers: str) -> None:
    watching = guard(HEALTHY)
    verdict = watching.observe(2, replace(HEALTHY, **{name: value}))
    assert (verdict.action, verdict.reasons) == ("stop", (numbers,))
    assert watching.last_good == 1


def test_sudden_unanimity_stops_the_run_but_an_answer_format_that_is_learned_does_not() -> None:
    unanimous = replace(HEALTHY, agreed=0.7)
    text = "two answers to a prompt agree in 70%, the base model's in 25%, expected at most 65%"
    assert guard().observe(1, replace(unanimous, agreed=0.64)).action == "go_on"
    verdict = guard().observe(1, unanimous)
    assert (verdict.action, verdict.reasons) == ("stop", (text,))
    for shy in (replace(HEALTHY, agreement=0.1, parsed=0.45, agreed=0.5), replace(HEALTHY, agreed=math.nan)):
        watching = Guard()
        watching.observe(0, shy)  # it seldom answers, or never twice
        answers_alike = replace(unanimous, agreement=0.7, parsed=1.0)
        assert watching.observe(1, answers_alike).action == "go_on"


@pytest.mark.parametrize(
    ("name", "value", "numbers"),
    [
        ("surprisal", 0.12, "surprisal is 0.12, base model 0.5, expected at least 0.125"),
        ("distinct", 0.7, "distinct is 0.7, base model 4, expected at least 0.8"),
        ("cut_off", 0.3, "cut_off is 0.3, base model 0, expected at most 0.2"),
        ("kl", 0.6, "kl is 0.6, base model 0, expected at most 0.5"),
        ("logprob_gap", 1.2, "logprob_gap is 1.2, base model 0, expected at most 1"),
    ],
)
def test_softer_signs_are_a_warning(name: str, value: float, numbers: str) -> None:
    verdict = guard(HEALTHY).observe(2, replace(HEALTHY, **{name: value}))
    assert (verdict.action, verdict.reasons) == ("warn", (numbers,))


def test_confidence_that_rises_without_agreement_is_a_warning() -> None:
    surer = replace(HEALTHY, answer_prob=0.76)
    assert guard().observe(1, surer).action == "warn"
    assert guard().observe(1, replace(surer, agreement=0.27)).action == "warn"
    assert guard().observe(1, replace(surer, agreement=0.29)).action == "go_on"


def test_a_handful_of_prompts_is_no_reason_to_stop() -> None:
    few = Guard()
    few.observe(0, replace(HEALTHY, prompts=5))
    verdict = few.observe(1, replace(HEALTHY, commonest=0.9, prompts=5))
    assert verdict.action == "warn"


def test_a_number_that_json_does_not_know_is_a_reason_to_stop_in_the_next_life_too() -> None:
    watching = guard()
    verdict = watching.observe(1, replace(HEALTHY, surprisal=math.nan))
    assert (verdict.action, verdict.reasons) == ("stop", ("surprisal is nan, expected a finite number",))
    kept = json.dumps(watching.to_json()).replace("NaN", "null")  # as the run directory keeps it
    assert Guard(json.loads(kept)).observe(1, HEALTHY) == verdict


def test_a_model_that_hardly_varies_its_words_is_collapse_and_a_sure_one_a_warning() -> None:
    verdict = guard(HEALTHY).observe(2, replace(HEALTHY, surprisal=0.02))
    assert verdict.action == "stop"
    assert verdict.reasons[0] == "surprisal is 0.02, base model 0.5, expected at least 0.025"


@pytest.mark.parametrize(("prompts", "action"), [(12, "warn"), (24, "stop")])
def test_settled_votes_that_mostly_change_are_collapse_where_there_are_many(prompts: int, action: str) -> None:
    before = {str(prompt): "4" for prompt in range(prompts)}
    now = {prompt: "5" if int(prompt) < prompts * 2 / 3 else "4" for prompt in before}
    watching = Guard()
    watching.observe(0, replace(HEALTHY, votes=before))
    verdict = watching.observe(1, replace(HEALTHY, votes=now))
    assert (verdict.action, verdict.reasons) == (
        action, (f"67% of {prompts} settled votes changed, expected at most 40%",)
    )  # fmt: skip
    assert flipped({"a": "1"}, {"b": "1"}) == flipped({"a": "1"}, {"a": "2"}) == 0.0  # too few to say


def test_a_warned_version_is_still_a_good_one() -> None:
    watching = guard()
    watching.observe(1, replace(HEALTHY, answer_prob=0.9))
    watching.observe(2, replace(HEALTHY, length=5.0))
    assert watching.last_good == 1


def test_a_version_is_judged_once_and_a_resumed_guard_knows_what_it_knew() -> None:
    watching = guard()
    assert watching.observe(1, replace(HEALTHY, length=5.0)).action == "stop"
    assert watching.observe(1, HEALTHY).action == "stop"
    again = Guard(json.loads(json.dumps(watching.to_json())))
    assert (again.observe(1, HEALTHY).action, again.last_good) == ("stop", 0)
