import pytest
import torch
from torch import nn

from loadmaster.config.schema import OptimizerConfig
from loadmaster.training import optimizer as optimizer_module
from loadmaster.training import rounding
from loadmaster.training.optimizer import TrainingOptimizer

NAMES = ["adamw", "adamw_bf16", "adamw_8bit", "paged_adamw_8bit", "adafactor"]


def parameters(dtype=torch.bfloat16) -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    return [
        ("big", nn.Parameter(torch.randn(128, 64, dtype=dtype))),
        ("norm", nn.Parameter(torch.ones(64, dtype=dtype))),
    ]


def step(optimizer: TrainingOptimizer, seed: int, lr: float = 1e-3) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in optimizer.parameters:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
    optimizer.step(lr)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_state_taken_and_loaded_continues_bit_for_bit(name, masters, dtype):
    if name == "adamw_bf16" and masters:
        dtype = torch.bfloat16  # stochastic rounding is for bf16 moments
    first = TrainingOptimizer(parameters(dtype), OptimizerConfig(weight_decay=0.1), name, masters)
    for seed in range(3):
        step(first, seed)
    tensors, scalars = first.state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    named = parameters(dtype)
    for (_, copy), original in zip(named, first.parameters, strict=True):
        copy.data.copy_(original.data)
    second = TrainingOptimizer(named, OptimizerConfig(weight_decay=0.1), name, masters)
    second.load_state([*tensors.items(), *scalars.items()])
    for optimizer in (first, second):
        step(optimizer, 9)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masters", [False, True])
def test_a_weight_that_had_no_gradient_in_some_steps_continues_bit_for_bit(name, masters):
    """Of an expert that nothing was sent to. In such a step it stays what it is."""

    def skip(optimizer: TrainingOptimizer, seed: int, absent: int) -> None:
        here = [p for index, p in enumerate(optimizer.parameters) if index != absent]
        for p in here:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.dtype)
        before = optimizer.parameters[absent].detach().clone()
        optimizer.step(1e-3)
        assert torch.equal(before, optimizer.parameters[absent])

    named, copies = ([(f"experts.{n}", nn.Parameter(parameters()[0][1].detach())) for n in range(2)] for _ in range(2))
    first = TrainingOptimizer(named, OptimizerConfig(), name, masters)
    for seed, absent in enumerate((0, 1, 1)):
        skip(first, seed, absent)
    tensors, scalars = first.state()
    tensors = {k: v.clone() for k, v in tensors.items()}
    for (_, copy), (_, original) in zip(copies, named, strict=True):
        copy.data.copy_(original.data)
    second = TrainingOptimizer(copies, OptimizerConfig(), name, masters)
    second.load_state([*tensors.items(), *scalars.items()])
    for optimizer in (first, second):
        skip(optimizer, 9, 0)
        step(optimizer, 10)
    assert all(map(torch.equal, first.parameters, second.parameters))


def test_master_weights_keep_updates_that_bf16_would_lose():
    named = [("w", nn.Parameter(torch.ones(256, 4, dtype=torch.bfloat16)))]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), "adamw", master_weights=True)
    for _ in range(40):
        named[0][1].grad = torch.ones_like(named[0][1])
        optimizer.step(1e-4)  # below half of bf16's spacing at 1.0 (2**-8): alone it rounds away
    assert named[0][1].float().max() < 1.0
    torch.testing.assert_close(optimizer.buckets[0].targets[0], torch.full((256, 4), 1 - 40e-4), rtol=1e-4, atol=0)


def test_moments_of_adamw_are_fp32_also_over_bf16_weights():
    optimizer = TrainingOptimizer(parameters(), OptimizerConfig(), "adamw", master_weights=False)
    step(optimizer, 0)
    moments = [t for k, t in optimizer.state()[0].items() if t.shape in [(128, 64), (64,)]]
    assert len(moments) == 4 and {t.dtype for t in moments} == {torch.float32}


