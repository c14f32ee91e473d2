"""The cluster files are what Ray's and KubeRay's own checks accept, and they keep what the guide promises."""

from __future__ import annotations

import copy
import gzip
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from rlsf_ray.placement import MARKED, MOST_GPUS, ROLE_RESOURCES

ROOT = Path(__file__).parents[2]
CRDS = Path(os.environ.get("RLSF_DATA") or ROOT.parent / "shared" / "data") / "kuberay"
RAY_UP = ("cluster.yaml", "examples/gcp.yaml")
KUBERAY = {"examples/raycluster.yaml": "rayclusters", "examples/rayjob.yaml": "rayjobs"}


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


@pytest.mark.parametrize("name", RAY_UP)
def test_ray_up_accepts_the_file(name: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = read(name)
    validate_config(prepare_config(copy.deepcopy(config)))
    with pytest.raises(jsonschema.ValidationError):  # that Ray's check says no to a typing error, too
        validate_config(prepare_config({**copy.deepcopy(config), "idle_timeout": 10}))


@pytest.mark.parametrize("name", RAY_UP)
def test_each_role_has_nodes_of_its_own_and_every_node_asks_for_the_token(name: str) -> None:
    config = read(name)
    types = config["available_node_types"]
    offered = {resource for name, kind in types.items() if name != "head" for resource in kind["resources"]}
    assert offered == set(ROLE_RESOURCES.values())
    most = sum(kind.get("max_workers", 0) for kind in types.values())  # machines with one GPU each
    assert types["head"]["resources"] == {"CPU": 0, MARKED: 1, MOST_GPUS: most}
    assert most <= config["max_workers"]
    rights = "IamInstanceProfile" if name == "cluster.yaml" else "serviceAccounts"  # Ray gives them to the head alone
    assert all(rights in kind["node_config"] for role, kind in types.items() if role != "head")
    starts = [c for key in ("head", "worker") for c in config[f"{key}_start_ray_commands"] if "ray start" in c]
    assert len(starts) == 2
    assert any("python -m rlsf_ray.spot" in command for command in config["worker_start_ray_commands"])
    assert all(command.startswith("RAY_AUTH_MODE=token ") for command in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert any("chmod 600" in command and "auth_token" in command for command in config["setup_commands"])


def closed(schema: Any) -> Any:
    """A Kubernetes schema that refuses the fields which the API server would silently drop."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if isinstance(found.get("properties"), dict) and not found.get("x-kubernetes-preserve-unknown-fields"):
            found.setdefault("additionalProperties", False)
        if found.pop("x-kubernetes-int-or-string", False):
            found.pop("type", None)
        return found
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


@pytest.mark.skipif(not CRDS.is_dir(), reason=f"KubeRay's schemas are not at {CRDS}; set RLSF_DATA to the data folder")
@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_knows_every_field(name: str) -> None:
    definition = yaml.safe_load(gzip.decompress((CRDS / f"ray.io_{KUBERAY[name]}.yaml.gz").read_bytes()))
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"]["metadata"] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    check = jsonschema.Draft7Validator(closed(schema))
    manifest = read(name)
    assert [error.message for error in check.iter_errors(manifest)] == []
    manifest["spec"]["raVersion"] = "2.60.0"
    assert [error.message for error in check.iter_errors(manifest)]


@pytest.mark.parametrize("name", KUBERAY)
def test_pods_take_the_token_and_offer_the_roles(name: str) -> None:
    spec = read(name)["spec"]
    spec = spec.get("rayClusterSpec", spec)
    assert spec["authOptions"]["mode"] == "token"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    for role in ("generator", "trainer"):
        assert offers(groups[role]) == {f"rlsf_{role}": 1}
    most = sum(group["maxReplicas"] for group in groups.values())  # pods with one GPU each
    assert offers(spec["headGroupSpec"]) == {MARKED: 1, MOST_GPUS: most}


def offers(group: Any) -> Any:
    """The resources that a pod of this group names."""
    return yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
