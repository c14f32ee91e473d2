"""The evidence benchmark: what its cells train and measure on, and its table from made-up cells."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import evidence
import pytest
from evidence_markdown import MARKS, _lost, _number, _stops, lines_of, signed, summary, targets
from evidence_table import above, calibration_against, difference, table_of, write_table
from vitals_data import HEALTHY

from rlsf_ray.config_loading import load_config
from rlsf_ray.records import Prompt
from rlsf_ray.tasks.sources import load_sets


@pytest.mark.parametrize("task", evidence.TASKS)
def test_no_cell_trains_on_what_is_measured_or_calibrated_with(task: str) -> None:
    if evidence.lacks_data(f"{task}/base/0"):
        pytest.skip(f"{evidence.CSQA}_train.jsonl is not there; set RLSF_DATA to its folder")
    judge, measuring = evidence.settings_of(f"{task}/base/0", training=False)
    sets = load_sets(load_config(str(judge), measuring))
    held_out = {asked(item.prompt) for item in sets.probe} | {asked(prompt) for prompt in sets.calibration}
    assert len(sets.probe) == 200
    for cell in evidence.cells(f"{task}/"):
        recipe, overrides = evidence.settings_of(cell, training=True)
        if recipe is not None:
            train = load_sets(load_config(recipe, overrides)).train
            assert not held_out & {asked(prompt) for prompt in train}, cell


def asked(prompt: Prompt) -> tuple[str, tuple[str, ...], str]:
    """What a prompt asks, told otherwise than by its key: numbers, in order where that matters, and operators."""
    text = prompt.messages[-1][1]
    if prompt.task not in ("products", "chain_sum", "gcd", "basic_arithmetic"):
        return prompt.task, (text,), ""
    operators = "".join(re.findall(r"(?<= )[-+*/](?= )", text))
    numbers = re.findall(r"-?\d+", text)
    ordered = set(operators) & set("-/")
    return prompt.task, tuple(numbers if ordered else sorted(numbers)), operators


def test_every_row_is_measured_alike() -> None:
    """The base model's branches are a call of their own (test_programs.py)."""
    judge, ours = evidence.settings_of("arithmetic/rlsf/1", training=False)
    assert evidence.settings_of("arithmetic/rlsf_paper/2", training=False) == (judge, ours)
    assert evidence.settings_of("arithmetic/base/0", training=False) == (judge, [*ours, "eval.branches=10"])


def cell(name: str, *right: list[int]) -> dict[str, Any]:
    """One list a question: which of its samples are right; the first stands for greedy as well."""
    samples = [
        [{"right": r, "parsed": True, "label": 0 if r else 1, "length": 9, "answer_prob": 0.5} for r in row]
        for row in right
    ]
    accuracy = sum(map(sum, right)) / sum(map(len, right))
    return {
        "cell": name,
        "machine": {"cores": 2},
        "minutes": 1.0,
        "training": None,
        "metrics": {"sampled_accuracy": accuracy, "greedy_accuracy": right[0][0]},
        "questions": [{"id": str(q), "greedy": row[0]["right"], "samples": row} for q, row in enumerate(samples)],
    }


def test_differences_are_paired_over_questions_after_a_mean_over_seeds() -> None:
    base = [cell("t/base/0", [0, 0], [1, 0])]
    ours = [cell("t/rlsf/0", [1, 1], [1, 0]), cell("t/rlsf/1", [1, 0], [1, 0])]
    assert difference(base, ours, "sampled")[0] == pytest.approx((0.75 - 0 + 0) / 2)
    assert difference(base, ours, "greedy")[0] == pytest.approx((1 + 0) / 2)
    assert difference(base, ours, "majority")[0] == pytest.approx((1 + 0) / 2)  # a tie goes to the first sample


def test_an_interval_is_over_questions_and_seeds() -> None:
    """Two questions alike, seeds that differ by 1: all that varies is the seed."""
    base, one, other = cell("t/base/0", [0], [0]), cell("t/rlsf/0", [1], [1]), cell("t/rlsf/1", [0], [0])
    assert difference([base], [one, other], "sampled") == [0.5, 0.0, 1.0]
    assert difference([base], [one, one], "sampled") == [1.0, 1.0, 1.0]


def test_what_chance_gains_is_held_against_a_third_of_ours_in_the_same_draws() -> None:
    """Ours doubles the base model's accuracy in every draw of questions; chance gains half as much."""
    base, ours, chance = (cell(f"t/{name}/0", [1, 0, 0, 0], [1, 0, 0, 0]) for name in ("base", "rlsf", "random_pairs"))
    for one, right in ((ours, 2), (chance, 1)):
        for question in one["questions"]:
            for sample in question["samples"][:right]:
                sample["right"] = 1
    chance["questions"][0]["samples"][1]["right"] = chance["questions"][1]["samples"][1]["right"] = 0.5
    found = above([base], [ours], [chance])
    assert found["times"] == pytest.approx([2.0, 2.0, 2.0])
    assert found["chance_above_third"] == pytest.approx([0.125 - 0.25 / 3] * 3)


