"""Greedy generation on the real small model."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from loadmaster.config.schema import EvaluationConfig
from loadmaster.data import Conversation
from loadmaster.errors import DataError
from loadmaster.evaluation import generate, prompts_and_references, run_task, some_answers
from loadmaster.export.answers import _prompt
from loadmaster.models.load import load_base
from loadmaster.models.tokenizer import load_tokenizer
from loadmaster.training.world import World

module = sys.modules["loadmaster.evaluation.generate"]
QUESTIONS = [
    "What colour is the sky on a clear day?",
    "Count from one to five.",
    "I have three apples and eat one. How many apples do I have left? Please answer in one short sentence.",
    "Hi",
]


def conversation(question: str, *more: dict, tools: list | None = None) -> Conversation:
    messages = [{"role": "user", "content": question}, *more]
    return Conversation(messages=messages, tools=tools, text=None, origin="test:1", row_id=question)


@pytest.fixture(scope="module")
def model(smollm2):
    # float32, so that padding's rounding does not decide between near-equal tokens.
    return load_base(smollm2, torch.float32, "cpu")


@pytest.fixture(scope="module")
def alone(model, tokenizer) -> list[str]:
    return [generate(model, tokenizer, [conversation(q)], 24, batch_size=1)[0] for q in QUESTIONS]


@pytest.mark.parametrize(("at", "ends"), [(1, False), (3, True)])
def test_an_answer_is_transformers_own_up_to_the_end_of_the_turn(smollm2, tokenizer, alone, at, ends):
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[at]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    # Told not to stop, so that what comes after the turn's end is there to be left out.
    output = plain.generate(**prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)
    ids = output[0, prompt["input_ids"].shape[1] :].tolist()
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    end = [*ids, stop].index(stop)
    assert (end < 24 - 1) == ends
    assert alone[at] == tokenizer.decode(ids[:end])


def test_a_batch_gives_the_answers_of_one_at_a_time_in_the_order_asked(model, tokenizer, alone):
    seen = []
    batch = [conversation(q) for q in QUESTIONS]
    assert generate(model, tokenizer, batch, 24, 3, on_progress=lambda *at: seen.append(at)) == alone
    assert len(set(alone)) == len(QUESTIONS)
    assert seen == [(3, 4), (4, 4)]


def test_a_card_too_small_for_so_many_answers_gives_them_fewer_at_a_time(model, tokenizer, alone):
    tried, past_the_allocator = [], RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    def small(_, args, kwargs):
        tried.append(len(kwargs["input_ids"]))
        if tried[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory") if tried[-1] > 2 else past_the_allocator

    with model.register_forward_pre_hook(small, with_kwargs=True):
        most = 1
        assert generate(model, tokenizer, [conversation(q) for q in QUESTIONS], 24, 4) == alone
        assert [size for size in tried if size > 1] == [4, 2]  # and never again
        most = 0
        with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
            generate(model, tokenizer, [conversation(QUESTIONS[0])], 24, 4)


@dataclass(frozen=True)
class Side(World):
    """A rank in a thread of its own; what ranks tell each other they leave in `said`, in their order."""

    size: int = 2
    said: list = field(default_factory=lambda: [None, None])
    meeting: threading.Barrier = field(default_factory=lambda: threading.Barrier(2, timeout=20))

    def gather(self, value):
        self.said[self.rank] = value
        self.meeting.wait()
        everyone = list(self.said)
        self.meeting.wait()
        return everyone

    def any(self, flag):
        return any(self.gather(flag))


def both_ranks(model, tokenizer, asked: int, at_a_time: int) -> list:
    """What two ranks answer to `asked` questions, each beside how far it was said to be."""
    first = Side()
    sides = [first, replace(first, rank=1)]

    def one(side: Side) -> tuple[list[str], list[int]]:
        seen: list[int] = []
        many = [conversation(QUESTIONS[i % len(QUESTIONS)]) for i in range(asked)]
        made = generate(model, tokenizer, many, 4, at_a_time, lambda *at: seen.append(side.gather(at)[0][0]), side)
        return made, seen

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sides))


def echo(tried: list, room) -> Callable:
    """In the place of a batch's generation: the last token of each prompt, where there is `room` for so many."""

    def batch(model, prompts, stops, pad_id, max_new_tokens, in_step):
        tried.append((len(prompts), in_step))
        if not room(len(prompts)):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [ids[-1:] for ids in prompts]

    return batch


