"""Prompts fed into a run: only new ones, kept as they came, and there again in the next life."""

from __future__ import annotations

import io
import json
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_config

from rlsf_ray.errors import InputError
from rlsf_ray.feeds import read_feeds, take_feed
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.sources import load_sets


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> RunStore:
    root = str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
    return RunStore.create_or_resume(root, tiny_config(tmp_path, data={"suffix": "Now!"}))


def lines(*questions: str) -> bytes:
    return "".join(json.dumps({"question": question}) + "\n" for question in questions).encode()


def test_a_feed_has_what_the_run_does_not_know_and_is_read_again(store: RunStore) -> None:
    train = load_sets(store.config).train
    question = train[0].messages[0][1].removesuffix("Now!").strip()
    first = take_feed(store, train, [], "More of it.JSONL", lines("How many?", question, "how  MANY?", "Where?"), 2)
    assert [prompt.messages for prompt in first.prompts] == [
        (("user", "How many? Now!"),),
        (("user", "Where? Now!"),),
    ]
    assert (first.first_round, first.known) == (2, 2), "one stands in the training set, one twice in the file"
    table = io.BytesIO()
    pq.write_table(pa.table({"question": ["Why?", "Where?"]}), table)
    second = take_feed(store, train, [first], "more.parquet", table.getvalue(), 3)
    assert [prompt.id for prompt in (*first.prompts, *second.prompts)] == ["feed-0001-1", "feed-0001-4", "feed-0002-1"]
    assert read_feeds(store, train) == [first, second]


def test_a_feed_has_the_columns_of_the_run_s_own_file(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(json.dumps({"q": "What?", "answer": "never read", "n": "a"}))
    own = {"kind": "file", "path": str(tmp_path / "own.jsonl"), "question": "q", "id": "n"}
    store = RunStore.create_or_resume(str(tmp_path / "run"), tiny_config(tmp_path, data={"train": [own], "probe": []}))
    feed = take_feed(store, load_sets(store.config).train, [], "new.jsonl", b'{"q": "Who?"}\n{"q": "what?"}', 0)
    assert ([prompt.id for prompt in feed.prompts], feed.known) == (["feed-0001-1"], 1)
    with pytest.raises(InputError, match="no column 'q', found 'question'"):
        take_feed(store, [], [], "new.jsonl", lines("Who?"), 0)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("new.csv", b"question", "got the ending '.csv'"),
        ("new.jsonl", b"", "is empty"),
        ("new.jsonl", b"question", "line 1: not valid JSON"),
        ("new.jsonl", b"\xff\xfe", "line 1: not valid JSON"),
        ("new.parquet", b"question", "not a readable Parquet file"),
        ("new.jsonl", lines("  "), "line 1|row 1"),
        ("new", lines("Who?"), "got the ending ''"),
    ],
)
def test_a_bad_file_is_refused_and_leaves_nothing(store: RunStore, name: str, data: bytes, message: str) -> None:
    with pytest.raises(InputError, match=f"data file {name}.*({message})"):
        take_feed(store, [], [], name, data, 0)
    assert store.names("feeds") == []


def test_a_file_without_news_is_refused(store: RunStore) -> None:
    feed = take_feed(store, [], [], "new.jsonl", lines("Who?"), 0)
    with pytest.raises(InputError, match=r"again.jsonl: the run knows all of its 1 prompts; expected at least one new"):
        take_feed(store, [], [feed], "again.jsonl", lines("who?"), 1)
    assert read_feeds(store, []) == [feed]


def test_a_file_without_its_record_was_cut_off_and_is_no_feed(store: RunStore) -> None:
    store.storage.write("feeds/0001.jsonl", lines("Who?"))
    assert read_feeds(store, []) == []
    assert take_feed(store, [], [], "new.jsonl", lines("Where?"), 0).prompts[0].messages[0][1] == "Where? Now!"
