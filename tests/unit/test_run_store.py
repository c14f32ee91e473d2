"""The run directory: atomic files, exact tables, resumable runs, adapters that PEFT reads."""

import json
import math
import pickle
import resource
import uuid
from pathlib import Path

import numpy as np
import pytest

from rlsf_ray.config import RunConfig
from rlsf_ray.errors import InputError, StorageError, WeightsError
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
from rlsf_ray.run_store import RunStore, checksum, group_to_row, pair_rows, row_to_group, trace_rows
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


def make_adapter(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn"
    shapes = {"q_proj.lora_A": (2, 8), "q_proj.lora_B": (8, 2), "v_proj.lora_A": (2, 8), "v_proj.lora_B": (8, 2)}
    return {f"{prefix}.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


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
    with pytest.raises(InputError, match="empty text"):
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


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond 4 KiB: the same path through the code as a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_named_with_its_cure_and_keeps_what_was_committed(tmp_path, full_disk):
    storage = Storage(str(tmp_path))
    storage.write("state.json", b"old")
    with pytest.raises(StorageError, match=r"cannot write .*state\.json: no space left.*Free space"):
        storage.write("state.json", b"x" * 5000)
    assert storage.read("state.json") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]  # the unfinished file is gone


def test_an_append_that_did_not_fit_is_taken_back(tmp_path, full_disk):
    storage = Storage(str(tmp_path))
    storage.append("a.jsonl", b"1\n")
    with pytest.raises(StorageError, match="no space left"):
        storage.append("a.jsonl", b"x" * 5000)
    assert storage.read("a.jsonl") == b"1\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_the_kernels_own_no_space_error_is_recognised(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="no space left"):
        Storage(str(tmp_path)).append("a.jsonl", b"1\n")


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
        store.write_table("probe", round, part, [{"text": text}])
    assert store.read_table("probe")["text"].to_pylist() == ["a", "b", "c"]
    assert store.read_table("probe", 0)["text"].to_pylist() == ["a", "b"]


def test_a_table_without_parts_is_empty_with_its_columns(store):
    assert store.read_table("traces").column_names == SCHEMAS["traces"].names
    assert store.read_table("traces", 4).num_rows == 0


def test_unknown_kinds_and_columns_are_refused(store):
    with pytest.raises(ValueError, match="unknown table 'scores'"):
        store.write_table("scores", 0, 0, [])
    with pytest.raises(ValueError, match=r"unknown columns \['gold'\]"):
        store.write_table("pairs", 0, 0, [{"gold": "12"}])


def test_no_training_table_has_room_for_a_gold_answer():
    leaves = {str(SCHEMAS[kind]) for kind in ("traces", "pairs", "groups")}
    assert not [text for text in leaves if "gold" in text]


# --- adapters


def test_checksum_depends_on_names_shapes_types_and_content_only():
    adapter = make_adapter()
    assert checksum(dict(reversed(adapter.items()))) == checksum(adapter)
    assert checksum({name: np.asfortranarray(array) for name, array in adapter.items()}) == checksum(adapter)
    name = next(iter(adapter))
    for changed in (adapter[name].reshape(-1), adapter[name].astype(np.float64), adapter[name] + 1e-6):
        assert checksum({**adapter, name: changed}) != checksum(adapter)
    assert checksum({f"{key}x": array for key, array in adapter.items()}) != checksum(adapter)


def test_an_adapter_comes_back_with_its_version_and_the_peft_config(store):
    adapter = make_adapter()
    made = store.write_adapter(1, adapter, "some/base", store.config)
    back, found = store.read_adapter(1)
    assert found == made
    assert made.path == store.path("versions/0001")
    assert checksum(back) == made.checksum == checksum(adapter)
    config = store.read_json("versions/0001/adapter_config.json")
    assert {"r": 2, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}.items() <= config.items()
    assert {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}.items() <= config.items()


def test_a_version_is_written_once_and_never_changed(store):
    store.write_adapter(2, make_adapter(), "base", store.config)
    store.write_adapter(2, make_adapter(), "base", store.config)  # the same again: nothing happens
    with pytest.raises(WeightsError, match="version 2 is already published with other weights"):
        store.write_adapter(2, make_adapter(seed=1), "base", store.config)
    assert store.versions() == [2]


def test_a_version_counts_only_when_it_is_complete(store):
    made = store.write_adapter(1, make_adapter(), "base", store.config)
    weights = store.storage.read("versions/0001/adapter_model.safetensors")
    store.storage.write("versions/0002/adapter_model.safetensors", weights)  # a crash before version.json
    assert store.versions() == [1]
    with pytest.raises(WeightsError, match=r"no version 2 .* published are \[1\]"):
        store.read_adapter(2)
    assert store.write_adapter(2, make_adapter(), "base", store.config).checksum == made.checksum


def test_changed_and_half_written_weights_are_found_on_reading(store):
    for version in (1, 2):
        store.write_adapter(version, make_adapter(seed=version), "base", store.config)
    name = "versions/{:04d}/adapter_model.safetensors"
    store.storage.write(name.format(1), store.storage.read(name.format(2)))
    with pytest.raises(WeightsError, match="changed after it was published"):
        store.read_adapter(1)
    store.storage.write(name.format(2), store.storage.read(name.format(2))[:-8])
    with pytest.raises(StorageError, match=r"0002/adapter_model\.safetensors is damaged"):
        store.read_adapter(2)


def test_arrays_that_are_no_adapter_are_refused(store):
    with pytest.raises(ValueError, match="pairs of"):
        store.write_adapter(1, {"base_model.model.lm_head.weight": np.zeros((2, 2))}, "base", store.config)


def test_plain_peft_loads_a_version_with_identical_logits(tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    store = RunStore.create_or_resume(str(tmp_path / "run"), make_config(learner={"lora_rank": 4, "lora_alpha": 12.0}))
    lora = LoraConfig(r=4, lora_alpha=12.0, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    trained = get_peft_model(base, lora).eval()
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(trained).items()}
    made = store.write_adapter(1, adapter, str(tmp_path / "base"), store.config)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        plain = fresh(tokens).logits
        loaded = PeftModel.from_pretrained(fresh, made.path).eval()(tokens).logits
        torch.testing.assert_close(loaded, trained(tokens).logits, rtol=0, atol=0)
    assert not torch.equal(loaded, plain)
    assert json.loads(Path(made.path, "version.json").read_text()) == {"version": 1, "checksum": made.checksum}
