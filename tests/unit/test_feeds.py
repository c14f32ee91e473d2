"""Prompts fed into a run: only new ones, kept as they came, and there again in the next life."""

from __future__ import annotations

import io
import json
import pickle
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_config

from rlsf_ray.errors import InputError
from rlsf_ray.feeds import Feed, keep_feed, new_feed, read_feeds
from rlsf_ray.records import Check
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import PromptSets, load_sets

EMPTY = PromptSets([], [], [])


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    root = str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    return RunStore.create_or_resume(root, tiny_config(tmp_path, data={"suffix": "Now!"}))


def take(store: RunStore, sets: PromptSets, name: str, data: bytes, first_round: int) -> Feed:
    feed = new_feed(store, sets, name, data, first_round)
    keep_feed(store, name, data, first_round)
    return feed


def lines(*questions: str) -> bytes:
    return "".join(json.dumps({"question": question}) + "\n" for question in questions).encode()


def test_a_feed_has_what_the_run_does_not_know_and_is_read_again(store: RunStore) -> None:
    sets = load_sets(store.config)
    question = sets.train[0].messages[0][1].removesuffix("Now!").strip()
    first = take(store, sets, "More of it.JSONL", lines("How many?", question, "how  MANY?", "Where?"), 2)
    assert [prompt.messages for prompt in first.prompts] == [
        (("user", "How many? Now!"),),
        (("user", "Where? Now!"),),
    ]
    assert (first.first_round, first.known) == (2, 2), "one stands in the training set, one twice in the file"
    table = io.BytesIO()
    pq.write_table(pa.table({"question": ["Why?", "Where?"]}), table)
    second = take(store, sets, "more.parquet", table.getvalue(), 3)
    assert [prompt.id for prompt in (*first.prompts, *second.prompts)] == ["feed-0001-1", "feed-0001-4", "feed-0002-1"]
    third = take(store, sets, "last.json", lines("When?"), 3)  # the records of feeds end so, too
    assert read_feeds(store, sets) == [first, second, third]


def test_a_feed_has_the_columns_of_the_run_s_own_file(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"q": "What?", "answer": "never read", "n": "a"}))
    own = {"kind": "file", "path": str(tmp_path / "own.jsonl"), "question": "q", "id": "n"}
    store = RunStore.create_or_resume(str(tmp_path / "run"), tiny_config(tmp_path, data={"train": [own], "probe": []}))
    feed = take(store, load_sets(store.config), "new.jsonl", b'{"q": "Who?"}\n{"q": "what?"}', 0)
    assert ([prompt.id for prompt in feed.prompts], feed.known) == (["feed-0001-1"], 1)
    with pytest.raises(InputError, match="no column 'q', found 'question'"):
        take(store, EMPTY, "new.jsonl", lines("Who?"), 0)


def parquet(**columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table(columns), file)
    return file.getvalue()


# what is wrong: (the file's name, what is in it, words of the message)
BAD = {
    "an ending nobody reads": ("new.csv", b"question", "got the ending '.csv'"),
    "no ending": ("new", lines("Who?"), "got the ending ''"),
    "nothing": ("new.jsonl", b"", "is empty"),
    "only blank lines": ("new.jsonl", b"\n \n", "is empty"),
    "no JSON": ("new.jsonl", b"question", "line 1: not valid JSON"),
    "a line that is cut off": ("new.jsonl", lines("Who?") + b'{"question": "W', "line 2: not valid JSON"),
    "another encoding": ("new.jsonl", b"\xff\xfe", "line 1: not valid JSON"),
    "a list for a row": ("new.jsonl", b"[1, 2]\n", "line 1"),
    "null for a question": ("new.jsonl", b'{"question": null}\n', "row 1"),
    "a blank question": ("new.jsonl", lines("  "), "row 1"),
    "no such column": ("new.jsonl", b'{"prompt": "Who?"}\n', "no column 'question', found 'prompt'"),
    "text called Parquet": ("new.parquet", b"question", "not a readable Parquet file"),
    "a pickle called Parquet": ("new.parquet", pickle.dumps(["Who?"]), "not a readable Parquet file"),
    "Parquet that is cut off": ("new.parquet", parquet(question=["Who?"])[:-9], "not a readable Parquet file"),
    "Parquet without rows": ("new.parquet", parquet(question=[]), "is empty"),
    "Parquet of another column": ("new.parquet", parquet(prompt=["Who?"]), "no column 'question', found 'prompt'"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_a_bad_file_is_refused_and_leaves_nothing(store: RunStore, wrong: str) -> None:
    name, data, message = BAD[wrong]
    with pytest.raises(InputError, match=f"data file {name}.*{message}"):
        take(store, EMPTY, name, data, 0)
    assert store.names("feeds") == []


def test_a_file_without_news_is_refused(store: RunStore) -> None:
    feed = take(store, EMPTY, "new.jsonl", lines("Who?"), 0)
    with pytest.raises(InputError, match=r"again.jsonl: the run knows all of its 1 prompts; expected at least one new"):
        take(store, EMPTY, "again.jsonl", lines("who?"), 1)
    assert read_feeds(store, EMPTY) == [feed]


def test_a_file_without_its_record_was_cut_off_and_is_no_feed(store: RunStore) -> None:
    store.storage.write("feeds/0001.jsonl", lines("Who?"))
    assert read_feeds(store, EMPTY) == []
    assert take(store, EMPTY, "new.jsonl", lines("Where?"), 0).prompts[0].messages[0][1] == "Where? Now!"


def test_prompts_without_the_check_that_the_run_s_own_have_are_refused(store: RunStore) -> None:
    sets = load_sets(store.config)
    checked = [replace(prompt, check=Check(kind="exact", data={"answer": "4"})) for prompt in sets.train]
    with pytest.raises(InputError, match=r"new.jsonl: 1 prompts have no check, such as feed-0001-1, and all that"):
        take(store, sets._replace(train=checked), "new.jsonl", lines("Who?"), 0)
    assert store.names("feeds") == []
    assert take(store, sets._replace(train=[*checked, sets.train[0]]), "new.jsonl", lines("Who?"), 0).prompts
