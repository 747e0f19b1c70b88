"""Packages that a machine may lack: what a job needs of them is said before a model is loaded for it; and versions."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING

from loadmaster.errors import ConfigError, LoadmasterError, Problem

if TYPE_CHECKING:
    from loadmaster.preflight.plan import Plan


def needed(plan: Plan, formats: Iterable[str] = ()) -> list[tuple[str, str, object, str]]:
    """(package, field that asks for it, its value, what does without) of a plan's training and exports."""
    from loadmaster.export.candidates import CALIBRATED, CANDIDATES
    from loadmaster.preflight.zero_settings import ZERO

    found: list[tuple[str, str, object, str]] = []
    if plan.method == "qlora":
        found.append(("bitsandbytes", "method", "qlora", "method=lora"))
    if plan.optimizer in ("adamw_8bit", "paged_adamw_8bit"):
        found.append(("bitsandbytes", "optimizer.name", plan.optimizer, "optimizer.name=adamw or adafactor"))
    by_itself = plan.precision != "fp32" and plan.sharding not in ZERO
    if plan.optimizer == "adamw" and not plan.master_weights and by_itself:
        found.append(("bitsandbytes", "optimizer.master_weights", False, "optimizer.master_weights=true"))
    if (plan.method, plan.precision) == ("full", "fp8"):
        found.append(("torchao", "precision", "fp8", "precision=bf16"))
    for name in formats:
        if name == "gguf":
            found.append(("gguf", "export.formats", name, "another format"))
        elif any(each in CALIBRATED for each in CANDIDATES.get(name, ())):
            found.append(("llmcompressor", "export.formats", name, "fp8, or another format that is not calibrated"))
    return found


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those that are here."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def refuse_missing(plan: Plan, formats: Iterable[str] = ()) -> None:
    """Raise ConfigError for what this job needs and this machine lacks."""
    problems = [
        Problem(
            key, value, "the plan (plan.json)", f"needs the package {package}, which is not installed here",
            f"{_install(package)}, or {without}",
        )
        for package, key, value, without in needed(plan, formats) if find_spec(package) is None
    ]
    if problems:
        raise ConfigError(problems)


def explained(error: ModuleNotFoundError) -> LoadmasterError | None:
    """Words for a package that was missed on the way; None for what is a defect: a module of ours, or a part of one
    that is there."""
    package = error.name or ""
    if "." in package or package in ("", "loadmaster"):
        return None
    return LoadmasterError(f"the package {package} is needed for this and not installed here\nfix: {_install(package)}")


def again(error: ImportError) -> str:
    """What to install anew where a library is not whole, or does not go with the others here."""
    package = (error.name or "").partition(".")[0]
    return _install(f"--force-reinstall {package}") if package else "install what it names"


def _install(package: str) -> str:
    return f"pip install {package}, in the version that loadmaster's pyproject.toml names"
