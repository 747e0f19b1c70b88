"""What a worker is told: where the weights are, vLLM's settings, the provider's request. Pure functions.

Nothing here names a quantization: vLLM reads it from the checkpoint's config.json, and a flag could only contradict it.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Any

from loadmaster.config.schema import EndpointConfig
from loadmaster.endpoint.sizing import Sizing
from loadmaster.export.manifest import max_lora_rank

HOST, PORT = "127.0.0.1", 8000
"""Only this machine reaches a server that has no key; who opens it further says so."""
VLLM = "0.27.1"
VLLM_IMAGE = f"vllm/vllm-openai:v{VLLM}"
WORKER_VLLM_IMAGE = "runpod/worker-v1-vllm:v2.25.2"
"""Its Dockerfile is FROM vllm/vllm-openai:v0.27.1 (release of 2026-08-20)."""
MIN_CUDA = "13.0"
"""What worker-vllm of that release allows."""
POD_MOUNT, SERVERLESS_MOUNT = PurePosixPath("/workspace"), PurePosixPath("/runpod-volume")
"""One network volume, as a Pod and as a serverless worker see it."""
BAKED = PurePosixPath("/model")
QUEUE_DELAY_S = 4
REQUEST_TIMEOUT_MS = 600_000
LONGEST_INPUT_BYTES_A_TOKEN = 16
"""JSON of a prompt in any script, as UTF-8, stays below; longer input is refused before it is tokenised."""
CONTAINER_GB = 60
"""The vLLM image unpacked, and room to work."""


def volume_path(artifact: Path) -> PurePosixPath:
    """Path of an export on its network volume, relative to the volume's root.

    Under /workspace it is there already; elsewhere it belongs under the same path from `runs` on, or, without a
    folder of that name, under runs/<run>/export/<format>.
    """
    path = PurePosixPath(artifact)
    if path.is_relative_to(POD_MOUNT):
        return path.relative_to(POD_MOUNT)
    parts = path.parts
    if "runs" in parts:
        return PurePosixPath(*parts[len(parts) - 1 - parts[::-1].index("runs") :])
    return PurePosixPath("runs", *parts[-3:])


def served_from(artifact: Path, weights: str) -> PurePosixPath:
    """Where a worker finds the weights."""
    return BAKED if weights == "image" else SERVERLESS_MOUNT / volume_path(artifact)


def model_options(manifest: dict[str, Any], model: str, context: int) -> dict[str, str]:
    """Long options of `vllm serve` without their dashes; "" for one without a value. `model` is the artifact's path."""
    name = manifest["recipe"]
    options = {"model": model, "served-model-name": name}
    if manifest["format"] == "adapter":
        base = manifest["base_model"]
        options = {"model": base["name"]}
        if base["revision"] and "==" not in base["revision"]:
            options["revision"] = base["revision"]
            options["tokenizer-revision"] = "main"  # else the base's, which the adapter's repository does not have
        options["tokenizer"] = model  # else the base's, with the base's chat template
        options["enable-lora"] = ""
        options["lora-modules"] = json.dumps({"name": name, "path": model})
        options["max-lora-rank"] = str(max_lora_rank(manifest["adapter"]["rank"]))
    return {**options, "max-model-len": str(context)}


def vllm_options(
    manifest: dict[str, Any], model: str, wanted: EndpointConfig, context: int, sizing: Sizing | None
) -> dict[str, str]:
    """The same with what the serving plan decides: memory, cache, cards, sequences at once."""
    options = model_options(manifest, model, context)
    options["gpu-memory-utilization"] = f"{wanted.gpu_memory_utilization:g}"
    if wanted.kv_cache_dtype == "fp8":
        options["kv-cache-dtype"] = "fp8"
    if sizing is not None:
        options["tensor-parallel-size"] = str(sizing.plan.gpus)
        options["max-num-seqs"] = str(sizing.requests_at_once * sizing.traffic.samples)
    return options


