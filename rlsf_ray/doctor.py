"""One archive for a bug report: what a run says of itself and of its machine. No questions, no answers, no secrets."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from rlsf_ray.access import token_path
from rlsf_ray.encoding import to_json
from rlsf_ray.errors import InputError
from rlsf_ray.kept_config import packages
from rlsf_ray.records import Json
from rlsf_ray.redaction import HIDDEN, PLAIN_VALUE, SECRET_NAME, redact
from rlsf_ray.run_store import RunStore

FILES = ("config.yaml", "packages.json", "state.json", "summary.json", "nonfinite.json")
FOLDERS = ("metrics", "logs")
ANSWERS = {"votes"}  # keys whose values are what the model has answered
MOST_BYTES = 4 << 20  # of each file of JSON Lines: its end
ASK_S = 20.0  # nvidia-smi may hang where a driver is broken


def write_archive(store: RunStore, to: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Make the zip file `to`; returns the names in it. Raises InputError if it is there already."""
    if to.exists():
        raise InputError(f"--to {to}: is there already; expected a new file; give another name")
    to.parent.mkdir(parents=True, exist_ok=True)
    secrets = _known_secrets(environment)
    names, half = [], to.with_name(f".{to.name}.part")
    try:
        with zipfile.ZipFile(half, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in [("machine.json", to_json(machine(store))), *_files(store)]:
                archive.writestr(name, cleaned(name, data, secrets))
                names.append(name)
        half.rename(to)
    finally:
        half.unlink(missing_ok=True)
    return names


def _files(store: RunStore) -> Iterator[tuple[str, bytes]]:
    inside = [f"{folder}/{name}" for folder in FOLDERS for name in store.names(folder)]
    for name in (*FILES, *inside):
        data = store.storage.read(name)
        if data is not None:
            yield name, data


def cleaned(name: str, data: bytes, secrets: Collection[str]) -> str:
    """A file's text without answers and secrets, told by its keys; of JSON Lines the last few megabytes."""
    text = data.decode(errors="replace")
    try:
        if name.endswith(".yaml"):
            return str(yaml.safe_dump(_clean(yaml.safe_load(text), secrets), sort_keys=False))
        if name.endswith(".json"):
            return json.dumps(_clean(json.loads(text), secrets), indent=2)
    except (ValueError, yaml.YAMLError):  # damaged: that may be the bug
        return redact(text, secrets)
    lines, size = list[str](), 0
    for line in reversed(text.split("\n")):
        size += len(line)
        if size > MOST_BYTES:
            break
        lines.append(_clean_line(line, secrets))
    return "\n".join(reversed(lines))


def _clean_line(line: str, secrets: Collection[str]) -> str:
    try:
        return json.dumps(_clean(json.loads(line), secrets)) if line else line
    except ValueError:
        return redact(line, secrets)


def _clean(value: Any, secrets: Collection[str]) -> Any:
    if isinstance(value, dict):
        return {key: _clean_entry(str(key), inner, secrets) for key, inner in value.items()}
    if isinstance(value, list):
        return [_clean(inner, secrets) for inner in value]
    return redact(value, secrets) if isinstance(value, str) else value


def _clean_entry(key: str, value: Any, secrets: Collection[str]) -> Any:
    if key in ANSWERS:
        return f"({len(value)} left out)" if isinstance(value, dict | list) else HIDDEN
    secret = isinstance(value, str) and value and re.fullmatch(rf"(?i){SECRET_NAME}", key)
    return HIDDEN if secret and not re.fullmatch(PLAIN_VALUE, value) else _clean(value, secrets)


def _known_secrets(environment: Mapping[str, str]) -> list[str]:
    """Values of environment variables with such names, and Ray's token."""
    found = [value for name, value in environment.items() if re.fullmatch(rf"(?i){SECRET_NAME}|.*_key", name)]
    with suppress(OSError, RuntimeError):  # a user without a home has none
        found.append(token_path(environment).expanduser().read_text().strip())
    return [value for value in found if len(value) >= 8]


def machine(store: RunStore) -> Json:
    """Of this process: versions, processors, memory, GPUs, free space. No names of hosts or users."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **packages(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
        "disk_used": store.storage.used(),
        "gpus": _gpus(),
    }


def _gpus() -> str:
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True).stdout.strip()
    except FileNotFoundError:
        return "none"
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi failed: {type(error).__name__}"