def test_a_rank_with_whole_weights_that_alone_runs_out_asks_fewer_and_keeps_step(model, tokenizer, monkeypatch):
    tried: list = []
    full = iter([True] + [False] * 100)  # one rank's first batch
    monkeypatch.setattr(module, "_generate_batch", echo(tried, lambda _: not next(full)))
    first, second = both_ranks(model, tokenizer, asked=10, at_a_time=4)
    assert first == second and len(first[0]) == 10 and first[1] == [8, 10]
    assert sorted(tried) == sorted([(4, False)] * 2 + [(2, False)] * 3)  # its four, two and two, and the last two


def test_ranks_that_gather_layers_agree_on_as_many_as_each_has_room_for(model, tokenizer, monkeypatch):
    tried, rooms = [], iter([True, False, True, True])  # of the two ranks; the second lacks room for four
    monkeypatch.setattr(module, "is_spread", lambda _: True)
    monkeypatch.setattr(module, "_has_room", lambda *_: next(rooms))
    monkeypatch.setattr(module, "_generate_batch", echo(tried, lambda _: True))
    first, second = both_ranks(model, tokenizer, asked=5, at_a_time=4)
    assert first == second and len(first[0]) == 5 and first[1] == [4, 5]
    assert sorted(tried) == [(1, True), (1, True), (2, True), (2, True)]  # the second goes along with the last one


def test_a_longer_batch_is_asked_more_room_for(model):
    one, four = (module._bytes(model, answers, 100, 24) for answers in (1, 4))
    layer = 2 * 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    assert four - layer == pytest.approx(4 * (one - layer), abs=4) and one > layer + 30 * 2 * 4 * 192 * 124


def test_a_long_answer_is_cut_at_max_new_tokens(model, tokenizer, alone):
    answer = generate(model, tokenizer, [conversation(QUESTIONS[3])], 4, 1)[0]
    assert len(tokenizer(answer)["input_ids"]) == 4
    assert alone[3].startswith(answer)


def test_the_models_own_generation_settings_do_not_change_an_answer(model, tokenizer, alone):
    shipped = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.5, top_p=0.8, repetition_penalty=2.0, no_repeat_ngram_size=1, eos_token_id=2,
        suppress_tokens=list(range(30, 9000)), return_dict_in_generate=True,
    )
    try:
        assert generate(model, tokenizer, [conversation(QUESTIONS[1])], 24, 1) == [alone[1]]
    finally:
        model.generation_config = shipped


def test_generation_leaves_no_trace(model, tokenizer, alone):
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    try:
        lora.train()
        lora.config.use_cache = False
        lora.base_model.model.gradient_checkpointing_enable()
        before = (
            [module.training for module in lora.modules()],
            lora.config.use_cache,
            model.config._attn_implementation,
            lora.generation_config.to_dict(),
            tokenizer.padding_side,
        )
        states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        # A fresh adapter's B is zero: the answers are the base model's.
        assert generate(lora, tokenizer, [conversation(q) for q in QUESTIONS[:2]], 24, 2) == alone[:2]
        assert torch.equal(torch.get_rng_state(), states[0])
        assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
        assert before == (
            [module.training for module in lora.modules()],
            lora.config.use_cache,
            model.config._attn_implementation,
            lora.generation_config.to_dict(),
            tokenizer.padding_side,
        )
        assert torch.is_grad_enabled()
    finally:
        lora.base_model.model.gradient_checkpointing_disable()
        lora.unload()
        model.config.use_cache = True
        model.eval()


def test_run_task_scores_the_last_answer_and_shows_samples(model, tokenizer, alone):
    rows = [
        replace(conversation(QUESTIONS[3], {"role": "assistant", "content": "Go away."}), label=False),  # no reference
        replace(conversation(QUESTIONS[0], {"role": "assistant", "content": alone[0]}), label=True),
        conversation(QUESTIONS[1], {"role": "assistant", "content": "no"}),
        Conversation(messages=[], tools=None, text="plain text", origin="test:3", row_id="3"),
        conversation(QUESTIONS[2], {"role": "assistant", "content": alone[2]}),
    ]
    evaluation = EvaluationConfig(task="exact_match", max_rows=2, max_new_tokens=24)
    figures = run_task(model, tokenizer, rows, evaluation)
    assert (figures["metric"], figures["rows"]) == (0.5, 2)
    assert figures["samples"] == [
        {"prompt": QUESTIONS[0], "reference": alone[0], "answer": alone[0], "right": True},
        {"prompt": QUESTIONS[1], "reference": "no", "answer": alone[1], "right": False},
    ]


