"""The bundle: which export to serve, on what, and how. Reads only the manifests; needs nothing of the training.

manifest.json                  of the export that is served, with the command under `serve`
README.md, traffic.svg         commands, size and reasons, bill, simulated waits, verification
serving.json                   the serving plan in figures
worker-vllm.env                environment of the provider's vLLM worker
endpoint.json                  the endpoint as `loadmaster deploy` asks for it
smoke.json                     prompts, and what the artifact answers: what the endpoint has to say
handler.py, server.json, requirements.txt, Dockerfile, test_input.json, .runpod/      a worker of our own
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loadmaster import catalog
from loadmaster.config.schema import Job
from loadmaster.endpoint import readme, settings
from loadmaster.endpoint.plot import draw
from loadmaster.endpoint.sizing import Sizing, goes_over, longest_request, size
from loadmaster.errors import ConfigError, ExportRejected, LoadmasterError
from loadmaster.export.answers import kept
from loadmaster.export.manifest import NAME, OLDEST_SERVER, is_served, read_manifest
from loadmaster.files import publish_folder, read_json, write_json, write_text

HERE = Path(__file__).parent


def write_bundle(run_dir: Path, job: Job) -> Path:
    """Write run_dir/bundle/ for the export to serve.

    Raises ConfigError when endpoint.serve_as was not exported or endpoint settings cannot work, ExportRejected when
    nothing was exported. A model whose size cannot be worked out gets a bundle without an endpoint, which says why.
    """
    folder = run_dir / "bundle"
    manifests = published(run_dir / "export", list(job.export.formats))
    undivided = [name for name, made in manifests.items() if not goes_over(job, made, run_dir / "export" / name)]
    chosen = choose(manifests, job.endpoint.serve_as, undivided)
    manifest = manifests[chosen]
    source = run_dir.absolute() / "export" / chosen
    artifact = Path(os.path.relpath(source, folder.absolute())).as_posix()
    context = longest_request(job, manifest, source)
    sizing, why_not = sized(job, manifest, source, context)
    command = settings.vllm_command(settings.model_options(manifest, artifact, context))
    with publish_folder(folder) as partial:
        serve = {"server": job.endpoint.server, "artifact": artifact, "max_model_len": context, "command": command}
        write_json(partial / NAME, {**manifest, "serve": serve})
        _write_worker(partial, job, manifest, source, context, sizing)
        gpus = sizing.plan.gpus if sizing else 1
        text = readme.render(
            "README.md.j2", name=manifest["recipe"], manifest=manifest, command=shlex.join(command),
            host=settings.HOST, port=settings.PORT, request=json.dumps(chat(manifest["recipe"])), artifact=artifact,
            sglang=readme.sglang_command(manifest, artifact, context, gpus),
            gguf=readme.gguf_commands(manifests, manifest["recipe"], context), sizing=sizing, why_not=why_not,
            volume_path=settings.volume_path(source), worker_image=settings.WORKER_VLLM_IMAGE,
            baked=job.endpoint.weights == "image", arrivals=job.endpoint.arrivals,
            max_slowdown=job.endpoint.max_slowdown,
            verification=readme.verification(manifests), served=readme.served(run_dir, manifest),
            **({} if sizing is None else _tables(sizing)),
        )
        write_text(partial / "README.md", text)
        if sizing is not None and sizing.outcomes:
            title = f"{manifest['recipe']} on {sizing.plan.gpus}x {sizing.plan.gpu}, simulated"
            write_text(partial / "traffic.svg", draw(sizing.outcomes, sizing.prices, title))
    return folder


def next_step(run_dir: Path) -> str:
    """The one command that goes on from the bundle of this run; it makes nothing and costs nothing."""
    bundle = run_dir / "bundle"
    wanted = read_json(bundle / "endpoint.json") if (bundle / "endpoint.json").is_file() else {"request": {}}
    if wanted["request"].get("image") is None:  # no endpoint, or one whose image has still to be built
        return f"next: the commands in {bundle / 'README.md'} serve it"
    volume = " --volume NAME" if "volume_path" in wanted else ""
    command = f"loadmaster deploy {shlex.quote(str(run_dir))}{volume} --dry-run"
    return f"next: {command} (what an endpoint would cost; {bundle / 'README.md'} serves it here)"


def published(export: Path, formats: list[str]) -> dict[str, dict[str, Any]]:
    """Manifests of the formats of this job that passed verification."""
    manifests = {name: read_manifest(export / name) for name in formats if (export / name / NAME).is_file()}
    passed = {name: manifest for name, manifest in manifests.items() if manifest["verification"]["passed"]}
    if not passed:
        raise ExportRejected(f"{export} holds no export that passed verification: run the export stage first.")
    return passed


def choose(manifests: dict[str, dict[str, Any]], serve_as: str, undivided: Sequence[str] = ()) -> str:
    """The format to serve: the one asked for, or the smallest; an adapter only where there is nothing else.

    undivided: those that vLLM does not divide over the endpoint's cards, taken where there are no others.

    (An adapter is small on disk, but a server needs its base besides.) A GGUF is not for the servers that bundles
    are written for, nor is an adapter that no server loads as it is.
    """
    unserved = {name for name in ("gguf", "adapter") if name in manifests and not is_served(manifests[name], name)}
    if serve_as in unserved:
        why = manifests[serve_as].get("oldest_server", OLDEST_SERVER[serve_as])["because"]
        remedy = "endpoint.serve_as=bf16, with it in export.formats"
        raise ConfigError.of("endpoint.serve_as", serve_as, f"no server loads it: {why}", remedy)
    if serve_as != "auto":
        if serve_as not in manifests:
            message = f"was not exported (there are: {', '.join(manifests)})"
            remedy = f"add it to export.formats, or set endpoint.serve_as to auto or {next(iter(manifests))}"
            raise ConfigError.of("endpoint.serve_as", serve_as, message, remedy)
        return serve_as
    servable = [name for name in manifests if name not in unserved]
    if not servable:
        message = "holds nothing that the bundle's server loads (gguf is for llama.cpp and Ollama"
        message += ", an adapter with whole modules or DoRA for none)" if "adapter" in unserved else ")"
        remedy = f"export.formats=[{','.join([*manifests, 'bf16'])}], or stop_after=export"
        raise ConfigError.of("export.formats", list(manifests), message, remedy)
    whole = [name for name in servable if name != "adapter"] or servable
    able = [name for name in whole if name not in undivided] or whole
    return min(able, key=lambda name: manifests[name]["bytes"])


def sized(job: Job, manifest: dict[str, Any], artifact: Path, context: int) -> tuple[Sizing | None, str]:
    """(the size, "") or (None, why there is none). Wrong settings are raised: they are the user's to mend."""
    try:
        return size(job, manifest, artifact, context), ""
    except ConfigError:
        raise
    except LoadmasterError as error:
        return None, str(error)