def test_clipping_scales_to_the_norm_and_reports_the_one_before():
    named = parameters(torch.float32)
    optimizer = TrainingOptimizer(named, OptimizerConfig(), "adamw", False)
    for _, p in named:
        p.grad = torch.full_like(p, 2.0)
    expected = 2.0 * sum(p.numel() for _, p in named) ** 0.5
    assert optimizer.clip(1.0).item() == pytest.approx(expected, rel=1e-6)
    assert torch.stack([p.grad.norm() for _, p in named]).norm().item() == pytest.approx(1.0, rel=1e-4)
    scaled = [p.grad.clone() for _, p in named]
    for limit in (0, 100.0):  # no limit, and one that they are within
        assert optimizer.clip(limit).item() == pytest.approx(1.0, rel=1e-4)
        assert all(torch.equal(p.grad, gradient) for (_, p), gradient in zip(named, scaled, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bitsandbytes_steps_as_by_its_own_step_and_waits_for_nothing(dtype, monkeypatch):
    def stepped() -> list[torch.Tensor]:
        optimizer = TrainingOptimizer(parameters(dtype), OptimizerConfig(weight_decay=0.1), "adamw_8bit", True)
        for seed in range(3):
            step(optimizer, seed)
        return [*optimizer.parameters, *optimizer.state()[0].values()]

    with monkeypatch.context() as patched:
        patched.setattr(optimizer_module, "_update", lambda optimizer: optimizer.step())
        expected = stepped()
    monkeypatch.setattr("bitsandbytes.optim.optimizer.sync_gpu", lambda _: pytest.fail("the GPU was waited for"))
    assert all(map(torch.equal, stepped(), expected))


@pytest.mark.parametrize("name", NAMES)
def test_reset_makes_the_optimizer_as_new(name):
    named = parameters()
    start = [p.detach().clone() for _, p in named]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), name, name == "adamw")
    step(optimizer, 0)
    for (_, p), original in zip(named, start, strict=True):
        p.data.copy_(original)
    optimizer.reset()
    fresh = TrainingOptimizer(parameters(), OptimizerConfig(), name, name == "adamw")
    for each in (optimizer, fresh):
        for seed in (1, 2):  # the second is the first that reads its moments
            step(each, seed)
    assert all(torch.equal(a, b) for a, b in zip(optimizer.parameters, fresh.parameters, strict=True))


def test_paged_states_stay_in_the_memory_that_they_have():
    optimizer = TrainingOptimizer(parameters(), OptimizerConfig(), "paged_adamw_8bit", False)
    step(optimizer, 0)
    tensors, scalars = optimizer.state()
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    optimizer.reset()
    assert not any(tensor.any() for name, tensor in tensors.items() if "qmap" not in name)
    optimizer.load_state([*saved.items(), *scalars.items()])
    again, numbers = optimizer.state()
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == places and numbers == scalars
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())


def test_several_buckets_update_like_one(monkeypatch):
    one = TrainingOptimizer(parameters(), OptimizerConfig(), "adamw", True)
    monkeypatch.setattr(optimizer_module, "BUCKET_ELEMENTS", 100)
    several = TrainingOptimizer(parameters(), OptimizerConfig(), "adamw", True)
    assert (len(one.buckets), len(several.buckets)) == (1, 2)
    step(one, 3)
    step(several, 3)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters, several.parameters, strict=True))


def test_offloaded_states_step_copies_that_the_parameters_are_written_from():
    here, there = (
        TrainingOptimizer(parameters(torch.float32), OptimizerConfig(), "adamw", False, offload=offload)
        for offload in (False, True)
    )
    for optimizer in (here, there):
        step(optimizer, 0)
        step(optimizer, 1)
    assert all(map(torch.equal, here.parameters, there.parameters))
    for mine, target in zip(there.parameters, there.buckets[0].targets, strict=True):
        assert torch.equal(mine, target) and mine.data_ptr() != target.data_ptr()


@pytest.mark.parametrize("name", NAMES[:-1])
def test_betas_and_eps_are_the_jobs(name):
    """Of a weight as small as this bitsandbytes keeps its moments in fp32."""
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8)) for _ in range(2))
    config = OptimizerConfig(beta1=0.5, beta2=0.7, eps=0.1, weight_decay=0.0)
    optimizer = TrainingOptimizer([("w", mine)], config, name, master_weights=False)
    adamw = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.5, 0.7), eps=0.1, weight_decay=0.0)
    for seed in range(3):
        step(optimizer, seed, lr=1e-2)
        theirs.grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(seed))
        adamw.step()
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_weight_decay_leaves_norms_and_biases_out():
    named = parameters(torch.float32)
    optimizer = TrainingOptimizer(named, OptimizerConfig(weight_decay=0.5), "adamw", False)
    before = [p.detach().clone() for _, p in named]
    for _, p in named:
        p.grad = torch.zeros_like(p)
    optimizer.step(0.1)
    torch.testing.assert_close(named[0][1].data, before[0] * (1 - 0.05))
    assert torch.equal(named[1][1].data, before[1])


