"""The report shows what is there, says what is not, and never stops a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from loadmaster.preflight.plan import HardwareSummary, MemoryGib, ModelSummary, PhasesGib, Plan
from loadmaster.report import units, write_report
from loadmaster.report.page import SECTIONS
from loadmaster.world_stages import _headline

COMMAND = "python train.py recipe=smoke seed=7"
EXPECTED_SECTIONS = {"evaluation", "exports", "training", "plan", "samples", "again"}
INLINE = {"span", "b", "em", "i", "wbr", "code", "time"}
VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


def make_plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "fits": True,
        "model": ModelSummary("Some/Model-135M", 134_515_008, 4_884_480, 30, 576, 49_152, "llama"),
        "hardware": HardwareSummary("h100_80gb", 8, 2, 79.1, 1024.0),
        "method": "lora", "precision": "bf16", "sharding": "ddp", "offload": "none", "activation_checkpointing": "full",
        "optimizer": "adamw", "master_weights": True, "micro_batch_size": 4, "gradient_accumulation_steps": 2,
        "sequence_length": 512, "memory_gib": MemoryGib(15.0, 0.2, 0.5, 41.3, 2.0, 0.0, 0.6, 1.4, 61.0),
        "phases_gib": PhasesGib(16.0, 61.0, 22.0, 17.0, 16.5), "budget_gib": 76.7, "host_memory_gib": 30.0,
        "disk_gib": 2.5, "tokens_per_second": 412_345.0, "hours": 0.31, "cost_usd": 12.4,
        "reasons": ["uses 61.0 of 76.7 GiB"],
        "rejected": [{"plan": "full, bf16, adamw", "reason": "needs 132.1 GiB on each GPU of 76.7"}],
        "alternatives": [{"change": "method=qlora", "plan": "qlora, bf16", "needs_gib": 31.2, "budget_gib": 43.0,
                          "tokens_per_second": None, "hours": 1.2, "usd_per_hour": 46.4, "cost_usd": 55.68}],
    }
    return Plan(**{**fields, **changes})


def metric_rows(steps: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": s, "loss": 3 / s, "grad_norm": 9 / s, "lr": 1e-3, "tokens": 100 * s, "trained_tokens": 20 * s,
         "tokens_per_second": 400.0 + s}
        for s in range(1, steps + 1)
    ]
    rows[-1]["eval_loss"] = 0.5
    return rows


def task(metric: float, answer: str) -> dict[str, Any]:
    reference = '{"product":"router"}'
    sample = {"prompt": "The router is broken.", "reference": reference, "answer": answer, "right": metric > 0.5}
    return {"metric": metric, "valid_json": 1.0, "field_match": 0.9, "per_field": {"product": metric}, "rows": 60,
            "samples": [sample]}


def verification(passed: bool) -> dict[str, Any]:
    return {
        "perplexity_ratio": 1.0031, "mean_kl": 0.0019, "top1_agreement": 0.9951, "task": {"metric": 0.9, "rows": 60},
        "passed": passed, "failures": [] if passed else ["mean_kl is 0.0019, must be at most 0.001"],
        "limits": {"max_perplexity_ratio": 1.03, "max_mean_kl": 0.02, "min_top1_agreement": 0.96,
                   "min_task_retention": 0.95},
    }


def put(run_dir: Path, name: str, value: Any) -> None:
    path = run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def add_plan(run_dir: Path) -> None:
    put(run_dir, "config.yaml", "recipe: smoke\nseed: 7\nmethod: lora\nprecision: auto\nstop_after: bundle\n")
    put(run_dir, "plan.json", make_plan().to_dict())
    put(run_dir, "stages.json", {"identity": "x", "stages": {"plan": stage(1.2, 0)}})


def stage(seconds: float, minute: int) -> dict[str, Any]:
    return {"inputs": "i", "seconds": seconds, "finished": f"2026-01-01T10:{minute:02d}:00+00:00"}


@pytest.fixture
def whole_run(tmp_path: Path) -> Path:
    run_dir = tmp_path / "2026-01-01_10-00-00"
    add_plan(run_dir)
    put(run_dir, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metric_rows(40)))
    put(run_dir, "eval.json", {
        "before": {"held_out": {"loss": 2.8712, "perplexity": 17.66, "tokens": 2411}, "task": task(0.0, "Sure!")},
        "after": {"held_out": {"loss": 0.1633, "perplexity": 1.1774, "tokens": 2411},
                  "task": task(0.9167, '{"product":"router"}')},
    })
    put(run_dir, "export/bf16/manifest.json",
        {"schema": 1, "format": "bf16", "bytes": 269 * 10**6, "files": [], "verification": verification(True)})
    put(run_dir, "result.json", {
        "peak_allocated_gib": 55.0, "peak_reserved_gib": 58.0, "peak_device_gib": 60.0, "predicted_gib": 61.0,
        "tokens_per_second": 400_123.0, "trained_tokens_per_second": 91_456.0, "mfu": 0.432, "steps": 40,
        "input_share": 0.013,
        "data": {"format": "messages", "rows_read": 480, "bad_rows": 2, "notes": ["3 rows repeat another row"],
                 "train": {"rows": 91, "fill": 0.968}, "validation": {"rows": 13, "fill": 0.9}},
    })
    names = ("plan", "train", "evaluate", "export", "bundle")
    put(run_dir, "stages.json", {"identity": "x", "stages": {n: stage(60.0, i) for i, n in enumerate(names)}})
    return run_dir


class Page(HTMLParser):
    """What a browser would make of the page: text, and every element with its attributes; refuses wrong nesting."""

    def __init__(self, html: str):
        super().__init__()
        self.html, self.elements, self.words, self.open = html, [], [], []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag not in INLINE:
            self.words.append(" ")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "title"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def sections(self) -> set[str | None]:
        return {attributes.get("id") for tag, attributes in self.elements if tag == "section"}


def report(run_dir: Path, command: str = COMMAND) -> Page:
    path = write_report(run_dir, command)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_a_run_that_has_done_nothing_yet_says_so_everywhere(tmp_path: Path):
    page = report(tmp_path)
    assert page.sections() == EXPECTED_SECTIONS
    for sentence in (
        "There is no plan yet.", "No training step has been logged yet.", "The evaluation has not run yet.",
        "Nothing has been exported yet.", "No answers have been generated yet.",
    ):
        assert sentence in page.text
    assert page.text.count("not run yet") == 5 + 1  # five stages, and the evaluation's sentence
    assert "could be read" not in page.text


def test_after_the_plan_alone_the_page_shows_the_plan_and_no_measurement(tmp_path: Path):
    add_plan(tmp_path)
    page = report(tmp_path)
    assert "61.00 GiB of 76.70 GiB: 15.70 GiB stay free" in page.text
    assert "2 nodes of 8 \N{MULTIPLICATION SIGN} h100_80gb" in page.text
    assert "activations 41.30 GiB 53.8%" in page.text
    assert "Nothing measured yet" in page.text and "planned, not measured yet" in page.text
    assert "No training step has been logged yet." in page.text
    assert page.html.index('id="plan"') < page.html.index('id="evaluation"')
    assert "<svg" not in page.html


def test_the_plan_says_which_settings_the_job_wrote_and_which_preflight_chose(tmp_path: Path):
    add_plan(tmp_path)
    text = report(tmp_path).text
    assert "method lora job" in text
    assert "precision bf16 preflight" in text
    assert "peak learning rate" not in text  # of a version that did not keep it
    put(tmp_path, "plan.json", make_plan(learning_rate=2e-4).to_dict())
    put(tmp_path, "config.yaml", "optimizer: {lr: auto}\n")
    assert "peak learning rate 0.0002 preflight" in report(tmp_path).text
    assert "one optimizer step 128 rows" in text and "traced" not in text  # 4 rows x 2 accumulated x 16 GPUs
    put(tmp_path, "plan.json", make_plan(trace={"traced_gib": 45.96, "of": "a micro-batch"}).to_dict())
    assert "traced, a micro-batch 45.96 GiB" in report(tmp_path).text


def test_a_machine_on_which_the_run_is_another_one_is_told_apart(tmp_path: Path):
    row = {"gpu": "rtx4090", "count": 4, "nodes": 1, "precision": "bf16", "sharding": "ddp", "micro_batch_size": 1,
           "activation_checkpointing": "none", "offload": "none", "global_size": 128}
    put(tmp_path, "plan.json", make_plan(elsewhere=[row, {**row, "global_size": 132, "offload": "all"}]).to_dict())
    text = report(tmp_path).text  # 4 rows x 2 accumulated x 16 GPUs are 128
    assert "bf16, ddp, activation checkpointing none, 1 row " in text and text.count("batch.global_size=") == 1
    assert "activation checkpointing none, all in host memory, 1 row, batch.global_size=132" in text


def test_some_recomputed_layers_are_counted_on_other_machines_too(tmp_path: Path):
    row = {"gpu": "rtx4090", "count": 4, "nodes": 1, "precision": "bf16", "sharding": "ddp", "micro_batch_size": 1,
           "activation_checkpointing": "full", "checkpointed_layers": 12, "global_size": 128}
    put(tmp_path, "plan.json", make_plan(elsewhere=[row]).to_dict())
    text = report(tmp_path).text
    assert "bf16, ddp, activation checkpointing 12 of 30 layers, 1 row " in text
    assert "The same job on other machines machine plan" in text  # of a plan that does not say its order
    put(tmp_path, "plan.json", make_plan(elsewhere=[row], elsewhere_order="cost").to_dict())
    assert "The same job on other machines, cheapest run first machine plan" in report(tmp_path).text


def test_a_runner_up_is_in_its_table_alone(tmp_path: Path):
    said = "runner-up (lora, fp8): 3% faster, 2.0 GiB more"
    row = {"plan": "lora, fp8", "needs_gib": 63.0, "tokens_per_second": 424_000.0, "difference": said}
    put(tmp_path, "plan.json", make_plan(reasons=["uses 61.0 of 76.7 GiB", said], runners_up=[row]).to_dict())
    text = report(tmp_path).text
    assert "uses 61.0 of 76.7 GiB" in text and text.count("3% faster, 2.0 GiB more") == 1 and said not in text


def test_hours_say_what_is_in_them(whole_run: Path):
    text = report(whole_run).text
    assert "planned at 18 min 36 s with start, load and export" in text
    assert "time with start, load and export, modelled 18 min 36 s, $12.40" in text
    put(whole_run, "plan.json", make_plan(hardware=HardwareSummary("cpu", 1, 1, 23.5, 23.5)).to_dict())
    text = report(whole_run).text
    assert "training planned at 18 min 36 s" in text and "training time, modelled 18 min 36 s" in text


def test_a_plan_that_does_not_fit_shows_by_how_much_and_what_would(tmp_path: Path):
    put(tmp_path, "plan.json", make_plan(fits=False, budget_gib=43.0).to_dict())
    text = report(tmp_path).text
    assert "plan does not fit" in text and "18.00 GiB too much" in text
    assert "needs 132.1 GiB on each GPU of 76.7" in text
    assert "method=qlora" in text and "$55.68" in text and "1 h 12 min" in text


def test_a_whole_run_shows_every_figure_with_its_unit(whole_run: Path):
    page = report(whole_run)
    assert page.sections() == EXPECTED_SECTIONS
    for shown in (
        "1.3% of the time passed until batches were there",
        "0.0% → 91.7%", "2.871 → 0.163", "17.66 → 1.177", "400,123 tokens/s", "43.2% of the peak FLOP/s",
        "60.00 GiB", "predicted 61.00 GiB, 1.7% too high", "5 min 00 s", "$12.40", "269.0 MB", "1.0031",
        "0.00190 at most 0.02000", "at most 1.0300", "at least 87.1%",
        "99.51%", "✓ passed", "480 rows read, 2 of them bad", "96.8%", "40 optimizer steps logged", COMMAND, "seed 7",
    ):
        assert shown in page.text, shown
    assert page.html.count("<svg") == 5  # four curves, the loss in a wide and a narrow drawing
    assert "stop_after: bundle" in page.text
    assert "could be read" not in page.text


def test_half_way_through_training_the_curves_are_there_and_the_steps_are_counted(tmp_path: Path):
    add_plan(tmp_path)
    put(tmp_path, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in metric_rows(3)))
    page = report(tmp_path)
    assert "train 3 steps so far" in page.text
    assert "Speed 403 tokens/s over the last steps; planned 412,345 tokens/s" in page.text
    assert page.html.count("<svg") == 5
    assert page.html.index('id="training"') < page.html.index('id="plan"') < page.html.index('id="evaluation"')


def test_training_that_failed_says_after_how_many_steps(whole_run: Path):
    put(whole_run, "stages.json", {"identity": "x", "stages": {"plan": stage(1, 0)}})
    put(whole_run, "result.json", {"failure": {"stage": "train", "message": "no room left"}})
    assert "train failed after 40 steps" in report(whole_run).text


def test_skipped_steps_are_counted_and_named(whole_run: Path):
    rows = metric_rows(20)
    rows[6] |= {"loss": None, "grad_norm": None}
    put(whole_run, "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert "1 skipped because loss or gradient was not finite (step 7)" in report(whole_run).text


def test_a_rejected_export_is_shown_with_the_figure_that_failed(whole_run: Path):
    result = json.loads((whole_run / "result.json").read_text())
    put(whole_run, "result.json", {**result, "exports": {"fp8": verification(False)}})
    text = report(whole_run).text
    assert "fp8 ✕ rejected" in text and "must be at most 0.001" in text
    assert "bf16 ✓ passed" in text


def test_an_attempt_that_was_rejected_stands_beside_the_earlier_export_with_figures_and_a_chart(whole_run: Path):
    result = json.loads((whole_run / "result.json").read_text())
    rejected = {"bf16": {**verification(False), "bytes": 2.7e8}, "int4": {**verification(False), "bytes": 1.2e8}}
    rejected["int4"] |= {
        "flipped_answers": 0.25, "p99_kl": 0.4321, "candidate": "int4-gptq",
        "candidates": {
            "int4-gptq": {"mean_kl": 0.01},
            "int4-rtn": {"mean_kl": 0.02, "flipped_answers": 0.123, "task": {"metric": 0.456}},
        },
    }
    put(whole_run, "result.json", {**result, "rejected_exports": rejected})
    page = report(whole_run)
    assert "bf16 ✓ passed" in page.text
    assert "bf16 (made again, not published) ✕ rejected" in page.text and "int4 ✕ rejected" in page.text
    assert "25.0%" in page.text and "0.4321" in page.text and "12.3%" in page.text and "45.6%" in page.text
    assert "int4-gptq was taken, by mean KL: int4-gptq 0.01000, int4-rtn 0.02000" in page.text
    assert "Distance from the model as trained over size" in page.text and page.html.count("<svg") == 7


def test_a_failed_stage_is_shown_with_its_message(whole_run: Path):
    stages = json.loads((whole_run / "stages.json").read_text())
    del stages["stages"]["export"], stages["stages"]["bundle"]
    put(whole_run, "stages.json", stages)
    put(whole_run, "result.json", {"failure": {"stage": "export", "message": "mean_kl is <too> high"}})
    page = report(whole_run)
    assert "export failed" in page.text and "mean_kl is <too> high" in page.text


def test_a_stage_older_than_one_before_it_is_marked_out_of_date(whole_run: Path):
    stages = {"plan": stage(1, 0), "train": stage(60, 50), "evaluate": stage(30, 20)}
    put(whole_run, "stages.json", {"identity": "x", "stages": stages})
    text = report(whole_run).text
    assert text.count("before an earlier stage ran again") == 1


def test_training_that_was_resumed_says_from_where_its_time_counts(whole_run: Path):
    result = json.loads((whole_run / "result.json").read_text())
    put(whole_run, "result.json", {**result, "resumed_after_step": 12})
    text = report(whole_run).text
    assert ", resumed after step 12" in text and "of training what came after step 12" in text


def test_training_that_took_an_earlier_step_says_which(whole_run: Path):
    result = json.loads((whole_run / "result.json").read_text())
    for taken, said in ((20, False), (12, True)):
        put(whole_run, "result.json", {**result, "steps": 20, "taken_step": taken})
        assert (", the weights are those of step 12 of 20" in report(whole_run).text) == said


def test_generated_text_is_never_markup(whole_run: Path):
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)></pre></style>{{ 7 * 7 }}\x00\ud800"
    evaluation = json.loads((whole_run / "eval.json").read_text())
    for side in ("before", "after"):
        evaluation[side]["task"]["samples"] = [
            {"prompt": attack, "reference": attack, "answer": attack, "right": False, attack: attack}
        ]
        evaluation[side]["task"]["per_field"] = {attack: 0.5}
    put(whole_run, "eval.json", evaluation)
    put(whole_run, "config.yaml", json.dumps({"recipe": attack.replace("\ud800", "").replace("\x00", "")}))
    page = report(whole_run, command=f"python train.py '{attack}'")
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "iframe", "object", "embed", "link"}
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 6
    assert "{{ 7 * 7 }}" in page.text and "\x00" not in page.html


def test_the_page_needs_nothing_from_outside_itself(whole_run: Path):
    page = report(whole_run)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)]*)", page.html))
    assert "@import" not in page.html and "http://" not in page.html and "https://" not in page.html


def test_drawings_share_no_ids_and_take_their_colours_from_the_page(whole_run: Path):
    page = report(whole_run)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    svg = "".join(re.findall(r"<svg.*?</svg>", page.html, flags=re.S))
    assert "var(--series-1)" in svg
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) <= {"#000000"}
    assert "prefers-color-scheme: dark" in page.html and 'name="viewport"' in page.html


@pytest.mark.parametrize("name", ["config.yaml", "plan.json", "result.json", "stages.json", "eval.json",
                                  "export/bf16/manifest.json"])
@pytest.mark.parametrize("content", ['{"a": [1, ', "[1, 2]", "\x00\x01: : {"])
def test_a_torn_or_strange_file_is_named_and_the_rest_is_shown(whole_run: Path, name: str, content: str):
    put(whole_run, name, content)
    page = report(whole_run)
    assert "Not everything could be read" in page.text and name in page.text
    assert page.sections() == EXPECTED_SECTIONS
    assert page.html.count("<svg") == 5


def test_fields_of_the_wrong_type_do_not_stop_the_report(whole_run: Path):
    plan = {"model": 3, "memory_gib": "much", "phases_gib": [1], "reasons": 5, "rejected": {"a": 1},
            "runners_up": [{"difference": 5}]}
    put(whole_run, "plan.json", plan)
    put(whole_run, "eval.json", {"before": [], "after": {"task": {"metric": "high", "samples": [7], "per_field": []}}})
    put(whole_run, "stages.json", {"stages": {"plan": 3, "train": {"seconds": "long"}}})
    put(whole_run, "result.json", {"exports": [1], "data": {"train": 4}, "peak_device_gib": None, "failure": "x",
                                  "tokens_per_second": 10**400, "trained_tokens_per_second": 10**400})
    put(whole_run, "metrics.jsonl", '{"step": Infinity}\n{"step": 2, "loss": 1.0}\n')
    assert report(whole_run).sections() == EXPECTED_SECTIONS


@pytest.mark.parametrize(("form", "unit"), [("preference", "of a pair"), ("unpaired", "of a labelled answer")])
def test_a_run_on_preferences_says_what_its_loss_is_of_and_what_was_too_long(whole_run: Path, form: str, unit: str):
    assert "Loss nats per token" in report(whole_run).text
    result = json.loads((whole_run / "result.json").read_text())
    result["data"] |= {"format": form, "train": {"rows": 91, "long_rows": {"long": 28, "cut_tokens": 0, "dropped": 28}}}
    put(whole_run, "result.json", result)
    put(whole_run, "config.yaml", "objective: kto\n")
    text = report(whole_run).text
    assert f"Loss {unit}" in text and "Loss nats per token" not in text
    assert "longer than sequence_length 28" in text and "left out, or pieces without loss 28" in text
    assert "tokens of them that were cut off" not in text


@pytest.mark.parametrize(
    ("objective", "form", "unit"),
    [("dpo", "preference", "chosen less rejected"), ("orpo", "preference", "log odds ratio"),
     ("kto", "unpaired", "desirable less undesirable")],
)
def test_a_run_on_preferences_shows_how_the_rewards_go(whole_run: Path, objective: str, form: str, unit: str):
    rewards = {"reward_margin": 0.1} | ({"reward_accuracy": 0.5} if form == "preference" else {})
    put(whole_run, "metrics.jsonl", "".join(json.dumps({**row, **rewards}) + "\n" for row in metric_rows(3)))
    put(whole_run, "config.yaml", f"objective: {objective}\n")
    put(whole_run, "result.json", {"data": {"format": form}})
    page = report(whole_run)
    assert f"Reward margin {unit}" in page.text and page.html.count("<svg") == 5 + len(rewards)
    assert ("Chosen preferred share of pairs" in page.text) == (form == "preference")


@pytest.mark.parametrize(("limit", "tokens"), [("32", 32), ("512", 128), ("null", 128)])
def test_answers_that_nothing_scored_are_shown_as_such(whole_run: Path, limit: str, tokens: int):
    put(whole_run, "config.yaml", f"evaluation: {{task: none, max_new_tokens: {limit}}}\n")
    sample = {"prompt": "Where is it?", "reference": "In hold 3."}
    sides = [{"held_out": {"loss": loss}, "samples": [{**sample, "answer": said}] * 5}
             for loss, said in ((2.0, "Nowhere."), (1.0, "In hold 4."))]
    put(whole_run, "eval.json", {"before": sides[0], "after": sides[1]})
    page = report(whole_run)
    scored = f"at most {tokens}. Nothing scored them"
    for words in ("Where is it?", "In hold 3.", "Nowhere.", "In hold 4.", scored, "2 more"):
        assert words in page.text
    shown = page.html.partition('<section id="samples">')[2].partition("</section>")[0]
    assert "right<" not in shown and "wrong<" not in shown


def test_without_a_task_metric_no_answers_are_promised(whole_run: Path):
    put(whole_run, "config.yaml", "evaluation: {task: none}\n")
    put(whole_run, "eval.json", {"before": {"held_out": {"loss": 2.0}}, "after": {"held_out": {"loss": 1.0}}})
    text = report(whole_run).text
    assert "No held-out conversation was answered." in text and "loadmaster chat asks this model" in text
    assert "generated yet" not in text


def test_a_model_that_is_its_own_reference_prefers_no_answer(whole_run: Path):
    sides = [{"loss": 0.6931, "reward_accuracy": 0.0, "reward_margin": 0.0, "pairs": 9},
             {"loss": 0.5, "reward_accuracy": 0.75, "reward_margin": 0.1, "pairs": 9}]
    put(whole_run, "eval.json", {"before": {"held_out": sides[0]}, "after": {"held_out": sides[1]}})
    put(whole_run, "metrics.jsonl", json.dumps({"step": 1, "loss": 0.6931} | sides[0]) + "\n")
    text, none = report(whole_run).text, units.MISSING
    assert "Reward margin" in text and "Chosen preferred" not in text  # it is no 0%
    assert "per pair; chosen answers preferred 75.0%" in text and f"preferred {none} 75.0% {none}" in text
    put(whole_run, "eval.json", {"before": {"held_out": sides[0]}, "after": {"held_out": sides[0]}})
    assert "per pair; neither preferred" in report(whole_run).text
    assert _headline(sides[0]) == "loss 0.6931, neither answer preferred"
    assert _headline(sides[1]) == "loss 0.5000, 75.0% of the chosen answers preferred"


def test_a_torn_line_of_the_metrics_costs_only_that_line(whole_run: Path):
    lines = [json.dumps(row) for row in metric_rows(10)]
    put(whole_run, "metrics.jsonl", "\n".join(lines[:9]) + "\n" + lines[9][:20])
    page = report(whole_run)
    assert "metrics.jsonl: line 10 could not be read" in page.text
    assert "9 optimizer steps logged" in page.text


def test_the_same_run_gives_the_same_page_but_for_the_date(whole_run: Path):
    pages = [re.sub(r"<time.*?</time>", "", report(whole_run).html) for _ in range(2)]
    assert pages[0] == pages[1]


def test_a_page_that_cannot_be_written_leaves_a_line_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    in_the_way = tmp_path / "report.html"
    in_the_way.mkdir()
    assert write_report(tmp_path, COMMAND) == in_the_way
    assert "could not be written" in capsys.readouterr().err


def test_a_part_that_cannot_be_made_is_named_and_the_rest_is_shown(whole_run: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(files: Any) -> None:
        raise ImportError("no matplotlib here")

    monkeypatch.setitem(SECTIONS, "curves", broken)
    page = report(whole_run)
    assert "The part on curves could not be shown (ImportError: no matplotlib here)." in page.text
    assert page.sections() == EXPECTED_SECTIONS and "0.0% → 91.7%" in page.text
