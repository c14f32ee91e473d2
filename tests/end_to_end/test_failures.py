"""The prompts a model fails, mined with the tiny model: which are kept, what the file is, what a second call does."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from several_runs import reflecting
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.engines.build import build_engine
from rlsf_ray.errors import InputError
from rlsf_ray.failures import find_failures
from rlsf_ray.records import Turn
from rlsf_ray.rollouts.several import reflect_retry, write_talks
from rlsf_ray.tasks.sources import load_sets


def mined(config: RunConfig, path: Path) -> RunConfig:
    """The same run on the prompts in a file of failures."""
    source = SourceConfig(kind="file", path=str(path), messages="messages", check="check", id="id", labels=True)
    return config.model_copy(update={"data": config.data.model_copy(update={"train": (source,), "probe": ()})})


def test_the_prompts_that_are_failed_are_found_and_an_interrupted_search_goes_on(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **reflecting(tmp_path))
    to = tmp_path / "hard.jsonl"

    def interrupted(done: int, of: int, kept: int) -> None:
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_failures(config, to, most=0.0, on_batch=interrupted)
    assert not to.exists()
    with (tmp_path / "hard.jsonl.judged").open("a") as file:
        file.write('{"id": "cut off')
    kept, judged = find_failures(config, to, most=0.0)
    assert judged == 24
    assert 0 < kept < judged
    again = tmp_path / "again.jsonl"
    assert find_failures(config, again, most=0.0) == (kept, judged)
    assert to.read_text() == again.read_text()
    fewer = config.model_copy(update={"rollout": config.rollout.model_copy(update={"traces": 4})})
    with pytest.raises(InputError, match="judged with another rollout"):
        find_failures(fewer, to, most=0.0)


def test_failures_are_asked_by_the_same_config_as_they_were_judged(tiny: Path, tmp_path: Path) -> None:
    settings = reflecting(tmp_path)
    settings["data"]["suffix"] = "Think."
    config, to = tiny_config(tiny, **settings), tmp_path / "hard.jsonl"
    kept, _ = find_failures(config, to, most=0.0)
    before = {prompt.id: prompt.messages for prompt in load_sets(config).train}
    after = {prompt.id: prompt.messages for prompt in load_sets(mined(config, to)).train}
    assert 0 < len(after) == kept < len(before)
    assert after.items() <= before.items()
    assert all(messages[-1][1].endswith("= Think.") for messages in after.values())


def test_failures_of_greedy_attempts_are_those_that_the_run_fails(tiny: Path, tmp_path: Path) -> None:
    settings = reflecting(tmp_path)
    settings["rollout"]["uncredited_temperature"] = 0.0
    config, to, data = tiny_config(tiny, **settings), tmp_path / "hard.jsonl", tmp_path / "checked.jsonl"

    def turns_of_the_run() -> dict[str, tuple[Turn, ...]]:
        prompts = load_sets(config).train
        with closing(build_engine(config)) as engine:
            groups = write_talks(
                reflect_retry, engine, prompts, config=config, round=0, sequences=range(len(prompts)), version=0
            )
        return {group.prompt.id: group.traces[0].turns for group in groups}

    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for item, (first, *_) in list(turns_of_the_run().items())[::2]:  # which are right from now on
        if first.answer and first.answer.isdigit():
            number = int(first.answer)
            rows[int(item.rpartition("-")[2]) - 1]["check"]["data"] = {"accepted": [str(number)]}
    data.write_text("\n".join(map(json.dumps, rows)))
    kept, judged = find_failures(config, to, most=0.5)
    assert 0 < kept < judged
    assert {json.loads(line)["samples"] for line in to.read_text().splitlines()} == {1}
    failed = {item for item, turns in turns_of_the_run().items() if len(turns) > 1}
    assert {prompt.id for prompt in load_sets(mined(config, to)).train} == failed


def test_a_prompt_that_has_changed_is_judged_anew(tiny: Path, tmp_path: Path) -> None:
    config, to = tiny_config(tiny, **reflecting(tmp_path)), tmp_path / "hard.jsonl"
    find_failures(config, to, most=0.0)
    data = tmp_path / "checked.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows[0]["question"] += " Say it."
    rows[1]["check"]["data"] = {"accepted": ["77"]}
    data.write_text("\n".join(map(json.dumps, rows)))
    anew: list[int] = []
    kept, judged = find_failures(config, to, most=0.0, on_batch=lambda done, of, kept: anew.append(done))
    changed = {prompt.id for prompt in load_sets(config).train} & {"checked-1", "checked-2"}
    assert changed
    assert anew == [judged]  # one batch, of these
    again = tmp_path / "again.jsonl"
    assert find_failures(config, again, most=0.0) == (kept, judged)
    assert to.read_text() == again.read_text()
    boxed = config.model_copy(update={"data": config.data.model_copy(update={"answer": "boxed"})})
    assert find_failures(boxed, to, most=0.0)[1] == judged  # another answer format: all of them
    assert len((tmp_path / "hard.jsonl.judged").read_text().splitlines()) == 1 + judged + len(changed) + judged


def test_prompts_without_a_check_are_named_or_judged_by_what_stands_in(tiny: Path, tmp_path: Path) -> None:
    settings = reflecting(tmp_path)
    settings["data"]["train"][0]["check"] = None
    to = tmp_path / "hard.jsonl"
    with pytest.raises(InputError, match=r"24 of 24 training prompts, .* have no check.*rollout\.check: maj"):
        find_failures(tiny_config(tiny, **settings), to, most=0.0)
    assert not (tmp_path / "hard.jsonl.judged").exists()
    settings["rollout"]["check"] = "p_true"
    config = tiny_config(tiny, **settings)
    kept, _ = find_failures(config, to, most=0.9)
    assert kept > 0
    source = mined(config, to).data.train[0].model_copy(update={"check": None})
    data = config.data.model_copy(update={"train": (source,), "probe": ()})
    assert len(load_sets(config.model_copy(update={"data": data})).train) == kept
    assert "check" not in json.loads(to.read_text().splitlines()[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: "", None),
        (lambda text: text.splitlines()[0][:20], None),  # cut short as it was begun
        (lambda text: text.split("\n", 1)[1], "line 1: got .*expected"),
        (lambda text: "not ours", "line 1: got .*expected"),
        (lambda text: text.replace("\n", "\n[1]\n", 1), "line 2: got .*expected"),
        (lambda text: text.replace("\n", '\n{"id": "x"}\n', 1), "line 2: got .*expected"),
    ],
)
def test_a_spoilt_file_of_judged_prompts_is_named_or_begun_anew(
    tiny: Path, tmp_path: Path, change: Callable[[str], str], words: str | None
) -> None:
    config, to = tiny_config(tiny, **reflecting(tmp_path)), tmp_path / "hard.jsonl"
    found = find_failures(config, to, most=0.0)
    file = tmp_path / "hard.jsonl.judged"
    spoilt = change(file.read_text())
    file.write_text(spoilt)
    if words is None:
        assert find_failures(config, to, most=0.0) == found
        return
    with pytest.raises(InputError, match=words):
        find_failures(config, to, most=0.0)
    assert file.read_text() == spoilt


def test_a_file_that_is_no_earlier_call_s_is_not_written_over(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **reflecting(tmp_path))
    to = tmp_path / "checked.jsonl"  # the training data
    text = to.read_text()
    with pytest.raises(InputError, match="give a new file"):
        find_failures(config, to, most=0.0)
    assert to.read_text() == text
    with pytest.raises(InputError, match="below 1"):
        find_failures(config, tmp_path / "hard.jsonl", most=float("nan"))
