"""The run directory: atomic files, exact tables, resumable runs, adapters that PEFT reads."""

import math
import pickle
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import yaml

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError, StorageError
from rlsf_ray.records import (
    Answer,
    Group,
    Pair,
    Prompt,
    ScoredGroup,
    Trace,
    TrainingGroup,
    TrainingTrace,
)
from rlsf_ray.run_store import RunStore, group_to_row, pair_rows, row_to_group, trace_rows
from rlsf_ray.storage import Storage
from rlsf_ray.tables import SCHEMAS


def make_config(**changes) -> RunConfig:
    source = {"kind": "reasoning_gym", "name": "products", "count": 4}
    return RunConfig.model_validate({"data": {"train": [source]}, **changes})


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path) -> str:
    return str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"


@pytest.fixture
def store(root) -> RunStore:
    return RunStore.create_or_resume(root, make_config())


def make_trace(index: int, *, answer: Answer | None) -> Trace:
    statistics = {name: np.array([-0.1, -0.7, -1e-7], np.float32) for name in ("logprob", "top1", "top2")}
    return Trace(
        id=f"g0/{index}",
        index=index,
        seed=2**63 + index,  # seeds take all 64 bits
        version=3,
        text="so 12",
        token_ids=np.array([5, 6, 7], np.int32),
        finished=answer is not None,
        answer=answer,
        **statistics,
    )


def make_scored() -> ScoredGroup:
    prompt = Prompt(id="p0", messages=(("user", "3 * 4?"),), task="products", key="3*4")
    traces = (make_trace(0, answer=Answer(text="12", chars=(3, 5), tokens=(1, 3))), make_trace(1, answer=None))
    group = Group(
        id="g0", round=2, sequence=9, version=3, prompt=prompt, prompt_ids=np.array([1, 2], np.int32), traces=traces
    )
    return ScoredGroup(
        group=group, signal="disparity", scores=(0.25, math.nan), labels=(0, -1), pairs=(), reason="one_answer"
    )


def make_training_group(*, score: float = math.nan) -> TrainingGroup:
    rng = np.random.default_rng(0)
    traces = tuple(
        TrainingTrace(
            id=f"g0/{i}",
            seed=2**63 + i,
            version=1,
            score=value,
            answer=answer,
            token_ids=rng.integers(0, 50_000, 5 + i).astype(np.int32),
            logprob=rng.normal(size=5 + i).astype(np.float32),
            reference_logprob=rng.normal(size=5 + i).astype(np.float32),
        )
        for i, (value, answer) in enumerate([(0.5, "12"), (score, None)])
    )
    return TrainingGroup(
        id="g0",
        round=2,
        sequence=9,
        prompt_id="p0",
        signal="disparity",
        prompt_ids=np.array([1, 2], np.int32),
        traces=traces,
        pairs=(Pair(chosen=0, rejected=1, weight=0.75, margin=0.5),),
    )


# --- the run and its config


def test_a_relative_root_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert RunStore.create_or_resume("runs/a", make_config()).root == str(tmp_path / "runs" / "a")


def test_creating_twice_resumes_and_open_gives_the_config_back(root):
    first = RunStore.create_or_resume(root, make_config(seed=3, learner={"learning_rate": 5e-7}))
    first.write_json("state.json", {"round": 1})
    again = RunStore.create_or_resume(root, make_config(seed=3, learner={"learning_rate": 5e-7}))
    assert again.read_json("state.json") == {"round": 1}
    assert RunStore.open(root).config == first.config
    assert again.read_json("packages.json")["packages"]["numpy"] == np.__version__


def test_a_run_of_an_older_program_goes_on_with_the_keys_that_it_did_not_know(root):
    store = RunStore.create_or_resume(root, make_config())
    kept = yaml.safe_load(store.storage.read("config.yaml"))
    del kept["cluster"]["scorers"]["most"], kept["cluster"]["tables_gb"]
    store.storage.write("config.yaml", yaml.safe_dump(kept).encode())
    assert RunStore.create_or_resume(root, make_config()).config == make_config()
    with pytest.raises(InputError, match=r"cluster.tables_gb: got 3.0, expected None"):
        RunStore.create_or_resume(root, make_config(cluster={"tables_gb": 3}))


