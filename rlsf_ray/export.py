"""Take a run's results out: an adapter, a merged model, or its preference data."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rlsf_ray.adapters import scaled, to_peft
from rlsf_ray.errors import InputError
from rlsf_ray.records import Json
from rlsf_ray.run_store import CALIBRATION_FILE, RunStore
from rlsf_ray.stream.ledger import FILTERED, Ledger

logger = logging.getLogger(__name__)


def export_adapter(store: RunStore, version: int, to: Path, alpha: float = 1.0) -> Path:
    """Write a version as a PEFT folder that `PeftModel.from_pretrained` reads, with its calibration.

    `alpha` scales what the adapter changes; at another one than 1 the calibration does not hold and stays behind.
    """
    adapter, _ = store.read_adapter(version)
    config = store.config
    _new_folder(to)
    files = to_peft(scaled(adapter, alpha), base_model=config.model.name, lora_alpha=config.learner.lora_alpha)
    for name, content in files.items():
        (to / name).write_bytes(content)
    calibration = store.storage.read(f"versions/{version:04d}/{CALIBRATION_FILE}")
    if calibration is not None and alpha == 1.0:
        (to / CALIBRATION_FILE).write_bytes(calibration)
    return to


def export_merged(store: RunStore, version: int, to: Path, alpha: float = 1.0) -> Path:
    """Save the base model with the adapter added into its weights, and the tokenizer, as an ordinary model folder.

    The sum is made in float32 and rounded once to the run's dtype, so that small changes are not lost.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from rlsf_ray.engines.lora import rounded
    from rlsf_ray.engines.models import find_model, load_tokenizer

    _new_folder(to)
    config = store.config.model
    dtype = getattr(torch, config.dtype)
    base = AutoModelForCausalLM.from_pretrained(find_model(config.name), dtype=dtype, trust_remote_code=False).float()
    with tempfile.TemporaryDirectory() as folder:
        adapter = export_adapter(store, version, Path(folder), alpha)
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
        if (adapter / CALIBRATION_FILE).exists():
            shutil.copy(adapter / CALIBRATION_FILE, to)
    for name, parameter in merged.named_parameters():
        parameter.data = rounded(parameter.data, dtype, name)
    merged.save_pretrained(to)
    load_tokenizer(config).save_pretrained(to)
    return to


def export_pairs(store: RunStore, to: Path) -> Path:
    """Write all preference pairs with `prompt`, `chosen`, `rejected` as chat messages, the form that TRL reads.

    `to` ends in .jsonl or .parquet. Each row keeps its score, margin, weight, round and prompt id. A trace of several
    turns is several messages, the user's among them, whose tokens a trainer has to leave out as ours does.
    """
    writers: dict[str, Callable[[list[Json], Path], None]] = {".jsonl": _write_jsonl, ".parquet": _write_parquet}
    if to.suffix not in writers:
        raise InputError(f"--to: expected a file that ends in .jsonl or .parquet, got {to}; choose one of the two")
    rows = pair_messages(store)
    if not rows:
        cure = "all were undone: run with a lower rate" if _undone_rounds(store) else "let the run train a round first"
        if not store.config.has_pairs(0):
            cure = f"{store.config.recipe} learns from advantages, which stand in the table of traces"
        raise InputError(f"{store.root} holds no pairs to export, expected at least one; {cure}")
    if to.exists():
        raise InputError(f"--to: {to} exists; choose another, or remove it")
    with _writing(to):
        to.parent.mkdir(parents=True, exist_ok=True)
        writers[to.suffix](rows, to)
    return to


