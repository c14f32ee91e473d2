"""Published adapters: exact, checked on reading, and what plain PEFT loads."""

import json
import uuid
from pathlib import Path

import numpy as np
import pytest
from report_data import bare_run

from rlsf_ray.adapters import canaries_from_bytes, canaries_to_bytes
from rlsf_ray.errors import StorageError, WeightsError
from rlsf_ray.records import Canary
from rlsf_ray.run_store import RunStore, checksum


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> RunStore:
    return bare_run(str(tmp_path / "run") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run")


def make_adapter(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    prefix = "base_model.model.model.layers.0.self_attn"
    shapes = {"q_proj.lora_A": (2, 8), "q_proj.lora_B": (8, 2), "v_proj.lora_A": (2, 8), "v_proj.lora_B": (8, 2)}
    return {f"{prefix}.{name}.weight": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_checksum_depends_on_names_shapes_types_and_content_only():
    adapter = make_adapter()
    assert checksum(dict(reversed(adapter.items()))) == checksum(adapter)
    assert checksum({name: np.asfortranarray(array) for name, array in adapter.items()}) == checksum(adapter)
    name = next(iter(adapter))
    for changed in (adapter[name].reshape(-1), adapter[name].astype(np.float64), adapter[name] + 1e-6):
        assert checksum({**adapter, name: changed}) != checksum(adapter)
    assert checksum({f"{key}x": array for key, array in adapter.items()}) != checksum(adapter)


def test_an_adapter_comes_back_with_its_version_and_the_peft_config(store):
    adapter = make_adapter()
    made = store.write_adapter(1, adapter, "some/base", store.config)
    back, found = store.read_adapter(1)
    assert found == made
    assert made.path == store.path("versions/0001")
    assert checksum(back) == made.checksum == checksum(adapter)
    config = store.read_json("versions/0001/adapter_config.json")
    assert {"r": 2, "lora_alpha": 32.0, "target_modules": ["q_proj", "v_proj"]}.items() <= config.items()
    assert {"base_model_name_or_path": "some/base", "task_type": "CAUSAL_LM"}.items() <= config.items()


def test_a_version_is_written_once_and_never_changed(store):
    store.write_adapter(2, make_adapter(), "base", store.config)
    store.write_adapter(2, make_adapter(), "base", store.config)  # the same again: nothing happens
    with pytest.raises(WeightsError, match="version 2 is already published with other weights"):
        store.write_adapter(2, make_adapter(seed=1), "base", store.config)
    assert store.versions() == [2]


def test_a_version_counts_only_when_it_is_complete(store):
    made = store.write_adapter(1, make_adapter(), "base", store.config)
    weights = store.storage.read("versions/0001/adapter_model.safetensors")
    store.storage.write("versions/0002/adapter_model.safetensors", weights)  # a crash before version.json
    assert store.versions() == [1]
    with pytest.raises(WeightsError, match=r"no version 2 .* published are \[1\]"):
        store.read_adapter(2)
    assert store.write_adapter(2, make_adapter(), "base", store.config).checksum == made.checksum


def test_changed_and_half_written_weights_are_found_on_reading(store):
    for version in (1, 2):
        store.write_adapter(version, make_adapter(seed=version), "base", store.config)
    name = "versions/{:04d}/adapter_model.safetensors"
    store.storage.write(name.format(1), store.storage.read(name.format(2)))
    with pytest.raises(WeightsError, match="changed after it was published"):
        store.read_adapter(1)
    store.storage.write(name.format(2), store.storage.read(name.format(2))[:-8])
    with pytest.raises(StorageError, match=r"0002/adapter_model\.safetensors is damaged"):
        store.read_adapter(2)


def test_arrays_that_are_no_adapter_are_refused(store):
    with pytest.raises(ValueError, match="pairs of"):
        store.write_adapter(1, {"base_model.model.lm_head.weight": np.zeros((2, 2))}, "base", store.config)


def test_plain_peft_loads_a_version_with_identical_logits(tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path / "base")
    store = bare_run(str(tmp_path / "run"))
    lora = LoraConfig(
        r=4, lora_alpha=store.config.learner.lora_alpha, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    trained = get_peft_model(base, lora).eval()
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = {name: tensor.numpy() for name, tensor in get_peft_model_state_dict(trained).items()}
    made = store.write_adapter(1, adapter, str(tmp_path / "base"), store.config)

    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        plain = fresh(tokens).logits
        loaded = PeftModel.from_pretrained(fresh, made.path).eval()(tokens).logits
        torch.testing.assert_close(loaded, trained(tokens).logits, rtol=0, atol=0)
    assert not torch.equal(loaded, plain)
    assert json.loads(Path(made.path, "version.json").read_text()) == {"version": 1, "checksum": made.checksum}


def test_canaries_come_back_as_they_were():
    draw = np.random.default_rng(0)
    made = [
        Canary(
            prompt_ids=np.arange(size, dtype=np.int32),
            token_ids=np.arange(4, dtype=np.int32),
            before=draw.normal(size=4).astype(np.float32),
            after=draw.normal(size=4).astype(np.float32),
        )
        for size in range(1, 13)
    ]
    back = canaries_from_bytes(canaries_to_bytes(made))
    for one, other in zip(made, back, strict=True):
        for name in ("prompt_ids", "token_ids", "before", "after"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
