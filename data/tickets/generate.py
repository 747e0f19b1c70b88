"""Write the support tickets dataset: free-text messages and the JSON ticket each should become.

    python data/tickets/generate.py            # rewrites the .jsonl files beside this file

Everything is written by hand below and combined by a seeded generator, so the same seed gives the same
bytes. A message is made of parts (greeting, problem, order number, urgency, a remark, signature) in
varying order, then typed carelessly: capitals dropped, letters swapped or doubled.

The validation split is held out in four ways: its customers, its order numbers and its combinations
of product, issue and urgency never occur in training, and neither does any of its messages.

The pairs are rows of these splits with a second ticket in which one field is wrong, the labels one ticket of each pair
and whether it is right: data for preference tuning.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import product as cartesian_product
from pathlib import Path
from random import Random
from typing import TypeVar

TRAIN_ROWS = 432
VALIDATION_ROWS = 60
PAIRS = 160
"""Of each split, at most."""
SEED = 7

SYSTEM = "Write a JSON ticket: customer, product, issue, urgency, order."

# Canonical name in the ticket -> what customers call it.
PRODUCTS = {
    "kettle": ["kettle", "electric kettle", "water kettle"],
    "toaster": ["toaster", "two-slice toaster", "bread toaster"],
    "blender": ["blender", "smoothie blender", "hand blender"],
    "coffee machine": ["coffee machine", "coffee maker", "espresso machine"],
    "vacuum": ["vacuum cleaner", "hoover", "vacuum"],
    "desk lamp": ["desk lamp", "reading lamp", "lamp"],
    "headset": ["headset", "wireless headset", "gaming headset"],
    "keyboard": ["keyboard", "wireless keyboard", "gaming keyboard"],
    "router": ["router", "wifi router", "wi-fi box"],
    "backpack": ["backpack", "rucksack", "hiking backpack"],
    "tent": ["tent", "camping tent", "two-person tent"],
    "bike helmet": ["bike helmet", "helmet", "cycling helmet"],
}

ISSUES = {
    "delivery": [
        "the {item} has still not arrived",
        "where is my {item}? tracking has not moved for {days} days",
        "I ordered the {item} {days} days ago and nothing came",
        "the courier says the {item} was delivered but it was not",
        "my {item} is late",
        "still waiting for the {item} you shipped {days} days ago",
        "the parcel with my {item} seems to be lost",
    ],
    "defect": [
        "the {item} stopped working after {days} days",
        "my {item} arrived broken",
        "the {item} has a crack in it",
        "my new {item} is faulty",
        "the {item} makes a strange noise and then it dies",
        "a part of the {item} fell off",
        "the {item} I got is damaged",
    ],
    "refund": [
        "I want my money back for the {item}",
        "please refund the {item}, I sent it back {days} days ago",
        "how do I return the {item} and get a refund",
        "the {item} is not for me, I would like to return it",
        "I changed my mind about the {item} and want to send it back",
        "I am still waiting for the refund for my {item}",
        "I'd like to give the {item} back and be refunded",
    ],
    "billing": [
        "I was charged twice for the {item}",
        "the invoice for the {item} shows the wrong amount",
        "you billed me {price} dollars too much for the {item}",
        "my card was charged for the {item} but the price was lower on the site",
        "I need a corrected invoice for the {item}",
        "there are two payments for one {item} on my card",
        "the discount code was not taken off the bill for my {item}",
    ],
    "question": [
        "how do I clean the {item}",
        "does the {item} come with a guarantee",
        "is the {item} also sold in blue",
        "where can I find the manual for the {item}",
        "can I buy spare parts for the {item}",
        "which size of the {item} should I pick",
        "what is the {item} made of",
    ],
}

# An empty one says nothing about urgency, which is normal too.
URGENCY = {
    "high": [
        "This is urgent!",
        "ASAP please!",
        "I need this solved today.",
        "Please answer right away.",
        "We leave tonight, so please hurry.",
        "I need it by tomorrow morning.",
    ],
    "normal": [
        "",
        "Please let me know.",
        "Can you help?",
        "What should I do?",
        "Please advise.",
        "Could you look into it?",
    ],
    "low": [
        "No rush.",
        "Whenever you have time.",
        "Take your time.",
        "There is no hurry at all.",
        "Next week is fine too.",
        "It can wait.",
    ],
}

ORDER = [
    "Order {order}.",
    "My order number is {order}.",
    "Order no. {order}.",
    "(order #{order})",
    "It is order {order}.",
    "Ref {order}.",
]
# Numbers that are not the order's.
REMARKS = [
    "I paid {price} dollars.",
    "It was a gift.",
    "I live on floor {days}.",
    "I have bought from you for {days} years.",
    "I wrote {days} days ago already.",
]

GREETINGS = ["Hi,", "Hello,", "Hey there,", "Good morning,", "Dear team,", "Hi again,"]
INTRODUCTIONS = ["{customer} here.", "This is {customer}.", "My name is {customer}.", "I am {customer}."]
SIGNATURES = [
    "Thanks, {customer}",
    "Best, {customer}",
    "- {customer}",
    "Regards, {customer}",
    "{customer}",
    "Cheers, {customer}",
]

TRAIN_CUSTOMERS = [
    "Abdul", "Agnes", "Ahmed", "Aisha", "Alan", "Amara", "Andre", "Anna", "Beatriz", "Bianca", "Boris",
    "Camila", "Carlos", "Cecilia", "Chloe", "Clara", "Daniel", "Dario", "Deepak", "Diego", "Dora", "Edith",
    "Eduardo", "Elena", "Esther", "Fatima", "Felix", "Fiona", "Frank", "Freya", "Gabriel", "Gita", "Grace",
    "Greta", "Gustav", "Hannah", "Hassan", "Henrik", "Hilda", "Hugo", "Imran", "Ingrid", "Isabel", "Ivan",
    "Jack", "Jana", "Joanna", "Jorge", "Julian", "Karim", "Katya", "Kofi", "Kwame", "Leila", "Lena", "Liam",
    "Lionel", "Lucas", "Lucy", "Magda", "Malik", "Marco", "Maria", "Martin", "Mateo", "Mei", "Mina", "Monica",
    "Nadia", "Nathan", "Nikolai", "Noor", "Olga", "Olivia", "Omar", "Patrick", "Pavel", "Peter", "Petra",
    "Priya", "Quentin", "Ramona", "Ravi", "Rosa", "Ruth", "Samuel", "Simon", "Sofia", "Stella", "Sven", "Tariq",
    "Teresa", "Thomas", "Tomasz", "Ursula", "Vera", "Viktor", "Walter", "Wei", "Yasmin", "Yuki", "Zara", "Zoe",
]
VALIDATION_CUSTOMERS = [
    "Emma", "Rashid", "Nina", "Oscar", "Laura", "Jamal", "Irene", "Paul", "Sara", "Bruno", "Helen", "David",
    "Marta", "Kenji", "Alice", "Victor",
]

Item = TypeVar("Item")


def pick(random: Random, choices: Sequence[Item]) -> Item:
    # random() alone is promised to give the same sequence in every Python version; choice() is not.
    return choices[int(random.random() * len(choices))]


def shuffled(random: Random, items: Sequence[Item]) -> list[Item]:
    return [item for _, item in sorted(((random.random(), i), item) for i, item in enumerate(items))]


def misspell(random: Random, word: str) -> str:
    """Swap two inner letters, double one or drop one, as fast typing does."""
    at = 1 + int(random.random() * (len(word) - 3))
    return pick(
        random,
        [
            word[:at] + word[at + 1] + word[at] + word[at + 2 :],
            word[:at] + word[at] + word[at:],
            word[:at] + word[at + 1 :],
        ],
    )


def carelessly(random: Random, text: str, keep: set[str]) -> str:
    """`text` as someone in a hurry types it; the words in `keep` stay readable."""
    if random.random() < 0.4:
        words = text.split(" ")
        candidates = [i for i, word in enumerate(words) if len(word) > 4 and word.isalpha() and word not in keep]
        if candidates:
            at = pick(random, candidates)
            words[at] = misspell(random, words[at])
            text = " ".join(words)
    if random.random() < 0.25:
        text = " ".join(word if word in keep else word.lower() for word in text.split(" "))
    return text


def sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    is_question = text.lower().startswith(("how", "does", "is ", "where can", "can ", "which", "what"))
    return text if text.endswith((".", "!", "?")) else text + ("?" if is_question else ".")


def conversation(random: Random, combination: tuple[str, str, str], customer: str, order: str) -> dict:
    product, issue, urgency = combination
    introduces = random.random() < 0.35
    with_order = random.random() < 0.7
    numbers = {"days": 3 + int(random.random() * 17), "price": 15 + int(random.random() * 80)}

    problem = sentence(pick(random, ISSUES[issue]).format(item=pick(random, PRODUCTS[product]), **numbers))
    body = [problem]
    if with_order:
        body.append(pick(random, ORDER).format(order=order))
    urging = pick(random, URGENCY[urgency])
    if urging:
        body.append(urging)
    if random.random() < 0.3:
        body.append(pick(random, REMARKS).format(**numbers))
    if random.random() < 0.5:
        body = shuffled(random, body)
    if introduces:
        body.insert(0, pick(random, INTRODUCTIONS).format(customer=customer))
    if random.random() < 0.6:
        if not body[0].startswith(("I ", "I'", "ASAP", customer)):
            body[0] = body[0][0].lower() + body[0][1:]
        body.insert(0, pick(random, GREETINGS))
    if not introduces:
        body.append(pick(random, SIGNATURES).format(customer=customer))

    message = carelessly(random, " ".join(body), keep={customer, f"{customer}."})
    ticket = {
        "customer": customer,
        "product": product,
        "issue": issue,
        "urgency": urgency,
        "order": order if with_order else None,
    }
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": json.dumps(ticket, separators=(",", ":"))},
        ]
    }


def combinations() -> dict[str, list[tuple[str, str, str]]]:
    """The (product, issue, urgency) of each split: one in five is held out, three of every product."""
    split: dict[str, list[tuple[str, str, str]]] = {"train": [], "validation": []}
    for (p, product), (i, issue), (u, urgency) in cartesian_product(*map(enumerate, (PRODUCTS, ISSUES, URGENCY))):
        split["validation" if (p + i + 2 * u) % len(ISSUES) == 0 else "train"].append((product, issue, urgency))
    return split


def dataset(seed: int = SEED) -> dict[str, list[dict]]:
    """Both splits, name -> conversations."""
    random = Random(seed)
    orders = shuffled(random, [str(number) for number in range(10_000, 100_000, 7)])
    rows: dict[str, list[dict]] = {"train": [], "validation": []}
    seen: set[str] = set()
    for split, count, customers in (
        ("train", TRAIN_ROWS, TRAIN_CUSTOMERS),
        ("validation", VALIDATION_ROWS, VALIDATION_CUSTOMERS),
    ):
        allowed = shuffled(random, combinations()[split])
        while len(rows[split]) < count:
            # Every combination in turn, so that none is left to chance.
            combination = allowed[len(rows[split]) % len(allowed)]
            row = conversation(random, combination, pick(random, customers), orders.pop())
            message = row["messages"][1]["content"].lower()
            if message not in seen:
                seen.add(message)
                rows[split].append(row)
    return rows


def pair(random: Random, row: dict) -> dict:
    """The row as a preference pair: its ticket is chosen, the same with one field wrong is rejected."""
    *prompt, answer = row["messages"]
    ticket = json.loads(answer["content"])
    field = pick(random, list(ticket))
    if field == "order":
        wrong = str(10_000 + int(random.random() * 90_000)) if ticket["order"] is None else None
    else:
        values = {"customer": TRAIN_CUSTOMERS, "product": PRODUCTS, "issue": ISSUES, "urgency": URGENCY}[field]
        wrong = pick(random, [value for value in values if value != ticket[field]])
    content = json.dumps({**ticket, field: wrong}, separators=(",", ":"))
    return {"messages": prompt, "chosen": answer, "rejected": {**answer, "content": content}}


def labelled(random: Random, couple: dict) -> dict:
    """One of a pair's two tickets with the label that a reader might have given it: right in two rows of three."""
    label = random.random() < 2 / 3
    return {"prompt": couple["messages"], "completion": [couple["chosen" if label else "rejected"]], "label": label}


def files(seed: int = SEED) -> dict[str, list[dict]]:
    """All files, name -> rows."""
    rows = dataset(seed)
    random = Random(seed + 1)
    pairs = {f"pairs_{split}": [pair(random, row) for row in some[:PAIRS]] for split, some in rows.items()}
    random = Random(seed + 2)
    labels = {
        f"labels_{split}": [labelled(random, couple) for couple in pairs[f"pairs_{split}"]] for split in rows
    }
    return rows | pairs | labels


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the .jsonl files of the tickets dataset.")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write to")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, rows in files(arguments.seed).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (arguments.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
