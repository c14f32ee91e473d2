"""Prompts: the demo's real data, the two sets, rounds, and what training can see."""

from __future__ import annotations

import dataclasses
import pickle
import re
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest

from rlsf_ray import records
from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import ProbePrompt, Prompt
from rlsf_ray.tasks.questions import canonical_key, key_of_messages, optional_module, question_id, with_suffix
from rlsf_ray.tasks.sources import PromptSets, load_prompts, load_sets, prompts_of_round

PRODUCTS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
SUMS = {**PRODUCTS, "max_digits": 2}


def gym(name: str, count: int, **options: object) -> dict[str, object]:
    return {"kind": "reasoning_gym", "name": name, "count": count, "options": options}


def run_config(
    train: list[dict[str, object]], probe: list[dict[str, object]] | None = None, **keys: object
) -> RunConfig:
    suffix = keys.pop("suffix", "")
    return RunConfig(data={"train": train, "probe": probe or [], "suffix": suffix}, **keys)


def demo(seed: int) -> RunConfig:
    return run_config(
        [gym("products", 30, **PRODUCTS), gym("chain_sum", 98, **SUMS)],
        [gym("products", 25, **PRODUCTS), gym("chain_sum", 125, **SUMS)],
        seed=seed,
        suffix="Show your reasoning.",
    )


def operands(prompt: Prompt) -> tuple[str, list[int]]:
    """(operator, numbers) read from the text itself, not from the key; numbers sorted unless the order matters."""
    match = re.search(r"(\d+) ([-+*]) (\d+)", prompt.messages[0][1])
    assert match is not None
    numbers = [int(match[1]), int(match[3])]
    return match[2], numbers if match[2] == "-" else sorted(numbers)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_train_and_probe_share_no_question_even_with_operands_swapped(seed: int) -> None:
    train, probe, _ = load_sets(demo(seed))
    asked_train = [operands(prompt) for prompt in train]
    asked_probe = [operands(item.prompt) for item in probe]
    # 55 unordered pairs of the digits 0..9: 25 to probe leaves 30 to train
    assert [p.task for p in train].count("products") == 30
    assert len(train) == 128
    assert [p.prompt.task for p in probe].count("products") == 25
    assert len(probe) == 150
    assert not [question for question in asked_train if question in asked_probe]
    assert len({prompt.key for prompt in train} | {item.prompt.key for item in probe}) == 128 + 150
    assert len({prompt.id for prompt in train}) == 128
    assert len({item.prompt.id for item in probe}) == 150


def test_the_seed_changes_the_training_set_and_leaves_the_probe_set_alone() -> None:
    sets = [load_sets(demo(seed)) for seed in (0, 1, 2)]
    assert sets[0][1] == sets[1][1] == sets[2][1]
    sums = [{p.key for p in train if p.task == "chain_sum"} for train, _, _ in sets]
    # 98 of about 10,000 sums each: near seeds must not share most of them
    assert all(len(sums[i] & sums[j]) < 49 for i, j in ((0, 1), (0, 2), (1, 2)))
    assert load_sets(demo(1)) == sets[1]


def test_calibration_prompts_are_set_aside_alike_for_every_seed() -> None:
    def sets(seed: int, calibration: int) -> PromptSets:
        config = demo(seed)
        return load_sets(
            config.model_copy(update={"data": config.data.model_copy(update={"calibration": calibration})})
        )

    first, second = sets(0, 20), sets(1, 20)
    assert first.calibration == second.calibration
    assert len(first.calibration) == 20
    assert first.probe == sets(0, 0).probe
    keys = [p.key for p in (*first.train, *first.calibration, *(item.prompt for item in first.probe))]
    assert len(set(keys)) == len(keys)
    assert {p.task for p in first.calibration} == {"products", "chain_sum"}
    assert len(sets(0, 1000).calibration) == 128 // 2, "half at most"


