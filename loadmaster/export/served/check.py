"""`loadmaster serve-check RUN`: is what a real server serves what was trained?

Each exported format is loaded into a vLLM server of its own on 127.0.0.1, an adapter over its base (a GGUF file into
llama.cpp: llama_cpp.py), and asked, over the OpenAI API, for its name, the tokens of rendered conversations,
log-probabilities of held-out documents, greedy answers, and whether each token that ends a turn stops it. All of it is
compared with the model as trained (compare.py). run_dir/serve-check.json has the figures (record.py),
run_dir/serve-check/<format>.log what the server said.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection
from contextlib import chdir, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from loadmaster.config.compose import read_job
from loadmaster.config.schema import Job
from loadmaster.data import Conversation, PreparedData, prepare, prompt_and_reference
from loadmaster.errors import ExportRejected, LoadmasterError, NotChecked, UsageError
from loadmaster.evaluation.generate import is_askable, prompt_ids
from loadmaster.export.manifest import NAME as MANIFEST
from loadmaster.export.manifest import is_served, no_export, read_manifest, verify_manifest
from loadmaster.export.process import answering_s, run_step, timeout_s
from loadmaster.export.room import trained_model
from loadmaster.export.served.client import Client
from loadmaster.export.served.compare import LIMITS, answer_figures, failures, log_probability_figures
from loadmaster.export.served.environment import LLAMA_CPP, environment_python, server_python
from loadmaster.export.served.harness import Asked, Harness
from loadmaster.export.served.harness import failures as task_failures
from loadmaster.export.served.llama_cpp import ask_llama_cpp
from loadmaster.export.served.processor import refuse_unserved
from loadmaster.export.served.record import NAME, earlier
from loadmaster.export.served.run import Servers, file_bytes
from loadmaster.files import read_json, storable, write_json
from loadmaster.models.resolve import resolve_base
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.preflight.hardware import detect_local
from loadmaster.preflight.plan import Plan
from loadmaster.rundir import started_in

DOCUMENTS, PROMPTS, ANSWER_TOKENS = 16, 8, 64
FIXED_CONVERSATIONS = {
    "single turn": [{"role": "user", "content": "What is in the hold?"}],
    "white space and other scripts": [{"role": "user", "content": "  Grüße \n\n 日本語 🚚 <b>x</b> {{y}}\t"}],
    "system": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is in the hold?"}],
    "several turns": [
        {"role": "user", "content": "What is in the hold?"},
        {"role": "assistant", "content": "Two crates."},
        {"role": "user", "content": "And their weight?"},
    ],
}
"""Rendered by the server and by us; one that the template itself refuses (some know no system message) is left out."""


def serve_check(
    run_dir: Path, formats: list[str] | None, python: Path | None, echo: Callable[[str], None],
    harness: Harness | None = None,
) -> dict[str, dict[str, Any]]:
    """Check each of `formats` (None: all that are exported) in a server, and write run_dir/serve-check.json.

    python: interpreter that has vLLM; None: see `server_python`. harness: tasks that the base and every format that
    vLLM serves are asked besides.
    Returns {format: "server", "created_utc", figures, "limits", "failures" (a sentence each), "passed", "checked"}; a
    server that dies is a failure of its format, and one that was not waited for any longer has not checked it. What was
    found before of an export that is not asked, or could not be checked, stays in the file. Raises LoadmasterError for
    a run that holds no export, or without a server.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")  # an export that is made meanwhile is not the one asked
    manifests = exported(run_dir, formats)
    earlier(run_dir)  # a file that is damaged is refused before hours of work
    if harness is not None and set(manifests) == {"gguf"}:
        raise UsageError("tasks are asked of what vLLM serves, and gguf is llama.cpp's: name another format too")
    job = read_job(run_dir / "config.yaml").job
    pythons, versions = _interpreters(manifests, python, echo)
    base = resolve_base(job.model)
    tokenizer = load_tokenizer(base)
    wanted = questions(job, prepare(job, tokenizer), tokenizer)
    results = {}
    with tempfile.TemporaryDirectory() as made:
        scratch = Path(made)
        asked = None if harness is None else Asked(harness, scratch, echo)
        reference = _reference(run_dir, base, wanted, list(manifests), scratch, echo)
        servers = Servers(run_dir, job.recipe, base, job.sequence_length, pythons.get("vllm"), detect_local(), asked)
        before = None if asked is None else servers.tasks_of_base(echo)

        def measured(name: str, say: Callable[[str], None]) -> dict[str, Any]:
            manifest = manifests[name]
            if name in reference["broken"]:
                raise ExportRejected(f"it does not load: {reference['broken'][name]}")
            if name == "adapter" and not is_served(manifest, name):
                raise ExportRejected(f"no server loads it: {manifest['oldest_server']['because']}")
            if python is None and name != "gguf":
                refuse_unserved(pythons["vllm"], name)
            if name == "gguf":
                folder = run_dir / "export" / name
                return ask_llama_cpp(pythons["llama.cpp"], folder, manifest, reference, wanted, tokenizer, scratch)
            return servers.figures(name, manifest, partial(ask, reference, wanted, manifest), say)

        for name in manifests:
            start = time.monotonic()
            say = partial(_say, echo, name)
            server = versions["llama.cpp" if name == "gguf" else "vllm"]
            say(f"starting {server}")
            try:
                figures = measured(name, say)
                found = failures(figures, LIMITS[name], job.recipe)
                if harness is not None and before is not None and "tasks" in figures:
                    found += task_failures(before, figures["tasks"], harness.max_drop)
            except ExportRejected as error:
                found, figures = [str(error)], {"checked": not isinstance(error, NotChecked)}
            seconds = time.monotonic() - start
            results[name] = {
                "server": server, "created_utc": now, "checked": True, **figures,
                "seconds": seconds, "limits": asdict(LIMITS[name]), "failures": found, "passed": not found,
            }
            say(f"{outcome(results[name])} after {seconds:.0f} s")
    kept = _kept(run_dir, results, echo)
    recorded = {**results, **kept}
    record: dict[str, Any] = {
        "schema": 1,
        "server": ", ".join(versions.values()),
        "served_as": job.recipe,
        "created_utc": now,
        "passed": all(figures["passed"] for figures in recorded.values()),
        "formats": recorded,
    }
    if harness is not None:
        path = str(harness.include_path) if harness.include_path else None
        record["tasks"] = {**asdict(harness), "include_path": path, "before": before}
    elif kept and (told := read_json(run_dir / NAME).get("tasks")):  # figures that stay were judged by the base's
        record["tasks"] = told
    write_json(run_dir / NAME, storable(record))
    return results


