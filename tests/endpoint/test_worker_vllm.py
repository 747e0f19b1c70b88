"""The contract with the provider's vLLM worker: what our environment becomes on the server's command line.

worker_vllm.json has the names that the worker of the image in settings.py knows; the rules are four: a variable is
an option in upper case; aliases win; an option without a value is given bare when true; whatever is not known, or is
reserved, never reaches the server, and nobody says so.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from loadmaster.config.schema import EndpointConfig, ExportConfig
from loadmaster.endpoint.bundle import write_bundle
from loadmaster.endpoint.settings import vllm_command
from loadmaster.files import read_json
from tests.endpoint.test_bundle import JOB, environment, publish

KNOWN = json.loads(Path(__file__).with_name("worker_vllm.json").read_text())
SETTINGS = [
    {},
    {"kv_cache_dtype": "fp8", "best_of_n": 4, "gpu": "l40s", "max_model_len": 256, "gpu_memory_utilization": 0.85},
]


def served(env: dict[str, str]) -> dict[str, str]:
    """Options of the server by name; "" for one without a value."""
    flags: dict[str, str] = {}
    options = [*KNOWN["with_value"], *KNOWN["paired"], *KNOWN["bare"]]
    names = {option.removeprefix("--").replace("-", "_").upper(): option for option in options}
    plain = {name: option for name, option in names.items() if name not in KNOWN["reserved"]}
    for name, option in [*plain.items(), *KNOWN["aliases"].items()]:
        value = env.get(name, "").strip()
        if not value:
            continue
        if option in KNOWN["paired"] or option in KNOWN["bare"]:
            assert value.lower() in ("true", "false"), f"{name}={value} is no boolean"
            if value.lower() == "true":
                flags[option] = ""
        else:
            flags[option] = value
    return flags


def command_line(words: list[str]) -> dict[str, str]:
    """The same of a `vllm serve MODEL --option value ...` line."""
    assert words[:2] == ["vllm", "serve"]
    found, rest = {"--model": words[2]}, words[3:]
    while rest:
        option, *rest = rest
        takes = bool(rest) and not rest[0].startswith("--")
        found[option] = rest.pop(0) if takes else ""
    return {name: value for name, value in found.items() if name not in ("--host", "--port")}


@pytest.fixture
def run_dir(tmp_path):
    for name, size in (("adapter", 10), ("bf16", 300), ("fp8", 200), ("int4", 100)):
        publish(tmp_path / "runs/tickets/one", name, size)
    return tmp_path / "runs/tickets/one"


@pytest.mark.parametrize("form", ["adapter", "bf16", "fp8", "int4"])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: ",".join(settings) or "plain")
def test_the_worker_starts_the_server_that_our_own_worker_would(run_dir, form, settings) -> None:
    job = replace(
        JOB, export=ExportConfig(formats=["adapter", "bf16", "fp8", "int4"]),
        endpoint=EndpointConfig(serve_as=form, **settings),
    )
    folder = write_bundle(run_dir, job)
    env = environment(folder)
    assert served(env) == command_line(read_json(folder / "server.json")["command"])
    assert not any("QUANTIZATION" in name for name in env)
    ours = {"MAX_CONCURRENCY"}
    assert ours <= set(KNOWN["wrapper"])
    aliases_and_options = {*KNOWN["aliases"], *(o[2:].replace("-", "_").upper() for o in KNOWN["with_value"])}
    aliases_and_options |= {o[2:].replace("-", "_").upper() for o in [*KNOWN["paired"], *KNOWN["bare"]]}
    assert set(env) - ours <= aliases_and_options - {*KNOWN["reserved"]}, "a variable that the worker would drop"
    assert not {o[2:].replace("-", "_").upper() for o in KNOWN["removed"]} & set(env)


def test_every_value_is_one_line_without_a_shell() -> None:
    command = vllm_command({"model": "m", "lora-modules": '{"name": "a b"}', "enable-lora": ""})
    assert command == ["vllm", "serve", "m", "--lora-modules", '{"name": "a b"}', "--enable-lora",
                       "--host", "127.0.0.1", "--port", "8000"]
