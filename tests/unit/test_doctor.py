"""The archive for a bug report holds what helps, and nothing that looks like a secret or belongs to the data."""

from __future__ import annotations

import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from tiny import tiny_config
from vitals_data import HEALTHY

from rlsf_ray import doctor
from rlsf_ray.doctor import cleaned, write_archive
from rlsf_ray.redaction import redact
from rlsf_ray.run_store import RunStore
from rlsf_ray.stream.run_state import RunState

SECRETS = {
    "a URL's password": ("s3 at https://ann:hunter2@store.example/bucket", "hunter2"),
    "a signed URL": ("GET https://store.example/x?X-Amz-Signature=abcdef0123456789&n=1", "abcdef0123456789"),
    "a hub token": ("Authorization: Bearer hf_abcdefghijklmnopqrstuvwx", "hf_abcdefghijklmnopqrstuvwx"),
    "a key in YAML": ("engine_args:\n  hf_token: my-own-secret\n  seed: 1", "my-own-secret"),
    "a key in JSON": ('{"api_key": "my-own-secret", "n": 1}', "my-own-secret"),
    "a shell's variable": ("WANDB_API_KEY=my-own-secret python x.py", "my-own-secret"),
    "a value that begins with a digit": ("RAY_AUTH_TOKEN=3fa85f64aabbccdd", "3fa85f64aabbccdd"),
    "a bearer": ("Authorization: Bearer abc.def", "abc.def"),
    "a private key": ('{"private_key": "abc def"}', "abc def"),
    "a PEM block": ("-----BEGIN RSA PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----", "MIIabc"),
    "a password with an at sign": ("postgres://u:p@ss@host/db", "ss@"),
    "another webhook": ("https://discord.example/api/webhooks/1/abc", "abc"),
    "a quoted value in a text": ('token="abc def" and more', "abc def"),
    "a quote in a value": ('{"password":"ab\\"cd"}', "cd"),
    "a webhook": ("posted to https://hooks.slack.com/services/T00/B00/xyz", "B00/xyz"),
    "a variable's value": ("it said: correct horse battery", "correct horse battery"),
}


KNOWN = ["correct horse battery"]


@pytest.mark.parametrize("name", SECRETS)
def test_what_looks_like_a_secret_is_hidden_in_a_text_and_in_a_log(name: str) -> None:
    text, secret = SECRETS[name]
    assert secret not in redact(text, KNOWN)
    line = cleaned("logs/x.jsonl", json.dumps({"message": text, "n": 1}).encode() + b"\n", KNOWN)
    assert secret not in line
    assert json.loads(line)["n"] == 1


def test_what_is_none_stays() -> None:
    text = 'max_tokens: 80\n{"tokens": 123, "token_entropy": -0.5, "tokenizers": 0.22}\nsignal: token_entropy'
    assert redact(text) == text


def test_secrets_are_told_by_their_keys_and_files_stay_what_they_are() -> None:
    config = {"engine_args": {"hf_token": "12hunter2", "seed": 1}, "max_tokens": 80, "api_key": None}
    assert yaml.safe_load(cleaned("config.yaml", yaml.safe_dump(config).encode(), [])) == {
        "engine_args": {"hf_token": "(hidden)", "seed": 1},
        "max_tokens": 80,
        "api_key": None,
    }
    packages = {"packages": {"tokenizers": "0.22.1", "ray": "2.60.0"}}
    assert json.loads(cleaned("packages.json", json.dumps(packages).encode(), [])) == packages
    damaged = cleaned("state.json", b'{"password": "hunter2", "half', [])
    assert "hunter2" not in damaged
    assert "half" in damaged


def test_only_the_end_of_a_long_log_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "MOST_BYTES", 200)
    lines = "".join(json.dumps({"n": n}) + "\n" for n in range(100))
    kept = [json.loads(line) for line in cleaned("metrics/x.jsonl", lines.encode(), []).splitlines()]
    assert 10 < len(kept) < 30
    assert kept[-1] == {"n": 99}


def test_the_archive_has_config_state_metrics_and_logs_but_no_questions_and_no_answers(tmp_path: Path) -> None:
    config = tiny_config(Path("model"))
    store = RunStore.create_or_resume(str(tmp_path / "run"), config)
    state = RunState("run", config)
    state.judged(0, asdict(HEALTHY) | {"votes": {"gsm8k-7": "what it answered"}})
    store.write_json("state.json", state.to_json())
    assert b"what it answered" in (tmp_path / "run/state.json").read_bytes()
    store.append_metrics("stages", [{"stage": "generate"}])
    store.write_text("logs/coordinator.jsonl", '{"message": "password=hunter2"}\n')
    for name in ("eval/version-0000.json", "traces/round-0000/part-00000.parquet", "versions/0001/adapter.bin"):
        store.write_text(name, "what is 1 + 1?")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text("0123456789abcdef")
    store.write_text("logs/trainer-0.jsonl", '{"message": "got 0123456789abcdef"}\n')
    names = write_archive(store, tmp_path / "out" / "bug.zip", {"HOME": str(tmp_path)})
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["bug.zip"]
    with zipfile.ZipFile(tmp_path / "out" / "bug.zip") as archive:
        assert archive.namelist() == names
        assert set(names) == {
            *("machine.json", "config.yaml", "packages.json", "state.json"),
            *("metrics/stages.jsonl", "logs/coordinator.jsonl", "logs/trainer-0.jsonl"),
        }
        everything = b"".join(archive.read(name) for name in names)
        assert json.loads(archive.read("machine.json"))["packages"]["ray"]
        (known,) = json.loads(archive.read("state.json"))["guard"]
    assert known["vitals"]["votes"] == "(1 left out)"
    for hidden in (b"hunter2", b"what it answered", b"what is 1 + 1?", b"0123456789abcdef"):
        assert hidden not in everything
