"""Bad input, as a user would give it: each case ends with its exit code and one message that says what to do.

Nothing heavy starts for any of them: the cases run in one process, in seconds.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
from spoilt import Make, Place

from rlsf_ray.cli import main

PLANTED = Path(tempfile.gettempdir()) / f"rlsf-planted-{os.getpid()}"


def planted(p: Place) -> list[str]:
    """A published version whose adapter is a pickle that makes a file when it is read as one."""
    folder = p.begun() / "versions" / "0001"
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (folder / name).write_bytes(b"cos\nsystem\n(S'touch " + str(PLANTED).encode() + b"'\ntR.")
    (folder / "version.json").write_text(json.dumps({"version": 1, "round": 0, "step": 1, "checksum": "", "nbytes": 1}))
    return [*EXPORT, "--root", str(p.run.parent)]


GOOD = json.dumps({"question": "1 + 1 =", "answer": "2"})
EXPORT = ("export", "begun", "--what", "adapter", "--to", "out")

# what is wrong: (command, exit code, words of the message)
COMMANDS: dict[str, tuple[Make, int, str]] = {
    "no command": (lambda p: ["no-such-command"], 2, "No such command"),
    "no recipe": (lambda p: ["run"], 2, "Missing argument"),
    "a recipe nobody knows": (lambda p: ["plan", "rlsf_papr"], 2, "did you mean 'rlsf_paper'"),
    "a recipe file that is not there": (
        lambda p: ["plan", "./mine.yaml"],
        2,
        "no recipe and no file is called './mine.yaml'",
    ),
    "a folder for a recipe": (lambda p: ["plan", str(p.folder)], 2, "no recipe and no file is called"),
    "--set without a value": (lambda p: p.plan("rounds"), 2, "expected key=value"),
    "--set without a key": (lambda p: p.plan("=3"), 2, "expected key=value"),
    "a seed that is no number": (lambda p: ["plan", "rlsf", "--seed", "one"], 2, "Invalid value for '--seed'"),
    "a seed below 0": (lambda p: ["plan", "rlsf", "--seed", "-1"], 2, "greater than or equal to 0, got -1"),
    "nobody answers": (lambda p: [*p.plan(), "--address", "127.0.0.1:1"], 2, "no Ray answers at 127.0.0.1:1"),
    "a run to hold where nobody answers": (
        lambda p: ["pause", "x", "--address", "127.0.0.1:1"],
        2,
        "no Ray answers at 127.0.0.1:1",
    ),
    "a feed that is not there": (lambda p: ["feed", "x", "nothing.jsonl"], 2, "nothing.jsonl cannot be read"),
    "a folder for a feed": (lambda p: ["feed", "x", str(p.folder)], 2, "cannot be read"),
    "a feed for nobody": (
        lambda p: ["feed", "x", str(p.file("new.jsonl", GOOD)), "--address", "127.0.0.1:1"],
        2,
        "no Ray answers at 127.0.0.1:1",
    ),
    "hours below 0": (lambda p: ["run", str(p.recipe), "--max-hours", "-1"], 2, "Invalid value for '--max-hours'"),
    "no tokens": (lambda p: ["run", str(p.recipe), "--max-tokens", "0"], 2, "Invalid value for '--max-tokens'"),
    "a version below 0 to go back to": (lambda p: ["rollback", "x", "--", "-1"], 2, "Invalid value for "),
    "a Ray Client's address": (lambda p: [*p.plan(), "--address", "ray://x:10001"], 2, "use its host and port"),
    "a run nobody knows": (lambda p: ["report", "nobody"], 2, "no run at"),
    "a model nobody knows": (
        lambda p: ["eval", "./nobody"],
        2,
        "got model.name='./nobody', expected an existing folder",
    ),
    "a version of a model": (lambda p: ["eval", str(p.model), "--version", "2"], 2, "is not a run"),
    "an unknown kind of export": (
        lambda p: ["export", "x", "--what", "all", "--to", "y"],
        2,
        "Invalid value for '--what'",
    ),
    "an alpha that is no number": (lambda p: ["mix", "x", "--alphas", "0,one"], 2, "numbers between commas"),
    "a password in the root": (
        lambda p: [*p.plan(), "--like", "x", "--root", "s3://me:swordfish@bucket/runs"],
        2,
        "got a URL with a user or a password (not shown)",
    ),
    "an infinite alpha": (lambda p: ["mix", "x", "--alphas", "0,inf"], 2, "numbers between commas"),
    "an alpha that overflows": (lambda p: ["mix", "x", "--alphas", "0,1e39"], 2, "none beyond 100"),
    "an option of one run for two": (lambda p: ["mix", "a", "b", "--version", "1"], 2, "--version: is for one run"),
    "an option of two for one run": (lambda p: ["mix", "a", "--train"], 2, "--train: is for two models"),
    "a confidence above 1": (lambda p: ["answer", "x", "?", "--sure", "2"], 2, "Invalid value for '--sure'"),
    "no traces at all": (lambda p: ["answer", "x", "?", "--most", "0"], 2, "Invalid value for '--most'"),
    "a share above 1": (lambda p: [*p.failures(), "--most", "2"], 2, "expected a share of at least 0 and below 1"),
    "a share of all": (lambda p: [*p.failures(), "--most", "1"], 2, "expected a share of at least 0 and below 1"),
    "a share that is no number": (lambda p: [*p.failures(), "--most", "nan"], 2, "--most is nan, expected a share"),
    "failures without checks": (lambda p: p.failures(), 2, "have no check, so whether the model fails them"),
    "failures over a file that was there": (
        lambda p: ["failures", str(p.recipe), "--to", str(p.file("mine.jsonl", GOOD))],
        2,
        "give a new file",
    ),
}
CONFIG: dict[str, tuple[Make, int, str]] = {
    "a key nobody knows": (lambda p: p.plan("loss.betta=1"), 2, "did you mean 'beta'"),
    "a section nobody knows": (lambda p: p.plan("los.beta=1"), 2, "did you mean 'loss'"),
    "a text for a number": (lambda p: p.plan("rounds=two"), 2, "rounds: input should be a valid integer"),
    "a token for the engine": (
        lambda p: p.plan("engine=vllm", "cluster.generators.threads=0", "engine_args.hf_token=hf_swordfish"),
        2,
        "got a text for hf_token (not shown)",
    ),
    "a password in the address of a file": (
        lambda p: p.plan("data.train=[{kind: file, path: 'https://me:swordfish@host/x.jsonl'}]"),
        2,
        "got a URL with a user or a password (not shown)",
    ),
    "no rounds": (lambda p: p.plan("rounds=0"), 2, "rounds: input should be greater than 0, got 0"),
    "a loss that is nan": (lambda p: p.plan("loss.beta=.nan"), 2, "loss.beta: input should be a finite number"),
    "an unknown signal": (lambda p: p.plan("signal=answer_prb"), 2, "did you mean 'answer_prob'?"),
    "an unknown pair rule": (lambda p: p.plan("pairs.rule=vote"), 2, "did you mean 'voted'"),
    "an unknown rollout": (lambda p: p.plan("rollout.name=reflect"), 2, "did you mean 'reflect_retry'?"),
    "one trace a prompt": (
        lambda p: p.plan("rollout.traces=1"),
        2,
        "rollout.traces: input should be greater than or equal to 2",
    ),
    "an unknown answer format": (lambda p: p.plan("data.answer=numbr"), 2, "did you mean 'number'?"),
    "a broken pattern": (lambda p: p.plan("data.answer='regex:('"), 2, "does not compile"),
    "YAML that is none": (lambda p: p.plan("data.train=[{"), 2, "not valid YAML"),
    "a module nobody has": (lambda p: p.plan("signal=nobody.at:home"), 2, "no module called nobody.at"),
    "engine arguments without vLLM": (lambda p: p.plan("engine_args={a: 1}"), 2, "set engine: vllm"),
    "advantages that CoT-decoding cannot have": (
        lambda p: p.plan("rollout.name=cot_decoding", "advantages={}"),
        2,
        "set rollout.name: sample",
    ),
    "a reward model without advantages": (lambda p: p.plan("reward_model={}"), 2, "set advantages: {}"),
    "a recipe file that is no mapping": (
        lambda p: ["plan", str(p.file("r.yaml", "- 1"))],
        2,
        "expected a mapping of keys, got list",
    ),
    "a recipe file that is no YAML": (
        lambda p: [
            "plan",
            str(p.file("r.yaml", "a: [")),
        ],
        2,
        "not valid YAML",
    ),
    "a recipe on a base nobody knows": (
        lambda p: ["plan", str(p.file("r.yaml", "base: rlsff"))],
        2,
        "no recipe and no file is called 'rlsff'",
    ),
    "a recipe on itself": (
        lambda p: ["plan", str(p.file("r.yaml", f"base: {p.folder}/r.yaml"))],
        2,
        "goes round in a circle",
    ),
}
DATA: dict[str, tuple[Make, int, str]] = {
    "no such file": (lambda p: p.plan("data.train=[{kind: file, path: no.jsonl}]"), 2, "does not exist"),
    "a file without rows": (lambda p: p.data("d.jsonl", ""), 2, "is empty"),
    "a line that is no JSON": (lambda p: p.data("d.jsonl", GOOD + "\n{'a': 1}"), 2, "line 2: not valid JSON"),
    "a line that is no object": (lambda p: p.data("d.jsonl", "[1]"), 2, "expected one object"),
    "no such column": (lambda p: p.data("d.jsonl", GOOD, ", question: quest"), 2, "did you mean 'question'"),
    "an empty question": (
        lambda p: p.data("d.jsonl", '{"question": " "}'),
        2,
        "row 1: column 'question' is ' ', expected a non-empty",
    ),
    "no question": (
        lambda p: p.data("d.jsonl", '{"question": null}'),
        2,
        "row 1: column 'question' is None, expected a non-empty",
    ),
    "one id twice": (lambda p: p.data("d.jsonl", f"{GOOD}\n{GOOD}", ", id: answer"), 2, "row 1 and in row 2"),
    "a CSV file": (lambda p: p.data("d.csv", "a,b"), 2, "got the ending '.csv'"),
    "a Parquet file that is none": (lambda p: p.data("d.parquet", "PAR?"), 2, "not a readable Parquet file"),
    "messages that end with the model": (
        lambda p: p.data("d.jsonl", '{"m": [{"role": "assistant", "content": "x"}]}', ", messages: m"),
        2,
        "ends with a user message",
    ),
    "a label as a check": (
        lambda p: p.data(
            "d.jsonl", '{"question": "?", "c": {"kind": "exact", "data": {"accepted": ["1"]}}}', ", check: c"
        ),
        2,
        "set labels: true",
    ),
    "a check nobody knows": (
        lambda p: p.data("d.jsonl", '{"question": "?", "c": {"kind": "magic", "data": {}}}', ", check: c"),
        2,
        "no check is called 'magic'",
    ),
    "fewer at most than always": (
        lambda p: p.plan("cluster.generators.count=3", "cluster.generators.most=2"),
        2,
        "expected most to be no less than count",
    ),
    "a family nobody knows": (
        lambda p: p.plan("data.train=[{kind: reasoning_gym, name: chain_summ, count: 4}]"),
        2,
        "did you mean 'chain_sum'?",
    ),
    "an endless source without a count": (
        lambda p: p.plan("data.train=[{kind: reasoning_gym, name: chain_sum}]"),
        2,
        "set count: 100",
    ),
    "a probe set without answers": (
        lambda p: p.plan(f"data.probe=[{{kind: file, path: {p.file('d.jsonl', GOOD)}, answer: null}}]"),
        2,
        "a probe source needs gold answers",
    ),
    "nothing left to train on": (
        lambda p: [*p.data("d.jsonl", GOOD), "--set", f"data.probe=[{{kind: file, path: {p.folder}/d.jsonl}}]"],
        2,
        "no training prompt is left",
    ),
    "a URL of no file system": (
        lambda p: p.plan("data.train=[{kind: file, path: 'nosuch://x/y.jsonl'}]"),
        2,
        "cannot be opened",
    ),
}
MODELS: dict[str, tuple[Make, int, str]] = {
    "no such folder": (
        lambda p: p.plan("model.name=/no/such/folder"),
        2,
        "got model.name='/no/such/folder', expected an existing folder",
    ),
    "a folder without a model": (lambda p: p.plan(f"model.name={p.folder}"), 2, "has no config.json"),
    "a config.json that is no JSON": (
        lambda p: p.model_file("config.json", "{"),
        2,
        "expected a JSON object as save_pretrained writes it",
    ),
    "a model that does not write": (
        lambda p: p.model_file("config.json", '{"architectures": ["BertModel"]}'),
        2,
        "not a causal language model",
    ),
    "no weights": (lambda p: p.model_file("model.safetensors", None), 2, "no weights in model folder"),
    "no tokenizer": (lambda p: p.model_file("tokenizer.json", None), 2, "no tokenizer in model folder"),
    "a tokenizer that is none": (lambda p: p.model_file("tokenizer.json", "{}"), 2, "save the tokenizer again"),
    "no chat template": (lambda p: p.model_file("chat_template.jinja", None), 2, "set model.chat=plain"),
    "a template that refuses": (
        lambda p: p.model_file("chat_template.jinja", "{{ raise_exception('no') }}"),
        2,
        "refuses the prompts",
    ),
    "a template that is none": (lambda p: p.model_file("chat_template.jinja", "{% for %}"), 2, "is no Jinja template"),
    "prompts longer than the context": (
        lambda p: p.plan("rollout.max_tokens=508"),
        2,
        "do not fit the model's context",
    ),
}
RUNS: dict[str, tuple[Make, int, str]] = {
    "a run of other settings": (
        lambda p: ["run", str(p.recipe), "--root", str(p.begun().parent), "--run", "begun", "--seed", "3"],
        2,
        "seed: got 3, expected 0",
    ),
    "a config.yaml that is no YAML": (
        lambda p: p.of_run("config.yaml", "a: [", "report", "begun"),
        4,
        "config.yaml is damaged or was only half written",
    ),
    "a config.yaml of another program": (
        lambda p: p.of_run("config.yaml", "a: 1", "report", "begun"),
        2,
        "is not a config of this version",
    ),
    "a state.json cut in half": (
        lambda p: p.of_run("state.json", '{"a', "report", "begun"),
        4,
        "state.json is damaged or was only half written",
    ),
    "a measure cut in half": (
        lambda p: p.of_run("eval/version-0000.json", '{"a', "report", "begun"),
        4,
        "version-0000.json is damaged or was only half written",
    ),
    "a table that is none": (
        lambda p: p.of_run(
            "pairs/round-0000/part-00000.parquet", "PAR?", "export", "begun", "--what", "pairs", "--to", "x.jsonl"
        ),
        4,
        "part-00000.parquet is damaged or was only half written",
    ),
    "logs of a role that has none": (
        lambda p: p.of_run("note", "", "logs", "begun", "--role", "generator"),
        2,
        "has no log of that; expected one of none",
    ),
    "an archive that is there": (
        lambda p: p.of_run("note", "", "doctor", "begun", "--to", str(p.recipe)),
        2,
        "is there already; expected a new file",
    ),
    "a run directory of a later form": (
        lambda p: p.of_run("packages.json", '{"schema": 99, "packages": {"rlsf-ray": "7.0"}}', *EXPORT),
        2,
        "is a run directory of form 99, expected at most 1; open it with the rlsf-ray that made it (7.0)",
    ),
    "packages.json is a list": (lambda p: p.of_run("packages.json", "[]", *EXPORT), 4, "packages.json is damaged"),
    "nothing published yet": (lambda p: p.of_run("note", "", *EXPORT), 2, "published no version yet"),
    "a version that is not there": (
        lambda p: p.of_run("versions/0001/version.json", "{}", *EXPORT, "--version", "7"),
        2,
        "no version 7; published: 1",
    ),
    "an adapter that is missing": (
        lambda p: p.of_run("versions/0001/version.json", "{}", *EXPORT),
        4,
        "adapter_model.safetensors is damaged",
    ),
    "a pickle in an adapter's place": (planted, 4, "not a safetensors file"),
    "an answer from a run without versions": (
        lambda p: p.of_run("note", "", "answer", "begun", "1 + 1 ="),
        2,
        "has published no version yet",
    ),
    "no pairs to export": (
        lambda p: p.of_run("note", "", "export", "begun", "--what", "pairs", "--to", "x.jsonl"),
        2,
        "holds no pairs",
    ),
    "an export of an unknown ending": (
        lambda p: p.of_run("note", "", "export", "begun", "--what", "pairs", "--to", "x.csv"),
        2,
        "ends in .jsonl or .parquet, got x.csv",
    ),
    "a name that leaves the root": (
        lambda p: ["run", str(p.recipe), "--root", str(p.folder / "runs"), "--run", "../out"],
        2,
        "got '../out'; choose another name",
    ),
    "a name with a slash": (
        lambda p: ["run", str(p.recipe), "--root", str(p.folder / "runs"), "--run", "a/b"],
        2,
        "got 'a/b'; choose another name",
    ),
    "an empty name": (
        lambda p: ["run", str(p.recipe), "--root", str(p.folder / "runs"), "--run", ""],
        2,
        "got ''; choose another name",
    ),
    "a root that no file system serves": (
        lambda p: ["report", "x", "--root", "nosuch://bucket"],
        2,
        "no file system for the run directory nosuch://",
    ),
    "a name no file can have": (lambda p: ["report", "a\0b"], 2, "must have a name without NUL"),
}
CASES: dict[str, tuple[Make, int, str]] = {
    f"{kind}: {name}": case
    for kind, cases in (("command", COMMANDS), ("config", CONFIG), ("data", DATA), ("model", MODELS), ("run", RUNS))
    for name, case in cases.items()
}


def test_there_are_at_least_sixty() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_named_with_its_cure(name: str, tiny: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    make, code, words = CASES[name]
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (tmp_path / "place").mkdir()
    arguments = make(Place(tmp_path / "place", tiny))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == code, told
    assert words in told
    assert "Traceback" not in told
    assert list((tmp_path / "work").iterdir()) == []
    assert not PLANTED.exists()