def test_calibration_prompts_are_as_hard_as_the_probe_set() -> None:
    """There are about 155 different sums of two one-digit numbers; whoever draws first would get most of them."""
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    source = {"kind": "reasoning_gym", "name": "chain_sum", "options": options}
    data = {"train": [source | {"count": 1600}], "probe": [source | {"count": 400}], "calibration": 400}
    found = load_sets(RunConfig(prompts_per_round=100, data=data))
    easy = [
        np.mean([bool(re.search(r"(?<!\d)\d [-+] \d(?!\d)", prompt.messages[0][1])) for prompt in prompts])
        for prompts in ([item.prompt for item in found.probe], found.calibration, found.train)
    ]
    assert len(found.probe) == len(found.calibration) == 400
    assert easy[0] == pytest.approx(easy[1], abs=0.03)
    assert easy[2] < easy[1] / 2


def test_probe_gold_is_the_value_of_the_question() -> None:
    probe = load_sets(demo(0)).probe
    for item in probe:
        match = re.search(r"(\d+) ([-+*]) (\d+)", item.prompt.messages[0][1])
        assert match is not None
        a, b = int(match[1]), int(match[3])
        assert int(item.gold) == {"+": a + b, "-": a - b, "*": a * b}[match[2]]


def test_one_user_message_ends_with_the_suffix() -> None:
    train = load_sets(demo(0)).train
    assert all(len(p.messages) == 1 and p.messages[0][0] == "user" for p in train)
    assert all(p.messages[0][1].endswith(" Show your reasoning.") for p in train)


def test_a_small_family_gives_all_it_has() -> None:
    # 0 and 1..9 as unordered pairs: 10 * 11 / 2 = 55
    prompts = load_prompts(
        demo(0).data.train[0].model_copy(update={"count": 500}), seed=0, suffix="", answer_format="number"
    )
    assert len(prompts) == 55


def test_the_solution_in_countdown_metadata_reaches_neither_key_nor_id() -> None:
    config = run_config([gym("countdown", 5)])
    train = load_sets(config).train
    for prompt in train:
        assert prompt.key == canonical_key(prompt.messages[0][1])
        assert re.fullmatch(r"countdown-[0-9a-f]{12}", prompt.id)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (gym("product", 3), "did you mean 'products'"),
        (gym("products", 3, min_term=2), "min_term.*it knows min_terms"),
        (gym("products", 3, min_terms=0), "min_terms must be positive"),
        (gym("products", 3, seed=1), "may not set.*seed"),
    ],
)
def test_bad_reasoning_gym_sources_are_input_errors(source: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_sets(run_config([source]))


def test_a_training_set_inside_the_probe_set_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no training prompt is left"):
        load_sets(run_config([gym("products", 5, **PRODUCTS)], [gym("products", 55, **PRODUCTS)]))


def test_rounds_walk_through_the_set_and_repeat_no_prompt() -> None:
    train = load_sets(run_config([gym("products", 10, **PRODUCTS)])).train
    first, second, third = (prompts_of_round(train, r, 4, seed=0) for r in range(3))
    # windows 0-3, 4-7, and 8, 9, 0, 1 of ten prompts
    assert {p.id for p in first} == {p.id for p in train[:4]}
    assert {p.id for p in second} == {p.id for p in train[4:8]}
    assert {p.id for p in third} == {p.id for p in (*train[8:], *train[:2])}
    assert prompts_of_round(train, 2, 4, seed=0) == third
    everything = prompts_of_round(train, 1, 64, seed=0)  # all ten
    assert sorted(p.id for p in everything) == sorted(p.id for p in train)


def test_prompts_that_are_fed_come_first_then_all_go_round() -> None:
    train = load_sets(run_config([gym("products", 10, **PRODUCTS)])).train
    fed, later = train[:5], train[5:6]
    rounds = [{p.id for p in prompts_of_round(train[6:], r, 2, seed=0, feeds=[(1, fed), (5, later)])} for r in range(7)]
    a, b, c, d = (p.id for p in train[6:])
    v, w, x, y, z = (p.id for p in fed)
    assert rounds[:5] == [{a, b}, {v, w}, {x, y}, {z, c}, {d, a}]
    assert rounds[5:] == [{later[0].id, b}, {v, w}], "the order goes on where it was"
    everything = prompts_of_round(train[6:], 1, 64, seed=0, feeds=[(1, fed)])
    assert {p.id for p in everything} == {a, b, c, d, v, w, x, y, z}
    assert len(everything) == 9


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("3 * 4", "3*4"),
        ("4*3", "3*4"),
        ("12 + 5 =", "5+12"),
        ("9 + 10 + 1", "1+9+10"),
        ("7 - 2", "7-2"),
        ("2 - 7", "2-7"),
        ("5 + -3", "-3+5"),
        ("2 - 3 + 4", "2-3+4"),
        ("2.50 + 1", "1+2.5"),
        ("( 3 + 4 ) * 2", "(3+4)*2"),
        ("( ( 4 * 3 ) )", "3*4"),
        ("(1 + 2) * (3 + 4)", "(1+2)*(3+4)"),
        ("(see below)", "(see below)"),
        ("What  is\nLove?", "what is love?"),
    ],
)
def test_canonical_key(text: str, key: str) -> None:
    assert canonical_key(text) == key


