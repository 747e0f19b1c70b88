"""Rules of data, objective, method, precision, sharding and plan."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from loadmaster import catalog
from loadmaster.config.fields import nearest_card
from loadmaster.config.model_folder import broken_files, run_of
from loadmaster.config.origins import COMMAND_LINE, DEFAULT, origin_of
from loadmaster.config.rule_table import Found, Origins, rule
from loadmaster.config.schema import DATA_SUFFIXES, Job, PreferenceConfig
from loadmaster.config.shipped import SCHEME, local_path, resolve_path, shipped_folder

MLP_TOKENS = 16384
"""Of an MLP at a time under activation_checkpointing=offload; the engine and the preflight read this number."""


@rule("data.path", "data.validation", "stop_after")
def data_files_exist(job: Job, origins: Origins) -> Found:
    """data.path and data.validation name files that exist, unless the job stops after the plan (on a rented machine
    they may be under /workspace, where its volume is); what is here can be read, and more than once."""
    paths = [job.data.path] if isinstance(job.data.path, str) else job.data.path
    named = [("data.path", path) for path in paths]
    if isinstance(job.data.validation, str):
        named.append(("data.validation", job.data.validation))
    for key, path in named:
        if job.launch.name != "local" and path.startswith("/workspace/"):
            continue
        place = Path(resolve_path(path))
        if closed := next((each for each in _looked_into(place) if os.path.exists(each) and not _may_read(each)), None):
            yield key, path, f"you may not read {closed.absolute()}", f"chmod u+r {closed}, or {key}=FILE of another"
        elif os.path.exists(place) and not (place.is_file() or place.is_dir()):
            message = f"is {'a pipe' if place.is_fifo() else 'no regular file'}, and data are read more than once"
            yield key, path, message, f"write it to a file first: COMMAND > rows.jsonl, and {key}=rows.jsonl"
        elif job.stop_after != "plan" and _is_file_name(path) and not os.path.exists(place):
            here = "" if place.is_absolute() else f" here ({place.absolute()})"
            yield key, path, f"there is no such file{here}", _file_hint(key, path)


@rule("data.validation", "data.path")
def validation_is_held_out(job: Job, origins: Origins) -> Found:
    """The held-out file is not among the training files: what was trained on measures nothing."""
    paths = [job.data.path] if isinstance(job.data.path, str) else job.data.path
    if job.data.validation in paths:
        remedy = "data.validation=0.05 holds out a share of the rows"
        yield "data.validation", job.data.validation, "is the training file itself", remedy


@rule("data.path", "data.validation")
def own_data_is_held_out_of_itself(job: Job, origins: Origins) -> Found:
    """Data of one's own is not judged on held-out rows that are shipped, which another data group left there. (Who
    types them, or sets both in one file such as a run's config.yaml, means it.)"""
    paths = [job.data.path] if isinstance(job.data.path, str) else job.data.path
    held = job.data.validation
    if any(path.startswith(SCHEME) for path in paths) or not (isinstance(held, str) and held.startswith(SCHEME)):
        return
    file, meant = _file(origin_of(origins, "data.path")), _file(origin_of(origins, "data.validation"))
    if meant != COMMAND_LINE and file != meant:
        typed = paths[0] if isinstance(job.data.path, str) else f"[{','.join(paths)}]"
        message = f"would be judged on other data's held-out rows, data.validation={held}"
        remedy = f"data=file data.path={typed} holds out a share of its rows; or data.validation=0.05"
        yield "data.path", job.data.path, message, remedy


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
    if (job.data.format == "preference") != (job.objective != "sft") and job.data.format not in ("auto", "unpaired"):
        what, remedy = "holds pairs, which objective=sft does not train on", "objective=dpo"
        if job.objective != "sft":
            kto = job.objective == "kto"
            what = f"holds no pairs{' and no labels' * kto}, which objective={job.objective} trains on"
            own = f"data.format=preference{' or unpaired' * kto} and rows with chosen and rejected answers"
            own += " (unpaired: with an answer and its label)" * kto
            remedy = _in_place_of("train", f"data=ticket_pairs{' or ticket_labels' * kto}", job, own)
            remedy += ", or objective=sft"
        yield "data.format", job.data.format, what, remedy


@rule("data.format", "objective")
def labelled_answers_are_ktos(job: Job, origins: Origins) -> Found:
    """data.format=unpaired (single answers with a label) goes with objective=kto."""
    if job.data.format == "unpaired" and job.objective != "kto":
        message = f"holds single answers with a label, which objective={job.objective} does not train on"
        shape, group = ("messages", "tickets") if job.objective == "sft" else ("preference", "ticket_pairs")
        remedy = "objective=kto, or " + _in_place_of("labels_train", f"data={group}", job, f"data.format={shape}")
        yield "data.format", "unpaired", message, remedy


def _in_place_of(rows: str, group: str, job: Job, otherwise: str) -> str:
    """A group of shipped data where the job trains on such rows of another; of data of one's own, what else to do."""
    return group if job.data.path == f"{SCHEME}tickets/{rows}.jsonl" else otherwise


