"""One archive for a bug report: what a run says of itself and of its machine. No questions, no answers, no secrets."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlsf_ray.encoding import to_json
from rlsf_ray.errors import InputError
from rlsf_ray.kept_config import packages
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore

FILES = ("config.yaml", "packages.json", "state.json", "summary.json", "nonfinite.json")
FOLDERS = ("metrics", "logs")
MOST_BYTES = 4 << 20  # of each file: its end
ASK_S = 20.0  # nvidia-smi may hang where a driver is broken

HIDDEN = "(hidden)"
_NAME = r"[\w.-]*(?:token(?!iz)|secret|passw|api_?-?key|credential|webhook)[\w.-]*"
_SECRETS = [  # each with what stays of it, in groups
    re.compile(r"(?<=://)[^/\s@\"']+(?=@)"),  # a URL's user and password
    re.compile(r"(?i)(?<=[?&])([\w-]*(?:token|key|secret|signature|sig|password)=)[^&\s\"']+"),
    re.compile(r"(https://hooks\.[^/\s\"']+/)[^\s\"']+"),
    re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abps]-|AKIA|ASIA|eyJ)[A-Za-z0-9_./+=-]{12,}"),
    # name: value, in YAML, JSON or a shell's form; a number is none
    re.compile(rf"(?i)(\b{_NAME}[\"']?\s*[:=]\s*\")(?![-+\d.])[^\"]+"),
    re.compile(rf"(?i)(\b{_NAME}[\"']?\s*[:=]\s*')(?![-+\d.])[^']+"),
    re.compile(rf"(?i)(\b{_NAME}[\"']?\s*[:=]\s*)(?![-+\d.\[{{\"'(\s]|null|true|false|none)[^\s,}}\]\"']+"),
]


def write_archive(store: RunStore, to: Path, environment: Mapping[str, str] = os.environ) -> list[str]:
    """Make the zip file `to`; returns the names in it. Raises InputError if it is there already."""
    if to.exists():
        raise InputError(f"--to {to}: is there already; expected a new file; give another name")
    to.parent.mkdir(parents=True, exist_ok=True)
    names = []
    with zipfile.ZipFile(to, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in [("machine.json", to_json(machine())), *_files(store)]:
            archive.writestr(name, redact(data[-MOST_BYTES:].decode(errors="replace"), environment))
            names.append(name)
    return names


def _files(store: RunStore) -> Iterator[tuple[str, bytes]]:
    inside = [f"{folder}/{name}" for folder in FOLDERS for name in store.names(folder)]
    for name in (*FILES, *inside):
        data = store.storage.read(name)
        if data is not None:
            yield name, data


def machine() -> Json:
    """Of this process: versions, processors, memory, GPUs, free space. No names of hosts or users."""
    disk = shutil.disk_usage(".")
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        **packages(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processors": os.cpu_count(),
        "memory_gb": round(pages / 2**30, 1),
        "disk_free_gb": round(disk.free / 2**30, 1),
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


def redact(text: str, environment: Mapping[str, str]) -> str:
    """`text` without what looks like a secret: known forms, named values, values of such environment variables."""
    for name, value in environment.items():
        if len(value) >= 8 and re.fullmatch(rf"(?i){_NAME}|.*_key", name):
            text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\1{HIDDEN}" if pattern.groups else HIDDEN, text)
    return text