def _kept(
    run_dir: Path, results: dict[str, dict[str, Any]], echo: Callable[[str], None]
) -> dict[str, dict[str, Any]]:
    """What was found before of exports that are not among `results`, or could not be checked."""
    known = {name for name, figures in results.items() if figures["checked"]}
    kept = {name: figures for name, figures in earlier(run_dir).items() if name not in known}
    for name in kept.keys() & results.keys():
        echo(f"{name}: what was found on {kept[name]['created_utc']} stays: it {outcome(kept[name])}")
    return kept


def outcome(figures: dict[str, Any]) -> str:
    """Of a format, in words; one that was not checked has neither passed nor failed."""
    return "passed" if figures["passed"] else "FAILED" if figures.get("checked", True) else "not checked"


def folder_of_paths(run_dir: Path) -> Path:
    """Which folder the relative paths of the run's job count from: where it was started, or here if all is here now."""
    for folder in (started_in(run_dir), Path.cwd()):
        with suppress(OSError, LoadmasterError), chdir(folder):
            read_job(run_dir.absolute() / "config.yaml")
            return folder
    return started_in(run_dir)


def _interpreters(
    formats: Collection[str], python: Path | None, echo: Callable[[str], None]
) -> tuple[dict[str, Path], dict[str, str]]:
    """(server -> its interpreter, server -> its name and version) of those that these formats need."""
    pythons, versions = {}, {}
    if set(formats) != {"gguf"}:
        pythons["vllm"], versions["vllm"] = server_python(python, echo)
    if "gguf" in formats:
        pythons["llama.cpp"] = environment_python(LLAMA_CPP, echo)
        versions["llama.cpp"] = f"llama.cpp ({LLAMA_CPP.folder})"
    return pythons, versions


