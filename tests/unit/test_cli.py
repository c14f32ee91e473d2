"""The command line: quick help, exit codes, and what it makes of a finished run (trained here by the loop)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ray
from safetensors.numpy import load_file
from timing import processor_seconds
from tiny import WATCHED, tiny_config

from rlsf_ray.cli import main
from rlsf_ray.config_loading import dump_config
from rlsf_ray.feeds import keep_feed
from rlsf_ray.run_store import RunStore

MAKING = ("answer", "demo", "eval", "export", "failures", "mix", "plan", "recipes", "report", "run")
OPERATING = ("doctor", "logs", "pause", "resume", "rollback", "status", "stop", "watch")


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def runs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one finished run, `done`, of two rounds over the tiny model."""
    from rlsf_ray.loop import run

    root = tmp_path_factory.mktemp("runs")
    run(tiny_config(tiny), str(root / "done"))
    return root


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    """In under 1 s of processor time."""
    code = (
        "import sys; from rlsf_ray.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'torch', 'ray', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    )
    done, seconds = processor_seconds([sys.executable, "-c", code])
    assert done.stdout.endswith("heavy: []\n")
    assert seconds < 1.0
    for command in (*MAKING, *OPERATING):
        assert f" {command} " in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rlsf_ray", "recipes"], capture_output=True, text=True, check=True)
    assert "rlsf_paper" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "no_such_recipe"],
        ["run", "rlsf", "--set", "loss.betta=1"],
        ["run", "rlsf", "--set", "model.name=/no/such/folder"],
        ["plan", "rlsf", "--set", "rounds=0"],
        ["demo", "--seed", "-1"],
        ["eval", "./no-such-model"],
        ["report", "no-such-run"],
        ["export", "no-such-run", "--what", "pairs", "--to", "x.jsonl"],
        ["export", "no-such-run", "--what", "everything", "--to", "x"],
        ["no-such-command"],
    ],
)
def test_bad_input_ends_with_code_2_and_leaves_nothing_behind(arguments, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(*arguments) == 2
    assert capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_plan_looks_where_run_would(tiny: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """--address, else RAY_ADDRESS, else this machine. Nothing listens at port 1."""
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_config(tiny)))
    recipe = str(tmp_path / "tiny.yaml")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not ray.is_initialized(), "a test left its Ray behind: plan would ask that one"
    assert exit_code("plan", recipe) == 0
    assert "(this machine)" in capsys.readouterr().out
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert exit_code("plan", recipe) == 2
    assert "no Ray answers at 127.0.0.1:1" in capsys.readouterr().err
    assert exit_code("plan", recipe, "--address", "localhost:1") == 2
    assert "no Ray answers at localhost:1" in capsys.readouterr().err


def test_an_error_of_ours_is_one_message_without_traceback(capsys) -> None:
    assert exit_code("plan", "rlsf_papr") == 2
    text = capsys.readouterr().err
    assert text.startswith("error: no recipe and no file is called 'rlsf_papr'")
    assert "Traceback" not in text


