"""The smoke recipe as a newcomer runs it: the whole pipeline on the real model, to the bars it promises."""

import json

import pytest

from loadmaster.export.manifest import verify_manifest
from tests.runs import finish


@pytest.mark.slow
def test_the_smoke_recipe_learns_its_task_and_every_export_keeps_it(tmp_path):
    words = ("run_dir=run", "evaluation.max_rows=30")  # half of the held-out tickets: answers take a third of the time
    done = finish(tmp_path, *words, timeout_s=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    evaluation = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert evaluation["before"]["task"]["metric"] < 0.10
    assert evaluation["after"]["task"]["metric"] > 0.85
    assert evaluation["after"]["held_out"]["loss"] < evaluation["before"]["held_out"]["loss"] / 2
    exports = json.loads((tmp_path / "run" / "result.json").read_text())["exports"]
    assert set(exports) == {"bf16", "fp8", "int4"}
    for name, figures in exports.items():
        assert figures["passed"] and figures["task"]["metric"] > 0.80, name
        assert verify_manifest(tmp_path / "run" / "export" / name) == []
    again = finish(tmp_path, *words)
    assert again.returncode == 0 and again.stdout.count("unchanged, skipped") == 5
