"""The shipped tickets dataset: what its README claims."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "data" / "tickets"
ISSUES = {"delivery", "defect", "refund", "billing", "question"}
URGENCIES = {"low", "normal", "high"}


def read(split: str) -> list[list[dict]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


def tickets(split: str) -> list[dict]:
    return [json.loads(messages[-1]["content"]) for messages in read(split)]


def generate(out: Path, *arguments: str) -> dict[str, bytes]:
    subprocess.run([sys.executable, FOLDER / "generate.py", "--out", out, *arguments], check=True)
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_the_shipped_files_are_what_the_script_writes(tmp_path):
    shipped = {path.name: path.read_bytes() for path in FOLDER.glob("*.jsonl")}
    assert generate(tmp_path) == shipped
    assert shipped.keys() == {
        f"{kind}{split}.jsonl" for kind in ("", "pairs_", "labels_") for split in ("train", "validation")
    }


def test_another_seed_gives_other_conversations(tmp_path):
    shipped = {json.dumps(messages) for messages in read("train")}
    other = [json.loads(line)["messages"] for line in generate(tmp_path, "--seed", "1")["train.jsonl"].splitlines()]
    assert len(other) == len(shipped)
    assert len(shipped & {json.dumps(messages) for messages in other}) < 10


@pytest.mark.parametrize("split", ["train", "validation"])
def test_every_ticket_can_be_read_off_its_message(split):
    for system, user, assistant in read(split):
        assert [m["role"] for m in (system, user, assistant)] == ["system", "user", "assistant"]
        ticket = json.loads(assistant["content"])
        assert list(ticket) == ["customer", "product", "issue", "urgency", "order"]
        assert assistant["content"] == json.dumps(ticket, separators=(",", ":"))
        assert ticket["customer"] in user["content"]
        assert ticket["order"] is None or ticket["order"] in user["content"]
        assert ticket["issue"] in ISSUES and ticket["urgency"] in URGENCIES


@pytest.mark.parametrize(
    ("what", "key"),
    [
        ("message", lambda user, ticket: user.lower()),
        ("customer", lambda user, ticket: ticket["customer"]),
        ("order number", lambda user, ticket: ticket["order"]),
        ("combination", lambda user, ticket: (ticket["product"], ticket["issue"], ticket["urgency"])),
    ],
)
def test_the_held_out_split_shares_nothing_with_training(what, key):
    sets = []
    for split in ("train", "validation"):
        found = [key(messages[1]["content"], json.loads(messages[-1]["content"])) for messages in read(split)]
        sets.append({value for value in found if value is not None})
        if what == "message":
            assert len(set(found)) == len(found)
    assert all(sets)
    assert not sets[0] & sets[1], what


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_rejected_ticket_differs_from_the_chosen_one_in_one_field(split):
    lines = (FOLDER / f"pairs_{split}.jsonl").read_text(encoding="utf-8").splitlines()
    pairs, known = [json.loads(line) for line in lines], read(split)
    assert len(pairs) == min(160, len(known))
    changed = set()
    for pair in pairs:
        assert [*pair["messages"], pair["chosen"]] in known
        chosen, rejected = (json.loads(pair[side]["content"]) for side in ("chosen", "rejected"))
        (field,) = [name for name in chosen if chosen[name] != rejected[name]]
        changed.add(field)
    assert changed == {"customer", "product", "issue", "urgency", "order"}


def test_no_field_can_be_guessed():
    for split in ("train", "validation"):
        rows = tickets(split)
        for field in ("product", "issue", "urgency", "order"):
            values = [ticket[field] for ticket in rows]
            commonest = max(map(values.count, set(values)))
            assert commonest / len(rows) < 0.5, (split, field)
        assert len({ticket["product"] for ticket in rows}) == 12
        assert {ticket["issue"] for ticket in rows} == ISSUES


def test_the_dataset_stays_within_the_smoke_recipes_token_budget(tokenizer):
    """Training on 2 CPU cores in under 4 minutes at about 400 tokens/s leaves some 40,000 tokens an epoch."""
    for split in ("train", "validation"):
        rows = read(split)
        lengths = [len(tokenizer.apply_chat_template(messages, return_dict=False)) for messages in rows]
        answers = [len(tokenizer(messages[-1]["content"])["input_ids"]) for messages in rows]
        assert sum(lengths) / len(rows) <= 95
        assert max(lengths) <= 128
        assert max(answers) <= 40
        assert sum(lengths) <= 40_000