@rule("data.on_long_row", "objective")
def judged_answers_are_not_split(job: Job, origins: Origins) -> Found:
    """data.on_long_row=split goes with objective=sft: pairs and judged answers are whole or left out."""
    if job.data.on_long_row == "split" and job.objective != "sft":
        message = f"answers that objective={job.objective} judges are not split: what is too long is left out whole"
        yield "data.on_long_row", "split", message, "data.on_long_row=cut (leaves them out) or refuse (lists them)"


@rule("preference.beta", "objective")
def beta_is_for_preferences(job: Job, origins: Origins) -> Found:
    """preference.beta belongs to objective=dpo, kto and orpo."""
    if job.preference.beta != PreferenceConfig().beta and job.objective == "sft":
        remedy = "leave out preference.beta, or objective=dpo, kto or orpo"
        yield "preference.beta", job.preference.beta, "has no effect: sft has no preference", remedy


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


@rule("checkpointed_layers", "activation_checkpointing")
def some_layers_are_checkpointed_in_full(job: Job, origins: Origins) -> Found:
    """checkpointed_layers as a number goes with activation_checkpointing=full."""
    if job.checkpointed_layers != "auto" and job.activation_checkpointing != "full":
        message = f"is of full checkpointing, and activation_checkpointing={job.activation_checkpointing}"
        yield "checkpointed_layers", job.checkpointed_layers, message, "activation_checkpointing=full, or auto"


@rule("compile", "activation_checkpointing", "sequence_length", "micro_batch_size")
def pieces_are_not_compiled(job: Job, origins: Origins) -> Found:
    """compile=true does not go with activation_checkpointing=offload with more than 16,384 tokens at a time."""
    rows = 1 if job.micro_batch_size == "auto" else job.micro_batch_size
    if job.compile is True and job.activation_checkpointing == "offload" and rows * job.sequence_length > MLP_TOKENS:
        message = f"does not go with activation_checkpointing=offload over {MLP_TOKENS:,} tokens, which run by pieces"
        yield "compile", True, message, "compile=auto, or activation_checkpointing=full"


@rule("hardware.gpu")
def gpu_is_known(job: Job, origins: Origins) -> Found:
    """hardware.gpu is local, cpu or a GPU of the catalogue."""
    known = ["local", "cpu", *catalog.gpus()]
    if job.hardware.gpu not in known:
        guess = nearest_card(job.hardware.gpu, known)
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


@rule("optimizer.in_backward", "optimizer.max_grad_norm", "sharding", "offload")
def stepped_in_the_backward_pass(job: Job, origins: Origins) -> Found:
    """optimizer.in_backward=true steps a layer before the norm of all gradients is known, so nothing is clipped, and
    does so where the gradients are (sharding none or fsdp, no offload)."""
    if job.optimizer.in_backward is not True:
        return
    other = "optimizer.in_backward=auto, which then never takes it"
    if job.optimizer.max_grad_norm:
        message = f"gradients cannot be clipped to a norm of {job.optimizer.max_grad_norm:g} that is not known yet"
        yield "optimizer.in_backward", True, message, f"optimizer.max_grad_norm=0, or {other}"
    if job.sharding not in ("auto", "none", "fsdp"):
        message = f"does not go with sharding={job.sharding}, which holds gradients for itself"
        yield "optimizer.in_backward", True, message, f"sharding=fsdp, or {other}"
    if job.offload not in ("auto", "none"):
        message = f"does not go with offload={job.offload}, under which the host steps what it holds"
        yield "optimizer.in_backward", True, message, f"offload=none, or {other}"


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


RESOLVED = {f"lora.{name}" for name in ("rank", "alpha", "dropout", "targets", "rank_stabilised", "b_lr_ratio")}
"""What every version writes of lora into a run's config.yaml, and into the job that goes to another machine, used or
not; nobody writes all of it by hand."""


@rule("method", "lora.*")
def lora_settings_have_an_adapter(job: Job, origins: Origins) -> Found:
    """lora.* is not set beside method=full, which has no adapter. (A recipe's lora.* under a method=full given
    later on the command line is simply not used.)"""
    if job.method != "full":
        return
    method_file = _file(origin_of(origins, "method"))
    said = [k for k in sorted(origins) if k.startswith("lora.") and _file(origins[k]) in (COMMAND_LINE, method_file)]
    if RESOLVED.issubset(said):
        return
    for key in said:
        name = key.partition(".")[2]
        remedy = f"leave out {key}, or method=lora"
        yield key, getattr(job.lora, name, None), "has no effect: method=full has no adapter", remedy


