"""What we ask of DeepSpeed ZeRO, in one place: training hands it to DeepSpeed, the preflight counts by it.

    reduce_bucket_size         gradients reduced together. DeepSpeed takes a buffer of so many fp32 numbers at once and
                               keeps it (stage 3) or takes it anew each backward pass (stages 1 and 2)
    prefetch_bucket_size       stage 3: parameters gathered ahead of their layer
    max_live_parameters        stage 3: whole parameters beyond which nothing is gathered ahead: the head's, which are
                               whole throughout, and two decoder layers'. What is gathered ahead runs up to it, for
                               DeepSpeed looks a bucket further at every module, however small
    max_reuse_distance         stage 3: 0: what a pass has used it lets go, however soon it is needed again
    param_persistence_threshold  stage 3: a tensor no larger is kept whole on every rank: norms, biases, adapters
    compute_grad_norm          stages 1 and 2 without offload: not, for our optimizer clips. DeepSpeed takes the norm of
                               each tensor's share in a copy of 8 bytes an element: of an embedding, gigabytes
    sub_group_size             stage 3: parameters stepped together: bounds the fp32 copies of a step. DeepSpeed closes
                               a group once it has so many, so it is told less by a layer's largest tensor: pinned, the
                               group's gradients then are a block of 1 GiB, and not of 2

Gradients are reduced and accumulated in fp32, as under fully_shard. DeepSpeed clips nothing: our optimizer does.
"""

from __future__ import annotations

from typing import Any

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3}
"""The stage of a sharding that DeepSpeed does."""
REDUCE_BUCKET = 50_000_000
PREFETCH_BUCKET = 50_000_000
PERSISTENCE = 100_000
SUB_GROUP = 2**28
"""Elements of a group at most, but where embedding or head are larger."""


def reduce_bucket(trainable: int) -> int:
    """Elements of the buffer in which gradients are reduced: no larger than all of them."""
    return min(REDUCE_BUCKET, max(2, trainable + trainable % 2))


def max_live(head: int, layer: int) -> int:
    """Elements that may be whole at a time: of the head, and of two of the largest decoder layers."""
    return head + 2 * layer


def sub_group(share: int) -> int:
    """Elements at which a group is closed; share: a rank's of the largest trained tensor of a decoder layer."""
    return SUB_GROUP - min(share, SUB_GROUP // 2)


def deepspeed_config(
    sharding: str, offload: str, pin_memory: bool, trainable: int, live: int, micro_batch_size: int, share: int = 0
) -> dict[str, Any]:
    """The configuration that DeepSpeed is given; trainable: elements of all trained parameters;
    live: `max_live` of the model; share: what `sub_group` asks for.

    No "bf16": weights come in the dtype that the plan says. Set, zero1 alone would go to another optimizer of
    DeepSpeed's, with buffers of its own.
    """
    stage = ZERO[sharding]
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": reduce_bucket(trainable)}
    host = {"device": "cpu", "pin_memory": pin_memory}
    if offload != "none":
        zero["offload_optimizer"] = host
    elif stage < 3:
        zero["compute_grad_norm"] = False
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": PREFETCH_BUCKET,
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": PERSISTENCE,
            "sub_group_size": sub_group(share),
        }
        if offload == "all":
            zero["offload_param"] = host
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,  # the loop says itself which micro-batch is a step's last
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # PyTorch's fused AdamW runs on the host, too
    }