def test_sigterm_ends_a_command_as_an_error_would() -> None:
    """So that whatever it has open is closed: an engine has processes of its own."""
    code = (
        "import time; from rlsf_ray import cli\n"
        "def app(**more):\n"
        "    try: print('open', flush=True); time.sleep(60)\n"
        "    finally: print('closed', flush=True)\n"
        "cli.app = app\n"
        "cli.main(['eval'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        process.terminate()
        assert process.communicate(timeout=30)[0] == "closed\n"
    assert process.returncode == 143


def test_what_was_not_foreseen_ends_with_code_4_and_a_traceback(monkeypatch, capsys) -> None:
    monkeypatch.setattr("rlsf_ray.cli_results.open_run", lambda *_: 1 / 0)
    assert exit_code("export", "x", "--what", "pairs", "--to", "x.jsonl") == 4
    assert "Traceback" in capsys.readouterr().err


def test_the_code_of_an_error_is_its_class(capsys) -> None:
    from rlsf_ray import errors

    codes = {"InputError": 2, "NoPairsError": 3, "ServiceError": 4, "DeadlineError": 4, "DrainedError": 5}
    assert {name: getattr(errors, name).exit_code for name in codes} == codes


def test_a_run_resolves_by_name_folder_and_url(runs: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(runs.parent)
    for arguments in (["done", "--root", str(runs)], [str(runs / "done")], [f"file://{runs}/done"]):
        assert exit_code("report", *arguments) == 0
        assert (runs / "done" / "report.html").stat().st_size > 0
    assert "report.html" in capsys.readouterr().out


def test_export_adapter_loads_with_plain_peft(runs: Path, tiny: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    to = tmp_path / "adapter"
    assert exit_code("export", "done", "--root", str(runs), "--what", "adapter", "--to", str(to), "--version", "1") == 0
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), to)
    assert any("lora_B" in name and parameter.abs().max() > 0 for name, parameter in model.named_parameters())


def test_export_merged_is_the_base_with_the_adapter(runs: Path, tiny: Path, tmp_path: Path) -> None:
    """Logits of the merged model equal those of base + adapter (float32, so to rounding of one sum)."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = tmp_path / "merged"
    assert exit_code("export", "done", "--root", str(runs), "--what", "merged", "--to", str(to)) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    tokens = AutoTokenizer.from_pretrained(to)("3 + 4 = ", return_tensors="pt")
    with torch.no_grad():
        plain = base(**tokens).logits
        adapted = PeftModel.from_pretrained(base, runs / "done" / "versions" / "0002")(**tokens).logits
        merged = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)(**tokens).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-4)
    assert not np.allclose(merged.numpy(), plain.numpy(), atol=1e-4)
    assert exit_code("export", "done", "--root", str(runs), "--what", "merged", "--to", str(to)) == 2  # not overwritten


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_export_pairs_is_what_datasets_and_trl_read(runs: Path, tmp_path: Path, name: str) -> None:
    import datasets
    from trl.data_utils import is_conversational

    to = tmp_path / name
    assert exit_code("export", "done", "--root", str(runs), "--what", "pairs", "--to", str(to)) == 0
    kind = "json" if name.endswith("jsonl") else "parquet"
    rows = datasets.load_dataset(kind, data_files=str(to), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) > 0
    assert is_conversational(rows[0])
    assert [message["role"] for message in rows[0]["prompt"]] == ["user"]
    assert rows[0]["chosen"][0]["role"] == rows[0]["rejected"][0]["role"] == "assistant"
    assert rows[0]["chosen"] != rows[0]["rejected"]
    assert not {"answer", "gold"} & set(rows.column_names)


def test_export_knows_the_prompts_that_were_fed(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "done", tmp_path / "fed")
    store = RunStore.open(str(tmp_path / "fed"))
    keep_feed(store, "new.jsonl", b'{"question": "Who?"}', 1)
    rows = store.read_table("pairs", 1).to_pylist()
    store.write_table("pairs", 1, 0, [row | {"prompt_id": "feed-0001-1"} for row in rows])
    to = tmp_path / "pairs.jsonl"
    assert exit_code("export", "fed", "--root", str(tmp_path), "--what", "pairs", "--to", str(to)) == 0
    found = [json.loads(line) for line in to.read_text().splitlines()]
    asked = {row["prompt"][0]["content"] for row in found if row["prompt_id"] == "feed-0001-1"}
    assert asked == {"Who?"}


def test_export_leaves_out_pairs_that_the_guard_has_undone(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "done", tmp_path / "back")
    state = tmp_path / "back" / "state.json"
    went_back = {"rolled_back": {"from": 2, "to": 1, "version": 3}}
    state.write_text(json.dumps(json.loads(state.read_text()) | went_back))
    to = tmp_path / "pairs.jsonl"
    assert exit_code("export", "back", "--root", str(tmp_path), "--what", "pairs", "--to", str(to)) == 0
    assert {json.loads(line)["round"] for line in to.read_text().splitlines()} == {0}


def test_export_pairs_refuses_other_kinds_of_file(runs: Path, tmp_path: Path) -> None:
    assert exit_code("export", "done", "--root", str(runs), "--what", "pairs", "--to", str(tmp_path / "p.csv")) == 2


def test_export_names_the_versions_there_are(runs: Path, tmp_path: Path, capsys) -> None:
    arguments = ["--root", str(runs), "--what", "adapter", "--to", str(tmp_path / "a"), "--version", "9"]
    assert exit_code("export", "done", *arguments) == 2
    assert "no version 9; published: 1, 2" in capsys.readouterr().err


def test_eval_of_a_run_measures_its_newest_version_and_keeps_it(runs: Path, capsys) -> None:
    kept = runs / "done" / "eval" / "version-0002.json"
    before = json.loads(kept.read_text())
    kept.unlink()
    assert exit_code("eval", "done", "--root", str(runs)) == 0
    assert "done, version 2, 6 questions" in " ".join(capsys.readouterr().out.split())
    assert json.loads(kept.read_text())["metrics"] == before["metrics"]


def test_eval_of_a_model_takes_its_probe_set_from_a_recipe(runs: Path, tiny: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "tiny.yaml").write_text(dump_config(tiny_config(tiny)))
    assert exit_code("eval", str(tiny), "--recipe", str(tmp_path / "tiny.yaml"), "--root", str(runs)) == 0
    assert "version 0, 6 questions" in " ".join(capsys.readouterr().out.split())


def test_eval_gives_every_metric_as_json(runs: Path, capsys) -> None:
    assert exit_code("eval", "done", "--version", "0", "--json", "--root", str(runs)) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["of"], found["version"], found["questions"]) == ("done", 0, 6)
    for metric in ("sampled_accuracy", "sampled_accuracy_low", "brier_disparity", "aurc_vote_share", "nll_answer_prob"):
        assert metric in found["metrics"]


@pytest.fixture(scope="module")
def watched(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one finished run, `watched`, that has a calibration."""
    from rlsf_ray.loop import run

    root = tmp_path_factory.mktemp("watched")
    run(tiny_config(tiny, **WATCHED, rounds=1, eval={"samples": 2}), str(root / "watched"))
    return root


def test_answer_prints_a_table_or_json(watched: Path, capsys) -> None:
    arguments = ["answer", "watched", "2 + 3 =", "4 + 4 =", "--root", str(watched), "--most", "2"]
    assert exit_code(*arguments) == 0
    assert "2 + 3 =" in capsys.readouterr().out
    assert exit_code(*arguments, "--json") == 0
    replies = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [reply["question"] for reply in replies] == ["2 + 3 =", "4 + 4 ="]
    assert all(0.0 <= reply["confidence"] <= 1.0 and 1 <= reply["traces"] <= 2 for reply in replies)
    assert {reply["version"] for reply in replies} == {1}
    assert exit_code(*arguments, "--sure", "1.5") == 2


def test_mix_measures_each_alpha_and_the_report_shows_it(watched: Path, capsys) -> None:
    arguments = ["mix", "watched", "--root", str(watched), "--alphas"]
    assert exit_code(*arguments, "0,1") == 0
    assert "alpha" in capsys.readouterr().out
    points = json.loads((watched / "watched" / "mix.json").read_text())["points"]
    assert [point["alpha"] for point in points] == [0.0, 1.0]
    base, last = (json.loads((watched / f"watched/eval/version-000{v}.json").read_text()) for v in (0, 1))
    for point, one in zip(points, (base, last), strict=True):
        for figure in ("sampled_accuracy", "ece_calibrated"):
            assert point["metrics"][figure] == pytest.approx(one["metrics"][figure], abs=1e-6)
    assert exit_code(*arguments, "0,x") == 2
    assert exit_code("report", "watched", "--root", str(watched), "--beside", "watched") == 0
    assert "along alpha" in (watched / "watched" / "report.html").read_text()


def test_export_scales_the_adapter_and_leaves_its_calibration_behind(watched: Path, tmp_path: Path) -> None:
    arguments = ["export", "watched", "--root", str(watched), "--what", "adapter", "--to"]
    assert exit_code(*arguments, str(tmp_path / "whole")) == 0
    assert exit_code(*arguments, str(tmp_path / "half"), "--alpha", "0.5") == 0
    whole, half = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "half"))
    assert any(array.any() for name, array in whole.items() if "lora_B" in name)
    for name, array in whole.items():
        np.testing.assert_allclose(half[name], array * (0.5 if "lora_B" in name else 1.0))
    assert (tmp_path / "whole" / "calibration.json").exists()
    assert not (tmp_path / "half" / "calibration.json").exists()


def test_the_logs_of_a_run_are_read_by_role_and_from_the_end(runs: Path, capsys) -> None:
    folder = runs / "done" / "logs"
    folder.mkdir()
    row = {"level": "INFO", "run": "done", "logger": "actors.x"}
    for late, role in enumerate(("coordinator", "trainer-0")):
        rows = [row | {"time": n + late / 2, "role": role, "message": f"{role} {n}"} for n in range(3)]
        (folder / f"{role}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert exit_code("logs", "done", "--root", str(runs), "--last", "3") == 0
    assert [line.rpartition(": ")[2] for line in capsys.readouterr().out.splitlines()] == [
        "trainer-0 1",
        "coordinator 2",
        "trainer-0 2",
    ]
    assert exit_code("logs", "done", "--root", str(runs), "--role", "trainer-0") == 0
    assert capsys.readouterr().out.count("trainer-0 ") == 3
    assert exit_code("logs", "done", "--root", str(runs), "--role", "trainer") == 2
    assert "expected one of coordinator, trainer-0" in capsys.readouterr().err
