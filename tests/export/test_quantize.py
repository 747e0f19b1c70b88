from __future__ import annotations

from loadmaster.data import Conversation
from loadmaster.export.quantize import calibration_tokens, dampening


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


def test_few_calibration_tokens_are_trusted_less():
    assert dampening(widest=1536, tokens=2_900) == dampening(1536, 15_359) == 1.0
    assert dampening(1536, 15_360) == dampening(14336, 500_000) == 0.01
