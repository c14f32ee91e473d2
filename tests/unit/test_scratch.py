"""Folders of killed engines are removed by the next one, those of living ones stay."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from rlsf_ray.engines.scratch import Scratch

OTHER = "import sys; from rlsf_ray.engines.scratch import Scratch; s = Scratch(); print(s.path, flush=True); input()"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_a_folder_goes_with_its_owner_or_with_the_next_one_after_a_kill() -> None:
    other = subprocess.Popen([sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout
    left = Path(other.stdout.readline().strip())
    (left / "model.safetensors").write_text("large")
    mine = Scratch()
    assert left.exists()  # its owner lives
    other.kill()
    other.wait(30)
    second = Scratch()
    assert not left.exists()
    assert mine.path.exists()
    for one in (mine, second):
        one.close()
        assert not one.path.exists()


def test_a_folder_that_is_only_being_made_stays(tmp_path: Path) -> None:
    young = tmp_path / "rlsf-versions-young"
    young.mkdir()
    Scratch().close()
    assert young.exists()