def exported(run_dir: Path, formats: list[str] | None) -> dict[str, dict[str, Any]]:
    """Manifests of the formats to check. Raises ExportRejected for one that is not there, or not as it was exported."""
    found = sorted(name for name in LIMITS if os.path.isfile(run_dir / "export" / name / MANIFEST))
    if not found:
        raise no_export(run_dir)
    if absent := [name for name in ("config.yaml", "plan.json") if not (run_dir / name).is_file()]:
        raise ExportRejected(f"{run_dir} has no {', '.join(absent)}: give the run directory itself.")
    if missing := [name for name in formats or [] if name not in found]:
        raise ExportRejected(f"{run_dir} has no export {', '.join(missing)}; it has {', '.join(found)}.")
    for name in formats or found:
        if problems := verify_manifest(folder := run_dir / "export" / name):
            listed = "\n  ".join(problems)
            raise ExportRejected(f"{folder} is not what was exported, so it is not asked:\n  {listed}")
    return {name: read_manifest(run_dir / "export" / name) for name in formats or found}


def questions(job: Job, prepared: PreparedData, tokenizer: Any) -> dict[str, Any]:
    """What is asked: held-out documents that fit, prompts with room for an answer, conversations and their token ids in
    training.

    Conversations with tools are left out: servers rewrite them for tool parsers of their own.
    """
    from loadmaster.export.served.reference import split_row

    rows = prepared.train if prepared.validation is None else prepared.validation
    documents: list[Any] = []
    for row in rows:
        # One token is left for the answer that vLLM gives with every prompt.
        documents += [d for d in split_row(row) if len(d) < job.sequence_length and (d.labels[1:] != -100).any()]
        if len(documents) >= DOCUMENTS:
            break
    if not documents:
        raise LoadmasterError(
            f"no held-out document is shorter than sequence_length={job.sequence_length}, so none can be sent whole "
            "to a server: hold out shorter ones (data.validation)"
        )
    asked: dict[str, Any] = {
        "documents": [{"input_ids": d.input_ids.tolist(), "labels": d.labels.tolist()} for d in documents[:DOCUMENTS]],
        "max_new_tokens": min(job.evaluation.max_new_tokens, ANSWER_TOKENS), "prompts": [], "conversations": {},
        "rendered": {},
    }
    if not tokenizer.chat_template:
        return asked
    asked["conversations"] = {
        name: messages for name, messages in FIXED_CONVERSATIONS.items()
        if is_askable(tokenizer, Conversation(messages))
    }
    held_out = prepared.validation is not None
    for conversation in prepared.validation_conversations if held_out else prepared.train_conversations:
        if len(asked["prompts"]) == PROMPTS:
            break
        if not conversation.is_words_alone:
            continue
        messages, _ = prompt_and_reference(conversation)
        if not is_askable(tokenizer, Conversation(messages)):
            continue
        if len(_rendered(tokenizer, messages)) + asked["max_new_tokens"] <= job.sequence_length:
            asked["prompts"].append(asdict(replace(conversation, messages=messages)))
            asked["conversations"][conversation.origin] = messages
    asked["rendered"] = {name: _rendered(tokenizer, messages) for name, messages in asked["conversations"].items()}
    return asked


