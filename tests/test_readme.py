"""Every command of the README runs, as it stands there; those that train do so scaled down, on a model with random
weights: the smoke recipe has its own test."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import ROOT, TIMEOUT_S, environment

# One step from a random adapter is close to bf16's rounding, which the shipped limits rightly refuse.
LOOSE = (
    "export.thresholds={adapter: {max_perplexity_ratio: 1.5, max_mean_kl: 1.0, max_p99_kl: 10.0, "
    "min_top1_agreement: 0.5, min_tuned_share: 0.5}}"
)
SMALL = [
    LOOSE,
    "sequence_length=256",
    "max_steps=1",
    "data.max_rows=8",
    "data.validation=0.25",
    "export=adapter",
    "export.verification_rows=2",
    "evaluation.task=none",
    "evaluation.max_rows=2",
    "evaluation.max_new_tokens=4",
    "tracker=none",
]
TRAINS = re.compile(r"^python train.py(?!.*(--cfg|stop_after=plan))")


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(". ")]


def marked() -> list:
    """Those that train, evaluate and export are with the slow tests."""
    return [pytest.param(c, marks=[pytest.mark.slow] * bool(TRAINS.match(c))) for c in commands()]


@pytest.mark.parametrize("command", marked())
def test_the_command_runs(command, tmp_path, request):
    words = shlex.split(command)
    programs = {"python": [sys.executable], "loadmaster": [sys.executable, "-m", "loadmaster.cli"]}
    words = [*programs[words[0]], *words[1:]]
    if TRAINS.match(command):
        words += [*SMALL, f"run_dir={tmp_path / 'run'}", f"model.path={request.getfixturevalue('few_words')}"]
        words += ["model.name=example/few-words"]
    here = {"train.py": str(ROOT / "train.py")}
    words = [here.get(word, word.replace("examples/", f"{ROOT}/examples/")) for word in words]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S,
        env={**environment(), "PYTHONPATH": str(ROOT)}, check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_recipe_is_in_the_table():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"`{recipe.stem}`" in readme


def headings(page: Path) -> set[str]:
    """As the part of a link after #: in lower case, spaces as dashes, no punctuation."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not heading or heading in headings(target), link
