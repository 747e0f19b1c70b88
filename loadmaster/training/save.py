"""The trained weights as files that everybody reads: gathered tensor by tensor, and compared with what was trained.

Sharded, a tensor is whole on each rank's host only while it is passed on: the lead keeps those of one file, at most
FILE_BYTES, and writes it. Every rank then reads back its own part of every tensor and compares it bit for bit.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from loadmaster.errors import TrainingFailed
from loadmaster.models.adapters import trainable
from loadmaster.models.buffers import stored_buffers
from loadmaster.models.dropout import as_loaded
from loadmaster.models.forward import causal_lm
from loadmaster.models.shards import Checkpoint, saved_name
from loadmaster.preflight.trained import in_groups
from loadmaster.training.placement import Placed
from loadmaster.training.world import World

FILE_BYTES = 4 * 2**30


def write_trained(model: nn.Module, folder: Path, placed: Placed, world: World, tokenizer: Any | None = None) -> None:
    """Write adapter or model into `folder`, which is there, and compare. All ranks call it.

    tokenizer: goes beside a whole model. Raises TrainingFailed when a file does not hold what was trained.
    """
    adapter = hasattr(model, "peft_config")
    with as_loaded(model):
        _write(model, folder, placed, world, tokenizer)
    world.barrier()
    mine = _different(model, folder, placed, strict=placed.sharded or adapter)
    different = [name for part in world.gather(mine) for name in part]
    if different:
        raise TrainingFailed(
            f"{folder.name.strip('.')} does not hold what was trained: {', '.join(sorted(set(different))[:3])} differ; "
            "nothing was published, and the last checkpoint is whole"
        )


def _write(model: nn.Module, folder: Path, placed: Placed, world: World, tokenizer: Any | None) -> None:
    adapter, sharded = hasattr(model, "peft_config"), placed.sharded
    if not sharded and world.lead:
        model.save_pretrained(str(folder))  # an adapter in peft's layout, a whole model in transformers'
    elif sharded and adapter:
        gathered = {name: placed.whole(parameter) for name, parameter in trainable(model)}
        first = {parameter: name for name, parameter in trainable(model)}
        shared = model.named_parameters(remove_duplicate=False)  # a tied head's copy is its embedding's
        gathered |= {name: gathered[first[parameter]] for name, parameter in shared if parameter in first}
        if world.lead:
            model.save_pretrained(str(folder), state_dict=gathered)
    elif sharded:
        _write_model(model, folder, placed, world)
    if world.lead and adapter:
        (folder / "README.md").unlink(missing_ok=True)  # peft's model card, which says nothing
    if world.lead and tokenizer is not None and not adapter:
        tokenizer.save_pretrained(folder)


def _write_model(model: nn.Module, folder: Path, placed: Placed, world: World) -> None:
    lm = causal_lm(model)
    parameters = {**dict(lm.named_parameters()), **stored_buffers(lm)}
    sizes = {name: placed.shape(p).numel() * p.element_size() for name, p in parameters.items()}
    files = in_groups(parameters, sizes.__getitem__, FILE_BYTES)
    where = {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else "model.safetensors"
        tensors = {}
        for name in names:
            whole = placed.whole(parameters[name])
            if world.lead:
                stored = revert_weight_conversion(lm, {name: whole})  # an expert each, as transformers writes them
                tensors |= {key: tensor.contiguous() for key, tensor in stored.items()}
        if world.lead:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    if world.lead:
        lm.config.architectures, lm.config.dtype = [type(lm).__name__], next(iter(parameters.values())).dtype
        lm.config.save_pretrained(folder)
        if lm.can_generate():
            lm.generation_config.save_pretrained(folder)
        if len(files) > 1:
            index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _different(model: nn.Module, folder: Path, placed: Placed, strict: bool) -> list[str]:
    """Trained parameters of which this rank's part is not in the files. strict: a name that is not there is different.

    (Of a model that is not sharded transformers writes the files, under names of its own in some families.)
    """
    written, found = Checkpoint(folder), []
    compared = 0
    for name, parameter in trainable(model):
        saved = saved_name(name) if hasattr(model, "peft_config") else name
        if saved not in written:
            found += [name] if strict else []
            continue
        compared += 1
        if not placed.holds(parameter, partial(written.rows, saved)):
            found.append(name)
    return found if compared else [*found, "every tensor"]