def test_calibration_is_held_against_the_base_models_answer_probability() -> None:
    base, ours = cell("t/base/0", [0, 0], [1, 0]), cell("t/rlsf/0", [1, 0], [0, 1])
    for one, name, value in ((base, "answer_prob", 0.75), (ours, "calibrated", 0.5)):
        for question in one["questions"]:
            for sample in question["samples"]:
                sample[name] = value
    found = calibration_against([base], [ours, ours])
    assert found["ece_ratio"] == [0.0, 0.0, 0.0]  # half of ours is right in every draw
    assert found["skill"][0] == pytest.approx(0.0)
    assert found["skill_gain"][0] == pytest.approx((3 * 0.75**2 + 0.25**2) / 4 / (0.25 * 0.75) - 1)


def test_seeds_that_err_in_opposite_ways_do_not_cancel() -> None:
    """One seed is half too sure, the other half too unsure; the base model is off by as much."""
    base, one, other = (cell(f"t/{name}", [1, 0], [0, 1]) for name in ("base/0", "rlsf/0", "rlsf/1"))
    for each, name, value in ((base, "answer_prob", 0.9), (one, "calibrated", 0.9), (other, "calibrated", 0.1)):
        for question in each["questions"]:
            for sample in question["samples"]:
                sample[name] = value
    assert calibration_against([base], [one, other])["ece_ratio"][0] == pytest.approx(1.0)


def test_a_collapsed_cell_does_not_break_the_table(tmp_path: Path) -> None:
    folder = tmp_path / "evidence"
    folder.mkdir()
    one = cell("t/base/0", [0, 0], [0, 0])
    one["metrics"] |= {"ece_answer_prob": 0.5, "auroc_answer_prob": None, "brier_skill_answer_prob": float("nan")}
    (folder / "one.json").write_text(json.dumps(one))
    write_table(folder)
    assert json.loads((tmp_path / "evidence.json").read_text(), parse_constant=pytest.fail)
    assert "| base: answer_prob | 0.500 | - |" in (tmp_path / "evidence.md").read_text()


def test_the_table_shows_what_the_guard_did(tmp_path: Path) -> None:
    saw = [{"version": v, "vitals": asdict(replace(HEALTHY, length=of))} for v, of in ((0, 40.0), (1, 38.0), (2, 3.0))]
    went_back = {"from": 2, "to": 1, "past": 2, "share": 0.25, "version": 4}
    folder = tmp_path / "evidence"
    folder.mkdir()
    for name, back, versions in (
        ("collapse", None, {"0": 0.1, "1": 0.3, "2": 0.05}),
        ("collapse_guarded", went_back, {"0": 0.1, "1": 0.3, "2": 0.05, "3": 0.4, "4": 0.35}),
    ):
        one = cell(f"t/{name}/0", [1, 0], [0, 0]) | {"sampled_by_version": versions, "guard_saw": saw}
        said = [{"version": 2, "found": "stop", "action": "warn", "reasons": ["length is 3"]}]
        one["training"] = {"guard": {"rolled_back": back, "verdicts": said}, "training": {"pairs": 7}}
        (folder / f"{name}.json").write_text(json.dumps(one))
    write_table(folder)
    lines = (tmp_path / "evidence.md").read_text().splitlines()
    assert "| collapse | 0.100 | 0.300 | 0.050 | - | - | 0.250 | 0.250 |" in lines
    assert "| collapse_guarded | 0.100 | 0.300 | 0.050 | 0.400 | 0.350 | 0.050 | -0.050 |" in lines
    assert "- collapse, version 2, stop: length is 3" in lines
    stops = json.loads((tmp_path / "evidence.json").read_text())["tasks"]["t"]["collapse"]["verdicts"]
    assert stops == [[{"version": 2, "found": "stop", "reasons": ["length is 3, base model 40, expected at least 16"]}]]
    tried = "version 4 is version 1 and 0.25 of the step to version 2; versions after 2 are the guard's tries"
    assert f"- collapse_guarded: {tried}" in lines


def test_the_table_compares_with_the_base_its_best_temperature_and_random_pairs(tmp_path: Path) -> None:
    found = [
        cell("t/base/0", [0, 0], [1, 0]),
        cell("t/base-t0.3/0", [0, 1], [1, 0]),
        cell("t/random_pairs/0", [0, 0], [1, 1]),
        cell("t/rlsf/0", [1, 1], [1, 1]),
    ]
    rows = table_of({one["cell"].split("/")[1]: [one] for one in found})
    assert rows["rlsf"]["from_base"]["sampled"][0] == pytest.approx(0.75)
    assert rows["rlsf"]["from_best"]["sampled"][0] == pytest.approx(0.5)
    assert rows["rlsf"]["from_random_pairs"]["sampled"][0] == pytest.approx(0.5)
    assert "from_base" not in rows["base"]
    folder = tmp_path / "evidence"
    folder.mkdir()
    for one in found:
        (folder / f"{one['cell'].replace('/', '-')}.json").write_text(json.dumps(one))
    write_table(folder)
    text = (tmp_path / "evidence.md").read_text()
    assert "| rlsf | 1 | - |" in text
    assert "+0.750" in text


