"""Greedy answers to conversations, many at a time.

Greedy, because an answer must not depend on chance, on the batch it was generated in, or on the settings that a
model's generation_config.json ships: of these only the tokens that end an answer count. Prompts are padded on the left,
so that every row's next token is at the same place; padding is masked and does not count as a position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from loadmaster.data import Conversation
from loadmaster.data.dialect import in_dialect
from loadmaster.data.render import stop_token_ids
from loadmaster.errors import ConfigError
from loadmaster.evaluation.mode import evaluating
from loadmaster.models.attention import cached_attention
from loadmaster.models.forward import causal_lm, decoder_layers, input_device
from loadmaster.out_of_memory import ran_out
from loadmaster.preflight.answers import answer_bytes
from loadmaster.preflight.config_json import from_config
from loadmaster.training.world import World

Progress = Callable[[int, int], None]
"""Called with (answers generated, answers asked for) after each batch."""


def generate(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Progress | None = None,
    world: World | None = None,
) -> list[str]:
    """The model's answer to each conversation, in the order given, without the token that ends its turn.

    conversations: each ends where the answer begins; its tools, if any, are shown to the model.
    model: a transformers causal language model, or a peft model around one. Its training mode, attention and
    cache settings and the state of the random number generators are as before when this returns.
    world: the ranks among which batches are dealt out; all call this together and get every answer.
    """
    ids = generate_ids(model, tokenizer, conversations, max_new_tokens, batch_size, on_progress, world)
    return [tokenizer.decode(answer, clean_up_tokenization_spaces=False) for answer in ids]


def generate_ids(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    max_new_tokens: int,
    batch_size: int,
    on_progress: Progress | None = None,
    world: World | None = None,
) -> list[list[int]]:
    """The token ids of what `generate` returns. An answer shorter than max_new_tokens ended by itself.

    Where a GPU has too little memory for so many at a time, half as many are asked, down to one: by each rank that has
    whole weights for itself, and by all together, before the first, where a layer is gathered from all of them.
    """
    prompts = [prompt_ids(tokenizer, conversation) for conversation in conversations]
    # Longest first: neighbours in length waste little padding, and what does not fit in memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    stops = stop_ids(model, tokenizer)
    world = world or World()
    in_step = world.size > 1 and is_spread(model)
    if in_step:
        batch_size = _agreed(model, prompts, max_new_tokens, batch_size, world)
    at_a_time = batch_size
    mine: dict[int, list[int]] = {}
    with evaluating(model), cached_attention(model), _as_asked(causal_lm(model)):
        for start in range(0, len(order), batch_size * world.size):
            first = start + batch_size * world.rank
            some = order[first : first + batch_size]
            # A rank without prompts of its own goes along with some: spread weights are gathered by all ranks.
            some = some or order[:1] * in_step
            while some:
                now = some[:at_a_time]
                try:
                    new_ids = _generate_batch(
                        model, [prompts[i] for i in now], stops, _pad_id(tokenizer), max_new_tokens, in_step
                    )
                except RuntimeError as error:
                    if not ran_out(error) or len(now) == 1 or in_step:  # others wait for this rank's part of a layer
                        raise
                    at_a_time = len(now) // 2
                    continue
                mine |= dict(zip(now, new_ids, strict=True))
                some = some[len(now) :]
            if on_progress is not None:
                on_progress(min(start + batch_size * world.size, len(order)), len(order))
    answers = {i: ids for part in world.gather(mine) for i, ids in part.items()}
    return [answers[i] for i in range(len(prompts))]


def answer(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], max_new_tokens: int, temperature: float, streamer: Any
) -> list[int]:
    """Token ids of one answer, without the token that ends it; streamer: transformers', told of each token.

    temperature: 0 takes the likeliest token each time, as `generate` does; above, tokens are drawn.
    """
    stops = stop_ids(model, tokenizer)
    settings = _settings(stops, _pad_id(tokenizer), max_new_tokens, temperature)
    input_ids_1S = torch.tensor([list(prompt)], device=input_device(model))
    with evaluating(model), cached_attention(model), _as_asked(causal_lm(model)):
        output_1N = causal_lm(model).generate(
            input_ids=input_ids_1S, attention_mask=torch.ones_like(input_ids_1S), generation_config=settings,
            streamer=streamer,
        )
    ids = output_1N[0, len(prompt) :].tolist()
    return ids[:-1] if ids and ids[-1] in stops else ids


@contextmanager
def _as_asked(lm: nn.Module) -> Iterator[None]:
    """Within the block the model has none of the generation settings that it ships: a call takes from them all that it
    does not say itself, and some change a greedy answer or end in an error."""
    from transformers import GenerationConfig

    shipped, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = shipped


def is_spread(model: nn.Module) -> bool:
    """Whether ranks have parts of the weights, which they gather in each forward pass (FSDP2, ZeRO's third stage)."""
    return any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for weight in model.parameters())


