"""Rules of what comes after training, and of where a job runs: export, endpoint, launch."""

from __future__ import annotations

import dataclasses
import os
import re

from loadmaster import catalog
from loadmaster.config.fields import known_cards, nearest
from loadmaster.config.origins import COMMAND_LINE, origin_of
from loadmaster.config.rule_table import Found, Origins, rule
from loadmaster.config.schema import Job, LaunchConfig
from loadmaster.config.shipped import local_path

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank accepts (vllm 0.33.0)."""
SERVED_RANK = LORA_RANKS[-1]


@rule("lora.rank", "endpoint.serve_as", "endpoint.server", "method")
def servers_load_the_rank(job: Job, origins: Origins) -> Found:
    """endpoint.serve_as=adapter needs a lora.rank that the server takes: up to 512 for vLLM (merged, any rank does)."""
    if job.endpoint.serve_as == "adapter" and job.method != "full" and job.lora.rank > SERVED_RANK:
        message = f"{job.endpoint.server} takes adapters of ranks up to {SERVED_RANK}"
        remedy = f"lora.rank={SERVED_RANK}, or endpoint.serve_as=bf16, where the adapter is merged"
        yield "lora.rank", job.lora.rank, message, remedy


@rule("lora.modules_to_save", "endpoint.serve_as", "endpoint.server", "export.formats", "method", "stop_after")
def servers_load_no_whole_modules(job: Job, origins: Origins) -> Found:
    """lora.modules_to_save is served merged: no server loads whole modules beside an adapter, so endpoint.serve_as is
    not adapter, nor is adapter the only format that a bundle could serve."""
    if job.lora.modules_to_save and job.method != "full" and serves_adapter(job):
        message = f"{job.endpoint.server} loads adapters without whole modules (PEFTHelper of vllm 0.33.0)"
        yield "lora.modules_to_save", list(job.lora.modules_to_save), message, MERGED


@rule("lora.dora", "endpoint.serve_as", "endpoint.server", "export.formats", "method", "stop_after")
def servers_load_no_dora(job: Job, origins: Origins) -> Found:
    """lora.dora is served merged: no server loads DoRA adapters, so endpoint.serve_as is not adapter, nor is adapter
    the only format that a bundle could serve."""
    if job.lora.dora and job.method != "full" and serves_adapter(job):
        yield "lora.dora", True, f"{job.endpoint.server} loads no DoRA adapters (PEFTHelper of vllm 0.33.0)", MERGED


@rule("export.formats", "stop_after")
def bundles_hold_what_a_server_loads(job: Job, origins: Origins) -> Found:
    """export.formats holds more than gguf where a bundle is made: it is written for vLLM or SGLang."""
    if set(job.export.formats) == {"gguf"} and job.stop_after == "bundle":
        message = "gguf is for llama.cpp and Ollama, and a bundle is written for servers that do not load it"
        yield "export.formats", ["gguf"], message, "export.formats=[gguf,bf16], or stop_after=export"


MERGED = "export.formats=[adapter,bf16] (or fp8, ...) and endpoint.serve_as=bf16, where it is merged"


def serves_adapter(job: Job) -> bool:
    """Whether the adapter is what a bundle of this job serves."""
    only = set(job.export.formats) - {"gguf"} == {"adapter"} and job.stop_after in ("plan", "bundle")
    return job.endpoint.serve_as == "adapter" or (job.endpoint.serve_as == "auto" and only)


@rule("export.formats", "method", "plan.methods")
def full_has_no_adapter(job: Job, origins: Origins) -> Found:
    """export.formats holds no adapter with method=full; with it, method=auto is lora or qlora."""
    only_full = job.method == "full" or (job.method == "auto" and set(job.plan.methods) == {"full"})
    if only_full and "adapter" in job.export.formats:
        remedy = "export=bf16, or method=lora"
        yield "export.formats", list(job.export.formats), "method=full trains no adapter to export", remedy


@rule("export.formats")
def something_is_exported(job: Job, origins: Origins) -> Found:
    """export.formats is not empty; a job that exports nothing says stop_after=evaluate."""
    if not job.export.formats:
        yield "export.formats", [], "names no format", "export=bf16, or stop_after=evaluate to export nothing"


@rule("endpoint.server")
def server_is_known(job: Job, origins: Origins) -> Found:
    """endpoint.server is a server of catalog/servers.yaml, alone or with a version from its oldest known one on."""
    name, given, version = job.endpoint.server.partition("==")
    rows = catalog.servers()["servers"].get(name)
    if rows is None:
        known = catalog.servers()["servers"]
        guess = nearest(name, list(known), cutoff=0.4) or "vllm"
        message = "is not a server that exports are written for (known: " + ", ".join(known) + ")"
        yield "endpoint.server", job.endpoint.server, message, f"endpoint.server={guess}"
        return
    oldest, newest = (str(rows[index]["version"]) for index in (0, -1))
    if given and not re.fullmatch(r"\d+(\.\d+)+(\.?post\d+)?", version):
        remedy = f"endpoint.server={name}=={newest}"
        yield "endpoint.server", job.endpoint.server, "is not a version, three numbers with dots", remedy
    elif given and as_version(version) < as_version(oldest):
        message = f"is older than {oldest}, the oldest whose files are known here"
        yield "endpoint.server", job.endpoint.server, message, f"endpoint.server={name}=={oldest}, or newer"


NEEDED_FIELDS = {"nvfp4": "scale_dtype", "fp8_block": "block_structure"}
"""Of a format's quantization config, what means something and came late to compressed-tensors."""