def pair_messages(store: RunStore) -> list[Json]:
    """One row for each pair of the run, in the order of rounds; none of a round that the guard has undone."""
    from rlsf_ray.feeds import read_feeds
    from rlsf_ray.tasks.sources import load_sets

    sets = load_sets(store.config)
    prompts = [*sets.train, *(prompt for feed in read_feeds(store, sets) for prompt in feed.prompts)]
    messages = {
        prompt.id: [{"role": role, "content": content} for role, content in prompt.messages] for prompt in prompts
    }
    undone, left_out = _undone_rounds(store), _left_out(store)
    if (kept := store.rounds("traces")) and kept[0] > 0:
        logger.warning("rounds 1 to %d are not there any more (cluster.tables_gb)", kept[0])
    traces = store.read_table("traces").select(["trace_id", "text", "turns"]).to_pylist()
    written = {trace["trace_id"]: _messages(trace) for trace in traces}
    return [
        {
            "prompt": messages[pair["prompt_id"]],
            "chosen": written[pair["chosen_trace_id"]],
            "rejected": written[pair["rejected_trace_id"]],
            **{
                name: pair[name]
                for name in ("prompt_id", "round", "weight", "margin", "chosen_score", "rejected_score")
            },
        }
        for pair in store.read_table("pairs").to_pylist()
        if pair["round"] not in undone and pair["group_id"] not in left_out
    ]


def _messages(trace: Json) -> list[Json]:
    """What a trace says, turn by turn, with the user's replies."""
    messages: list[Json] = []
    for turn in trace["turns"] or [{"said": "", "text": trace["text"]}]:
        messages += [{"role": "user", "content": turn["said"]}] if turn.get("said") else []
        messages.append({"role": "assistant", "content": turn["text"]})
    return messages


def _left_out(store: RunStore) -> set[str]:
    """Groups whose pairs were not trained, because the round had enough of surer ones."""
    state = store.read_json("state.json") or {}
    ledger = Ledger.from_json(state.get("ledger", {}))
    found: set[str] = set()
    ended = {round for round, _ in state.get("ended", ())}
    for round in store.rounds("pairs"):
        if not store.config.keeps_surest(round):
            continue
        sequences = set(ledger.sequences(round, FILTERED))
        if round not in ended:  # which are the surest is not known yet
            sequences = set(range(store.config.prompts_per_round))
        rows = store.read_table("traces", round).select(["group_id", "sequence"]).to_pylist()
        found |= {row["group_id"] for row in rows if row["sequence"] in sequences}
    return found


def _undone_rounds(store: RunStore) -> set[int]:
    """Rounds whose versions were given up when the run went back."""
    state = store.read_json("state.json") or {}
    if not (back := state.get("rolled_back")):
        return set()
    newest = back["past"] if back.get("share") else back["to"]
    kept = {round for round, version in state["ended"] if version is not None and version <= newest}
    return {round for round in store.rounds("pairs") if round not in kept and not store.config.trains_reward(round)}


def latest_version(store: RunStore, version: int | None) -> int:
    """`version` if it is published, or the newest. Raises InputError where there is none."""
    known = store.versions()
    if not known:
        raise InputError(f"{store.root} has published no version yet; let the run finish a round first")
    if version is not None and version not in known:
        raise InputError(f"{store.root}: no version {version}; published: {', '.join(map(str, known))}")
    return known[-1] if version is None else version


def _new_folder(to: Path) -> None:
    with _writing(to):
        taken = to.exists() and (not to.is_dir() or any(to.iterdir()))
    if taken:
        raise InputError(f"--to: {to} exists and is not an empty folder; choose another, or remove it")
    with _writing(to):
        to.mkdir(parents=True, exist_ok=True)


@contextmanager
def _writing(to: Path) -> Iterator[None]:
    """Errors of the file system as InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(f"--to: {to} cannot be written ({error}); choose another place") from error


def _write_jsonl(rows: list[Json], to: Path) -> None:
    half_made = to.with_name(to.name + ".tmp")
    half_made.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(half_made, to)


def _write_parquet(rows: list[Json], to: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    half_made = to.with_name(to.name + ".tmp")
    pq.write_table(pa.Table.from_pylist(rows), half_made)
    os.replace(half_made, to)
