"""Rules of data and of the objective that is trained on it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from pathlib import Path

from loadmaster.config.origins import COMMAND_LINE, origin_file, origin_of
from loadmaster.config.rule_table import Found, Origins, rule
from loadmaster.config.schema import DATA_SUFFIXES, Job, PreferenceConfig
from loadmaster.config.shipped import SCHEME, resolve_path, shipped_folder


@rule("data.path", "data.validation", "stop_after")
def data_files_exist(job: Job, origins: Origins) -> Found:
    """data.path and data.validation name files that exist, unless the job stops after the plan (on a rented machine
    they may be under /workspace, where its volume is); what is here can be read, and more than once."""
    named = [("data.path", path) for path in job.data.paths]
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
        elif job.stop_after != "plan" and os.path.islink(place) and not os.path.exists(place):
            yield key, path, f"is a link to {os.readlink(place)}, which is not there", "mend the link, or name the file"
        elif job.stop_after != "plan" and _is_file_name(path) and not os.path.exists(place):
            here = "" if place.is_absolute() else f" here ({place.absolute()})"
            yield key, path, f"there is no such file{here}", _file_hint(key, path)


@rule("data.validation", "data.path", "data.split", "data.validation_split")
def validation_is_held_out(job: Job, origins: Origins) -> Found:
    """The held-out file is not among the training files, nor a split of a Hub dataset trained on: what was trained on
    measures nothing."""
    held = job.data.validation
    if held not in job.data.paths:
        return
    remedy = "data.validation=0.05 holds out a share of the rows"
    if _is_file_name(held) or os.path.exists(resolve_path(held)):
        yield "data.validation", held, "is the training file itself", remedy
    elif job.data.split == job.data.validation_split:
        remedy += ", data.validation_split=NAME is another split"
        yield "data.validation_split", job.data.validation_split, f"is the split of {held} that is trained on", remedy


@rule("data.path", "data.validation")
def own_data_is_held_out_of_itself(job: Job, origins: Origins) -> Found:
    """Data of one's own is not judged on held-out rows that are shipped, which another data group left there. (Who
    types them, or sets both in one file such as a run's config.yaml, means it.)"""
    paths, held = job.data.paths, job.data.validation
    if any(path.startswith(SCHEME) for path in paths) or not (isinstance(held, str) and held.startswith(SCHEME)):
        return
    file, meant = origin_file(origin_of(origins, "data.path")), origin_file(origin_of(origins, "data.validation"))
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


@rule("data.packing", "objective", "method", "plan.methods")
def kto_of_all_weights_is_packed(job: Job, origins: Origins) -> Found:
    """objective=kto method=full takes packed rows, within which a prompt is compared under another's answer."""
    left = [name for name in job.plan.methods if name != "full"]
    only_full = job.method == "full" or (job.method == "auto" and job.plan.methods and not left)
    if job.objective == "kto" and only_full and not job.data.packing:
        message = "leaves no other answer in a row, from which kto of all weights tells how far the model moved"
        yield "data.packing", False, message, "data.packing=true, or method=lora"


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
        yield "data.on_long_row", "split", message, "data.on_long_row=drop (leaves them out) or refuse (lists them)"


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
    if set("*?") & set(path):
        several = f" or files, {key}=[A,B]" if key == "data.path" else ""
        return f"patterns are not expanded here: name a folder, {key}={path.rpartition('/')[0] or '.'}{several}"
    real, beside = Path(resolve_path(path)), path.lstrip("/")
    if path != beside and os.path.isfile(beside):
        return f"{key}={beside}"
    if not os.path.isdir(real.parent):
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