@rule("export.formats", "endpoint.server")
def servers_read_the_formats(job: Job, origins: Origins) -> Found:
    """export.formats holds what the version of endpoint.server reads: nvfp4 from vLLM 0.14, fp8_block from 0.10.2."""
    name, _, version = job.endpoint.server.partition("==")
    rows, fields = catalog.servers()["servers"].get(name, []), catalog.servers()["fields"]["arguments"]
    known = [row for row in rows if as_version(str(row["version"])) <= as_version(version)]
    if not known:  # without a version, none is
        return
    for form in (form for form in NEEDED_FIELDS if form in job.export.formats):
        since = as_version(str(fields[NEEDED_FIELDS[form]]))
        if as_version(str(known[-1]["compressed_tensors"])) >= since:
            continue
        first = next(row["version"] for row in rows if as_version(str(row["compressed_tensors"])) >= since)
        message = f"{form} is not read by {name} {version} (compressed-tensors {known[-1]['compressed_tensors']})"
        remedy = f"endpoint.server={name}=={first} or newer, or other export.formats"
        yield "export.formats", list(job.export.formats), message, remedy


def as_version(text: str) -> tuple[int, ...]:
    """Of the leading numbers: 0.10.1.post1 is (0, 10, 1)."""
    return tuple(int(part) for part in text.split(".") if part.isdigit())


@rule("endpoint.serve_as", "export.formats")
def served_format_is_exported(job: Job, origins: Origins) -> Found:
    """endpoint.serve_as is auto or one of export.formats."""
    serve_as = job.endpoint.serve_as
    if serve_as != "auto" and serve_as not in job.export.formats:
        both = ",".join([*job.export.formats, serve_as])
        message = f"is not among export.formats ({', '.join(job.export.formats)})"
        yield "endpoint.serve_as", serve_as, message, f"export.formats=[{both}], or endpoint.serve_as=auto"


@rule("endpoint.gpu")
def endpoint_gpu_is_known(job: Job, origins: Origins) -> Found:
    """endpoint.gpu is auto or a GPU of the catalogue."""
    known = ["auto", *catalog.serving()["gpus"]]
    if job.endpoint.gpu not in known:
        remedy = known_cards(job.endpoint.gpu, known, "endpoint.gpu")
        yield "endpoint.gpu", job.endpoint.gpu, "is not in the catalogue", remedy


