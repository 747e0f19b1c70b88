"""Tables: no figure is lost in a log or a pipe, nor in a terminal that is too narrow for them."""

from __future__ import annotations

import io
from functools import cache

import pytest
from rich.console import Console
from rich.table import Table

from loadmaster.config.schema import HardwareConfig, Job, ModelConfig
from loadmaster.launch.prices import show_prices
from loadmaster.preflight import make_plan
from loadmaster.preflight.plan import Plan
from loadmaster.preflight.scaling import print_scaling, scaling
from loadmaster.preflight.serving_command import plan_serving_command
from loadmaster.preflight.table import print_comparison, print_plan
from loadmaster.tables import print_table
from loadmaster.training.display import Display

JOB = Job(
    model=ModelConfig(name="meta-llama/Llama-3.1-405B"), method="lora", precision="fp8",
    hardware=HardwareConfig(gpu="h100_80gb", count=8, nodes=2),
)


@cache
def plan() -> Plan:
    return make_plan(JOB, with_elsewhere=True)


def screen(width: int, terminal: bool) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def lines(console: Console) -> list[str]:
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


@pytest.mark.parametrize(("width", "terminal"), [(80, False), (40, False), (100, True), (80, True), (60, True)])
def test_a_plan_keeps_every_figure_of_the_other_machines(width, terminal) -> None:
    console = screen(width, terminal)
    print_plan(plan(), console)
    said = lines(console)
    assert "…" not in console.file.getvalue()
    at = next(n for n, line in enumerate(said) if line.startswith("machines of the catalogue")) + 1
    for row in plan().elsewhere[:6]:
        shown = next(line for line in said[at:] if line.endswith(f" {row['usd_per_million_tokens']:.3f}"))
        figures = f"{row['needs_gib']:.1f}", f"{row['tokens_per_second']:,.0f}", f"{row['usd_per_hour']:.2f}"
        assert set(figures) <= set(shown.split())
    if terminal and width >= 80:
        end = next(n for n, line in enumerate(said) if line.startswith("memory: "))
        assert max(map(len, said[at:end])) <= width
    bars = [line for line in said if "█" in line or "····" in line]
    assert len(bars) >= 6 and max(map(len, bars)) <= (max(width, 65) if not terminal else width)


@pytest.mark.parametrize("terminal", [False, True])
def test_other_tables_are_whole_too(terminal) -> None:
    console = screen(70, terminal)
    print_comparison("seed", {"1": plan(), "2": plan()}, console)
    print_scaling(JOB, scaling(JOB, [2], None), console)
    show_prices(console)
    said = console.file.getvalue()
    assert "…" not in said and said.count(f"{plan().memory_gib.total:.1f} of {plan().budget_gib:.1f}") == 2
    assert f"{plan().tokens_per_second:,.0f}" in said and "6.79" in said
    assert terminal or "  $ a billion tokens\n" in said


def test_a_serving_plan_is_whole_in_a_pipe_narrower_than_its_tables(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    assert plan_serving_command(["model=llama3_1_8b"]) == 0
    said = capsys.readouterr().out
    assert "…" not in said and "10,154,608 1,239.6 26,317 54.32 69.12 0.57" in " ".join(said.split())


@pytest.mark.parametrize("width", [80, 100, 120])
def test_steps_and_times_of_a_training_are_never_cut(width) -> None:
    console = screen(width, terminal=True)
    display = Display(console)
    display.start(10_000, 0)
    display.step({"step": 9_999, "loss": 10.7624, "lr": 1.97e-3, "tokens_per_second": 123_456.0}, 10_000, 70.55)
    display.stop()
    said = console.file.getvalue()
    assert "9999/10000 loss 10.7624  lr 1.97e-03  123,456 tok/s  peak 70.55 GiB " in said
    assert " eta -:--:--" in said and "…" not in said and ("training ━" in said) == (width >= 100)


@pytest.mark.parametrize("terminal", [True, False])
def test_each_held_out_loss_of_a_training_is_shown(terminal) -> None:
    console = screen(100, terminal)
    display = Display(console)
    display.start(9, 0)
    for step, held_out in enumerate([{}, {"eval_loss": 1.23456}, {"eval_loss": None}, {"eval_loss": 0.5}], 1):
        display.step({"step": step, "loss": 2.0, "lr": 1e-3, "tokens_per_second": 9.0, **held_out}, 9, 1.0)
    display.stop()
    said = [line[line.index("step") :] for line in lines(console) if "held-out" in line]
    assert said == ["step 2/9  held-out loss 1.2346", "step 4/9  held-out loss 0.5000"]


def test_in_a_narrow_terminal_text_and_headings_wrap_and_figures_do_not() -> None:
    for width in (20, 48, 60, 70):
        table = Table(box=None, pad_edge=False)
        table.add_column("on", no_wrap=True)
        table.add_column("plan")
        table.add_column("$ a million tokens", justify="right")
        table.add_row("2 nodes of 8x h200", "fp8, fsdp, checkpointing, one row", "1,234,567.89")
        console = screen(width, terminal=True)
        print_table(table, console)
        said = lines(console)
        assert any(line.startswith("2 nodes of 8x h200 ") and line.endswith(" 1,234,567.89") for line in said)
        assert max(map(len, said)) <= max(width, 46) and len(said) > 2
