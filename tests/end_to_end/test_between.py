"""Mixtures of two models: their weights, what is measured, and a run from each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from advantage_runs import CERTAINTY
from tiny import tiny_config, tiny_model

from rlsf_ray import loop
from rlsf_ray.between import between, draw, gain, write_mixture
from rlsf_ray.config_sections import ModelConfig
from rlsf_ray.engines.models import generation_config, load_model, load_tokenizer
from rlsf_ray.engines.tokens import eos_ids
from rlsf_ray.errors import InputError
from rlsf_ray.run_store import RunStore


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that was taught for a third of the time: less sure."""
    return tiny_model(tmp_path_factory.mktemp("other"), seed=1, steps=40)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(ModelConfig(name=str(folder), dtype="float32"), device="cpu").named_parameters())


def test_a_mixture_is_the_weighted_mean_of_the_weights(tiny: Path, other: Path, tmp_path: Path) -> None:
    a, b, mixed = weights(tiny), weights(other), weights(write_mixture(tiny, other, 0.25, tmp_path / "mixed"))
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * a[name] + 0.25 * b[name])


def test_models_of_two_shapes_are_refused(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny)
    config = model.config
    config.intermediate_size = 48
    wider = type(model)(config)
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(InputError, match="cannot be mixed"):
        write_mixture(tiny, tmp_path / "wider", 0.5, tmp_path / "mixed")


def test_a_mixture_ends_where_either_model_does_and_talks_as_either_can(
    tiny: Path, other: Path, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "chat_template.jinja").unlink()
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 7}))
    taught = load_tokenizer(ModelConfig(name=str(other)))
    for a, b in ((base, other), (other, base)):
        mixed = write_mixture(a, b, 0.5, tmp_path / "mixed")
        tokenizer = load_tokenizer(ModelConfig(name=str(mixed)))
        assert tokenizer.chat_template == taught.chat_template
        assert eos_ids(generation_config(mixed), tokenizer) == {7, taught.eos_token_id}


def test_models_that_number_tokens_differently_are_refused(tiny: Path, tmp_path: Path) -> None:
    swapped = Path(shutil.copytree(tiny, tmp_path / "swapped"))
    kept = json.loads((swapped / "tokenizer.json").read_text())
    vocabulary = kept["model"]["vocab"]
    one, two = sorted(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (swapped / "tokenizer.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match="number 2 tokens differently"):
        write_mixture(tiny, swapped, 0.5, tmp_path / "mixed")


def test_each_mixture_is_measured_and_trained(tiny: Path, other: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **CERTAINTY, rounds=1)
    told: list[str] = []
    found = between(str(tiny), str(other), [1, 0], config, tmp_path / "out", train=True, tell=told.append)
    assert [point["alpha"] for point in found["points"]] == [0, 1]
    taught, less = (point["metrics"]["surprisal"] for point in found["points"])
    assert taught < less
    assert all(isinstance(gain(point), float) for point in found["points"])
    picture = draw(found, tmp_path / "out")
    assert picture is not None
    assert picture.read_text().count("<svg") == 1
    assert json.loads((tmp_path / "out" / "between.json").read_text()) == json.loads(json.dumps(found))
    assert any("alpha 1: round 1" in text for text in told)


def test_a_run_is_mixed_by_its_merged_model(tiny: Path, tmp_path: Path) -> None:
    config: Any = tiny_config(tiny, **CERTAINTY, rounds=1)
    loop.run(config, str(tmp_path / "run"))
    run = RunStore.open(str(tmp_path / "run"))
    found = between(str(tiny), run, [0, 1], config, tmp_path / "out", train=False)
    assert found["points"][0]["metrics"] != found["points"][1]["metrics"]
    assert [point["after"] for point in found["points"]] == [None, None]
    assert draw(found, tmp_path / "out") is None


def test_a_folder_with_mixtures_of_other_models_is_refused(tiny: Path, other: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny, **CERTAINTY, rounds=1)
    between(str(tiny), str(other), [0], config, tmp_path / "out", train=False)
    between(str(tiny), str(other), [0], config, tmp_path / "out", train=False)  # the same again is fine
    with pytest.raises(InputError, match="mixtures of other models"):
        between(str(other), str(tiny), [0], config, tmp_path / "out", train=False)


def test_a_mixture_that_cannot_be_trained_says_why_and_the_others_count(tiny: Path, tmp_path: Path) -> None:
    """A model that never ends its traces gives no scores."""
    silent = tiny_model(tmp_path / "silent", seed=1, steps=0)
    config = tiny_config(tiny, **CERTAINTY, rounds=1)
    found = between(str(tiny), str(silent), [0, 1], config, tmp_path / "out", train=True)
    taught, untaught = found["points"]
    assert taught["after"] is not None
    assert untaught["after"] is None
    assert "no prompt gave traces with different scores" in untaught["error"]
    assert draw(found, tmp_path / "out") is not None


def test_without_a_probe_set_nothing_can_be_measured(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no probe set"):
        between(str(tiny), str(tiny), [0], tiny_config(tiny, data={"probe": []}), tmp_path, train=False)


def test_the_command_writes_table_and_picture(
    tiny: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rlsf_ray.cli import main
    from rlsf_ray.config_loading import dump_config

    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(dump_config(tiny_config(tiny, **CERTAINTY, rounds=1)))
    arguments = [
        "mix",
        str(tiny),
        str(other),
        "--alphas",
        "0,1",
        "--recipe",
        str(recipe),
        "--to",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None)
    assert "entropy" in capsys.readouterr().out
    assert (tmp_path / "out" / "between.json").exists()
    assert not (tmp_path / "out" / "between.svg").exists(), "nothing was trained"
    for idle in (["--version", "1"], ["--alphas", "x"]):
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *idle])
        assert ended.value.code == 2
    with pytest.raises(SystemExit) as ended:
        main(["mix", str(tiny), "--train"])
    assert ended.value.code == 2
