"""Settings from the environment, and what they are checked for."""

from pathlib import Path

import pytest

from dashinfer.config import ServerConfig
from dashinfer.errors import ConfigurationError
from dashinfer.serving.environment import from_environment, torchrun_settings

KUBERNETES = {
    "DASHINFER_SERVICE_HOST": "10.0.0.1",
    "DASHINFER_SERVICE_PORT": "8000",
    "DASHINFER_SERVICE_PORT_HTTP": "8000",
    "DASHINFER_PORT": "tcp://10.0.0.1:8000",
    "DASHINFER_PORT_8000_TCP": "tcp://10.0.0.1:8000",
    "DASHINFER_PORT_8000_TCP_PROTO": "tcp",
    "DASHINFER_PORT_8000_TCP_PORT": "8000",
    "DASHINFER_PORT_8000_TCP_ADDR": "10.0.0.1",
    "DASHINFER_SMALL_SERVICE_HOST": "10.0.0.2",
    "DASHINFER_SMALL_PORT": "udp://10.0.0.2:53",
    "DASHINFER_SMALL_PORT_53_UDP": "udp://10.0.0.2:53",
}


def test_settings_from_variables() -> None:
    environment = {
        "DASHINFER_MODEL": "m",
        "DASHINFER_PORT": "8080",
        "DASHINFER_KV_CACHE_MEMORY": "2GiB",
        "DASHINFER_DISABLE_PREFIX_CACHE": "true",
        "DASHINFER_CACHE": "/somewhere",
        "HOME": "/root",
    }

    assert from_environment(environment) == ServerConfig(
        model="m", port=8080, kv_cache_memory=2 * 2**30, disable_prefix_cache=True
    )


def test_variables_of_kubernetes_are_no_settings() -> None:
    assert from_environment({"DASHINFER_MODEL": "m", **KUBERNETES}) == ServerConfig(model="m")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "DASHINFER_MODEL is not set"),
        ({"DASHINFER_MAX_BATCH": "many"}, "DASHINFER_MAX_BATCH: 'many' is not a whole number"),
        ({"DASHINFER_PORT": "http"}, "DASHINFER_PORT: 'http' is not a whole number"),
        ({"DASHINFER_STEP_TIMEOUT": "long"}, "DASHINFER_STEP_TIMEOUT: 'long' is not a number"),
        ({"DASHINFER_DATA_TYPE": "bfloat"}, "did you mean bfloat16?"),
        ({"DASHINFER_MAXBATCH": "1"}, "DASHINFER_MAXBATCH is not a setting (did you mean DASHINFER_MAX_BATCH"),
        (
            {"DASHINFER_ZZZZZZZZZZ": "1"},
            "DASHINFER_ZZZZZZZZZZ is not a setting; known are DASHINFER_ALLOWED_MEDIA_DOMAINS, ",
        ),
        ({"DASHINFER_MODEL": "m", "DASHINFER_NNODES": "2"}, "--nnodes 2 does not divide the number of workers, which is 1"),
    ],
)
def test_a_bad_environment_is_said(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_environment(variables)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_name_in_the_api(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = tmp_path / "parent" / "child"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "parent"))
    names = {
        "org/Name-1B": "Name-1B",
        "models/small.gguf": "small",
        "models/name/": "name",
        ".": "child",
        "./": "child",
        "..": "parent",
        "../child/..": "parent",
        "~": "parent",
        "~/child": "child",
        "/": "model",
    }

    assert {model: ServerConfig(model=model).model_name for model in names} == names
    assert ServerConfig(model=".", served_model_name="mine").model_name == "mine"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"node_rank": 1}, "--node-rank 1 is not below --nnodes 1"),
        ({"nnodes": 2}, "--nnodes 2 does not divide the number of workers, which is 1"),
        ({"nnodes": 2, "tensor_parallel": 3}, "--nnodes 2 does not divide the number of workers, which is 3"),
        ({"nnodes": 2, "tensor_parallel": 2, "master_addr": "10.0.0.1"}, "set DASHINFER_CLUSTER_SECRET to the same on each"),
        ({"nnodes": 2, "tensor_parallel": 2, "master_addr": "somewhere", "cluster_secret": ""}, "need a secret"),
        ({"nnodes": 2, "tensor_parallel": 2, "cluster_interface": "eth0"}, "need a secret"),  # where 127.0.0.1 is not
        ({"nnodes": 2, "tensor_parallel": 2, "master_port": 0}, "--master-port 0: the other machines must know the port"),
    ],
)
def test_machines_that_cannot_work_together_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ServerConfig(model="m", **settings)


TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29400",
}


def test_what_torchrun_tells() -> None:
    assert torchrun_settings(TORCHRUN) == {"nnodes": 2, "node_rank": 1, "master_addr": "10.0.0.1", "master_port": 29401}


def test_variables_like_those_of_torchrun_mean_nothing_without_it() -> None:
    assert torchrun_settings({name: value for name, value in TORCHRUN.items() if name != "TORCHELASTIC_RUN_ID"}) == {}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": "65535"}, "torchrun's variables: 65536 is not a port number"),
        ({"GROUP_RANK": "first"}, "torchrun's variables: 'first' is not a whole number"),
    ],
)
def test_nonsense_in_torchruns_variables_is_said(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        torchrun_settings(TORCHRUN | change)


def test_a_missing_variable_of_torchrun_is_named() -> None:
    with pytest.raises(ConfigurationError, match="torchrun's variable MASTER_ADDR is not set"):
        torchrun_settings({name: value for name, value in TORCHRUN.items() if name != "MASTER_ADDR"})