def test_a_system_message_does_not_make_a_question_new() -> None:
    assert key_of_messages((("system", "Be brief."), ("user", "4 * 3"))) == "3*4"
    assert key_of_messages((("user", "Hi"), ("assistant", "Yes?"), ("user", "4 * 3"))) != "3*4"


def test_ids_are_readable_for_arithmetic_and_stable_for_text() -> None:
    assert question_id("products", "3*4") == "products-3x4"
    # printf 'what is love?' | sha256sum
    assert question_id("talk", "what is love?") == "talk-b4fbbd9db78b"


def test_the_suffix_goes_on_the_last_user_message() -> None:
    chat = (("user", "a"), ("assistant", "b"), ("user", "c"))
    assert with_suffix(chat, "now") == (("user", "a"), ("assistant", "b"), ("user", "c now"))
    assert with_suffix(chat, "\nnow")[2] == ("user", "c\nnow")
    assert with_suffix(chat, "") == chat


def reachable_fields(kind: object) -> dict[str, object]:
    """Names of all fields of a record type and of the record types inside it."""
    found: dict[str, object] = {}
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            found |= {name: hint, **reachable_fields(hint)}
    for inner in typing.get_args(kind):
        found |= reachable_fields(inner)
    return found


@pytest.mark.parametrize("name", ["Prompt", "Group", "Trace", "ScoredGroup", "TrainingGroup", "TrainingTrace"])
def test_no_training_record_can_hold_a_gold_answer(name: str) -> None:
    fields = reachable_fields(getattr(records, name))
    assert fields
    assert not [field for field, hint in fields.items() if "gold" in field or "ProbePrompt" in str(hint)]
    assert "gold" in reachable_fields(ProbePrompt)  # the search does find it where it is


def test_the_training_set_holds_prompts_and_no_trace_of_the_gold(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "Which bird?", "answer": "golden-eagle"}\n', encoding="utf-8")
    source = {"kind": "file", "path": str(path)}
    train = load_sets(run_config([source])).train
    assert [type(item) for item in train] == [Prompt]
    assert b"golden-eagle" not in pickle.dumps(train)
    probe = load_sets(run_config([gym("products", 1, **PRODUCTS)], [source])).probe
    assert b"golden-eagle" in pickle.dumps(probe)


def test_a_missing_package_is_an_input_error_with_the_cure() -> None:
    with pytest.raises(InputError, match=r"no_such_package_of_ours.*pip install it"):
        optional_module("no_such_package_of_ours", "pip install it")


def test_importing_sources_loads_nothing_heavy() -> None:
    code = (
        "import sys, rlsf_ray.tasks.sources, rlsf_ray.tasks.equality;"
        "print([m for m in ('torch', 'ray', 'transformers', 'reasoning_gym', 'datasets', 'math_verify', 'pyarrow')"
        " if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
