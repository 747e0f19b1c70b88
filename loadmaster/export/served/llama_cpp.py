"""A GGUF export in llama.cpp, which is not vLLM's to serve: the same questions, asked through its Python binding.

llama.cpp is cyllama's build, in an environment of its own, and runs in a process of its own: native code that crashes
on this machine's processor is a failure of the format and of nothing else. It computes activations in 8 bits beside
8-bit weights, so its difference from the trained model is larger than that of the same weights in transformers.
"""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from loadmaster.errors import ExportRejected, NotChecked
from loadmaster.export.process import KILLED, answering_s, clean_environment, meaning, run_script, timeout_s
from loadmaster.export.served.client import Served
from loadmaster.export.served.compare import LIMITS, answer_figures, log_probability_figures
from loadmaster.export.served.server import FASTER
from loadmaster.processors import threads

PROBE = Path(__file__).with_name("llama_cpp_probe.py")
TAIL_LINES = 8


def ask_llama_cpp(
    python: Path, folder: Path, manifest: dict[str, Any], reference: dict[str, Any], wanted: dict[str, Any],
    tokenizer: Any, scratch: Path,
) -> dict[str, Any]:
    """Figures of the GGUF file in `folder`, as `serve_check.ask` gives them of a served model.

    python: interpreter of an environment with cyllama.
    Raises ExportRejected when llama.cpp does not load it, or dies; NotChecked when it is killed or not done in time.
    """
    [file] = sorted(folder.glob("*.gguf"))
    texts = {
        name: tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for name, messages in wanted["conversations"].items()
    }
    stop_ids = manifest["stop_token_ids"]
    # As many threads as torch would take: llama.cpp's spin while they wait, and crawl where they are too many.
    told = {
        "model": str(file.absolute()), "documents": reference["documents"], "texts": texts, "stop_ids": stop_ids,
        "prompts": [wanted["rendered"][prompt["origin"]] for prompt in wanted["prompts"]],
        "max_new_tokens": wanted["max_new_tokens"], "threads": threads(),
    }
    size, passes = file.stat().st_size, len(told["prompts"]) * wanted["max_new_tokens"]  # one after the other
    found = _probe(python, told, scratch, timeout_s(size) + answering_s(passes, size, "cpu"))
    served = [(each["own"], each["top"]) for each in found["documents"]]
    figures: dict[str, Any] = {"models": [found["name"]]}
    figures |= log_probability_figures(reference["documents"], served)
    different = [name for name, ids in found["tokens"].items() if ids != wanted["rendered"][name]]
    if texts and found["template"] != tokenizer.get_chat_template():
        different.append("the chat template in the file")
    figures["rendering"] = {"cases": len(texts), "different": different}
    if wanted["prompts"]:
        answers = [
            Served(ids, said["ids"], tokenizer.decode(said["ids"], skip_special_tokens=True), _reason(said))
            for ids, said in zip(told["prompts"], found["answers"], strict=True)
        ]
        figures |= answer_figures(reference["answers"], answers, stop_ids, LIMITS["gguf"])
    return {**figures, "stops_at": found["ends"]}


def _reason(said: dict[str, Any]) -> str:
    return "stop" if said["ended"] else "length"


def _probe(python: Path, told: dict[str, Any], scratch: Path, limit_s: float) -> dict[str, Any]:
    environment = clean_environment()
    try:
        done, result = run_script(python, PROBE, told, scratch, timeout=limit_s, env=environment)
    except subprocess.TimeoutExpired:
        raise NotChecked(f"llama.cpp did not answer within {limit_s:.0f} s; {FASTER}") from None
    if result is None:
        tail = "\n".join(done.stderr.strip().splitlines()[-TAIL_LINES:])
        why = f"llama.cpp ended with {meaning(done.returncode)} on {Path(told['model']).name}\n{tail}"
        raise NotChecked(why) if done.returncode in KILLED else ExportRejected(why)
    return result