def test_bf16_moments_follow_gradients_that_become_smaller():
    """Against second moments by the definition, in float64: rounded to the nearest they would fall no more."""
    optimizer = TrainingOptimizer(parameters(), OptimizerConfig(beta2=0.999), "adamw_bf16", master_weights=False)
    big = optimizer.parameters[0]
    square = torch.zeros(big.shape, dtype=torch.float64)
    for seed in range(1200):
        size = 1.0 if seed < 50 else 0.01
        big.grad = (size * torch.randn(big.shape, generator=torch.Generator().manual_seed(seed))).to(torch.bfloat16)
        square.lerp_(big.grad.double().square(), 0.001)
        optimizer.step(1e-6)
    tensors, _ = optimizer.state()
    assert tensors["big/exp_avg_sq"].dtype == torch.bfloat16
    assert tensors["big/exp_avg_sq"].double().mean().item() == pytest.approx(square.mean().item(), rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "masters", "moments"),
    [
        (torch.bfloat16, False, torch.bfloat16),
        (torch.bfloat16, True, torch.bfloat16),
        (torch.float32, False, torch.float32),
    ],
)
def test_adamw_bf16_steps_as_adamw_does(dtype, masters, moments):
    """In the mean over many weights: each by itself is rounded at random."""
    steps, config = 40, OptimizerConfig(weight_decay=0.1)
    named = [("w", nn.Parameter(torch.ones(512, 64, dtype=dtype)))]
    optimizer = TrainingOptimizer(named, config, "adamw_bf16", masters)
    exact = nn.Parameter(torch.ones(512, 64, dtype=torch.float64))
    reference = torch.optim.AdamW([exact], lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    for seed in range(steps):
        gradient = 1 + torch.randn(512, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
        named[0][1].grad, exact.grad = gradient, gradient.double()
        optimizer.step(1e-4)
        reference.step()
    states, _ = optimizer.state()
    held = states["w/master"] if masters else named[0][1]
    assert held.double().mean().item() == pytest.approx(exact.mean().item(), abs=5e-5)
    assert states["w/exp_avg"].dtype == states["w/exp_avg_sq"].dtype == moments


@pytest.mark.parametrize("name", NAMES)
def test_ranks_with_the_same_weights_round_them_alike_and_draw_on_as_before(name):
    """Each rank's generators are its own, for dropout."""
    held, drawn = [], []
    for rank in range(2):
        optimizer = TrainingOptimizer(parameters(), OptimizerConfig(), name, master_weights=False)
        torch.manual_seed(rank)
        before = torch.get_rng_state()
        for seed in range(3):
            for parameter in optimizer.parameters:
                numbers = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
                parameter.grad = numbers.to(parameter.dtype)
            optimizer.step(1e-3)
        assert torch.equal(before, torch.get_rng_state())
        tensors, _ = optimizer.state()
        held.append([p.detach().clone() for p in optimizer.parameters] + list(tensors.values()))
        drawn.append(torch.rand(4))
    assert held[0][0].dtype == torch.bfloat16
    assert all(map(torch.equal, *held)) and not torch.equal(*drawn)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bucket", [64 * 64, 2**28])
def test_each_parameter_and_each_step_is_rounded_in_its_own_way(name, bucket, monkeypatch):
    """Layers that were rounded by the same draws would be wrong in the same direction, and their errors add up."""
    monkeypatch.setattr(optimizer_module, "BUCKET_ELEMENTS", bucket)
    named = [(name, nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))) for name in "ab"]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), name, master_weights=False)
    steps = []
    for _ in range(2):
        before = [p.detach().clone() for p in optimizer.parameters]
        for parameter in optimizer.parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)
        moved = [(a != b) for a, b in zip(before, optimizer.parameters, strict=True)]
        assert 0.1 < moved[0].float().mean() < 0.4 and not torch.equal(*moved)  # a quarter of a step of bf16
        steps.append(moved[0])
    assert len(optimizer.buckets) == (2 if bucket == 64 * 64 else 1) and not torch.equal(*steps)


@pytest.mark.parametrize("masters", [True, False])
def test_second_moments_are_rounded_by_other_draws_than_their_weights(masters):
    """All elements are alike, so that what is drawn alone says which goes up."""
    named = [("w", nn.Parameter(torch.ones(256, 256, dtype=torch.bfloat16)))]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), "adamw_bf16", masters)
    named[0][1].grad = torch.full_like(named[0][1], 1.03)
    optimizer.step(1e-3)
    rounded = torch.stack([named[0][1].detach().view(-1), optimizer.state()[0]["w/exp_avg_sq"].view(-1)]).double()
    assert all(len(values.unique()) == 2 for values in rounded)
    assert abs(torch.corrcoef(rounded)[0, 1]) < 0.02


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_go_where_float32_ones_go(name, masters):
    """In the mean, where each update is a fortieth of their spacing. Masters move, but to the nearest the model would
    not before they went half of it."""
    ends = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = nn.Parameter(torch.ones(512, 64, dtype=dtype))
        optimizer = TrainingOptimizer([("w", weight)], OptimizerConfig(weight_decay=0.1), name, masters)
        for seed in range(40):
            gradient = 1 + torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))
            weight.grad = gradient.bfloat16().to(dtype)
            optimizer.step(1e-4)
        ends.append(weight.detach().double().mean().item())
    assert ends[0] < 1 - 30e-4  # to the nearest they would all be 1 still
    assert ends[1] == pytest.approx(ends[0], abs=5e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "adamw_bf16"])
