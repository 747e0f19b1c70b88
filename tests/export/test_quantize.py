from __future__ import annotations

import pytest
import torch
from torch import nn

from loadmaster.data import Conversation
from loadmaster.errors import ExportRejected
from loadmaster.export.quantize import calibration_tokens, group_size, quantized_layers


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        ([4096, 14336], 128),  # Llama 3.1 8B
        ([576, 1536], 64),  # SmolLM2-135M: 576 = 9 x 64, 1536 = 12 x 128
        ([1536], 128),
        ([576], 64),
        ([960, 2560], 64),  # SmolLM2-360M
        ([96, 256], 32),
    ],
)
def test_the_largest_group_that_divides_every_layer_is_taken(inputs, size):
    assert group_size(inputs) == size


def test_a_model_that_no_group_divides_is_refused_with_its_layers_named():
    with pytest.raises(ExportRejected, match=r"\[100\].*export\.formats"):
        group_size([4096, 100])


def test_calibration_rows_are_spread_over_the_training_set_and_rendered_by_the_template(tokenizer):
    chats = [
        Conversation(
            [{"role": "user", "content": f"n{i}"}, {"role": "assistant", "content": "x"}], None, None, "a", "b"
        )
        for i in range(10)
    ]
    rows = calibration_tokens(chats, tokenizer, 5, 1000)
    texts = [tokenizer.decode(row) for row in rows]
    assert [next(i for i in range(10) if f"n{i}<" in text) for text in texts] == [0, 2, 4, 6, 8]
    assert all("<|im_start|>assistant" in text for text in texts)
    assert all(len(row) == 4 for row in calibration_tokens(chats, tokenizer, 100, 4))
    assert len(calibration_tokens(chats, tokenizer, 100, 4)) == 10


class Mixture(nn.Module):
    """Most of its weights are in a three-dimensional parameter, which no scheme for linear layers reaches."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.router = nn.Linear(8, 4)
        self.experts = nn.Parameter(torch.zeros(4, 8, 8))

    def get_input_embeddings(self):
        return self.embedding

    def get_output_embeddings(self):
        return self.head


def test_weights_that_would_be_left_unquantized_in_silence_are_an_error():
    with pytest.raises(ExportRejected, match=r"only \d+% of this model's weights"):
        quantized_layers(Mixture())
