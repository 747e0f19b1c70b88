"""Rules of method, precision, sharding, plan and model."""

from __future__ import annotations

import math
import os
from pathlib import Path

from loadmaster import catalog
from loadmaster.config.fields import NOT_APPLES, OF_APPLES, is_apples, known_cards
from loadmaster.config.model_folder import broken_files, run_of
from loadmaster.config.origins import COMMAND_LINE, origin_file, origin_of
from loadmaster.config.rule_table import Found, Origins, rule
from loadmaster.config.schema import Job, OptimizerConfig
from loadmaster.config.shipped import local_path
from loadmaster.words import counted

MLP_TOKENS = 16384
"""Of an MLP at a time under activation_checkpointing=offload; the engine and the preflight read this number."""

LONGEST_TEMPLATE = 10_000_000
"""Bytes; what is longer, such as a model's weights, is no chat template."""


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
        message, remedy = "is not in the catalogue", known_cards(job.hardware.gpu, known, "hardware.gpu")
        if is_apples(job.hardware.gpu):
            message, remedy = OF_APPLES, NOT_APPLES
        yield "hardware.gpu", job.hardware.gpu, message, remedy


@rule("sharding", "hardware.count", "hardware.nodes")
def several_gpus_are_synchronised(job: Job, origins: Origins) -> Found:
    """sharding none is for one GPU: on several, each would train a model of its own."""
    gpus = _gpus(job)
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
    gpus = _gpus(job)
    if job.micro_batch_size != "auto" and job.micro_batch_size * gpus > job.batch.global_size:
        largest = job.batch.global_size // gpus
        message = f"times {counted(gpus, 'GPU')} is more than batch.global_size={job.batch.global_size}"
        remedy = f"batch.global_size={job.micro_batch_size * gpus}"
        remedy = f"micro_batch_size={largest}, or {remedy}" if largest else remedy
        yield "micro_batch_size", job.micro_batch_size, message, remedy


@rule("neftune_alpha", "lora.dropout", "objective", "method")
def noise_is_for_answers(job: Job, origins: Origins) -> Found:
    """neftune_alpha and lora.dropout go with objective=sft: noise would be taken for a preference."""
    dropout = 0.0 if job.method == "full" else job.lora.dropout
    for key, value in {"neftune_alpha": job.neftune_alpha, "lora.dropout": dropout}.items():
        if value and job.objective != "sft":
            message = f"objective={job.objective} compares likelihoods, which noise changes"
            yield key, value, message, f"{key}=0, or objective=sft"


def _gpus(job: Job) -> int:
    """GPUs of all nodes, where auto is at least one each."""
    return (1 if job.hardware.count == "auto" else job.hardware.count) * job.hardware.nodes


RESOLVED = {f"lora.{name}" for name in ("rank", "alpha", "dropout", "targets", "rank_stabilised", "b_lr_ratio")}
"""What every version writes of lora into a run's config.yaml, and into the job that goes to another machine, used or
not; nobody writes all of it by hand."""


@rule("method", "lora.*")
def lora_settings_have_an_adapter(job: Job, origins: Origins) -> Found:
    """lora.* is not set beside method=full, which has no adapter. (A recipe's lora.* under a method=full given
    later on the command line is simply not used.)"""
    if job.method != "full":
        return
    with_method = COMMAND_LINE, origin_file(origin_of(origins, "method"))
    said = [k for k in sorted(origins) if k.startswith("lora.") and origin_file(origins[k]) in with_method]
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


@rule("optimizer.decay_ratio", "optimizer.schedule")
def only_wsd_has_a_decay_of_its_own(job: Job, origins: Origins) -> Found:
    """optimizer.decay_ratio goes with schedule=wsd: the others fall from the warm-up on, or not at all."""
    ratio, schedule = job.optimizer.decay_ratio, job.optimizer.schedule
    is_set = ratio != OptimizerConfig.decay_ratio or origin_of(origins, "optimizer.decay_ratio") == COMMAND_LINE
    if schedule != "wsd" and is_set:
        remedy = "leave it out, or optimizer.schedule=wsd"
        yield "optimizer.decay_ratio", ratio, f"has no effect with schedule={schedule}", remedy


@rule("optimizer.decay_ratio", "optimizer.warmup_ratio", "optimizer.warmup_steps", "max_steps")
def the_rate_rises_before_it_falls(job: Job, origins: Origins) -> Found:
    """With schedule=wsd warm-up and optimizer.decay_ratio are no more than all of the steps. (A warm-up as long as the
    run is refused by itself.)"""
    optimizer = job.optimizer
    warmup = optimizer.warmup_ratio
    if optimizer.warmup_steps is not None:
        warmup = optimizer.warmup_steps / job.max_steps if job.max_steps else 0.0
    if optimizer.warmup_steps is not None and warmup >= 1:
        return
    if optimizer.schedule == "wsd" and warmup + optimizer.decay_ratio > 1:
        message = f"of the steps and a warm-up over {100 * warmup:.3g}% of them are more than all"
        left = math.floor(100 * (1 - warmup)) / 100
        remedy = f"optimizer.decay_ratio={left:g}, or a shorter warm-up" if left > 0 else "a shorter warm-up"
        yield "optimizer.decay_ratio", optimizer.decay_ratio, message, remedy


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
            message, remedy = f"{name} is not in the catalogue", known_cards(name, catalog.gpus())
            yield "plan.prices_usd_per_hour", job.plan.prices_usd_per_hour, message, remedy


