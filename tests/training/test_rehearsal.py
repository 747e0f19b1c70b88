"""What the rehearsal itself does beside the run's own steps takes no memory that the plan would have to count."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from loadmaster.training.rehearsal import is_finite


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operation makes."""

    made = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.made = max(self.made, result.nbytes if isinstance(result, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_whether_weights_are_finite_is_seen_without_a_copy_of_them(dtype):
    weights = torch.randn(100, 1000).to(dtype)
    with Largest() as largest:
        assert is_finite(weights)
    assert largest.made <= 4
    assert is_finite(weights[:0]) and is_finite(torch.full((10,), torch.finfo(dtype).max, dtype=dtype))
    for value in (math.nan, math.inf, -math.inf):
        weights[7, 7] = value
        assert not is_finite(weights)