def ask(
    reference: dict[str, Any], wanted: dict[str, Any], manifest: dict[str, Any], client: Client
) -> dict[str, Any]:
    """Figures of one served model."""
    stop_ids = manifest["stop_token_ids"]
    figures: dict[str, Any] = {"models": client.models()}
    different = [name for name, messages in wanted["conversations"].items()
                 if client.rendered(messages) != wanted["rendered"][name]]
    served = [client.log_probabilities(document["ids"], document["positions"]) for document in reference["documents"]]
    figures |= log_probability_figures(reference["documents"], served, manifest["format"])
    if wanted["prompts"]:
        answers = [client.answer(prompt["messages"], wanted["max_new_tokens"]) for prompt in wanted["prompts"]]
        # What the server answered to, besides what it says it would.
        for prompt, answer in zip(wanted["prompts"], answers, strict=True):
            if answer.prompt_ids != wanted["rendered"][prompt["origin"]]:
                different.append(f"the prompt of {prompt['origin']}")
        figures |= answer_figures(reference["answers"], answers, stop_ids, LIMITS[manifest["format"]])
    if wanted["conversations"]:
        messages = next(iter(wanted["conversations"].values()))
        forced = {token: client.answer(messages, max_tokens=4, only_token=token) for token in stop_ids}
        figures["stops_at"] = {
            str(token): answer.finish_reason == "stop" and len(answer.ids) == 1 for token, answer in forced.items()
        }
    figures["rendering"] = {"cases": len(wanted["conversations"]), "different": list(dict.fromkeys(different))}
    return figures


COLUMNS = ("format", "chats", "differs", "from disk", "tuned", "top-1", "1st token", "answers", "ends", "passed")


def table(results: dict[str, dict[str, Any]]) -> Table:
    """What `serve_check` returns, as a rich Table.

    chats: conversations rendered as in training. differs: mean difference of log-probabilities from the trained model,
    nats; from disk: from the same files as we load them. tuned: the tuned share. top-1: tokens with the same most
    likely next token. 1st token, answers: greedy answers with our first token, and equal to ours. ends: answers that
    end where ours do, of those that are ours up to there and do or surely should.
    """
    shown = Table(title="served, against the model as trained")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("format", "passed") else "right")
    for name, figures in results.items():
        shown.add_row(name, *_cells(figures), {"passed": "yes", "FAILED": "no"}.get(said := outcome(figures), said))
    return shown


def _cells(figures: dict[str, Any]) -> list[str]:
    if "difference" not in figures:
        return [""] * (len(COLUMNS) - 2)
    rendering, share = figures["rendering"], figures["tuned_share"]
    cells = [
        f"{rendering['cases'] - len(rendering['different'])}/{rendering['cases']}" if rendering["cases"] else "none",
        f"{figures['difference']:.4f}", f"{figures['from_disk']:.4f}", "?" if share is None else f"{share:.3f}",
        f"{figures['top1_agreement']:.1%}",
    ]
    if "answers" not in figures:
        return [*cells, "", "", ""]
    ended, same = figures["ended"]
    return [*cells, f"{figures['first_token']:.0%}", f"{figures['equal_answers']:.0%}", f"{ended}/{same}"]


def _reference(
    run_dir: Path, base: Path, wanted: dict[str, Any], formats: list[str], scratch: Path, echo: Callable[[str], None]
) -> dict[str, Any]:
    plan = Plan.read(run_dir / "plan.json")
    trained = run_dir / plan.trained
    if not trained.is_dir():
        raise ExportRejected(f"{trained} is not there: without what was trained there is nothing to compare with.")
    # bf16 and the adapter are the trained model, to a rounding; transformers does not compute a GGUF as llama.cpp.
    exports = {name: str(run_dir / "export" / name) for name in formats if name not in ("bf16", "adapter", "gguf")}
    # What a CPU trained is in fp32, which packed attention on a GPU does not take.
    device = "cpu" if "cpu" in (plan.hardware.gpu, detect_local().gpu) else "cuda"
    spec = {
        **trained_model(plan, base, trained, device, scratch),
        **{key: wanted[key] for key in ("documents", "prompts", "max_new_tokens")},
        "exports": exports,
    }
    each, passes = file_bytes(base), wanted["max_new_tokens"] + len(wanted["prompts"])
    limit_s = timeout_s((3 + len(exports)) * each) + answering_s(passes, each, device)
    return run_step("loadmaster.export.served.reference", spec, scratch, limit_s, echo)


def _say(echo: Callable[[str], None], name: str, text: str) -> None:
    echo(f"{name}: {text}")


def _rendered(tokenizer: Any, messages: list[dict[str, Any]]) -> list[int]:
    return prompt_ids(tokenizer, Conversation(messages))