@rule("lora.dora", "method", "precision", "sharding", "offload", "plan.methods")
def dora_reads_whole_weights(job: Job, origins: Origins) -> Found:
    """lora.dora goes with a base in bf16 or fp32 (method=lora), sharding=none or ddp and weights on the GPU: it takes
    the norms of whole rows, of weights that are no codes."""
    if not job.lora.dora or job.method == "full":
        return
    if job.method == "qlora" or (job.method == "auto" and set(job.plan.methods) == {"qlora"}):
        yield "lora.dora", True, "is not done over a base in nf4", "method=lora, or lora.dora=false"
    if job.precision == "fp8" and (job.method == "lora" or "full" not in job.plan.methods):
        yield "lora.dora", True, "is not done over a frozen base in fp8", "precision=bf16, or lora.dora=false"
    if job.sharding not in ("auto", "none", "ddp"):
        message = f"takes norms of whole weights, which sharding={job.sharding} cuts or casts"
        yield "lora.dora", True, message, "sharding=ddp or auto, or lora.dora=false"
    if job.offload == "all":
        yield "lora.dora", True, "does not go with offload=all, which cuts weights", "offload=auto, or lora.dora=false"


@rule("optimizer.min_lr_ratio", "optimizer.schedule")
def constant_rate_has_no_minimum(job: Job, origins: Origins) -> Found:
    """optimizer.min_lr_ratio has no meaning with schedule=constant, which does not fall."""
    if job.optimizer.schedule == "constant" and job.optimizer.min_lr_ratio > 0:
        remedy = "leave it out, or optimizer.schedule=cosine"
        yield "optimizer.min_lr_ratio", job.optimizer.min_lr_ratio, "has no effect with schedule=constant", remedy


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
            guess = nearest_card(name, list(catalog.gpus()))
            remedy = (f"{guess}; " if guess else "") + "known are " + ", ".join(catalog.gpus())
            yield "plan.prices_usd_per_hour", job.plan.prices_usd_per_hour, f"{name} is not in the catalogue", remedy


@rule("model.path")
def model_folder_exists(job: Job, origins: Origins) -> Found:
    """model.path is a folder with a config.json, and what lies in it is whole. With launch=ssh and slurm an absolute
    path that is not here is left to the hosts."""
    if job.model.path is None:
        return
    folder = local_path(job.model.path)
    if job.launch.name in ("ssh", "slurm") and job.model.path.startswith("/") and not folder.exists():
        return
    remedy = "name a folder with config.json, *.safetensors and the tokenizer, or leave it out to use the Hub"
    if not (folder / "config.json").is_file():
        what = "has no config.json in it" if folder.is_dir() else "is not a folder here"
        what += f" ({folder})" if str(folder) != job.model.path.rstrip("/") else ""
        if run := run_of(folder):
            what = f"is {'a run' if run == folder else 'the adapter of a run'}, not a model"
            remedy = f"model.path={run / 'export' / 'bf16'}, what that run trained as a model (export=bf16 writes it)"
        yield "model.path", job.model.path, what, remedy
    for what in broken_files(folder):
        yield "model.path", job.model.path, what, remedy


def _file(origin: str) -> str:
    return origin if origin in (COMMAND_LINE, DEFAULT) else origin.rpartition(":")[0]


def _looked_into(place: Path) -> Iterator[Path]:
    """The files of rows that `place` is or holds, and the folders that they may be in: not a volume's lost+found."""
    yield place
    for each in place.rglob("*") if os.path.isdir(place) else ():
        below = each.relative_to(place).parts
        if not any(part.startswith(".") or part == "lost+found" for part in below) and (
            each.suffix.lower() in DATA_SUFFIXES or each.is_dir()
        ):
            yield each


def _may_read(place: Path) -> bool:
    return os.access(place, os.R_OK | (os.X_OK if place.is_dir() else 0))


def _is_file_name(path: str) -> bool:
    """Whether `path` means a file here and not a Hub dataset id (`owner/name`)."""
    return path.startswith((SCHEME, "/", "./", "../", "~")) or path.lower().endswith(DATA_SUFFIXES)


def _file_hint(key: str, path: str) -> str:
    if "://" in path:
        return f"download it and give the file, or a Hub dataset as {key}=OWNER/NAME"
    if path.startswith(SCHEME):
        return _shipped_hint(key, path)
    real, beside = Path(resolve_path(path)), path.lstrip("/")
    if path != beside and os.path.isfile(beside):
        return f"{key}={beside}"
    if not real.parent.is_dir():
        return f"there is no folder {real.parent}; paths are relative to where the command is run ({Path.cwd()})"
    names = sorted(p.name for p in real.parent.iterdir() if p.suffix.lower() in DATA_SUFFIXES and p.is_file())
    close = difflib.get_close_matches(real.name, names, n=1)
    if close:
        return f"{key}={path.removesuffix(real.name)}{close[0]}"
    there = ", ".join(names[:8]) or "no JSON, JSONL, CSV or Parquet file"
    return f"name a file that is there; {real.parent.resolve()} has {there}"


def _shipped_hint(key: str, path: str) -> str:
    folder = shipped_folder("data")
    files = sorted(file for file in folder.rglob("*") if file.suffix in DATA_SUFFIXES)
    names = [f"{SCHEME}{file.relative_to(folder)}" for file in files]
    close = difflib.get_close_matches(path, names, n=1)
    return f"{key}={close[0]}" if close else f"shipped are {', '.join(names)}"