def test_another_config_is_refused_naming_every_key_with_got_expected_and_cure(root):
    RunStore.create_or_resume(root, make_config())
    source = {"kind": "reasoning_gym", "name": "products", "count": 5}
    with pytest.raises(InputError) as caught:
        RunStore.create_or_resume(root, make_config(seed=7, loss={"beta": 0.2}, data={"train": [source]}))
    text = str(caught.value)
    assert "  seed: got 7, expected 0\n" in text
    assert "  loss.beta: got 0.2, expected 0.1\n" in text
    assert "  data.train.0.count: got 5, expected 4\n" in text
    assert text.count(", expected ") == 3
    assert "--run" in text


def test_of_two_runs_that_begin_at_once_the_second_meets_the_config_of_the_first(tmp_path):
    begun = threading.Event()

    def begin():
        begun.set()
        RunStore.create_or_resume(str(tmp_path), make_config(seed=2))

    with ThreadPoolExecutor(1) as second, Storage(str(tmp_path)).lock(".config.lock"):
        waiting = second.submit(begin)
        assert begun.wait(60)
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        config = make_config(seed=1).model_dump(mode="json")
        Storage(str(tmp_path)).write("config.yaml", yaml.safe_dump(config).encode())
    with pytest.raises(InputError, match="seed: got 2, expected 1"):
        waiting.result()


def test_a_source_too_many_is_named_and_an_empty_list_is_a_value(root):
    RunStore.create_or_resume(root, make_config())
    source = {"kind": "reasoning_gym", "name": "products", "count": 4}
    with pytest.raises(InputError, match=r"data.probe.0.name: got 'products', expected absent") as caught:
        RunStore.create_or_resume(root, make_config(data={"train": [source], "probe": [source]}))
    assert "data.probe: got absent, expected []" in str(caught.value)


def test_open_without_a_run_and_unknown_protocols_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no run at"):
        RunStore.open(str(tmp_path))
    with pytest.raises(InputError, match="nosuch://"):
        RunStore.open("nosuch://bucket/run")
    with pytest.raises(InputError, match="must have a name"):
        RunStore.open(" ")


def test_a_store_pickles_and_reads_the_same_files(store):
    store.write_json("state.json", {"round": 2})
    copy = pickle.loads(pickle.dumps(store))
    assert copy.root == store.root
    assert copy.read_json("state.json") == {"round": 2}


# --- JSON, and what a crash or a full disk leaves


def test_json_is_plain_after_numpy_and_nan(store):
    store.write_json("a.json", {"x": np.float32(0.5), "n": np.arange(2), "nan": math.nan, "t": (1, np.int64(2))})
    assert store.read_json("a.json") == {"x": 0.5, "n": [0, 1], "nan": None, "t": [1, 2]}
    assert store.read_json("missing.json") is None


def test_half_written_files_are_storage_errors_that_name_the_file(store):
    store.write_text("state.json", '{"round": ')
    with pytest.raises(StorageError, match=r"state\.json is damaged"):
        store.read_json("state.json")
    store.write_table("groups", 0, 0, [group_to_row(make_training_group())])
    name = "groups/round-0000/part-00000.parquet"
    store.storage.write(name, store.storage.read(name)[:-20])
    with pytest.raises(StorageError, match=r"part-00000\.parquet is damaged"):
        store.read_table("groups")
    store.write_text("config.yaml", "{a: [")
    with pytest.raises(StorageError, match=r"config\.yaml is damaged"):
        RunStore.open(store.root)


def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path):
    store = RunStore.create_or_resume(str(tmp_path), make_config())
    store.write_table("groups", 0, 0, [group_to_row(make_training_group())])
    (tmp_path / "groups/round-0000/.part-00000.parquet.1f.tmp").write_bytes(b"half")  # what kill -9 leaves behind
    (tmp_path / ".state.json.1f.tmp").write_bytes(b"half")
    assert store.read_table("groups").num_rows == 1
    assert store.read_json("state.json") is None


