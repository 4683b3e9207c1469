"""Settings from environment variables: `DASHINFER_*`, and those that torchrun gives the processes it starts."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any

from dashinfer.config import ServerConfig, did_you_mean, parse_setting
from dashinfer.errors import ConfigurationError
from dashinfer.setting_values import not_negative, port, positive

_PREFIX = "DASHINFER_"
_RESERVED = {"DASHINFER_CACHE"}  # where downloads are kept; read by sources
# What Kubernetes tells each container of services named `dashinfer` or `dashinfer-...`.
_OF_KUBERNETES = re.compile(r"DASHINFER_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")


def environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings that `DASHINFER_MODEL`, `DASHINFER_MAX_BATCH` and so on give, by their names in `ServerConfig`.

    Raises:
        ConfigurationError: a `DASHINFER_` name that is no setting, or a bad value.
    """
    fields = {_PREFIX + field.name.upper(): field for field in dataclasses.fields(ServerConfig)}
    values: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.startswith(_PREFIX) or name in _RESERVED or _OF_KUBERNETES.fullmatch(name):
            continue
        if name.endswith("_PORT") and _ADDRESS.fullmatch(text):  # Kubernetes again
            continue
        if name not in fields:
            near = did_you_mean(name, fields, most=2)
            raise ConfigurationError(
                f"the variable {name} is not a setting" + (near or f"; known are {', '.join(sorted(fields))}")
            )
        try:
            values[fields[name].name] = parse_setting(fields[name], text)
        except ValueError as error:
            raise ConfigurationError(f"{name}: {error}") from None
    return values


def torchrun_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings that a process finds in its environment if torchrun started it; none in any other process. The port is the one
    above torchrun's, which it may hold itself.

    Raises:
        ConfigurationError: a variable is missing or no number.
    """
    if "TORCHELASTIC_RUN_ID" not in environment:
        return {}
    try:
        return {
            "nnodes": positive(environment["GROUP_WORLD_SIZE"]),
            "node_rank": not_negative(environment["GROUP_RANK"]),
            "master_addr": environment["MASTER_ADDR"],
            "master_port": port(str(port(environment["MASTER_PORT"]) + 1)),
        }
    except KeyError as error:
        raise ConfigurationError(f"torchrun's variable {error.args[0]} is not set") from None
    except ValueError as error:
        raise ConfigurationError(f"torchrun's variables: {error}") from None


def from_environment(environment: Mapping[str, str] = os.environ) -> ServerConfig:
    """All settings from the environment.

    Raises:
        ConfigurationError: an unknown name, a bad value, or no model.
    """
    values = environment_settings(environment)
    if "model" not in values:
        raise ConfigurationError("DASHINFER_MODEL is not set; try DASHINFER_MODEL=demo")
    return ServerConfig(**values)
