"""What a person sees of the data."""

from __future__ import annotations

import io

from rich.console import Console

from loadmaster.data import prepare, show


def printed(terminal: bool, *arguments) -> str:
    buffer = io.StringIO()
    show(
        *arguments,
        Console(file=buffer, force_terminal=terminal, width=80, color_system="standard" if terminal else None),
    )
    return buffer.getvalue()


def test_plain_output_marks_the_trained_part_and_ends_with_the_figures(tokenizer, write_jsonl, job_for):
    rows = [{"instruction": f"[bold]{n}[/bold]", "output": f"answer {n}"} for n in range(4)]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    text = printed(False, prepared, tokenizer, 2)
    assert "rows.jsonl:1\n" in text and "rows.jsonl:2\n" in text and "rows.jsonl:3\n" not in text
    assert "[bold]0[/bold]<|im_end|>\n<|im_start|>assistant\n⟦answer 0<|im_end|>⟧" in text
    assert "data: 4 rows read as alpaca" in text


def test_of_several_files_a_row_of_each_is_printed_in_turn(tokenizer, write_jsonl, job_for):
    files = [write_jsonl([{"text": f"{name} {n}"} for n in range(3)], f"{name}.jsonl") for name in "abc"]
    prepared = prepare(job_for(files, validation=None), tokenizer)
    text = printed(False, prepared, tokenizer, 4)
    shown = [line.rpartition("/")[2] for line in text.splitlines() if line.startswith("--- ")]
    assert shown == ["a.jsonl:1", "b.jsonl:1", "c.jsonl:1", "a.jsonl:2"]


def test_a_terminal_gets_the_trained_part_in_green(tokenizer, write_jsonl, job_for):
    rows = [{"instruction": "hi", "output": "answer"}]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    text = printed(True, prepared, tokenizer, 1)
    start, green = text.index("answer"), text.rindex("\x1b[", 0, text.index("answer"))
    assert "32m" in text[green:start] and "⟦" not in text


def test_plain_text_is_shown_trained_with_its_eos(tokenizer, write_jsonl, job_for):
    prepared = prepare(job_for(write_jsonl([{"text": "It rained."}]), validation=None), tokenizer)
    text = printed(False, prepared, tokenizer, 1)
    assert "⟦It rained.<|im_end|>⟧" in text
    assert "data: 1 row read as text" in text and "  train: 1 row -> 1 packed row of " in text


def test_of_a_very_long_row_the_beginning_and_the_end_are_printed(tokenizer, write_jsonl, job_for):
    rows = [{"instruction": "First.", "output": "word " * 4000 + "Last."}]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    for terminal in (False, True):
        text = printed(terminal, prepared, tokenizer, 1)
        assert "First." in text and "Last." in text and " characters ..." in text and len(text) < 10_000


def test_a_row_does_not_steer_the_terminal_that_it_is_looked_at_in(tokenizer, write_jsonl, job_for):
    """It could hide what is in it, or write to the clipboard (OSC 52)."""
    rows = [{"instruction": "hi\x1b]52;c;eA==\x07", "output": "answer\x1b[2J"}]
    prepared = prepare(job_for(write_jsonl(rows), validation=None), tokenizer)
    for terminal in (False, True):
        text = printed(terminal, prepared, tokenizer, 1)
        assert "hi\u241b]52;c;eA==\u2407" in text and "\u241b[2J" in text
        assert "\x1b]" not in text and "\x1b[2J" not in text and "\x07" not in text
    assert "\u27e6answer\u241b[2J<|im_end|>\u27e7" in printed(False, prepared, tokenizer, 1)
