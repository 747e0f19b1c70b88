"""The real tokenizer under chat templates in the manner of the common families, written for these tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from loadmaster.config.schema import DataConfig, Job
from loadmaster.data.cache import cache_folder

# name -> (template, its special tokens)
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    # A header of two special tokens, contents stripped, a token that ends the turn, tool calls as JSON.
    "llama3": (
        "{{ '<|begin|>' }}{% for m in messages %}"
        "{{ '<|head|>' + ('ipython' if m.role == 'tool' else m.role) + '<|/head|>\n\n' }}"
        '{% if m.tool_calls %}{% for c in m.tool_calls %}{{ \'{"name": "\' + c.function.name + \'", "parameters": \' }}'
        "{{ c.function.arguments | tojson }}{{ '}' }}{% endfor %}"
        "{% elif m.role == 'tool' %}{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}"
        "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}",
        ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"],
    ),
    # No header for the assistant; the system message goes into the first user message; roles must alternate.
    "mistral": (
        "{{ '<s>' }}{% set ns = namespace(system='', turn=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set ns.system = m.content + '\n\n' %}{% else %}"
        "{% if (m.role == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
    ),
    # Reasoning of earlier turns is dropped, the last turn gets an empty block when it has none.
    "qwen3": (
        "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}"
        "{% set content = m.content.split('</think>')[-1].strip() if m.role == 'assistant' else m.content %}"
        "{% set think = m.content.split('</think>')[0].split('<think>')[-1].strip() if '</think>' in m.content %}"
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.index0 > ns.last %}"
        "{{ '<think>\n' + (think or '') + '\n</think>\n\n' }}{% endif %}{{ content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    # The assistant is called model, a system message raises, contents are stripped, a newline behind each turn.
    "gemma": (
        "{{ '<bos>' }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{{ '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '</turn>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<turn>model\n' }}{% endif %}",
        ["<bos>", "<turn>", "</turn>"],
    ),
    # Tool definitions in the system message, calls and answers tagged, answers inside a user turn.
    "hermes": (
        "{% if tools %}{{ '<|im_start|>system\nTools:' }}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}"
        "{{ '<|im_end|>\n' }}{% endif %}{% for m in messages %}{% if m.role == 'tool' %}"
        "{{ '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% for c in m.tool_calls or [] %}"
        "{{ '<tool_call>\n' + c.function | tojson + '\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    # Calls need null content and arguments as text; special tokens close a call before the turn ends.
    "deepseek": (
        "{{ '<bos>' }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
        "{% elif m.role == 'tool' %}{{ '<|out|>' + m.content + '<|/out|>' }}"
        "{% elif m.content is none %}{{ '<|Assistant|>' }}{% for c in m.tool_calls %}"
        "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments + '<|/call|>' }}{% endfor %}{{ '<|eos|>' }}"
        "{% else %}{{ '<|Assistant|>' + m.content + '<|eos|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
        ["<bos>", "<|User|>", "<|Assistant|>", "<|out|>", "<|/out|>", "<|call|>", "<|/call|>", "<|eos|>"],
    ),
    # A turn of calls, which a special token closes, ends by another token than one of text, as Llama 3.1's may.
    "eom": (
        "{% for m in messages %}{{ '<|head|>' + m.role + '\n' }}{% for c in m.tool_calls or [] %}"
        "{{ '<|call|>' + c.function.name + '\n' + c.function.arguments | tojson + '<|/call|>\n' }}{% endfor %}"
        "{{ '<|eom|>' if m.tool_calls else m.content + '<|eot|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|head|>assistant\n' }}{% endif %}",
        ["<|head|>", "<|call|>", "<|/call|>", "<|eom|>", "<|eot|>"],
    ),
    # Reasoning is dropped, that of the last turn too, as by DeepSeek-R1's.
    "silent": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    # A system prompt of its own ends as turns do, and headers hold no special token.
    "plain": (
        "{{ 'Be brief.<|im_end|>\n' }}{% for m in messages %}{{ m.role + ': ' + m.content }}"
        "{{ '<|im_end|>' if m.role == 'assistant' }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}",
        ["<|im_end|>"],
    ),
    # Two tokens end a turn, and the assistant's next header follows whether it is asked for or not, as Cohere's does.
    "insistent": (
        "{% for m in messages %}{{ '<|turn|><|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ '<|/answer|>' }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
        "{{ '<|turn|><|assistant|>' }}",
        ["<|turn|>", "<|user|>", "<|assistant|>", "<|/answer|>", "<|im_end|>"],
    ),
    # Nothing ends a turn but the beginning of the next.
    "endless": (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>"],
    ),
    # System messages vanish.
    "deaf": (
        "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
    ),
    # Only the assistant is rendered at all, so every token would be trained.
    "monologue": (
        "{% for m in messages if m.role == 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
        ["<|im_end|>"],
    ),
    # The assistant is left out.
    "mute": (
        "{% for m in messages if m.role != 'assistant' %}{{ m.content + '<|im_end|>' }}{% endfor %}",
        ["<|im_end|>"],
    ),
}


@pytest.fixture(scope="session")
def tokenizer_with(tokenizer):
    """tokenizer_with("llama3"): the tokenizer under that template, with its special tokens."""
    made = {}

    def make(name: str):
        if name not in made:
            template, special = TEMPLATES[name]
            made[name] = copy.deepcopy(tokenizer)
            made[name].add_special_tokens({"additional_special_tokens": special})
            made[name].chat_template = template
        return made[name]

    return make


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Where tokenised data is kept; not in tmp_path, which some tests train on."""
    monkeypatch.setenv("LOADMASTER_CACHE", str(tmp_path_factory.mktemp("cache")))
    return cache_folder()


@pytest.fixture
def job_for():
    """job_for(path, sequence_length=256, **data fields) -> Job."""

    def make(path: Path | str | list, sequence_length: int = 256, seed: int = 42, **fields) -> Job:
        path = [str(one) for one in path] if isinstance(path, list) else str(path)
        return Job(data=DataConfig(path=path, **fields), sequence_length=sequence_length, seed=seed)

    return make


@pytest.fixture
def write_jsonl(tmp_path):
    """write_jsonl(rows, name) -> path of a JSONL file; a str in rows is written as it stands."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture
def chat():
    """chat("u", "hi", "a", "hello") -> messages; s, u, a, t are system, user, assistant, tool."""

    def make(*parts: str) -> list[dict]:
        roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        return [{"role": roles[role], "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]

    return make