def test_a_task_without_rows_is_refused(model, tokenizer):
    with pytest.raises(DataError, match="no held-out conversation"):
        run_task(model, tokenizer, [Conversation([], text="prose")], EvaluationConfig(task="exact_match"))


def test_a_few_answers_are_there_to_be_read_where_there_is_no_task(model, tokenizer, alone, monkeypatch):
    said = {"role": "assistant", "content": "no"}
    rows = [
        Conversation([], text="plain text"),
        Conversation([said]),  # nothing to answer
        replace(conversation(QUESTIONS[3], said), label=False),
        conversation("word " * 1030, said),  # nobody reads it, and it would take the memory of all others
        conversation(QUESTIONS[0], said),
        conversation(QUESTIONS[3], {**said, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
        conversation(QUESTIONS[1], said),
    ]
    evaluation = EvaluationConfig(max_new_tokens=24)
    expected = [{"prompt": QUESTIONS[i], "reference": "no", "answer": alone[i]} for i in range(2)]
    assert some_answers(model, tokenizer, rows, evaluation) == expected
    assert some_answers(model, tokenizer, rows[:4], evaluation) == []
    briefly = replace(evaluation, max_new_tokens=1)
    files = [replace(conversation(f"{n}", said), origin=f"{'ab'[n > 8]}.jsonl:{n}") for n in range(12)]
    asked = [sample["prompt"] for sample in some_answers(model, tokenizer, files, briefly)]
    assert asked == ["0", "9", "1", "10", "2", "11", "3", "4"]  # of both files in turn
    twice = [rows[4], replace(rows[4], messages=[*rows[4].messages[:-1], {**said, "content": "again"}])]
    assert [sample["reference"] for sample in some_answers(model, tokenizer, twice, briefly)] == ["no"]
    with monkeypatch.context() as spread:  # over GPUs: they would be gathered for each token
        spread.setattr("loadmaster.evaluation.is_spread", lambda model: True)
        assert some_answers(model, tokenizer, rows, briefly) == []
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert some_answers(model, tokenizer, rows, briefly) == []


def test_prompts_that_the_chat_template_refuses_without_their_answer_are_not_asked(tokenizer, monkeypatch):
    template = "{% if 'user' not in messages | map(attribute='role') %}{{ raise_exception('nobody asks') }}{% endif %}a"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    said = {"role": "assistant", "content": "no"}
    greeting = Conversation([{"role": "system", "content": "Greet."}, said, {"role": "user", "content": "Hi"}])
    asked, references = prompts_and_references(tokenizer, [greeting, conversation("Hi", said)], None)
    assert ([prompt.messages[0]["content"] for prompt in asked], references) == (["Hi"], ["no"])
    assert _prompt(greeting, tokenizer) is None
    assert _prompt(conversation("Hi", said), tokenizer) is not None


def test_a_longer_conversation_is_shown_turn_by_turn(model, tokenizer):
    system = {"role": "system", "content": "Be brief."}
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Name a colour."},
        {"role": "assistant", "content": "Blue"},
    ]
    row = Conversation(messages=[system, *turns], tools=None, text=None, origin="test:1", row_id="1")
    evaluation = EvaluationConfig(task="exact_match", max_new_tokens=2)
    sample = run_task(model, tokenizer, [row], evaluation)["samples"][0]
    assert sample["prompt"] == "user: Hi\nassistant: Hello\nuser: Name a colour."


def test_a_text_is_gone_on_with_where_the_tokenizer_puts_an_end_behind_it(smollm2):
    tokenizer, text = load_tokenizer(smollm2), Conversation([], text="Once upon")
    plain = module.prompt_ids(tokenizer, text)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
    )
    assert tokenizer(text.text)["input_ids"] == [*plain, tokenizer.eos_token_id]
    assert module.prompt_ids(tokenizer, text) == plain
