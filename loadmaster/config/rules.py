"""Rules between fields: one table, checked on every job and printed in docs/configuration.md.

A rule is here only if it holds for every model and machine; what depends on memory, on the model's config.json
or on the GPUs that are there is preflight's to refuse.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from loadmaster import catalog
from loadmaster.config.fields import nearest
from loadmaster.config.model_folder import broken_files
from loadmaster.config.origins import COMMAND_LINE, DEFAULT, origin_of
from loadmaster.config.schema import Job
from loadmaster.config.shipped import SCHEME, resolve_path
from loadmaster.errors import Problem

Origins = dict[str, str]
Found = Iterator[tuple[str, object, str, str]]
"""Key to blame, its value, what is wrong, what would work."""

SERVED_RANK = 512
"""Largest rank that --max-lora-rank accepts (vllm 0.33.0); a test holds it to export's list."""
DATA_SUFFIXES = (".json", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Rule:
    name: str
    keys: tuple[str, ...]
    explanation: str
    check: Callable[[Job, Origins], Found]


RULES: list[Rule] = []


def rule(*keys: str) -> Callable[[Callable[[Job, Origins], Found]], Callable[[Job, Origins], Found]]:
    """Enter a check into the table; its docstring is the explanation, the first key the one to blame."""

    def enter(check: Callable[[Job, Origins], Found]) -> Callable[[Job, Origins], Found]:
        RULES.append(Rule(check.__name__, keys, " ".join((check.__doc__ or "").split()), check))
        return check

    return enter


def broken_rules(job: Job, origins: Origins, doubtful: list[str]) -> list[Problem]:
    """Problems of every rule but those about a `doubtful` key, whose value in `job` is not the user's."""
    problems = []
    for entry in RULES:
        if any(_touches(key, wrong) for key in entry.keys for wrong in doubtful):
            continue
        for key, value, message, remedy in entry.check(job, origins):
            if key not in doubtful:
                problems.append(Problem(key, value, origin_of(origins, key), message, remedy))
    return problems


def _touches(key: str, wrong: str) -> bool:
    return key == wrong or key.startswith(f"{wrong}.") or wrong.startswith(f"{key}.")


@rule("data.path", "data.validation", "stop_after")
def data_files_exist(job: Job, origins: Origins) -> Found:
    """data.path and data.validation name files that exist, unless the job stops after the plan (on a rented machine
    they may be under /workspace, where its volume is)."""
    if job.stop_after == "plan":
        return
    paths = [job.data.path] if isinstance(job.data.path, str) else job.data.path
    named = [("data.path", path) for path in paths]
    if isinstance(job.data.validation, str):
        named.append(("data.validation", job.data.validation))
    for key, path in named:
        if job.launch.name != "local" and path.startswith("/workspace/"):
            continue
        if _is_file_name(path) and not Path(resolve_path(path)).expanduser().exists():
            yield key, path, "there is no such file", _file_hint(key, path)


@rule("data.validation", "data.path")
def validation_is_held_out(job: Job, origins: Origins) -> Found:
    """The held-out file is not among the training files: what was trained on measures nothing."""
    paths = [job.data.path] if isinstance(job.data.path, str) else job.data.path
    if job.data.validation in paths:
        remedy = "data.validation=0.05 holds out a share of the rows"
        yield "data.validation", job.data.validation, "is the training file itself", remedy


@rule("evaluation.task", "data.validation")
def task_has_held_out_rows(job: Job, origins: Origins) -> Found:
    """A task metric needs held-out rows: evaluation.task is none where data.validation is null."""
    if job.evaluation.task != "none" and job.data.validation is None:
        remedy = "data.validation=0.05, or evaluation.task=none"
        yield "evaluation.task", job.evaluation.task, "needs held-out rows, and data.validation is null", remedy


@rule("evaluation.task", "data.format")
def task_has_answers(job: Job, origins: Origins) -> Found:
    """A task metric compares answers, and plain text (data.format=text) has none."""
    if job.evaluation.task != "none" and job.data.format == "text":
        message = "compares answers, and data.format=text has no questions and answers"
        yield "evaluation.task", job.evaluation.task, message, "evaluation.task=none"


@rule("objective", "method", "plan.methods")
def preferences_have_a_reference(job: Job, origins: Origins) -> Found:
    """objective=dpo and kto train an adapter: their reference is the base model with the adapter switched off."""
    left = [name for name in job.plan.methods if name != "full"]
    only_full = job.method == "full" or (job.method == "auto" and job.plan.methods and not left)
    if job.objective in ("dpo", "kto") and only_full:
        message = "needs the model before training as its reference, which a full fine-tune overwrites"
        yield "objective", job.objective, message, "method=lora, or objective=orpo, which needs no reference"


@rule("data.format", "objective")
def pairs_go_with_a_preference_objective(job: Job, origins: Origins) -> Found:
    """data.format=preference goes with objective=dpo, orpo or kto, and they with it (or auto)."""
    if (job.data.format == "preference") != (job.objective != "sft") and job.data.format != "auto":
        what = "holds pairs, which objective=sft does not train on"
        if job.objective != "sft":
            what = f"holds no pairs, which objective={job.objective} trains on"
        remedy = "objective=dpo" if job.objective == "sft" else "data.format=preference, or objective=sft"
        yield "data.format", job.data.format, what, remedy


@rule("preference.label_smoothing", "objective")
def label_smoothing_is_dpos(job: Job, origins: Origins) -> Found:
    """preference.label_smoothing belongs to objective=dpo."""
    if job.preference.label_smoothing and job.objective != "dpo":
        remedy = "preference.label_smoothing=0, or objective=dpo"
        yield "preference.label_smoothing", job.preference.label_smoothing, f"{job.objective} has none", remedy


@rule("preference.desirable_weight", "preference.undesirable_weight", "objective")
def answer_weights_are_ktos(job: Job, origins: Origins) -> Found:
    """preference.desirable_weight and undesirable_weight belong to objective=kto."""
    for name in ("desirable_weight", "undesirable_weight"):
        value = getattr(job.preference, name)
        if value != 1.0 and job.objective != "kto":
            yield f"preference.{name}", value, f"{job.objective} has none", f"preference.{name}=1, or objective=kto"


@rule("precision", "method")
def qlora_is_not_fp8(job: Job, origins: Origins) -> Found:
    """qlora keeps its base in nf4, so precision fp8 has nothing to apply to."""
    if job.method == "qlora" and job.precision == "fp8":
        remedy = "precision=bf16 with qlora, or method=lora for a frozen fp8 base"
        yield "precision", job.precision, "does not go with method=qlora, whose base is in nf4", remedy


@rule("sequence_length", "method", "precision")
def fp8_products_take_sixteens(job: Job, origins: Origins) -> Found:
    """method=full precision=fp8 needs a sequence_length that is a multiple of 16: its fp8 products sum over tokens."""
    if job.method == "full" and job.precision == "fp8" and job.sequence_length % 16:
        works = -(-job.sequence_length // 16) * 16
        message = "is no multiple of 16, which fp8 products over tokens need"
        yield "sequence_length", job.sequence_length, message, f"sequence_length={works}, or precision=bf16"


@rule("precision", "hardware.gpu")
def fp8_needs_fp8_units(job: Job, origins: Origins) -> Found:
    """precision fp8 needs a GPU with fp8 matrix units (compute capability 8.9 or higher)."""
    facts = catalog.gpus().get(job.hardware.gpu)
    lacking = job.hardware.gpu == "cpu" or (facts is not None and "fp8" not in facts["tflops"])
    if job.precision == "fp8" and lacking:
        able = ", ".join(name for name, gpu in catalog.gpus().items() if "fp8" in gpu["tflops"])
        message = f"hardware.gpu={job.hardware.gpu} has no fp8 matrix units"
        yield "precision", job.precision, message, f"precision=bf16, or one of {able}"


@rule("compile", "activation_checkpointing")
def pieces_are_not_compiled(job: Job, origins: Origins) -> Found:
    """compile=true does not go with activation_checkpointing=offload, which runs layers by pieces."""
    if job.compile is True and job.activation_checkpointing == "offload":
        message = "does not go with activation_checkpointing=offload, which runs layers by pieces"
        yield "compile", True, message, "compile=auto, or activation_checkpointing=full"


@rule("hardware.gpu")
def gpu_is_known(job: Job, origins: Origins) -> Found:
    """hardware.gpu is local, cpu or a GPU of the catalogue."""
    known = ["local", "cpu", *catalog.gpus()]
    if job.hardware.gpu not in known:
        guess = nearest(job.hardware.gpu, known, cutoff=0.4)
        remedy = (f"hardware.gpu={guess}; " if guess else "") + "known are " + ", ".join(known)
        yield "hardware.gpu", job.hardware.gpu, "is not in the catalogue", remedy


@rule("sharding", "hardware.count", "hardware.nodes")
def several_gpus_are_synchronised(job: Job, origins: Origins) -> Found:
    """sharding none is for one GPU: on several, each would train a model of its own."""
    gpus = (1 if job.hardware.count == "auto" else job.hardware.count) * job.hardware.nodes
    if job.sharding == "none" and gpus > 1:
        message = f"{gpus} GPUs would each train a model of their own"
        yield "sharding", "none", message, "sharding=ddp (whole model on each GPU), sharding=fsdp (split), or auto"


@rule("optimizer.name", "optimizer.master_weights", "sharding", "precision")
def zero_steps_by_adamw(job: Job, origins: Origins) -> Found:
    """zero1, zero2 and zero3 are DeepSpeed's, which cuts what is trained into ranges of elements: only AdamW, with fp32
    master weights, steps those."""
    if job.sharding not in ("zero1", "zero2", "zero3"):
        return
    remedy = "adamw or auto, or sharding=fsdp, which goes with every optimizer"
    if job.optimizer.name not in ("auto", "adamw"):
        message = f"works on matrices or blocks, which sharding={job.sharding} cuts"
        yield "optimizer.name", job.optimizer.name, message, f"optimizer.name={remedy}"
    if job.optimizer.master_weights is False and job.precision != "fp32":
        message = f"sharding={job.sharding} keeps fp32 master weights of what it trains in bf16"
        yield "optimizer.master_weights", False, message, "optimizer.master_weights=auto, or sharding=fsdp"


@rule("sharding", "compile", "method", "precision")
def zero3_gathers_module_by_module(job: Job, origins: Origins) -> Found:
    """zero3 gathers and drops weights around every module: not inside compiled layers, and not under FP8 training."""
    if job.sharding != "zero3":
        return
    if job.compile is True:
        message = "gathers weights around every module, which a compiled layer runs as one"
        yield "sharding", "zero3", message, "compile=auto, or sharding=fsdp"
    if (job.method, job.precision) == ("full", "fp8"):
        yield "sharding", "zero3", "was not made to go with training in FP8", "sharding=fsdp, or precision=bf16"


@rule("micro_batch_size", "batch.global_size", "hardware.count", "hardware.nodes")
def micro_batch_within_global_batch(job: Job, origins: Origins) -> Found:
    """One micro-batch on every GPU is no more than batch.global_size."""
    gpus = (1 if job.hardware.count == "auto" else job.hardware.count) * job.hardware.nodes
    if job.micro_batch_size == "auto":
        return
    if job.micro_batch_size * gpus > job.batch.global_size:
        largest = job.batch.global_size // gpus
        message = f"times {gpus} GPU(s) is more than batch.global_size={job.batch.global_size}"
        remedy = f"batch.global_size={job.micro_batch_size * gpus}"
        remedy = f"micro_batch_size={largest}, or {remedy}" if largest else remedy
        yield "micro_batch_size", job.micro_batch_size, message, remedy


@rule("neftune_alpha", "objective")
def noise_is_for_answers(job: Job, origins: Origins) -> Found:
    """neftune_alpha goes with objective=sft: noise would be taken for a preference."""
    if job.neftune_alpha and job.objective != "sft":
        message = f"objective={job.objective} compares likelihoods, which noise changes"
        yield "neftune_alpha", job.neftune_alpha, message, "neftune_alpha=0, or objective=sft"


@rule("lora.rank", "endpoint.serve_as", "endpoint.server", "method")
def servers_load_the_rank(job: Job, origins: Origins) -> Found:
    """endpoint.serve_as=adapter needs a lora.rank that the server takes: up to 512 for vLLM (merged, any rank does)."""
    if job.endpoint.serve_as == "adapter" and job.method != "full" and job.lora.rank > SERVED_RANK:
        message = f"{job.endpoint.server} takes adapters of ranks up to {SERVED_RANK}"
        remedy = f"lora.rank={SERVED_RANK}, or endpoint.serve_as=bf16, where the adapter is merged"
        yield "lora.rank", job.lora.rank, message, remedy


@rule("method", "lora.*")
def lora_settings_have_an_adapter(job: Job, origins: Origins) -> Found:
    """lora.* is not set beside method=full, which has no adapter. (A recipe's lora.* under a method=full given
    later on the command line is simply not used.)"""
    if job.method != "full":
        return
    method_file = _file(origin_of(origins, "method"))
    for key in sorted(origins):
        if key.startswith("lora.") and _file(origins[key]) in (COMMAND_LINE, method_file):
            name = key.partition(".")[2]
            remedy = f"leave out {key}, or method=lora"
            yield key, getattr(job.lora, name, None), "has no effect: method=full has no adapter", remedy


@rule("optimizer.min_lr_ratio", "optimizer.schedule")
def constant_rate_has_no_minimum(job: Job, origins: Origins) -> Found:
    """optimizer.min_lr_ratio has no meaning with schedule=constant, which does not fall."""
    if job.optimizer.schedule == "constant" and job.optimizer.min_lr_ratio > 0:
        remedy = "leave it out, or optimizer.schedule=cosine"
        yield "optimizer.min_lr_ratio", job.optimizer.min_lr_ratio, "has no effect with schedule=constant", remedy


@rule("export.formats", "method")
def full_has_no_adapter(job: Job, origins: Origins) -> Found:
    """export.formats holds no adapter with method=full."""
    if job.method == "full" and "adapter" in job.export.formats:
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
    elif given and _numbers(version) < _numbers(oldest):
        message = f"is older than {oldest}, the oldest whose files are known here"
        yield "endpoint.server", job.endpoint.server, message, f"endpoint.server={name}=={oldest}, or newer"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


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
        guess = nearest(job.endpoint.gpu, known, cutoff=0.4)
        remedy = (f"endpoint.gpu={guess}; " if guess else "") + "known are " + ", ".join(known)
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
    elif not Path(arrivals).expanduser().is_file():
        yield "endpoint.arrivals", arrivals, "there is no such file", "a CSV with the time of a request a line"


@rule("launch.name", "launch.nodes", "launch.force_pods", "launch.hosts", "launch.sbatch", "launch.dry_run")
def other_machines_need_a_way_to_them(job: Job, origins: Origins) -> Found:
    """launch.nodes, force_pods, hosts, sbatch, dry_run go with launch=runpod, ssh or slurm, not with launch=local."""
    launch = job.launch
    if launch.name != "local":
        return
    ways = {"nodes": "runpod, or slurm", "force_pods": "runpod", "hosts": "ssh", "sbatch": "slurm"}
    ways |= {"dry_run": "runpod, ssh or slurm; here stop_after=plan shows the plan"}
    given = {"nodes": launch.nodes != "auto", "force_pods": launch.force_pods, "dry_run": launch.dry_run}
    given |= {"hosts": bool(launch.hosts), "sbatch": bool(launch.sbatch)}
    for name in (name for name in ways if given[name]):
        value = getattr(launch, name)
        yield f"launch.{name}", value, "has no effect with launch=local", f"launch={ways[name]}; or leave it out"


@rule("plan.methods", "method")
def auto_has_methods_to_choose_from(job: Job, origins: Origins) -> Found:
    """method=auto needs at least one entry in plan.methods."""
    if job.method == "auto" and not job.plan.methods:
        yield "plan.methods", [], "leaves method=auto nothing to choose from", "plan.methods=[full,lora,qlora]"


@rule("plan.prices_usd_per_hour")
def prices_are_of_known_gpus(job: Job, origins: Origins) -> Found:
    """plan.prices_usd_per_hour names GPUs of the catalogue."""
    for name in job.plan.prices_usd_per_hour or {}:
        if name not in catalog.gpus():
            guess = nearest(name, list(catalog.gpus()), cutoff=0.4)
            remedy = (f"{guess}; " if guess else "") + "known are " + ", ".join(catalog.gpus())
            yield "plan.prices_usd_per_hour", job.plan.prices_usd_per_hour, f"{name} is not in the catalogue", remedy


@rule("model.path")
def model_folder_exists(job: Job, origins: Origins) -> Found:
    """model.path is a folder with a config.json, and what lies in it is whole."""
    if job.model.path is None:
        return
    folder = Path(job.model.path).expanduser()
    remedy = "name a folder with config.json, *.safetensors and the tokenizer, or leave it out to use the Hub"
    if not (folder / "config.json").is_file():
        what = "has no config.json in it" if folder.is_dir() else "is not a folder here"
        yield "model.path", job.model.path, what, remedy
    for what in broken_files(folder):
        yield "model.path", job.model.path, what, remedy


def _file(origin: str) -> str:
    return origin if origin in (COMMAND_LINE, DEFAULT) else origin.rpartition(":")[0]


def _is_file_name(path: str) -> bool:
    """Whether `path` means a file here and not a Hub dataset id (`owner/name`)."""
    return path.startswith((SCHEME, "/", "./", "../", "~")) or path.endswith(DATA_SUFFIXES)


def _file_hint(key: str, path: str) -> str:
    real = Path(resolve_path(path)).expanduser()
    if not real.parent.is_dir():
        return f"there is no folder {real.parent}; paths are relative to where the command is run ({Path.cwd()})"
    names = sorted(p.name for p in real.parent.iterdir() if p.suffix in DATA_SUFFIXES)
    close = difflib.get_close_matches(real.name, names, n=1)
    if close:
        return f"{key}={path.removesuffix(real.name)}{close[0]}"
    return f"{real.parent.resolve()} has " + (", ".join(names[:8]) or "no JSON, JSONL or Parquet file")