def test_a_root_that_is_a_file_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        RunStore.create_or_resume(str(tmp_path / "file"), make_config())


# --- metrics


def test_metrics_append_and_read_back(store):
    store.append_metrics("stages", [{"role": "scorer", "start": 1.5}])
    store.append_metrics("stages", [{"role": "trainer", "start": np.float64(2.5)}])
    assert store.read_metrics("stages") == [{"role": "scorer", "start": 1.5}, {"role": "trainer", "start": 2.5}]
    assert store.read_metrics("none") == []


def test_a_line_cut_short_by_a_crash_is_dropped_and_the_next_one_is_whole(tmp_path):
    store = RunStore.create_or_resume(str(tmp_path), make_config())
    store.append_metrics("stages", [{"a": 1}])
    path = tmp_path / "metrics" / "stages.jsonl"
    path.write_text(path.read_text() + '{"a": 2')
    assert store.read_metrics("stages") == [{"a": 1}]
    store.append_metrics("stages", [{"a": 3}])
    assert store.read_metrics("stages") == [{"a": 1}, {"a": 3}]
    path.write_text('{"a"\n{"a": 1}\n')
    with pytest.raises(StorageError, match=r"stages\.jsonl is damaged"):
        store.read_metrics("stages")


def test_training_metrics_are_tensorboard_scalars_too(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    store = RunStore.create_or_resume(str(tmp_path), make_config())
    store.append_metrics("train", [{"time": 10.0, "step": 1, "loss": 0.75, "note": "x"}])
    store.append_metrics("train", [{"time": 11.0, "step": 2, "loss": 0.5}])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(e.step, e.value, e.wall_time) for e in events.Scalars("train/loss")] == [(1, 0.75, 10.0), (2, 0.5, 11.0)]


# --- tables


def test_trace_rows_carry_the_whole_provenance(store):
    store.write_table("traces", 2, 0, trace_rows(make_scored()))
    first, second = store.read_table("traces", 2).to_pylist()
    assert {name: first[name] for name in ("group_id", "prompt_id", "round", "sequence", "trace_id", "index")} == {
        "group_id": "g0",
        "prompt_id": "p0",
        "round": 2,
        "sequence": 9,
        "trace_id": "g0/0",
        "index": 0,
    }
    assert (first["seed"], first["version"], first["signal"], first["reason"]) == (2**63, 3, "disparity", "one_answer")
    assert (first["answer"], first["answer_chars"], first["answer_tokens"]) == ("12", [3, 5], [1, 3])
    assert (first["token_ids"], first["score"], first["label"]) == ([5, 6, 7], 0.25, 0)
    assert np.float32(first["logprob"][2]) == np.float32(-1e-7)
    assert (second["answer"], second["answer_chars"], second["score"], second["finished"]) == (None, None, None, False)


def test_pair_rows_name_both_traces(store):
    store.write_table("pairs", 2, 0, pair_rows(make_training_group()))
    (row,) = store.read_table("pairs").to_pylist()
    assert (row["chosen_trace_id"], row["chosen_seed"], row["chosen_answer"], row["chosen_score"]) == (
        "g0/0",
        2**63,
        "12",
        0.5,
    )
    assert (row["rejected_trace_id"], row["rejected_answer"], row["rejected_score"]) == ("g0/1", None, None)
    assert (row["weight"], row["margin"], row["signal"], row["round"]) == (0.75, 0.5, "disparity", 2)


