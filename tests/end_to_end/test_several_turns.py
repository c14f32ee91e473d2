"""Rollouts of several turns in one process on the tiny model: what is kept, credited and measured."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import numpy as np
import pytest
from several_runs import reflecting, sums_with_checks
from tiny import tiny_config

from rlsf_ray import loop
from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config
from rlsf_ray.errors import InputError
from rlsf_ray.evaluate import measure_version
from rlsf_ray.export import pair_messages
from rlsf_ray.records import Json
from rlsf_ray.report import write_report
from rlsf_ray.report_parts import signed
from rlsf_ray.rollouts.several import REFLECT, RETRY, VERIFY
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets


@pytest.fixture(scope="module")
def ended(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunStore, Json]:
    folder = tmp_path_factory.mktemp("several")
    summary = loop.run(tiny_config(tiny, **reflecting(folder)), str(folder / "run"))
    return RunStore.open(str(folder / "run")), summary


def test_reflections_are_learned_from_and_every_prompt_has_its_end(ended: tuple[RunStore, Json]) -> None:
    store, summary = ended
    counts = summary["accounting"]
    assert counts["trained"] + counts["filtered"] == counts["admitted"] == 16
    assert set(counts["reasons"]) <= {"passed_at_once", "equal_scores"}
    assert counts["trained"] > 0
    rows = store.read_table("traces").to_pylist()
    assert {turn["role"] for row in rows for turn in row["turns"]} == {"attempt", "reflection", "retry"}
    for row in rows:
        tries = [turn["passed"] for turn in row["turns"] if turn["role"] != "reflection"]
        assert row["score"] == tries[-1]
        assert len(tries) == 1 + (tries[0] == 0.0)


def test_the_probe_set_is_measured_try_by_try(ended: tuple[RunStore, Json]) -> None:
    store, summary = ended
    for version in summary["versions"]:
        metrics = version["metrics"]
        assert 0.0 <= metrics["first_try"] <= metrics["last_try"] <= 1.0  # a right answer is not asked again here
        assert metrics["thought_length"] > 0
    rows = store.read_json("eval/version-0000.json")["questions"]
    episodes = [turns for row in rows for turns in row["episodes"]]
    assert len(episodes) == 6 * 2
    first = sum(turns[0]["right"] for turns in episodes) / len(episodes)
    assert summary["versions"][0]["metrics"]["first_try"] == pytest.approx(first)


def test_a_prompt_without_a_check_is_named_before_anything_is_trained(tiny: Path, tmp_path: Path) -> None:
    settings = reflecting(tmp_path)
    settings["data"]["train"][0]["check"] = None
    with pytest.raises(InputError, match="has no check"):
        loop.run(tiny_config(tiny, **settings), str(tmp_path / "run"))


def turn_by_turn(store: RunStore) -> str:
    """The report's section on turns."""
    page = Path(write_report(store)).read_text()
    return page.partition('<section id="turns">')[2].partition("</section>")[0]


def test_the_report_shows_what_each_token_counts_in_the_first_and_the_last_round(ended: tuple[RunStore, Json]) -> None:
    store, _ = ended
    section = turn_by_turn(store)
    assert section.index("Round 1 of 2") < section.index("Round 2 of 2")
    for round in (0, 1):
        rows = [row for row in store.read_table("traces", round).to_pylist() if row["reason"] is None]
        best, worst = (pick(row["advantage"] for row in rows) for pick in (max, min))
        assert best > 0 > worst
        assert rows[0]["prompt_id"] in section
        for kind, advantage in (("up", best), ("down", worst)):
            assert re.search(
                f'<span class="{kind}" title="[0-9]+ tokens?, {re.escape(signed(advantage, 2))} each">', section
            )
    assert section.count('class="turn reflection up"') > 0
    assert section.count('class="turn reflection down"') > 0
    assert not re.search('class="turn (attempt|retry) (up|down|held)', section)  # not credited
    assert re.search('<div class="turn attempt ">.*?<span class="idle" title="[0-9]+ tokens?, masked">', section)
    assert f'title="masked: said by the user">User: {escape(REFLECT)}' in section
    assert len(section) < 60_000
    assert "First try" in store.storage.read("report.html").decode()


