"""Run by the interpreter of lm-evaluation-harness's own environment; nothing of loadmaster is there.

    python -I harness_runner.py SPEC

spec: tasks, include_path, limit, apply_chat_template, model_args (null: only load the tasks and their data), result
(the file that the answer is written to: {"unknown": names} or {"tasks": {task: {"metric,filter": figure}}}).
"""

import json
import sys
from pathlib import Path

import lm_eval
from lm_eval.tasks import TaskManager, get_task_dict


def figures(found: dict) -> dict:
    """Numbers of each task by metric, with their standard error, direction, and how many answers they rest on."""
    tasks: dict = {}
    for task, values in found["results"].items():
        better = found["higher_is_better"].get(task, {})
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            tasks.setdefault(task, {})[key] = {
                "value": float(value),
                "stderr": float(error) if isinstance(error, int | float) else None,
                "higher_is_better": better.get(metric, True) is not False,
                "answers": found.get("n-samples", {}).get(task, {}).get("effective"),
            }
    return tasks


def main(path: str) -> None:
    told = json.loads(Path(path).read_text(encoding="utf-8"))
    manager = TaskManager(include_path=told["include_path"])
    unknown = [name for name in told["tasks"] if not manager.match_tasks([name])]
    if unknown:
        answer: dict = {"unknown": unknown}
    elif told["model_args"] is None:
        get_task_dict(manager.match_tasks(told["tasks"]), manager)
        answer = {"tasks": {}}
    else:
        found = lm_eval.simple_evaluate(
            model="local-completions", model_args=told["model_args"], tasks=manager.match_tasks(told["tasks"]),
            task_manager=manager, limit=told["limit"], apply_chat_template=told["apply_chat_template"],
            bootstrap_iters=1000, log_samples=False,
        )
        answer = {"tasks": figures(found)}
    Path(told["result"]).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
