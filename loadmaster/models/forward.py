"""From a packed micro-batch to summed losses or logits at the trained positions.

Both loss and logits come from the same hidden states, computed with documents kept apart; training,
evaluation and the verification of exports all go through here, so they cannot disagree about what a
trained token is: one whose label is not -100 and which has a token of its own document before it.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import pad

from loadmaster.data.rows import NO_LOSS
from loadmaster.errors import LoadmasterError
from loadmaster.models import capped
from loadmaster.models.loss import summed_cross_entropy, through_head
from loadmaster.models.rotary import turn_by_document
from loadmaster.models.transfer import put


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal language model inside adapters or wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def input_device(model: nn.Module) -> torch.device:
    """Where the embedding looks tokens up. Shards of it may live in host memory, and are gathered on their mesh."""
    # Not `.weight`: under zero3 DeepSpeed takes a module that reads it for its user, and keeps it whole for that long.
    weight = next(causal_lm(model).get_input_embeddings().parameters())
    if isinstance(weight, DTensor) and weight.device.type == "cpu":
        return torch.device(weight.device_mesh.device_type)
    return weight.device


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Its decoder layers, in order. Raises LoadmasterError for a model that has no list of them."""
    layers = getattr(causal_lm(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not layers:
        raise LoadmasterError(
            "this model has no list of decoder layers to shard, compile or checkpoint by; use sharding=ddp, "
            "compile=false and activation_checkpointing=none"
        )
    return list(layers)


def document_bounds(position_ids_BS: Tensor) -> list[int]:
    """Where documents begin in the flattened batch, and its end: [0, ..., B * S]. Host tensors only."""
    flat = position_ids_BS.reshape(-1)
    return [*torch.nonzero(flat == 0).squeeze(-1).tolist(), flat.numel()]


def shifted_targets(labels_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
    """Target of each flattened position [B * S]: the next token's label inside the same document, else -100."""
    labels, positions = labels_BS.reshape(-1), position_ids_BS.reshape(-1)
    targets = torch.full_like(labels, NO_LOSS)
    targets[:-1] = torch.where(positions[1:] == 0, NO_LOSS, labels[1:])
    return targets


def count_trained(labels_BS: Tensor, position_ids_BS: Tensor) -> int:
    return int((shifted_targets(labels_BS, position_ids_BS) != NO_LOSS).sum())


def logit_transform(config: Any) -> tuple[float | None, float]:
    """(soft cap, factor) that the model family applies to its logits."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    return getattr(text, "final_logit_softcapping", None), scale / (getattr(text, "logits_scaling", None) or 1.0)


def trained_hidden(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [T, h] that predict trained tokens, those tokens [T], and (on the host) their documents [T]."""
    lm = causal_lm(model)
    device = input_device(lm)
    bounds = document_bounds(batch.position_ids)
    targets = shifted_targets(batch.labels, batch.position_ids)
    trained = torch.nonzero(targets != NO_LOSS).squeeze(-1)
    documents = torch.bucketize(trained, torch.tensor(bounds[1:-1]), right=True)

    ids, positions = batch.input_ids.reshape(1, -1), batch.position_ids.reshape(1, -1)
    if capped.runs_fused(lm.config, device) and (extra := -bounds[-1] % capped.BLOCK):
        ids = pad(ids, (0, extra))  # a document of padding makes the last block whole
        positions = torch.cat([positions, torch.arange(extra)[None]], dim=1)
        bounds = [*bounds, bounds[-1] + extra]
    cu_seq_lens = put(torch.tensor(bounds, dtype=torch.int32), device)
    longest = torch.empty(max(2, *(end - start for start, end in itertools.pairwise(bounds))), 0, device=device)
    for varies in (cu_seq_lens, longest):  # from batch to batch, and compiled layers are not compiled anew for it
        torch._dynamo.mark_dynamic(varies, 0)
    ids = put(ids, device)
    alpha = getattr(lm, "neftune_alpha", 0.0) if lm.training else 0.0
    text = {"inputs_embeds": noisy(lm.get_input_embeddings()(ids), bounds, alpha)} if alpha else {"input_ids": ids}
    turn_by_document(lm.get_decoder())
    keep_no_keys(lm.get_decoder())
    hidden = lm.get_decoder()(
        **text,
        position_ids=put(positions, device),
        use_cache=False,
        cu_seq_lens_q=cu_seq_lens,
        cu_seq_lens_k=cu_seq_lens,
        longest_document=longest,
        **capped.fused_inputs(lm.config, bounds, device),
    ).last_hidden_state[0]
    trained = put(trained, device)
    return hidden.index_select(0, trained), put(targets, device).index_select(0, trained), documents


def keep_no_keys(decoder: nn.Module) -> None:
    """Let Gemma 4's layers not hand their keys and values on where no layer shares them: they would stay with the
    arguments of every checkpointed layer, for as long as one of them is to be run again."""
    attentions = [getattr(layer, "self_attn", None) for layer in getattr(decoder, "layers", ())]
    if not any(getattr(attention, "is_kv_shared_layer", False) for attention in attentions):
        for attention in attentions:
            if getattr(attention, "store_full_length_kv", False):
                attention.store_full_length_kv = False


def noisy(embedded_NH: Tensor, bounds: list[int], alpha: float) -> Tensor:
    """NEFTune: embeddings [1, N, h] plus uniform noise of up to alpha / sqrt(L h), L the tokens of the document.

    (Jain et al. 2023, arXiv 2310.05914.)
    """
    lengths = torch.tensor([end - start for start, end in itertools.pairwise(bounds)])
    largest = (alpha / (lengths * embedded_NH.shape[-1]).sqrt()).repeat_interleave(lengths)
    noise = torch.empty_like(embedded_NH).uniform_(-1, 1)
    return embedded_NH + noise * put(largest, noise.device)[None, :, None].to(noise.dtype)


def token_losses(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
    """(sum of the trained tokens' cross-entropies, fp32 scalar; how many they are).

    batch: a MicroBatch with input_ids, labels, position_ids, each int64 [B, S] on the host.
    """
    hidden, targets, _ = trained_hidden(model, batch)
    lm = causal_lm(model)
    transform = logit_transform(lm.config)
    return through_head(lm.get_output_embeddings(), summed_cross_entropy, hidden, targets, *transform), len(targets)


def trained_logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """(logits [T, V] in fp32 at the positions that predict trained tokens, those tokens [T])."""
    hidden, targets, _ = trained_hidden(model, batch)
    return logits_of(model, hidden), targets


def logits_of(model: nn.Module, hidden_TH: Tensor) -> Tensor:
    """Logits [T, V] in fp32 of last hidden states [T, h]."""
    lm = causal_lm(model)
    softcap, scale = logit_transform(lm.config)
    logits = lm.get_output_embeddings()(hidden_TH).float() * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class SummedLoss(nn.Module):
    """A model whose forward is `token_losses`: what DistributedDataParallel can wrap."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def forward(self, batch: Any) -> Tensor:
        return token_losses(self.module, batch)[0]