def _agreed(
    model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, batch_size: int, world: World
) -> int:
    """So many answers at a time as every rank has memory for, `batch_size` at most.

    A rank that ran out between two gatherings would leave the others waiting, so what the longest prompts will take is
    asked for before, at once.
    """
    longest = max(map(len, prompts), default=0)
    while batch_size > 1 and world.any(not _has_room(world.device, _bytes(model, batch_size, longest, max_new_tokens))):
        batch_size //= 2
    return batch_size


def _bytes(model: nn.Module, answers: int, prompt: int, new: int) -> int:
    """Of the answers, and of two layers that are whole at a time."""
    config, width = causal_lm(model).config, model.get_input_embeddings().weight.element_size()
    layer = decoder_layers(model)[0]
    gathered = 2 * sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in layer.parameters())
    try:
        shape = from_config(config.to_dict(), config.model_type)
    except ConfigError:  # no kind of model whose answers could be counted
        return 0
    return gathered + int(answer_bytes(shape, width, answers, prompt, new))


def _has_room(device: torch.device, needed: int) -> bool:
    try:
        torch.empty(needed if device.type == "cuda" else 0, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        return False
    return True


def prompt_ids(tokenizer: Any, conversation: Conversation) -> list[int]:
    """Tokens of a conversation up to where its answer begins; of plain text all, less the EOS that some add."""
    if conversation.text is not None:
        ids = tokenizer(conversation.text)["input_ids"]
        return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    messages = in_dialect(tokenizer, conversation.messages)
    rendered = tokenizer.apply_chat_template(
        messages, tools=conversation.tools, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return rendered["input_ids"]


def is_askable(tokenizer: Any, prompt: Conversation) -> bool:
    """Whether the chat template takes a conversation without its answer: some refuse one in which no user speaks."""
    try:
        prompt_ids(tokenizer, prompt)
    except Exception:  # the template's raise_exception and Jinja share no base class
        return False
    return True


def _pad_id(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def stop_ids(model: nn.Module, tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those of the model's own configuration."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({*stop_token_ids(tokenizer), *(i for i in configured if i is not None)})


def _generate_batch(
    model: nn.Module, prompts: list[list[int]], stops: list[int], pad_id: int, max_new_tokens: int, in_step: bool
) -> list[list[int]]:
    """New token ids of each prompt, up to and without its first stop token; in_step: with every other rank."""
    longest = max(map(len, prompts))
    device = input_device(model)
    input_ids_BS = torch.tensor([[pad_id] * (longest - len(ids)) + ids for ids in prompts], device=device)
    mask_BS = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
    greedy = _settings(stops, pad_id, max_new_tokens)
    output_BN = causal_lm(model).generate(
        input_ids=input_ids_BS, attention_mask=mask_BS, generation_config=greedy, synced_gpus=in_step
    )
    stop_set = set(stops)
    answers = []
    for ids in output_BN[:, longest:].tolist():
        end = next((at for at, token in enumerate(ids) if token in stop_set), len(ids))
        answers.append(ids[:end])
    return answers


def _settings(stops: list[int], pad_id: int, max_new_tokens: int, temperature: float = 0.0) -> Any:
    from transformers import GenerationConfig

    chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    return GenerationConfig(
        **chosen, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=pad_id, use_cache=True
    )