def chat(name: str) -> dict[str, Any]:
    return {"model": name, "messages": [{"role": "user", "content": "..."}]}


def _write_worker(
    folder: Path, job: Job, manifest: dict[str, Any], source: Path, context: int, sizing: Sizing | None
) -> None:
    wanted, name = job.endpoint, manifest["recipe"]
    model = str(settings.served_from(source, wanted.weights))
    at_once = sizing.requests_at_once if sizing else 1
    options = settings.vllm_options(manifest, model, wanted, context, sizing)
    env = settings.worker_env(options, at_once)
    facts = {
        "name": name, "vllm": settings.VLLM, "vllm_image": settings.VLLM_IMAGE, "model": model,
        "baked": wanted.weights == "image", "artifact": f"export/{manifest['format']}",
        "adapter": manifest["format"] == "adapter",
    }
    write_text(folder / "worker-vllm.env", "".join(f"{key}={value}\n" for key, value in env.items()))
    write_text(folder / "handler.py", (HERE / "handler.py").read_text(encoding="utf-8"))
    write_text(folder / "requirements.txt", (HERE / "templates/requirements.txt").read_text(encoding="utf-8"))
    write_json(folder / "server.json", settings.server_json(options, name, context, at_once))
    write_text(folder / "Dockerfile", readme.render("Dockerfile.j2", **facts))
    write_text(folder / "Dockerfile.dockerignore", readme.render("dockerignore.j2", **facts))
    test_input = {"input": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": min(16, context // 2)}}
    write_json(folder / "test_input.json", test_input)
    recorded = kept(source.parent.parent, manifest)
    fitting = [each for each in recorded if each["prompt_tokens"] + each["max_tokens"] <= context]
    write_json(folder / "smoke.json", {"model": name, "prompts": fitting})
    if sizing is None:
        return
    request = settings.endpoint_request(manifest, wanted, env, sizing)
    gpu_name = catalog.gpus()[sizing.plan.gpu]["name"]
    write_json(folder / ".runpod/hub.json", settings.hub_json(name, manifest["base_model"]["name"], request))
    write_json(folder / ".runpod/tests.json", settings.tests_json(request, gpu_name, test_input))
    on_volume = {} if wanted.weights == "image" else {"volume_path": str(settings.volume_path(source))}
    usd = {"usd_per_worker_hour": sizing.prices.flex, "active_workers": sizing.min_workers}
    usd |= {"pod_usd_per_hour": sizing.prices.pod, "active_discount": sizing.prices.active_discount}
    limits = {"max_slowdown": wanted.max_slowdown}
    cards = [gpu_name, *catalog.serving()["gpus"][sizing.plan.gpu].get("alike", [])]
    write_json(folder / "endpoint.json", {"request": request, "cards": cards, **on_volume, **usd, **limits})
    write_json(folder / "serving.json", _figures(sizing))


def _figures(sizing: Sizing) -> dict[str, Any]:
    """Without the waits of every simulated request."""
    outcomes = [
        {
            "fleet": asdict(outcome.fleet), "p50_wait_s": outcome.wait_s(0.5), "p95_wait_s": outcome.wait_s(0.95),
            "p99_wait_s": outcome.wait_s(0.99), "cold_share": outcome.cold_share, "requests": len(outcome.waits_s),
            "seconds": outcome.seconds,
        }
        for outcome in sizing.outcomes
    ]
    return {
        "plan": asdict(sizing.plan), "traffic": asdict(sizing.traffic), "workers": sizing.workers,
        "service": asdict(sizing.service), "prices": asdict(sizing.prices), "start_s": list(sizing.start_s),
        "starts": sizing.starts,
        "bills": [asdict(bill) for bill in sizing.bills], "reasons": sizing.reasons,
        "runners_up": [asdict(plan) for plan in sizing.runners_up], "outcomes": outcomes,
        "load": asdict(sizing.load),
    }


def _tables(sizing: Sizing) -> dict[str, str]:
    return {
        "sizes": readme.sizes(sizing),
        "costs": readme.costs(sizing),
        "starts": readme.starts(sizing),
        "crossings": readme.crossings(sizing),
        "fleets": readme.fleets(sizing),
    }
