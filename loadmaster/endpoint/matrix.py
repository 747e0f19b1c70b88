"""What people recommend for serving, with the number that makes each true or false: a block of docs/serving.md.

python -m loadmaster.endpoint.matrix        writes the block anew
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loadmaster import catalog
from loadmaster.endpoint.readme import table
from loadmaster.files import write_text
from loadmaster.preflight.config_json import from_config
from loadmaster.preflight.hardware import from_catalog
from loadmaster.preflight.serving import ServingPlan, plan_serving

PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- matrix: written by python -m loadmaster.endpoint.matrix -->", "<!-- end of matrix -->"
REQUEST = 8192
SHORT = 2048
"""Tokens of a request that a server should hold at least one of, to be called one."""


@dataclass(frozen=True)
class Claim:
    """gpu x count for a model of the catalogue in a format; utilisation: share of the card that the server takes."""

    said: str
    gpu: str
    count: int
    model: str
    format: str
    utilisation: float = 0.9
    cache: str = "bf16"


CLAIMS = (
    Claim("RTX 4090 for 8B in 16 bits", "rtx4090", 1, "meta-llama/llama-3.1-8b", "bf16"),
    Claim("RTX 4090 for 13B in INT4", "rtx4090", 1, "meta-llama/llama-2-13b-hf", "int4"),
    Claim("L40S for 70B in INT4", "l40s", 1, "meta-llama/llama-3.1-70b", "int4"),
    Claim("the same with an FP8 cache", "l40s", 1, "meta-llama/llama-3.1-70b", "int4", cache="fp8"),
    Claim("2x A100 80 GB for 70B in 16 bits", "a100_80gb", 2, "meta-llama/llama-3.1-70b", "bf16"),
    Claim("H100 80 GB for 70B in FP8", "h100_80gb", 1, "meta-llama/llama-3.1-70b", "fp8"),
    Claim("the same at 0.92 of the card", "h100_80gb", 1, "meta-llama/llama-3.1-70b", "fp8", 0.92),
)


def planned(claim: Claim) -> ServingPlan:
    config = dict(catalog.shapes()[claim.model])
    name = config.pop("_name")
    shape = from_config(config, name)
    hardware = from_catalog(claim.gpu, claim.count)
    return plan_serving(shape, hardware, claim.format, SHORT, claim.cache, claim.utilisation)


def verdict(plan: ServingPlan, longest: int = REQUEST) -> str:
    """True from one request of `longest` tokens on; false where not even one of SHORT fits."""
    requests = plan.cache_tokens / longest
    if requests >= 1:
        return f"**true**: {requests:.1f} requests of {longest:,} at once"
    if plan.cache_tokens >= SHORT:
        return f"**true for short requests**: none of {longest:,}, {plan.cache_tokens / SHORT:.1f} of {SHORT:,}"
    return f"**false**: not one request of {SHORT:,}"


def matrix() -> str:
    """A Markdown table."""
    header = ["recommended", "weights GB", "of the budget, GiB a card", "cache tokens", "verdict"]
    header += ["ECC", "pool", "without", "Flex $/h"]
    rows = []
    for claim in CLAIMS:
        plan, facts = planned(claim), catalog.serving()["gpus"][claim.gpu]
        known = catalog.shapes()[claim.model].get("max_position_embeddings", REQUEST)
        rows.append([
            claim.said, f"{plan.weights_gb:,.1f}", f"{plan.weights_gib_per_gpu:.1f} of {plan.budget_gib_per_gpu:.1f}",
            f"{plan.cache_tokens:,}", verdict(plan, min(REQUEST, known)), "yes" if plan.ecc else "no", facts["pool"],
            ", ".join(other.removeprefix("NVIDIA ") for other in facts["others"]) or "nothing",
            f"{plan.flex_usd_per_hour:.2f}",
        ])
    return table(header, rows)


def write() -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    write_text(PAGE, f"{before}{BEGIN}\n{matrix()}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
