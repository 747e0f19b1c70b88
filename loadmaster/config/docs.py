"""Writes docs/configuration.md from the schema, the groups, the recipes and the rules.

python -m loadmaster.config.docs
"""

from __future__ import annotations

import io
import re
from pathlib import Path

import yaml

from loadmaster.config.compose import compose
from loadmaster.config.fields import describe, fields, sections, written
from loadmaster.config.jobhash import NOT_INPUTS, STAGE_FIELDS
from loadmaster.config.rules import RULES
from loadmaster.config.schema import ThresholdsConfig
from loadmaster.config.shipped import shipped_folder
from loadmaster.config.show import show_error
from loadmaster.config.validate import MISSING
from loadmaster.errors import ConfigError
from loadmaster.files import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"
WRONG_COMMAND = ["recipe=qlora_8b", "lora.rnk=8", "optimizer.lr=fast", "hardware=a100", "endpoint.serve_as=fp8"]

HEAD = """\
<!-- Written by `python -m loadmaster.config.docs` from the schema, conf/, recipes/ and the rules: edit those. -->

# Configuration

A job is composed, in this order, each later part winning over the earlier ones:

1. the schema's defaults (the tables below);
2. one file from each group of `conf/`, as `conf/train.yaml` lists them;
3. the recipe, `recipes/NAME.yaml`, an overlay that may pick other groups and set any field;
4. the command line.

```
python train.py                                              # recipe=smoke
python train.py recipe=lora_8b lora.rank=32 epochs=3
python train.py recipe=lora_8b data=file data.path=my.jsonl  # your own data
python train.py recipe=lora_8b --cfg job                     # print the composed job, start nothing
python train.py --multirun seed=1,2,3 stop_after=evaluate    # three runs
```

The installed command takes the same words: `loadmaster train recipe=lora_8b`. Given a run directory it goes on with
that run, whose settings then count: `loadmaster export runs/lora_8b/<date-time> export=fp8`.

A field is either written by you or `auto`. **What you write is respected or refused, never silently changed**; what
is `auto` is decided by the plan stage, which says why and records it in `plan.json`. The schema is closed: an unknown
key, a wrong type or a combination that cannot work stops the command before torch is imported, with exit code 2 and
every problem at once.

| on the command line | means |
|---|---|
| `key=value` | set a field; of several values the last one counts, and a note says so |
| `group=option` | pick a file of a group: `recipe=qlora_8b`, `hardware=h100_80gb_x8` |
| `key=[a,b]` | a list; quote it for shells that expand brackets |
| `key=~/folder` | a path from the home folder, also where the shell leaves the ~ as it is |
| `~key`, `~group` | back to the schema's default |
| `+key=value`, `++key=value` | Hydra's add and force; the schema is closed, so plain `key=value` always does |
| `--multirun key=a,b` | [one run for each value](training.md#comparing-settings); all checked before the first starts |
| `--config-dir FOLDER` | one more folder of groups, as `conf/` is; recipes in its folder `recipe` |
| `--cfg job`, `--info`, `--help` | look and start nothing; what is wrong with the job is said besides, with code 2 |
"""

OWN = """\
## Your own recipes

Folders `recipes/` and `conf/` in the current directory come before the shipped ones, also for the installed command.
So this is `recipes/mine.yaml`, and `recipe=mine` finds it (`recipe=team/mine` that of a folder `recipes/team/`):

```yaml
# @package _global_
defaults:
  - override /model: llama3_1_8b
  - override /data: file

method: lora
data:
  path: my.jsonl
lora:
  rank: 32
```

A recipe can name Hydra callbacks (`hydra.callbacks`), which are code: read one of somebody else's before you use it.

## Coming from another tool

A name of Axolotl, LLaMA-Factory, TRL, PEFT or torchtune is answered with what it is here: `load_in_4bit=true` with
`method=qlora`, `logging_steps=1` with why nothing needs to be said. A whole configuration of theirs, copied to
`recipes/theirs.yaml`, is answered line by line by `loadmaster plan recipe=theirs`.

`batch.global_size` is their rows on a device x accumulation steps x devices. With `data.packing`, the default, a row
holds many examples, as under Axolotl's `sample_packing`; `data.packing=false` keeps one a row.
"""

THRESHOLDS = """\
The limits of one format, as in `export.thresholds.fp8.max_mean_kl=0.05`. Those not given stay at the shipped ones of
the format, which `docs/export.md` lists."""

