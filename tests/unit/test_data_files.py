"""JSON Lines, Parquet, GSM8K and CommonsenseQA sources, and every way such a file can be wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Check, ProbePrompt
from rlsf_ray.tasks.bfcl import bfcl_questions
from rlsf_ray.tasks.checks import check_answer
from rlsf_ray.tasks.gym import gym_questions
from rlsf_ray.tasks.rows import row_questions
from rlsf_ray.tasks.sources import load_prompts, load_sets

DATA = Path(os.environ.get("RLSF_DATA") or Path(__file__).parents[3] / "shared" / "data")


def write(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(path: str, **keys: object) -> list[ProbePrompt]:
    source = SourceConfig(**{"kind": "file", "path": path, **keys})
    prompts = load_prompts(source, seed=0, suffix="", answer_format="number")
    return sorted(prompts, key=lambda item: item.prompt.id)


def train_config(*paths: str, **keys: object) -> RunConfig:
    return RunConfig(data={"train": [{"kind": "file", "path": path, **keys} for path in paths]})


def shared(name: str) -> str:
    if not (DATA / name).exists():
        pytest.skip(f"{name} is not in {DATA}; set RLSF_DATA to its folder")
    return str(DATA / name)


def test_json_lines_rows_become_prompts(tmp_path: Path) -> None:
    path = write(tmp_path / "birds.v2.jsonl", {"question": "Big?", "answer": 3}, {"question": "Small?", "answer": "x"})
    first, second = load(path)
    assert (first.prompt.id, first.prompt.task, first.gold) == ("birds-1", "birds", "3")
    assert first.prompt.messages == (("user", "Big?"),)
    assert (second.prompt.id, second.gold, second.prompt.key) == ("birds-2", "x", "small?")


def test_parquet_with_own_columns_and_chat_messages(tmp_path: Path) -> None:
    path = str(tmp_path / "chat.parquet")
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 1"}]
    pq.write_table(pa.Table.from_pylist([{"uid": 7, "turns": turns, "label": "3", "other": None}]), path)
    source = SourceConfig(kind="file", path=path, id="uid", messages="turns", answer="label")
    (item,) = load_prompts(source, seed=0, suffix="Think.", answer_format="boxed")
    assert item.prompt.messages == (("system", "Be brief."), ("user", "2 + 1 Think."))
    assert (item.prompt.id, item.prompt.key, item.gold, item.prompt.answer_format) == ("7", "1+2", "3", "boxed")


def test_a_url_is_read_through_fsspec(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "Big?", "answer": 3})
    assert [item.prompt.id for item in load(f"file://{path}")] == ["a-1"]


def test_count_takes_a_seeded_share_and_equal_questions_count_once(tmp_path: Path) -> None:
    rows = [{"question": f"Bird {i}?", "answer": i} for i in range(40)]
    path = write(tmp_path / "a.jsonl", *rows, {"question": "bird  0?", "answer": 0})
    assert len(load(path)) == 40
    source = SourceConfig(kind="file", path=path, count=5)
    picks = [[p.gold for p in load_prompts(source, seed=s, suffix="", answer_format="number")] for s in (0, 0, 1)]
    assert len(picks[0]) == 5
    assert picks[0] == picks[1] != picks[2]


def test_training_rows_need_no_answer_column(tmp_path: Path) -> None:
    train = load_sets(train_config(write(tmp_path / "a.jsonl", {"question": "Big?"}, {"question": "Small?"}))).train
    assert {p.id for p in train} == {"a-1", "a-2"}


BROKEN: list[tuple[str, bytes, str]] = [
    ("empty", b"", "is empty"),
    ("blank", b"\n \n", "is empty"),
    ("broken", b'{"question": "a", "answer": 1}\n{"question": \n', "line 2: not valid JSON"),
    ("encoding", b'{"question": "\xff", "answer": 1}\n', "line 1: not valid JSON"),
    ("list", b"[1]\n", "line 1: got a JSON list"),
    ("column", b'{"questions": "a", "answer": 1}\n', "no column 'question', found 'questions', 'answer'; did you mean"),
    ("later", b'{"question": "a", "answer": 1}\n\n{"answer": 1}\n', "line 3: no column 'question'"),
    ("null", b'{"question": null, "answer": 1}\n', "row 1: column 'question' is None"),
    ("gold", b'{"question": "a", "answer": null}\n', "row 1: column 'answer' is None"),
    ("no_gold", b'{"question": "a"}\n', "no column 'answer'"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN, ids=[name for name, _, _ in BROKEN])
def test_a_wrong_json_lines_file_is_an_input_error_that_names_the_place(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load(str(path))
    assert str(path) in str(caught.value)


def test_missing_unknown_and_unreachable_files_are_input_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        load(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=r"got the ending '.csv'"):
        load(str(tmp_path / "a.csv"))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        load(str(tmp_path / "folder.jsonl"))
    with pytest.raises(InputError, match=r"cannot be opened.*nosuchprotocol"):
        load("nosuchprotocol://a.jsonl")


def test_a_wrong_parquet_file_is_an_input_error(tmp_path: Path) -> None:
    bad, other = tmp_path / "bad.parquet", tmp_path / "other.parquet"
    bad.write_bytes(b"PAR1 but not really")
    pq.write_table(pa.table({"quest": ["a"], "answer": ["1"]}), other)
    with pytest.raises(InputError, match="not a readable Parquet file"):
        load(str(bad))
    with pytest.raises(InputError, match="no column 'question', found 'quest', 'answer'; did you mean 'quest'"):
        load(str(other))
    pq.write_table(pa.table({"question": pa.array([], pa.string()), "answer": pa.array([], pa.string())}), other)
    with pytest.raises(InputError, match="is empty"):
        load(str(other))


def test_duplicate_ids_name_the_id_and_both_rows(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": 1, "uid": i} for q, i in (("a", "x"), ("b", "y"), ("c", "x"))]
    with pytest.raises(InputError, match="the id 'x' stands in row 1 and in row 3"):
        load(write(tmp_path / "a.jsonl", *rows), id="uid")


def test_two_sources_may_not_share_an_id(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    paths = (
        write(tmp_path / "a.jsonl", {"question": "Big?"}),
        write(tmp_path / "more" / "a.jsonl", {"question": "Small?"}),
    )
    with pytest.raises(InputError, match=r"two sources of data.train use the id 'a-1'"):
        load_sets(train_config(*paths))


def test_a_probe_source_without_an_answer_column_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a probe source needs gold answers"):
        load(write(tmp_path / "a.jsonl", {"question": "a"}), answer=None)


@pytest.mark.parametrize("turns", [[], "hello", [{"role": "user"}], [{"role": "assistant", "content": "hi"}]])
def test_bad_chat_messages_are_an_input_error(tmp_path: Path, turns: object) -> None:
    with pytest.raises(InputError, match=r"row 1: column 'chat'.*ends with a user message"):
        load(write(tmp_path / "a.jsonl", {"chat": turns, "answer": 1}), messages="chat")


def test_gsm8k_gold_is_the_number_after_the_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"question": "How much?", "answer": "1 #### no\n2 * 600 = 1200\n#### 1,200"})
    assert [item.gold for item in load(path, kind="gsm8k")] == ["1200"]
    with pytest.raises(InputError, match="no gold number after '####'"):
        load(write(tmp_path / "h.jsonl", {"question": "How much?", "answer": "1200"}), kind="gsm8k")


def test_commonsenseqa_rows_become_lettered_questions(tmp_path: Path) -> None:
    choices = [{"label": "A", "text": "bank"}, {"label": "B", "text": "mall"}]
    row = {"question": {"stem": "Where is money?", "choices": choices}, "answerKey": "A"}
    (item,) = load(write(tmp_path / "c.jsonl", row), kind="commonsenseqa")
    assert item.prompt.messages == (("user", "Where is money?\n(A) bank\n(B) mall"),)
    assert (item.gold, item.prompt.answer_format, item.prompt.task) == ("A", "choice", "commonsenseqa")
    with pytest.raises(InputError, match="answerKey is 'C', expected one of A, B"):
        load(write(tmp_path / "d.jsonl", {**row, "answerKey": "C"}), kind="commonsenseqa")
    with pytest.raises(InputError, match="not in CommonsenseQA form"):
        load(write(tmp_path / "e.jsonl", {**row, "question": "Where?"}), kind="commonsenseqa")


def test_the_real_gsm8k_file_loads_whole() -> None:
    prompts = load(shared("gsm8k_test.jsonl"), kind="gsm8k")
    assert len(prompts) == 1319
    first = next(item for item in prompts if item.prompt.id == "gsm8k_test-1")
    assert first.gold == "18"  # the ducks of the first row lay 18 dollars a day
    assert all(item.gold.lstrip("-").replace(".", "").isdigit() for item in prompts)


def test_the_real_commonsenseqa_file_loads_whole() -> None:
    prompts = load(shared("commonsenseqa_dev.jsonl"), kind="commonsenseqa")
    assert len(prompts) == 1221
    assert {item.gold for item in prompts} == set("ABCDE")


def test_a_hub_set_that_cannot_be_reached_is_an_input_error() -> None:
    pytest.importorskip("datasets", reason="datasets is installed only where a hub set is asked for")
    code = (
        "from rlsf_ray.config_sections import SourceConfig\n"
        "from rlsf_ray.errors import InputError\n"
        "from rlsf_ray.tasks.sources import load_prompts\n"
        "source = SourceConfig(kind='hub', name='no-such-owner/no-such-set')\n"
        "try:\n"
        "    load_prompts(source, seed=0, suffix='', answer_format='number')\n"
        "except InputError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "hub data set 'no-such-owner/no-such-set' cannot be loaded" in done.stdout


def test_the_wanted_calls_of_bfcl_are_labels_and_only_used_where_that_is_said(tmp_path: Path) -> None:
    call = {"name": "area", "parameters": {"properties": {"base": {"type": "integer"}}, "required": ["base"]}}
    asked = {"id": "s_0", "question": [[{"role": "user", "content": "Base 10?"}]], "function": [call]}
    (tmp_path / "possible_answer").mkdir()
    (tmp_path / "simple.json").write_text(json.dumps(asked))
    (tmp_path / "possible_answer/simple.json").write_text(
        json.dumps({"id": "s_0", "ground_truth": [{"area": {"base": [10]}}]})
    )
    source = SourceConfig(kind="bfcl", path=str(tmp_path / "simple.json"))
    with pytest.raises(InputError, match=r"which are labels.*set labels: true"):
        bfcl_questions(source, labelled=False)
    (trained,) = bfcl_questions(source.model_copy(update={"labels": True}), labelled=False)
    (probed,) = bfcl_questions(source, labelled=True)
    assert (trained.gold, probed.gold) == (None, "area(base=10)")
    assert trained.check == probed.check
    assert trained.check is not None
    assert check_answer(trained.check, "area(base=10)").right is True
    assert check_answer(trained.check, "area(base=11)").right is False
    assert '"area"' in trained.messages[0][1]


def test_a_column_of_checks_is_read_and_a_broken_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checked.jsonl"
    check = {"kind": "countdown", "data": {"numbers": [1, 2], "target": 3}}
    path.write_text(json.dumps({"question": "Make 3", "check": check}))
    source = SourceConfig(kind="file", path=str(path), check="check")
    (question,) = row_questions(source, labelled=False)
    assert question.check == Check(**check)
    path.write_text(json.dumps({"question": "Make 3", "check": "1 + 2"}))
    with pytest.raises(InputError, match=r"row 1: column 'check' is '1 \+ 2', expected"):
        row_questions(source, labelled=False)


def test_a_countdown_brings_its_check_whether_or_not_its_gold_answer_is_read() -> None:
    source = SourceConfig(name="countdown", count=3, options={"min_numbers": 3, "max_numbers": 3})
    (first, second) = (next(gym_questions(source, seed=1, labelled=labelled)) for labelled in (False, True))
    assert first.check == second.check
    assert first.check is not None
    assert first.gold is None
    assert check_answer(first.check, second.gold).right is True


def test_a_check_that_holds_the_wanted_answer_is_a_label_in_any_file(tmp_path: Path) -> None:
    path = tmp_path / "labelled.jsonl"
    check = {"kind": "exact", "data": {"accepted": ["4"]}}
    path.write_text(json.dumps({"question": "2 + 2 =", "answer": "4", "check": check}))
    source = SourceConfig(kind="file", path=str(path), check="check")
    with pytest.raises(InputError, match=r"a check of kind exact holds the wanted answer.*set labels: true"):
        row_questions(source, labelled=False)
    assert row_questions(source.model_copy(update={"labels": True}), labelled=False)[0].gold is None
    assert row_questions(source, labelled=True)[0].check == Check(**check)
    path.write_text(json.dumps({"question": "2 + 2 =", "check": {"kind": "countdown", "data": {"numbrs": [4]}}}))
    with pytest.raises(InputError, match="the check countdown does not take"):
        row_questions(source, labelled=False)