def test_a_target_is_met_by_the_whole_interval_or_by_its_point_or_not() -> None:
    def rows(rise: list[float], ratio: list[float]) -> dict[str, Any]:
        ours = {"from_base": dict.fromkeys(("greedy", "majority", "sampled"), rise)}
        against = {"skill": [0.1, -0.1, 0.2], "skill_gain": [0.1, 0.0, 0.2]}
        return {
            "base": {"metrics": {}},
            "random_pairs": {},
            "rlsf": {"metrics": {}, **ours, "against_base": against | {"ece_ratio": ratio}},
        }

    fine, missed = rows([-0.01, -0.03, 0.01], [0.8, 0.6, 1.1]), rows([-0.1, -0.2, -0.05], [1.3, 1.1, 1.4])
    lines = [line.strip("| ").split(" | ") for line in targets({"fine": fine, "missed": missed})[2:]]
    assert [(task, met) for task, _, _, met in lines] == [
        *[("fine", "within its interval")] * 3,
        *[("fine", "not to the end of its interval")] * 2,
        ("fine", "yes"),
        *[("missed", "no")] * 4,
        ("missed", "not to the end of its interval"),
        ("missed", "yes"),
    ]


def test_what_the_readme_says_of_the_evidence_was_measured() -> None:
    """Each figure in its own words; none that is not looked up here."""
    results = Path(evidence.__file__).parent / "results"
    tasks = json.loads((results / "evidence.json").read_text())["tasks"]
    arithmetic, basic, gcd = (tasks[name] for name in ("arithmetic", "basic_arithmetic", "gcd"))
    bare, cot = {name: row["metrics"] for name, row in arithmetic.items()}, "cot_aggregated_accuracy"
    few, ours = (arithmetic[name]["from_base"] for name in ("random_few", "rlsf"))
    driven, *guarded = (
        run["by_version"] for row in ("collapse", "collapse_guarded") for run in arithmetic[row]["runs"]
    )
    greedy = [task["rlsf"]["metrics"]["greedy_accuracy"][0] for task in (arithmetic, basic)]
    stops = sum(_stops(task["random_pairs"]) for task in tasks.values())
    ratio = arithmetic["rlsf"]["against_base"]["ece_ratio"]
    said = [
        f"rises by {signed(basic['rlsf']['from_base']['majority'])} on basic_arithmetic",
        f"is right for {_number(bare['base'][cot])} and {_number(basic['base']['metrics'][cot])},",
        f"for {greedy[0]:.3f} and {greedy[1]:.3f}.",
        "falls ({:.3f} to {:.3f})".format(*(gcd[row]["metrics"]["greedy_accuracy"][0] for row in ("base", "rlsf"))),
        f"cost at most {max(_lost(run['by_version']) for run in gcd['rlsf']['runs']):.3f} of sampled",
        f"do no worse there ({signed(gcd['random_pairs']['from_base']['sampled'])} sampled",
        f"right for {tasks['commonsenseqa']['base']['metrics']['accuracy_given_parsed'][0]:.3f} of the answers",
        f"chance gains {signed(few['sampled'])} sampled and {signed(few['greedy'])} greedy,",
        f"`rlsf` {signed(ours['greedy'])} greedy",
        f"stopped {stops} of the 12 runs of random pairs",
        f"reaches {max(driven.values()):.3f} and ends at {driven['5']:.3f} without it",
        "ends at {:.3f} and {:.3f} with it".format(*(run[max(run)] for run in guarded)),
        "{:.3f} and {:.3f} below the best version of these runs".format(*map(_lost, guarded)),
        f"{ratio[0]:.2f} reached, but up to {ratio[2]:.2f} is possible",
    ]
    readme = (results.parents[1] / "README.md").read_text()
    prose = " ".join(readme[readme.index(MARKS[1]) : readme.index("## How it works")].split())
    for sentence in said:
        assert prose.count(sentence) == 1, sentence
        prose = prose.replace(sentence, "")
    assert not re.findall(r"\d\.\d+", prose)
    rises = [seed for task in (arithmetic, basic) for seed in task["rlsf"]["from_base"]["sampled_by_seed"]]
    assert min(rises) > 0, "sampled accuracy rises in every seed"
    assert _stops(arithmetic["rlsf_paper"]) == 3
    assert [_stops(task["rlsf"]) for task in tasks.values() if task is not gcd] == [0, 0, 0]


def test_the_readme_shows_the_summary_of_the_committed_figures() -> None:
    results = Path(evidence.__file__).parent / "results"
    facts = json.loads((results / "evidence.json").read_text())
    readme = (results.parents[1] / "README.md").read_text()
    shown = readme[readme.index(MARKS[0]) + len(MARKS[0]) : readme.index(MARKS[1])]
    assert shown.strip().splitlines() == summary(facts)
    assert (results / "evidence.md").read_text() == "\n".join(lines_of(facts)) + "\n"