def of_recipe(name: str, tiny: Path, folder: Path, *more: str) -> RunConfig:
    """A recipe as it is, on the tiny model and a few sums that the model sometimes passes."""
    source = f"kind: file, path: {sums_with_checks(folder)}, check: check"
    size = ("rounds=1", "prompts_per_round=10", "rollout.traces=4", "rollout.max_tokens=12", "eval.samples=2")
    data = (f"data.train=[{{{source}, count: 24, labels: true}}]", f"data.probe=[{{{source}, count: 4}}]")
    here = (f"model.name={tiny}", "model.dtype=float32", "data.calibration=0", "data.suffix=''", "guard=off")
    return load_config(name, [*size, *data, *here, *more])


@pytest.mark.parametrize(
    ("recipe", "more", "roles"),
    [
        (
            "reflect_retry_reward",
            ("rollout.traces=12", "rollout.uncredited_temperature=0.5"),
            {"attempt", "reflection", "retry"},
        ),
        ("try_again", (), {"attempt"}),
        ("score_first", (), {"attempt", "retry"}),
        ("score_second", (), {"attempt", "retry"}),
        ("self_rewarding_correction", (), {"attempt", "verdict", "retry"}),
        ("evolve", ("pairs.surest=null", "pairs.min_gap=0"), {"attempt", "retry"}),
    ],
)
def test_every_recipe_of_several_turns_trains(
    recipe: str, more: tuple[str, ...], roles: set[str], tiny: Path, tmp_path: Path
) -> None:
    config = of_recipe(recipe, tiny, tmp_path, *more)
    summary = loop.run(config, str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    counts = summary["accounting"]
    assert counts["trained"] > 0, counts
    assert counts["trained"] + counts["filtered"] == counts["admitted"] == 10
    assert {turn["role"] for row in store.read_table("traces").to_pylist() for turn in row["turns"]} == roles
    assert np.isfinite([row["loss"] for row in store.read_metrics("train")]).all()
    assert store.versions() == [1]


def test_pairs_of_several_turns_are_exported_turn_by_turn(tiny: Path, tmp_path: Path) -> None:
    loop.run(of_recipe("self_rewarding_correction", tiny, tmp_path), str(tmp_path / "run"))
    store = RunStore.open(str(tmp_path / "run"))
    section = turn_by_turn(store)
    assert re.search(r'<div class="turn (verdict|retry) up">', section)
    assert re.search(r'<div class="turn (verdict|retry) down">', section)
    # Both sides begin with one attempt: neither is made likelier or less likely by a pair
    assert not re.search('class="turn attempt (up|down)', section)
    assert re.search('<span class="idle" title="[0-9]+ tokens?, 0 each">', section)
    turns = {row["trace_id"]: row["turns"] for row in store.read_table("traces").to_pylist()}
    pairs = store.read_table("pairs").to_pylist()
    rows = pair_messages(store)
    assert len(rows) == len(pairs) > 0
    for pair, row in zip(pairs, rows, strict=True):
        for side in ("chosen", "rejected"):
            messages, written = row[side], turns[pair[f"{side}_trace_id"]]
            assert [m["role"] for m in messages] == ["assistant", "user"] * (len(written) - 1) + ["assistant"]
            assert [m["content"] for m in messages[::2]] == [turn["text"] for turn in written]
            assert [m["content"] for m in messages[1::2]] == [VERIFY, RETRY][: len(written) - 1]


def test_long_chains_are_measured(tiny: Path, tmp_path: Path) -> None:
    config = of_recipe("deep_self_evolving", tiny, tmp_path)
    found = measure_version(None, config, load_sets(config), 0)
    episodes = [turns for question in found["questions"] for turns in question["episodes"]]
    assert {tuple(turn["role"] for turn in turns) for turns in episodes} == {("attempt", *("critique", "retry") * 3)}
    assert 0.0 <= found["metrics"]["voted_tries"] <= 1.0