@rule("model.path")
def model_folder_exists(job: Job, origins: Origins) -> Found:
    """model.path is a folder with a config.json, and what lies in it is whole. With launch=ssh and slurm an absolute
    path that is not here is left to the hosts."""
    if job.model.path is None:
        return
    folder = local_path(job.model.path)
    if job.launch.name in ("ssh", "slurm") and job.model.path.startswith("/") and not os.path.exists(folder):
        return
    is_here = os.path.isdir(folder)
    remedy = "name a folder with config.json, *.safetensors and the tokenizer, or leave it out to use the Hub"
    if not os.path.isfile(folder / "config.json"):
        what = "has no config.json in it" if is_here else "is not a folder here"
        what += f" ({folder})" if str(folder) != job.model.path.rstrip("/") else ""
        if is_here and (run := run_of(folder)):
            whose = "an export" if folder.parent.name == "export" else "the adapter"
            what = f"is {'a run' if run == folder else f'{whose} of a run'}, not a model"
            remedy = f"model.path={run / 'export' / 'bf16'}, what that run trained as a model (export=bf16 writes it)"
        yield "model.path", job.model.path, what, remedy
    for what in broken_files(folder) if is_here else ():
        yield "model.path", job.model.path, what, remedy


@rule("model.chat_template", "stop_after")
def chat_template_is_a_file(job: Job, origins: Origins) -> Found:
    """model.chat_template names a file that is here and holds a Jinja template, unless the job stops after the plan."""
    path = job.model.chat_template
    if path is None or job.stop_after == "plan" or (job.launch.name != "local" and path.startswith("/workspace/")):
        return
    if what := _no_template(local_path(path)):
        remedy = "name a file with the Jinja text, as chat_template.jinja of a model is; null: the model's own is taken"
        yield "model.chat_template", path, what, remedy


def _no_template(file: Path) -> str | None:
    """What a file is that holds no template; None for one that does."""
    if not (os.path.isfile(file) and os.access(file, os.R_OK)):
        return f"is no file that can be read here ({file.absolute()})"
    try:
        text = file.read_text(encoding="utf-8") if file.stat().st_size < LONGEST_TEMPLATE else "\0"
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or not text.strip():
        return "is no text in UTF-8" if "\0" in text else "holds nothing"
    from loadmaster.config.chat_template import broken

    return broken(text)


@rule(
    "checkpoint.load_best", "checkpoint.keep_best", "checkpoint.every_steps", "evaluation.every_steps",
    "data.validation",
)
def best_checkpoint_is_known_and_kept(job: Job, origins: Origins) -> Found:
    """checkpoint.load_best needs held-out rows, evaluated as checkpoints are written, and the best of these kept."""
    if not job.checkpoint.load_best:
        return
    written, evaluated = job.checkpoint.every_steps, job.evaluation.every_steps
    if job.data.validation is None:
        yield "data.validation", None, "leaves checkpoint.load_best nothing to go by", "data.validation=0.05"
    if job.checkpoint.keep_best == 0:
        yield "checkpoint.keep_best", 0, "keeps none for checkpoint.load_best", "checkpoint.keep_best=1"
    apart = evaluated != "auto" and (written == "auto" or evaluated is None or written % evaluated)
    if apart:
        message = "leaves checkpoints without the loss that checkpoint.load_best goes by"
        yield "evaluation.every_steps", evaluated, message, "evaluation.every_steps=auto evaluates with each checkpoint"


@rule("evaluation.patience", "evaluation.every_steps", "data.validation")
def patience_has_evaluations(job: Job, origins: Origins) -> Found:
    """evaluation.patience counts evaluations of held-out rows while training."""
    if job.evaluation.patience is None:
        return
    if job.data.validation is None:
        yield "data.validation", None, "leaves evaluation.patience nothing to go by", "data.validation=0.05"
    if job.evaluation.every_steps is None:
        message = "evaluates only at the end, where evaluation.patience has nothing left to end"
        yield "evaluation.every_steps", None, message, "evaluation.every_steps=auto evaluates with each checkpoint"


@rule("optimizer.warmup_steps", "max_steps")
def warm_up_ends_within_the_run(job: Job, origins: Origins) -> Found:
    """optimizer.warmup_steps is less than max_steps, or the rate never reaches its peak."""
    warmup, steps = job.optimizer.warmup_steps, job.max_steps
    if warmup and steps is not None and warmup >= steps:
        message = f"of max_steps={steps}: the learning rate would never reach its peak"
        yield "optimizer.warmup_steps", warmup, message, f"optimizer.warmup_steps={steps // 10}, or more steps"


@rule("tracker.project", "tracker.name")
def tensorboard_writes_into_the_run(job: Job, origins: Origins) -> Found:
    """tracker.project is a folder within the run directory, where tracker.name is tensorboard."""
    project = job.tracker.project
    if job.tracker.name == "tensorboard" and (os.path.isabs(project) or ".." in project.split("/")):
        message = "leads out of the run directory, where tensorboard's files are"
        yield "tracker.project", project, message, f"tracker.project={os.path.basename(project.rstrip('/.')) or 'NAME'}"