@rule("endpoint.prompt_tokens", "endpoint.output_tokens", "endpoint.max_model_len", "sequence_length")
def usual_request_fits_the_longest(job: Job, origins: Origins) -> Found:
    """endpoint.prompt_tokens and output_tokens together are no more than max_model_len (auto: sequence_length)."""
    prompt, output = (0 if n == "auto" else n for n in (job.endpoint.prompt_tokens, job.endpoint.output_tokens))
    longest = job.sequence_length if job.endpoint.max_model_len == "auto" else job.endpoint.max_model_len
    if prompt + output > longest:
        key = "endpoint.prompt_tokens" if prompt else "endpoint.output_tokens"
        message = f"a request of {prompt} + {output} tokens is longer than max_model_len={longest}"
        yield key, prompt or output, message, f"endpoint.max_model_len={prompt + output}"


@rule("endpoint.min_workers", "endpoint.max_workers")
def workers_have_an_order(job: Job, origins: Origins) -> Found:
    """endpoint.min_workers is no more than max_workers."""
    least, most = job.endpoint.min_workers, job.endpoint.max_workers
    if most != "auto" and least > most:
        yield "endpoint.min_workers", least, f"is more than max_workers={most}", f"endpoint.max_workers={least}"


@rule("endpoint.weights", "endpoint.worker", "endpoint.image")
def baked_weights_are_in_our_own_image(job: Job, origins: Origins) -> Found:
    """endpoint.weights=image goes with worker=handler, whose image you build."""
    if job.endpoint.weights == "image" and job.endpoint.worker == "worker-vllm":
        remedy = "endpoint.worker=handler, or endpoint.weights=volume"
        yield "endpoint.weights", "image", "worker-vllm's image has no weights of yours in it", remedy


@rule("endpoint.arrivals")
def arrivals_are_known(job: Job, origins: Origins) -> Found:
    """endpoint.arrivals is poisson, bursty, or a .csv file that exists."""
    arrivals = job.endpoint.arrivals
    if arrivals in ("poisson", "bursty"):
        return
    if not arrivals.endswith(".csv"):
        yield "endpoint.arrivals", arrivals, "is no kind of arrivals", "poisson, bursty, or the name of a .csv file"
    elif not os.path.isfile(local_path(arrivals)):
        yield "endpoint.arrivals", arrivals, "there is no such file", "a CSV with the time of a request a line"


HERE = ("name", "max_hours", "max_usd", "grace_s", "hang_timeout_s")
"""Fields of launch that a run on this machine obeys."""


@rule("launch.name", "launch.*")
def other_machines_need_a_way_to_them(job: Job, origins: Origins) -> Found:
    """launch.nodes, force_pods, hosts, sbatch, dry_run go with launch=runpod, ssh or slurm, not with launch=local; nor
    does any other field of launch, on the command line, but max_hours, max_usd, grace_s and hang_timeout_s."""
    launch = job.launch
    if launch.name != "local":
        return
    ways = {"nodes": "runpod, or slurm", "force_pods": "runpod", "hosts": "ssh", "sbatch": "slurm"}
    ways |= {"dry_run": "runpod, ssh or slurm; here loadmaster plan, or stop_after=plan, shows the plan"}
    given = {"nodes": launch.nodes != "auto", "force_pods": launch.force_pods, "dry_run": launch.dry_run}
    given |= {"hosts": bool(launch.hosts), "sbatch": bool(launch.sbatch)}
    for field in dataclasses.fields(LaunchConfig):  # a recipe may say how it is launched, and be run here all the same
        name, typed = field.name, origin_of(origins, f"launch.{field.name}") == COMMAND_LINE
        if typed and name not in (*HERE, *ways):
            ways[name], given[name] = "runpod, ssh or slurm", getattr(launch, name) != getattr(LaunchConfig(), name)
    for name in (name for name in ways if given[name]):
        value = getattr(launch, name)
        yield f"launch.{name}", value, "has no effect with launch=local", f"launch={ways[name]}; or leave it out"
