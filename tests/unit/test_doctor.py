"""The archive for a bug report holds what helps, and nothing that looks like a secret or belongs to the data."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from tiny import tiny_config

from rlsf_ray.doctor import redact, write_archive
from rlsf_ray.run_store import RunStore

SECRETS = {
    "a URL's password": ("s3 at https://ann:hunter2@store.example/bucket", "hunter2"),
    "a signed URL": ("GET https://store.example/x?X-Amz-Signature=abcdef0123456789&n=1", "abcdef0123456789"),
    "a hub token": ("Authorization: Bearer hf_abcdefghijklmnopqrstuvwx", "hf_abcdefghijklmnopqrstuvwx"),
    "a key in YAML": ("engine_args:\n  hf_token: my-own-secret\n  seed: 1", "my-own-secret"),
    "a key in JSON": ('{"api_key": "my-own-secret", "n": 1}', "my-own-secret"),
    "a shell's variable": ("WANDB_API_KEY=my-own-secret python x.py", "my-own-secret"),
    "a webhook": ("posted to https://hooks.slack.com/services/T00/B00/xyz", "B00/xyz"),
    "a variable's value": ("it said: correct horse battery", "correct horse battery"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_like_a_secret_is_hidden(name: str) -> None:
    text, secret = SECRETS[name]
    found = redact(text, {"MY_PASSWORD": "correct horse battery", "HOME": "/home/ann"})
    assert secret not in found
    if name == "a key in JSON":
        assert json.loads(found) == {"api_key": "(hidden)", "n": 1}


def test_what_is_none_stays() -> None:
    text = 'max_tokens: 80\n{"tokens": 123, "token_entropy": -0.5, "tokenizers": "0.22.1"}\nsignal: token_entropy'
    assert redact(text, {"HOME": "signal", "EMPTY_TOKEN": ""}) == text


def test_the_archive_has_config_state_metrics_and_logs_but_no_questions(tmp_path: Path) -> None:
    store = RunStore.create_or_resume(str(tmp_path / "run"), tiny_config(Path("model")))
    store.write_json("state.json", {"state": "failed"})
    store.append_metrics("stages", [{"stage": "generate"}])
    store.write_text("logs/coordinator.jsonl", '{"message": "password=hunter2"}\n')
    for name in ("eval/version-0000.json", "traces/round-0000/part-00000.parquet", "versions/0001/adapter.bin"):
        store.write_text(name, "what is 1 + 1?")
    names = write_archive(store, tmp_path / "out" / "bug.zip", {})
    with zipfile.ZipFile(tmp_path / "out" / "bug.zip") as archive:
        assert archive.namelist() == names
        assert set(names) == {
            *("machine.json", "config.yaml", "packages.json", "state.json"),
            *("metrics/stages.jsonl", "logs/coordinator.jsonl"),
        }
        assert json.loads(archive.read("state.json")) == {"state": "failed"}
        assert json.loads(archive.read("machine.json"))["packages"]["ray"]
        assert b"hunter2" not in archive.read("logs/coordinator.jsonl")
