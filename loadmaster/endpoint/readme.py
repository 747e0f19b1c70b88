"""README.md of a bundle: the commands, the size and its reasons, the bill, the proof."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from loadmaster.endpoint.economics import MONTH_S
from loadmaster.endpoint.plot import label
from loadmaster.endpoint.settings import HOST, PORT
from loadmaster.endpoint.sizing import Sizing
from loadmaster.export.served.record import checked_figures
from loadmaster.export.table import COLUMNS, row
from loadmaster.preflight.serving import ServingPlan


@cache
def _templates() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("loadmaster.endpoint")
    return Environment(loader=loader, undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)


def render(template: str, **facts: Any) -> str:
    return _templates().get_template(template).render(**facts)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    header = list(header)
    lines = [header, ["---"] * len(header), *map(list, rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def sizes(sizing: Sizing) -> str:
    header = ["machine", "weights GiB/GPU", "cache tokens", "longest requests at once", "tokens/s", "Pod $/h",
              "Flex $/h", "ECC"]
    return table(header, (_size(plan) for plan in [sizing.plan, *sizing.runners_up]))


def _size(plan: ServingPlan) -> list[str]:
    return [
        f"{plan.gpus}x {plan.gpu}", f"{plan.weights_gib_per_gpu:.2f}", f"{plan.cache_tokens:,}",
        f"{plan.concurrent_requests:,.1f}", "" if plan.tokens_per_second is None else f"{plan.tokens_per_second:,.0f}",
        f"{plan.pod_usd_per_hour:.2f}", f"{plan.flex_usd_per_hour:.2f}", "yes" if plan.ecc else "no",
    ]


def costs(sizing: Sizing) -> str:
    header = ["requests/s", "requests", "Flex $", "Active $", "Pod $", "cheapest", "cold starts"]
    return table(header, (
        [
            f"{bill.requests_per_second:g}", f"{bill.requests:,.0f}", f"{bill.flex_usd:,.2f}",
            f"{bill.active_usd:,.2f}", f"{bill.pod_usd:,.2f}", bill.cheapest, f"{bill.cold_start_share:.0%}",
        ]
        for bill in sizing.bills
    ))


def crossings(sizing: Sizing) -> str:
    lines = []
    for name, (share, rate) in sizing.crossings.items():
        title = {"active": "Active", "pod": "An always-on Pod"}[name]
        if share is None or rate is None:
            discount = f" at a discount of {sizing.prices.active_discount:.0%}" if name == "active" else ""
            lines.append(f"{title} is never cheaper than Flex{discount}.")
        else:
            lines.append(
                f"{title} is cheaper than Flex from {share:.0%} of the time billed, which one worker reaches at "
                f"{rate:.3g} requests a second."
            )
    return " ".join(lines)


def starts(sizing: Sizing) -> str:
    header = ["weights", "seconds to the first token", "billed"]
    usd = sizing.prices.flex / 3600
    return table(header, ([place, f"{s:,.0f}", f"${s * usd:.3f}"] for place, s in sizing.starts.items()))


def fleets(sizing: Sizing) -> str:
    header = ["fleet", "p50 wait s", "p95", "p99", "cold starts", "$ a month"]
    prices = sizing.prices
    return table(header, (
        [
            label(outcome) + (" (chosen)" if index == 0 else ""),
            *(f"{outcome.wait_s(share):.1f}" for share in (0.5, 0.95, 0.99)),
            f"{outcome.cold_share:.1%}", f"{outcome.usd(prices.flex, prices.active_discount, MONTH_S):,.2f}",
        ]
        for index, outcome in enumerate(sizing.outcomes)
    ))


def verification(manifests: dict[str, dict[str, Any]]) -> str:
    rows = (row(name, {**found["verification"], "bytes": found["bytes"]}) for name, found in manifests.items())
    return table([column for column, _ in COLUMNS], rows)


def served(run_dir: Path, manifest: dict[str, Any]) -> str:
    """Which server has loaded this very export and what came of it, as `loadmaster serve-check` recorded it."""
    figures = checked_figures(run_dir, manifest)
    if figures is None:
        return (
            "The export was verified with transformers, in a process of its own. When this was written no server had "
            "loaded it:\n`loadmaster serve-check RUN` loads it in a real one and compares; its result is "
            "`../serve-check.json`."
        )
    if not figures["passed"]:
        return (
            "The export was verified with transformers, and did not pass `loadmaster serve-check` with "
            f"{figures['server']}:\n"
            f"{'; '.join(figures['failures'])}."
        )
    return (
        "The export was verified with transformers, in a process of its own, and `loadmaster serve-check` loaded and "
        f"compared it in\n{figures['server']}; no other server was run against it."
    )


def sglang_command(manifest: dict[str, Any], artifact: str, context: int, gpus: int) -> str:
    """Empty for an adapter: its base is loaded there under another set of options."""
    if manifest["format"] == "adapter":
        return ""
    return shlex.join([
        "python", "-m", "sglang.launch_server", "--model-path", artifact, "--served-model-name", manifest["recipe"],
        "--context-length", str(context), "--tp", str(gpus), "--host", HOST, "--port", str(PORT),
    ])


def gguf_commands(manifests: dict[str, dict[str, Any]], name: str, context: int) -> str:
    """For the gguf export, else for one that llama.cpp's converter makes of the bf16 export; empty without both."""
    if "gguf" in manifests:
        exported = next(f["path"] for f in manifests["gguf"]["files"] if f["path"].endswith(".gguf"))
        return "\n".join([
            f"llama-server --model ../export/gguf/{exported} --ctx-size {context} --alias {name}",
            f"(cd ../export/gguf && ollama create {name} -f Modelfile)",
        ])
    if "bf16" not in manifests:
        return ""
    stem = name.replace("/", "-")
    return "\n".join([
        f"python convert_hf_to_gguf.py ../export/bf16 --outtype bf16 --outfile {stem}.gguf      # in llama.cpp",
        f"llama-quantize {stem}.gguf {stem}-q4_k_m.gguf Q4_K_M",
        f"llama-server --model {stem}-q4_k_m.gguf --ctx-size {context} --alias {name}",
        f"printf 'FROM ./{stem}-q4_k_m.gguf\\nPARAMETER num_ctx {context}\\n' > Modelfile",
        f"ollama create {name} -f Modelfile",
    ])
