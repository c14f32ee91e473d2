"""Python that lies in a model's folder is never run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines.models import load_model, load_tokenizer
from rlsf_ray.errors import InputError


def test_code_in_a_model_s_folder_is_not_run(tiny: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(tiny, folder)
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w')\n")
    _change(folder / "config.json", model_type="own", auto_map={"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"})
    _change(folder / "tokenizer_config.json", tokenizer_class="Own", auto_map={"AutoTokenizer": ["own.C", None]})
    config = ModelConfig(name=str(folder), dtype="float32")
    with pytest.raises(InputError, match="trust_remote_code"):
        load_model(config, device="cpu")
    with pytest.raises(InputError, match="trust_remote_code"):
        load_tokenizer(config)
    assert not ran.exists()


def _change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
