"""Draw docs/plan.svg, a plan as a terminal shows it; a test holds the picture to what is planned now.

python benchmarks/plan_picture.py
"""

from __future__ import annotations

import io
from pathlib import Path
from unittest.mock import patch

from rich.console import Console
from rich.text import Text

from loadmaster.config.compose import compose
from loadmaster.preflight import make_plan
from loadmaster.preflight.table import print_plan

PICTURE = Path(__file__).parents[1] / "docs" / "plan.svg"
WORDS = ("recipe=qlora_8b", "hardware=rtx4090_x1", "max_steps=1000")
COLUMNS = 116


def picture() -> str:
    """The SVG of a terminal with the command and what it prints."""
    command, printed = " ".join(("loadmaster plan", *WORDS)), io.StringIO()
    with patch.dict("os.environ", {"FORCE_COLOR": "1", "COLORTERM": "truecolor", "NO_COLOR": ""}):
        print_plan(make_plan(compose(list(WORDS)).job, with_elsewhere=True), Console(file=printed, width=COLUMNS))
    terminal = Console(file=io.StringIO(), width=COLUMNS, record=True, color_system="truecolor", force_terminal=True)
    terminal.print(f"$ {command}", style="bold", highlight=False)
    terminal.print(Text.from_ansi(printed.getvalue()))
    return terminal.export_svg(title="", unique_id="plan")


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
    print(PICTURE)
