"""Optimizer states in blocks, saved by some shards and gone on with by others."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from loadmaster.config.schema import OptimizerConfig
from loadmaster.training.optimizer import TrainingOptimizer
from loadmaster.training.relayout import OldLayout

ROWS, COLUMNS = 96, 256


def trained(parts: int, name: str, steps: int = 3) -> list[TrainingOptimizer]:
    """An optimizer for each part of a matrix of ROWS x COLUMNS, cut by rows, after some steps on the same gradients."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))
    cut = [nn.Parameter(part.clone()) for part in weight.chunk(parts)]
    made = [TrainingOptimizer([("w", part)], OptimizerConfig(), name, False) for part in cut]
    for seed in range(steps):
        step(made, seed)
    return made


def step(optimizers: list[TrainingOptimizer], seed: int) -> None:
    gradient = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed + 1))
    for optimizer, part in zip(optimizers, gradient.chunk(len(optimizers)), strict=True):
        optimizer.parameters[0].grad = part.clone()
        optimizer.step(1e-2)


def moved(old: list[TrainingOptimizer], parts: int, name: str, folder) -> list[TrainingOptimizer]:
    """The same run cut into other parts: weights are cut anew, states come through files."""
    for index, optimizer in enumerate(old):
        states = {f"opaque/{index}-of-{len(old)}/{key}": value for key, value in optimizer.state()[0].items()}
        states = {key: value.contiguous() for key, value in states.items() if value.dim()}
        save_file(states, folder / f"{index}.safetensors")
    layout = OldLayout(folder)
    assert layout.shards == len(old)
    weight = torch.cat([optimizer.parameters[0].detach() for optimizer in old])
    new = [
        TrainingOptimizer([("w", nn.Parameter(part.clone()))], OptimizerConfig(), name, False)
        for part in weight.chunk(parts)
    ]
    first = 0
    for optimizer in new:
        rows = optimizer.parameters[0].shape[0]
        optimizer.reset()
        optimizer.adopt("w", layout.states("w", torch.Size([ROWS, COLUMNS]), first, first + rows))
        tensors, scalars = old[0].state()
        for path, value in [*scalars.items(), *((k, v) for k, v in tensors.items() if not v.dim())]:
            optimizer.buckets[0].optimizer.state[optimizer.buckets[0].targets[0]][path.split("/")[1]] = value
        first += rows
    return new


def weights(optimizers: list[TrainingOptimizer]) -> torch.Tensor:
    return torch.cat([optimizer.parameters[0].detach() for optimizer in optimizers])


@pytest.mark.parametrize("before, after", [(4, 1), (4, 2), (1, 4), (2, 8)])
def test_8_bit_moments_of_whole_blocks_are_the_same_numbers_however_they_are_cut(before, after, tmp_path):
    """Parts of 6,144 elements and more are in 8 bits, of 3,072 in fp32, which then round no more; rows are a block."""
    old = trained(before, "adamw_8bit")
    new = moved(old, after, "adamw_8bit", tmp_path)
    for seed in (7, 8):
        step(old, seed)
        step(new, seed)
    if after == 8:
        torch.testing.assert_close(weights(new), weights(old), rtol=0, atol=2e-3)
    else:
        assert torch.equal(weights(new), weights(old))


def test_blocks_that_are_cut_are_rounded_once_more_and_no_further(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.training.test_relayout.COLUMNS", 250)  # a row is no whole block
    old = trained(4, "adamw_8bit")
    new = moved(old, 3, "adamw_8bit", tmp_path)
    step(old, 7)
    step(new, 7)
    torch.testing.assert_close(weights(new), weights(old), rtol=0, atol=2e-3)


@pytest.mark.parametrize("before, after", [(4, 1), (4, 2), (1, 4)])
def test_adafactor_goes_on_with_the_rows_own_means_and_the_columns_averaged(before, after, tmp_path):
    old = trained(before, "adafactor")
    new = moved(old, after, "adafactor", tmp_path)

    def states(optimizers, key):
        return [o.buckets[0].optimizer.state[o.buckets[0].targets[0]][key] for o in optimizers]

    assert torch.equal(torch.cat(states(new, "exp_avg_sq_row")), torch.cat(states(old, "exp_avg_sq_row")))
    mean = torch.stack(states(old, "exp_avg_sq_col")).mean(0)
    torch.testing.assert_close(torch.stack(states(new, "exp_avg_sq_col")).mean(0), mean)
    step(new, 7)
    assert torch.isfinite(weights(new)).all()
