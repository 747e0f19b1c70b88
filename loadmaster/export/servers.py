"""What the server that an export is aimed at can read, and the config files written so that it does. Pure functions.

`endpoint.server` names it: vllm==0.27.1, sglang==0.5.23; a name alone is the newest version in catalog/servers.yaml,
and a version between two rows is taken as the older one. Two things have broken exports before:

- compressed-tensors from 0.11 on refuses a quantization config with a field that it does not know, so one null field
  too many makes a server refuse the model (llm-compressor issues 2057 and 2234). Fields that say nothing are left out
  for servers that do not know them; a field that says something makes the format impossible there.
- transformers 5 writes what 4 cannot read: the tokenizer class TokenizersBackend (LLaMA-Factory issue 10310), a list
  of extra special tokens, and RoPE under another name, which 4 ignores without a word.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from loadmaster import catalog
from loadmaster.config.serving_rules import as_version
from loadmaster.errors import ExportRejected
from loadmaster.preflight.other_layers import global_sizes


@dataclass(frozen=True)
class Server:
    """A server to write for."""

    name: str
    version: str
    compressed_tensors: str
    transformers: str
    """The oldest that it may be installed with."""

    @property
    def reads_transformers_5(self) -> bool:
        return as_version(self.transformers)[0] >= 5


def aimed_at(wanted: str) -> Server:
    """The server of `endpoint.server`, as the catalogue knows it (loadmaster.config.rules refuses what it does not)."""
    name, _, version = wanted.partition("==")
    rows = catalog.servers()["servers"][name]
    version = version or str(rows[-1]["version"])
    row = [row for row in rows if as_version(str(row["version"])) <= as_version(version)][-1]
    return Server(name, version, str(row["compressed_tensors"]), str(row["transformers"]))


NEWEST = aimed_at("vllm")


def for_server(config: dict[str, Any], server: Server) -> dict[str, Any]:
    """A quantization_config without the fields that the server does not know.

    Raises ExportRejected where such a field says something.
    """
    config = copy.deepcopy(config)
    known = catalog.servers()["fields"]
    for group in config["config_groups"].values():
        _drop(group, known["scheme"], server, implied=config["format"])
        for part in ("weights", "input_activations", "output_activations"):
            if group.get(part):
                _drop(group[part], known["arguments"], server, implied=None)
    return config


def oldest_reader(server: Server, is_quantized: bool) -> dict[str, str]:
    """For the manifest: the oldest version of the server that reads files written for it, and why."""
    known = catalog.servers()["fields"]
    since = [as_version(str(version)) for fields in known.values() for version in fields.values()]
    written = [version for version in since if version <= as_version(server.compressed_tensors)]
    needed = max(written, default=(0,)) if is_quantized else (0,)
    oldest = next(
        str(row["version"])
        for row in catalog.servers()["servers"][server.name]
        if as_version(str(row["compressed_tensors"])) >= needed
        and (as_version(str(row["transformers"]))[0] >= 5 or not server.reads_transformers_5)
    )
    return {
        server.name: oldest,
        "because": "its compressed-tensors and transformers read these config files; its kernels were not checked",
        "source": f"METADATA of the releases, {catalog.servers()['date']}",
    }


def _drop(fields: dict[str, Any], since: dict[str, str], server: Server, implied: Any) -> None:
    """Take out what came after the server's compressed-tensors. implied: the value that a server assumes anyway."""
    for name, version in since.items():
        if name not in fields or as_version(str(version)) <= as_version(server.compressed_tensors):
            continue
        value = fields.pop(name)
        if value not in (None, implied):
            raise ExportRejected(
                f"{server.name} {server.version} has compressed-tensors {server.compressed_tensors}, which does not "
                f"know {name}={value} of this format (it came with {version}). "
                f"Set endpoint.server to a newer version, or leave the format out of export.formats."
            )


def model_config(config: dict[str, Any], server: Server) -> dict[str, Any]:
    """config.json with what transformers 4 reads beside what 5 writes, where the server may have 4, what vLLM looks for
    elsewhere than transformers, and of Gemma 4 what 5 read up to 5.14 (and llama.cpp and others do), beside the
    per_layer_config that it writes since."""
    config = {**config, **scaled_queries(config)}
    if config.get("model_type") == "gemma4_text" and (sizes := global_sizes(config)) is not None:
        config = {**config, "global_head_dim": sizes[0], "num_global_key_value_heads": sizes[1]}
    if server.reads_transformers_5:
        return config
    config = {**config, "torch_dtype": config.get("dtype")}
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    if any(isinstance(value, dict) for value in rope.values()):
        raise ExportRejected(
            f"{server.name} {server.version} may run with transformers {server.transformers}, which has one RoPE for "
            "all layers; this model has several. Set endpoint.server to a version with transformers 5."
        )
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        **config,
        "rope_theta": rope.get("rope_theta", 10000.0),
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
    }


def scaled_queries(config: dict[str, Any]) -> dict[str, Any]:
    """Ministral 3's queries grow from original_max_position_embeddings on; without this key vLLM leaves them as they
    are (MistralAttention of 0.32.0)."""
    rope = config.get("rope_parameters") or {}
    beta = rope.get("llama_4_scaling_beta") if config.get("model_type") == "ministral3" else None
    known = {"original_max_position_embeddings": rope.get("original_max_position_embeddings"), "beta": beta}
    return {"llama_4_scaling": known} if beta else {}


def tokenizer_config(config: dict[str, Any], server: Server) -> dict[str, Any]:
    """tokenizer_config.json in the terms of the oldest transformers that the server may have.

    The class is written as PreTrainedTokenizerFast for every server: 4 knows no other name, and 5 loads it as the
    same class.
    """
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if not server.reads_transformers_5 and isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config