def vllm_command(options: dict[str, str]) -> list[str]:
    words = ["vllm", "serve", options["model"]]
    for name, value in options.items():
        if name != "model":
            words += [f"--{name}", *([value] if value else [])]
    return [*words, "--host", HOST, "--port", str(PORT)]


def worker_env(options: dict[str, str], at_once: int) -> dict[str, str]:
    """Environment of worker-vllm: each option in upper case, MODEL_NAME for the model, and its own MAX_CONCURRENCY."""
    env = {name.replace("-", "_").upper(): value or "true" for name, value in options.items()}
    env["MODEL_NAME"] = env.pop("MODEL")
    if "REVISION" in env:
        env["MODEL_REVISION"] = env.pop("REVISION")
    env["MAX_CONCURRENCY"] = str(at_once)
    return env


def server_json(options: dict[str, str], name: str, context: int, at_once: int) -> dict[str, Any]:
    """Settings of handler.py."""
    return {
        "command": vllm_command(options),
        "port": PORT,
        "served_model_name": name,
        "max_concurrency": at_once,
        "longest_input_bytes": 4096 + LONGEST_INPUT_BYTES_A_TOKEN * context,
    }


def endpoint_request(
    manifest: dict[str, Any], wanted: EndpointConfig, env: dict[str, str], sizing: Sizing
) -> dict[str, Any]:
    """Body of the provider's `POST /v2/serverless`, without network volumes, which deploy adds."""
    disk = CONTAINER_GB + (2 * manifest["bytes"] / 1e9 if wanted.weights == "image" else 0)
    if manifest["format"] == "adapter":
        disk += 2 * sizing.plan.weights_gb  # the base model is downloaded into the container
    excluded = {"excludedTypes": sizing.excluded} if sizing.excluded else {}
    return {
        "name": endpoint_name(manifest),
        "type": "QUEUE",
        "image": image_of(wanted),
        "disk": round(disk),
        "env": env if wanted.worker == "worker-vllm" else {},
        "gpu": {"pools": [sizing.pool], **excluded, "count": sizing.plan.gpus, "minCudaVersion": MIN_CUDA},
        "scaling": {"type": "QUEUE_DELAY", "queueDelay": QUEUE_DELAY_S},
        "workers": {"min": sizing.min_workers, "max": sizing.max_workers, "idleTimeout": wanted.idle_timeout_s},
        "flashboot": "FLASHBOOT" if wanted.flashboot else "OFF",
        "timeout": REQUEST_TIMEOUT_MS,
    }


def endpoint_name(manifest: dict[str, Any]) -> str:
    """The same for every deployment of this recipe and format, so that a second one updates the first."""
    return f"loadmaster-{manifest['recipe'].replace('/', '-')}-{manifest['format']}"


def image_of(wanted: EndpointConfig) -> str | None:
    """None: the handler's image has still to be built."""
    return wanted.image or (WORKER_VLLM_IMAGE if wanted.worker == "worker-vllm" else None)


def hub_json(name: str, base: str, request: dict[str, Any]) -> dict[str, Any]:
    """.runpod/hub.json of the handler's image."""
    gpu = request["gpu"]
    ids = [*gpu["pools"], *(f"-{card}" for card in gpu.get("excludedTypes", []))]
    return {
        "title": name,
        "description": f"{name}: fine-tuned from {base}, OpenAI-compatible, on vLLM {VLLM}",
        "type": "serverless",
        "category": "language",
        "config": {
            "runsOn": "GPU", "containerDiskInGb": request["disk"], "gpuIds": ",".join(ids), "gpuCount": gpu["count"],
            "allowedCudaVersions": [MIN_CUDA], "env": [], "presets": [],
        },
    }


def tests_json(request: dict[str, Any], gpu_name: str, test_input: dict[str, Any]) -> dict[str, Any]:
    """.runpod/tests.json: one chat must be answered."""
    return {
        "tests": [{"name": "chat", **test_input, "timeout": REQUEST_TIMEOUT_MS}],
        "config": {
            "gpuTypeId": gpu_name, "gpuCount": request["gpu"]["count"], "env": [], "allowedCudaVersions": [MIN_CUDA],
        },
    }