def test_a_training_group_comes_back_exactly(store):
    group = make_training_group()
    store.write_table("groups", 2, 7, [group_to_row(group)])
    back = row_to_group(store.read_table("groups", 2).to_pylist()[0])
    assert (back.id, back.round, back.sequence, back.pairs) == (group.id, group.round, group.sequence, group.pairs)
    assert back.prompt_ids.dtype == np.int32
    np.testing.assert_array_equal(back.prompt_ids, group.prompt_ids)
    for ours, theirs in zip(back.traces, group.traces, strict=True):
        assert (ours.id, ours.seed, ours.version, ours.answer) == (
            theirs.id,
            theirs.seed,
            theirs.version,
            theirs.answer,
        )
        np.testing.assert_array_equal(ours.token_ids, theirs.token_ids)
        np.testing.assert_array_equal(ours.reference_logprob, theirs.reference_logprob)
        assert ours.reference_logprob.dtype == np.float32
    assert math.isnan(back.traces[1].score)


def test_parts_and_rounds_are_read_in_order_and_rewriting_a_part_replaces_it(store):
    for round, part, text in [(1, 0, "c"), (0, 1, "b"), (0, 0, "x"), (0, 0, "a")]:
        store.write_table("traces", round, part, [{"text": text}])
    assert store.read_table("traces")["text"].to_pylist() == ["a", "b", "c"]
    assert store.read_table("traces", 0)["text"].to_pylist() == ["a", "b"]


def test_a_table_without_parts_is_empty_with_its_columns(store):
    assert store.read_table("traces").column_names == SCHEMAS["traces"].names
    assert store.read_table("traces", 4).num_rows == 0


def test_the_version_before_skips_numbers_and_follows_the_weights(store, caplog):
    """Round 2 gave no pairs, so there is no version 2; version 5 has version 3's weights again."""
    assert store.version_before(0) is None
    for version in (1, 3, 4, 5):
        store.write_json(f"versions/{version:04d}/version.json", {})
    for back in ({"share": 0.0}, {}):  # an older program wrote no share
        store.write_json("state.json", {"rolled_back": {"from": 4, "to": 3, "version": 5, **back}})
        assert [store.version_before(version) for version in (1, 3, 4, 5)] == [0, 1, 3, 1]
    store.write_json("versions/0006/version.json", {})
    store.write_json("state.json", {"rolled_back": {"from": 4, "to": 3, "past": 4, "share": 0.25, "version": 6}})
    assert [store.version_before(version) for version in (3, 4, 5, 6)] == [1, 3, 1, 1]
    store.write_json("state.json", {"rolled_back": {"from": 4, "to": 0, "version": 5}})
    assert store.version_before(5) is None
    assert (store.earlier_answers(5), caplog.records) == (None, [])
    assert store.earlier_answers(4) is None
    assert "version 3 was not measured by this program" in caplog.text
    store.write_json("eval/version-0003.json", {"calibration_answers": {"q": ["4", None]}})
    assert store.earlier_answers(4) == {"q": ["4", None]}


def test_the_oldest_rounds_give_their_room_back(store):
    for round in range(4):
        for kind in ("traces", "groups", "pairs"):
            store.storage.write(f"{kind}/round-{round:04d}/part-00000.parquet", b"x" * 100)
    assert store.drop_rounds(1e-6, ended=3) == [0]  # 1,000 bytes are room for three rounds
    assert store.rounds("traces") == store.rounds("groups") == store.rounds("pairs") == [1, 2, 3]
    assert store.drop_rounds(1e-9, ended=1) == [], "rounds that go on stay"
    assert store.drop_rounds(1e-9, ended=4) == [1, 2], "and the newest that is over"
    assert store.drop_rounds(1e-9, ended=4) == []
    assert store.storage.size("nowhere") == 0
    store.storage.remove("nowhere")


def test_unknown_kinds_and_columns_are_refused(store):
    with pytest.raises(ValueError, match="unknown table 'scores'"):
        store.write_table("scores", 0, 0, [])
    with pytest.raises(ValueError, match=r"unknown columns \['gold'\]"):
        store.write_table("pairs", 0, 0, [{"gold": "12"}])


def test_no_training_table_has_room_for_a_gold_answer():
    leaves = {str(SCHEMAS[kind]) for kind in ("traces", "pairs", "groups")}
    assert not [text for text in leaves if "gold" in text]