def test_a_parameter_is_stepped_in_parts_as_in_one(name, monkeypatch):
    def stepped() -> list[torch.Tensor]:
        optimizer = TrainingOptimizer(parameters(), OptimizerConfig(weight_decay=0.1), name, master_weights=False)
        for seed in range(3):
            step(optimizer, seed)
        return optimizer.parameters, [t for k, t in optimizer.state()[0].items() if "qmap" not in k]

    weights, states = stepped()
    monkeypatch.setattr(rounding, "PIECE", 1024)
    others, same = stepped()
    assert len(states) > 2 and all(map(torch.equal, states, same))
    for one, other in zip(weights, others, strict=True):  # each was rounded three times, in parts by other draws
        torch.testing.assert_close(one, other, rtol=3 * 2**-7, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_float32_beside_bf16_is_not_rounded(name):
    """DoRA's magnitudes."""
    ends = []
    for first in (torch.bfloat16, torch.float32):
        named = parameters(first)
        named[1] = ("norm", nn.Parameter(torch.ones(64)))
        optimizer = TrainingOptimizer(named, OptimizerConfig(), name, master_weights=False)
        for seed in range(3):
            step(optimizer, seed, lr=1e-5)
        ends.append(named[1][1].detach())
    assert len(ends[0].unique()) > 8
    assert torch.allclose(*ends, rtol=0, atol=1e-7 if name != "adamw_bf16" else 1e-5)


def test_adafactor_that_ran_out_of_memory_in_a_step_steps_again(monkeypatch):
    """As a rehearsal does, of which the second try keeps fewer activations (in the backward pass they are there)."""
    from transformers.optimization import Adafactor

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    ends = []
    for fails in (True, False):
        optimizer = TrainingOptimizer(parameters(), OptimizerConfig(weight_decay=0.1), "adafactor", False)
        if fails:
            with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
                patched.setattr(Adafactor, "_rms", full)
                step(optimizer, 0)
            optimizer.reset()
        step(optimizer, 0)
        ends.append([p.detach().clone() for p in optimizer.parameters])
        assert len(optimizer.buckets[0].optimizer.state) == 2
    assert all(map(torch.equal, *ends))


def test_rounding_takes_either_neighbour_so_that_the_mean_is_right():
    wide = torch.tensor([1.0, 1.0 + 2**-10, -3.001, 1e-30, 0.0, torch.inf]).repeat(2**16, 1)
    found = rounding.rounded(wide, rounding.seed(1, 2, 3))
    assert torch.equal(found, found.bfloat16().float())
    near = wide[0].bfloat16().float()
    assert ((found - wide).abs() <= near.abs() * 2**-7).logical_or(found == wide).all()
    assert torch.allclose(found[:, :5].double().mean(0), wide[0, :5].double(), rtol=5e-5, atol=0)
    assert all(len(column.unique()) == (2 if number in (1, 2, 3) else 1) for number, column in enumerate(found.T))


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "adafactor"])
def test_adapters_are_their_masters_to_the_nearest_and_other_weights_at_random(name):
    named = [("layers.0.q_proj.lora_A.default.weight", parameters()[0][1]), ("embed_tokens.weight", parameters()[0][1])]
    optimizer = TrainingOptimizer(named, OptimizerConfig(), name, master_weights=True)
    step(optimizer, 0, lr=1e-3)
    (adapter, table), (of_adapter, of_table) = optimizer.parameters, optimizer.buckets[0].targets
    assert torch.equal(adapter, of_adapter.bfloat16()) and not torch.equal(table, of_table.bfloat16())
    assert ((table - of_table).abs() <= of_table.abs() * 2**-7).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("masters", [True, False])
def test_a_weight_whose_rows_do_not_lie_together_is_stepped_as_one_whose_do(name, masters):
    ends = []
    for lie in (lambda weight: weight, lambda weight: weight.T.contiguous().T):
        named = [("w", nn.Parameter(lie(parameters()[0][1].detach())))]
        optimizer = TrainingOptimizer(named, OptimizerConfig(), name, masters)
        step(optimizer, 0)
        ends.append(named[0][1].detach())
    assert torch.equal(*ends)