EXIT_CODES = """\
## Exit codes

| code | means |
|---|---|
| 0 | done |
| 2 | the configuration, the data or an option of the command is wrong |
| 3 | nothing fits; `plan.json` says what would |
| 4 | training failed; the machine has no room for an export; or a command could not do what it was asked for: \
the folder is no run or lacks the stage (`deploy`, `fetch`, `endpoint`), \
a key is not set, or the provider, a host or the Hub refused |
| 5 | an export did not pass verification and nothing is published; \
or there is no such export to judge (`verify`, `push`, `serve-check` of a folder or format that was not exported) |
| 75 | stopped on request with a checkpoint saved; the same command resumes |

A `--multirun` ends with the highest code of its runs.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD, _errors(), _recipes(), _groups(), OWN, _fields(), _rules(), _hashes(), EXIT_CODES]
    return "\n".join(parts)


def _errors() -> str:
    try:
        compose(WRONG_COMMAND)
    except ConfigError as error:
        text = io.StringIO()
        show_error(error, text)
        shown = "\n".join(line.rstrip() for line in text.getvalue().strip().splitlines())
        return f"## What a mistake looks like\n\n```\n$ python train.py {' '.join(WRONG_COMMAND)}\n{shown}\n```\n"
    raise AssertionError("the example of wrong configuration is right")


def _recipes() -> str:
    rows = [[f"`{f.stem}`", _comment(f), _measured(f)] for f in sorted(shipped_folder("recipes").glob("*.yaml"))]
    return "## Recipes\n\n" + _table(["recipe", "what for", "measured"], rows)


def _groups() -> str:
    conf = shipped_folder("conf")
    chosen = {k: v for item in yaml.safe_load((conf / "train.yaml").read_text())["defaults"] if isinstance(item, dict)
              for k, v in item.items()}
    rows = []
    for folder in sorted(path for path in conf.iterdir() if path.is_dir()):
        for file in sorted(folder.glob("*.yaml")):
            default = " (default)" if chosen.get(folder.name) == file.stem else ""
            rows.append([f"`{folder.name}={file.stem}`{default}", _comment(file)])
    return "## Groups\n\n" + _table(["option", "what it is"], rows)


def _fields() -> str:
    text = ["## Fields\n"]
    for section, keys in sections().items():
        rows = []
        for key in keys:
            item = fields()[key]
            default = "must be given" if item.default == MISSING else f"`{written(item.default)}`"
            rows.append([f"`{key}`", describe(item.annotation), default, item.help])
        text.append(f"### {section or 'The job'}\n\n" + _table(["field", "takes", "default", "meaning"], rows))
    rows = [
        [f"`{item.key}`", describe(item.annotation), f"`{item.default}`", item.help]
        for item in fields(ThresholdsConfig).values()
    ]
    head = ["field", "takes", "default", "meaning"]
    text.append(f"### export.thresholds.FORMAT\n\n{THRESHOLDS}\n\n" + _table(head, rows))
    return "\n".join(text)


def _rules() -> str:
    rows = [[item.explanation, ", ".join(f"`{key}`" for key in item.keys)] for item in RULES]
    intro = (
        "## Rules between fields\n\nWhat depends on memory, on the model's `config.json` or on the GPUs that are there "
        "is the plan stage's to refuse.\n\n"
    )
    return intro + _table(["rule", "fields"], rows)


def _hashes() -> str:
    rows = [[stage, ", ".join(f"`{name}`" for name in names) or "no more than the stages before it"]
            for stage, names in STAGE_FIELDS.items()]
    intro = (
        "## What a stage depends on\n\nThe same job finds its run again and skips the stages whose inputs have not "
        "changed; `loadmaster plan` makes its plan anew until something was trained by it. A stage depends on the "
        "fields of its row, on those of the rows above and on the contents of the data files. The first "
        "two rows are the job's identity: change one of them and it is another run.\n\n"
    )
    rest = ", ".join(f"`{name}`" for name in NOT_INPUTS)
    return f"{intro}{_table(['stage', 'fields'], rows)}\nNo stage depends on {rest}.\n"


def _comment(file: Path) -> str:
    """First paragraph of the comment that a YAML file opens with."""
    lines: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @"):
            continue
        if not line.startswith("#") or (line == "#" and lines):
            break
        lines += [line[1:].strip()] if line != "#" else []
    return " ".join(lines)


def _measured(file: Path) -> str:
    row = re.search(r"^# measured: *(.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
    return row[1] if row else ""


def _table(head: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped]) + "\n"


if __name__ == "__main__":
    write_text(PAGE, page())
