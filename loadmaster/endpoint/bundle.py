"""The bundle: which export to serve, and how. Reads only the manifests; needs nothing of the training."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from loadmaster.config.schema import Job
from loadmaster.errors import ConfigError, ExportRejected, Problem
from loadmaster.export.manifest import NAME, read_manifest
from loadmaster.export.table import COLUMNS, row
from loadmaster.files import publish_folder, write_json, write_text

HOST, PORT = "127.0.0.1", 8000
"""Only this machine reaches a server that has no key; who opens it further says so."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm 0.33.0)."""


def write_bundle(run_dir: Path, job: Job) -> Path:
    """Write run_dir/bundle/: manifest.json of the export to serve, and README.md with the command and the figures.

    Raises ConfigError when endpoint.serve_as was not exported, ExportRejected when nothing was.
    """
    folder = run_dir / "bundle"
    manifests = published(run_dir / "export", list(job.export.formats))
    chosen = choose(manifests, job.endpoint.serve_as)
    manifest = manifests[chosen]
    artifact = Path(os.path.relpath(run_dir / "export" / chosen, folder)).as_posix()
    longest = job.sequence_length if job.endpoint.max_model_len == "auto" else job.endpoint.max_model_len
    command = serve_command(manifest, artifact, longest)
    with publish_folder(folder) as partial:
        serve = {"server": job.endpoint.server, "artifact": artifact, "max_model_len": longest, "command": command}
        write_json(partial / NAME, {**manifest, "serve": serve})
        write_text(partial / "README.md", readme(manifest, command, manifests))
    return folder


def published(export: Path, formats: list[str]) -> dict[str, dict[str, Any]]:
    """Manifests of the formats of this job that passed verification."""
    manifests = {name: read_manifest(export / name) for name in formats if (export / name / NAME).is_file()}
    passed = {name: manifest for name, manifest in manifests.items() if manifest["verification"]["passed"]}
    if not passed:
        raise ExportRejected(f"{export} holds no export that passed verification: run the export stage first.")
    return passed


def choose(manifests: dict[str, dict[str, Any]], serve_as: str) -> str:
    """The format to serve: the one asked for, or the smallest; an adapter only where there is nothing else.

    (An adapter is small on disk, but a server needs its base besides.)
    """
    if serve_as != "auto":
        if serve_as not in manifests:
            raise ConfigError([
                Problem("endpoint.serve_as", serve_as, "the endpoint group, recipe or command line",
                        f"was not exported (there are: {', '.join(manifests)})",
                        f"add it to export.formats, or set endpoint.serve_as to auto or {next(iter(manifests))}")
            ])  # fmt: skip
        return serve_as
    whole = [name for name in manifests if name != "adapter"] or list(manifests)
    return min(whole, key=lambda name: manifests[name]["bytes"])


def serve_command(manifest: dict[str, Any], artifact: str, max_model_len: int) -> list[str]:
    """Arguments of `vllm serve`, to be run in the bundle's folder."""
    name = manifest["recipe"]
    shared = ["--host", HOST, "--port", str(PORT), "--max-model-len", str(max_model_len)]
    if manifest["format"] != "adapter":
        return ["vllm", "serve", artifact, "--served-model-name", name, *shared]
    rank = manifest["adapter"]["rank"]
    allowed = next((allowed for allowed in LORA_RANKS if allowed >= rank), rank)
    base = manifest["base_model"]
    revision = ["--revision", base["revision"]] if base["revision"] and "==" not in base["revision"] else []
    return [
        "vllm", "serve", base["name"], *revision, "--enable-lora", "--lora-modules", f"{name}={artifact}",
        "--max-lora-rank", str(allowed), *shared,
    ]  # fmt: skip


def readme(manifest: dict[str, Any], command: list[str], manifests: dict[str, dict[str, Any]]) -> str:
    """README.md of the bundle: what is served, the command, a request, and every format's figures."""
    name, oldest, base = manifest["recipe"], manifest["oldest_server"], manifest["base_model"]
    request = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "..."}}]}}'
    header = [column for column, _ in COLUMNS]
    rows = [row(each, {**found["verification"], "bytes": found["bytes"]}) for each, found in manifests.items()]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))
    revision = f" ({base['revision']})" if base["revision"] else ""
    return f"""# {name}: {manifest["format"]}, ready to serve

Fine-tuned from {base["name"]}{revision}, exported {manifest["created_utc"]}. Generation stops at token
{", ".join(map(str, manifest["stop_token_ids"]))}. Loads in vLLM {oldest["vllm"]} or newer: {oldest["because"]}.

Run in this folder:

```
{shlex.join(command)}
```

It listens on this machine only. Then:

```
curl http://{HOST}:{PORT}/v1/chat/completions -H 'Content-Type: application/json' -d '{request}'
```

## Against the model as trained

{table}

perplexity: over the trained model's. KL: mean over held-out tokens. top-1: share of tokens with the same most
likely next token. task kept: task metric over the trained model's. `manifest.json` has every figure, and the
sha256 of every file of the artifact.
"""
