"""The figures of a served model, and the judgement."""

import copy

import pytest

from loadmaster.export.served.client import Served
from loadmaster.export.served.compare import LIMITS, answer_figures, failures, log_probability_figures
from loadmaster.export.tuned import tuned_share

STOP = 2
DOCUMENTS = [
    {"trained": [-0.1, -0.2], "base": [-2.1, -1.2], "top": [5, 6]},
    {"trained": [-0.3], "base": [-3.3], "top": [7]},
]
FIGURES = {
    "models": ["smoke"], "rendering": {"cases": 4, "different": []}, "difference": 0.002, "from_disk": 0.002,
    "rounding": 0.0, "top1_agreement": 0.99, "fine_tune": 1.7, "tuned_share": 1.0, "answers": 8, "first_token": 1.0,
    "equal_answers": 1.0, "ended": [8, 8], "overrun": 0, "stops_at": {"2": True},
}


def served(log_p):
    return [(log_p[:2], [5, 6]), (log_p[2:], [7])]


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0, 2.0])
def test_the_tuned_share_is_how_much_of_the_fine_tune_is_served(share):
    trained, base = [-0.1, -0.2, -0.3], [-2.1, -1.2, -3.3]
    mixed = [b + share * (t - b) for t, b in zip(trained, base, strict=True)]
    figures = log_probability_figures(DOCUMENTS, served(mixed))
    assert figures["tuned_share"] == pytest.approx(share)
    assert figures["difference"] == pytest.approx(abs(1 - share) * 2.0)
    assert (figures["tokens"], figures["top1_agreement"]) == (3, 1.0)


def test_the_difference_from_disk_is_from_the_export_itself_where_that_is_not_the_trained_model():
    documents = [{**d, "exports": {"int4": [value - 0.5 for value in d["trained"]]}} for d in DOCUMENTS]
    as_on_disk = served([-0.6, -0.7, -0.8])
    figures = log_probability_figures(documents, as_on_disk, "int4")
    assert (figures["difference"], figures["from_disk"]) == (pytest.approx(0.5), pytest.approx(0.0))
    assert log_probability_figures(documents, as_on_disk, "bf16")["from_disk"] == pytest.approx(0.5)


def test_rounding_is_how_far_the_export_is_from_itself_with_its_activations_rounded():
    documents = [
        {**d, "exports": {"fp8": d["trained"]}, "rounded": {"fp8": [v - 0.2 for v in d["trained"]]}} for d in DOCUMENTS
    ]
    rounded_the_other_way = served([0.1, 0.0, -0.1])
    figures = log_probability_figures(documents, rounded_the_other_way, "fp8")
    assert (figures["from_disk"], figures["rounding"]) == (pytest.approx(0.2), pytest.approx(0.2))
    assert log_probability_figures(documents, rounded_the_other_way, "bf16")["rounding"] == 0.0


@pytest.mark.parametrize(
    ("from_disk", "rounding", "accepted"),
    [
        (0.1145, 0.1531, True),   # rounded by scales in float32, and by ours in bf16
        (0.0325, 0.1531, True),   # not rounded: what bf16 arithmetic does otherwise
        (0.3443, 0.1531, False),  # the scale of one of 30 up projections doubled
        (0.2074, 0.0, False),     # the same figure of a format that rounds nothing
        (3.5637, 0.1531, False),  # the scale of all of them doubled
        (0.05, float("nan"), False),
    ],
)
def test_a_server_may_round_activations_its_own_way_and_not_do_worse(from_disk, rounding, accepted):
    """Figures of an imitated server, SmolLM2-135M and an adapter that has learnt nothing, 477 tokens, 2026-11-26."""
    found = failures({**FIGURES, "from_disk": from_disk, "rounding": rounding}, LIMITS["fp8"], "smoke")
    assert [failure.split()[0] for failure in found] == ([] if accepted else ["from_disk"])


def test_a_fine_tune_too_small_to_tell_has_no_tuned_share():
    same = [{**document, "base": [value + 0.01 for value in document["trained"]]} for document in DOCUMENTS]
    assert log_probability_figures(same, served([-0.1, -0.2, -0.3]))["tuned_share"] is None


def test_a_fine_tune_raises_some_tokens_and_lowers_others_and_what_goes_against_it_is_below_zero():
    trained, base = [-1.0, -2.0], [-2.0, -1.0]
    assert tuned_share(trained, trained, base) == (1.0, 1.0)
    assert tuned_share([-3.0, 0.0], trained, base) == (1.0, -1.0)
    assert tuned_share([-1.0, 0.0], trained, base) == (1.0, 0.0)  # as much with it as against it
    assert tuned_share([-0.0, -0.0], [-0.04, 0.0], [0.0, -0.04]) == (pytest.approx(0.04), None)


def reference(ids, ended=True, margin=9.0):
    return {"ids": ids, "text": str(ids), "ended": ended, "end_margin": margin if ended else None}


def answer(ids, reason="stop"):
    body = ids[:-1] if ids[-1] == STOP else ids
    return Served([1], ids, str(body), reason)


def test_answers_are_compared_up_to_the_token_that_ends_them():
    figures = answer_figures(
        [reference([10, 11]), reference([10, 11]), reference([12], ended=False)],
        [answer([10, 11, STOP]), answer([10, 13, STOP]), answer([12], "length")], [STOP], LIMITS["bf16"],
    )
    assert figures == {
        "answers": 3, "first_token": 1.0, "equal_answers": pytest.approx(2 / 3), "ended": [1, 1], "overrun": 0,
    }


def test_an_answer_that_goes_on_where_ours_ends_is_counted():
    served = [answer([10, 14, 15], "length"), answer([10, STOP, 14])]
    figures = answer_figures([reference([10])] * 2, served, [STOP], LIMITS["int4"])
    assert (figures["ended"], figures["overrun"]) == ([0, 2], 1)


@pytest.mark.parametrize(("name", "margin", "ended"), [
    ("bf16", 0.02, [1, 1]), ("bf16", 0.3, [1, 2]), ("fp8", 0.3, [1, 1]), ("fp8", 1.1, [1, 2]), ("int4", 1.1, [1, 1]),
])
def test_a_near_tie_of_the_end_and_another_token_may_go_either_way(name, margin, ended):
    served = [answer([10, 14, STOP]), answer([10, STOP])]
    figures = answer_figures([reference([10], margin=margin)] * 2, served, [STOP], LIMITS[name])
    assert figures["ended"] == ended


def test_a_server_that_is_deaf_to_the_token_is_caught_at_a_near_tie_too():
    figures = answer_figures([reference([10], margin=0.0)], [answer([10, STOP, 14], "length")], [STOP], LIMITS["bf16"])
    assert (figures["ended"], figures["overrun"]) == ([0, 0], 1)
    assert failures({**FIGURES, **figures, "equal_answers": 1.0}, LIMITS["bf16"], "smoke") == [
        "stop: 1 answers go on behind a token that ends a turn"
    ]


def test_a_good_server_has_no_failures_in_any_format():
    assert [failures(FIGURES, limits, "smoke") for limits in LIMITS.values()] == [[]] * len(LIMITS)
    of_chat = ("answers", "first_token", "equal_answers", "ended", "overrun", "stops_at")
    without_chat = {key: value for key, value in FIGURES.items() if key not in of_chat}
    assert failures({**without_chat, "tuned_share": None}, LIMITS["bf16"], "smoke") == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"models": ["other"]}, "/v1/models has other, not smoke"),
        ({"rendering": {"cases": 4, "different": ["system"]}}, "1 of 4 conversations give other tokens"),
        ({"tuned_share": 0.01}, "the base model is served, the fine-tune is not applied"),
        ({"tuned_share": 0.55}, "tuned_share is 0.55, must be"),
        ({"tuned_share": 1.9}, "tuned_share is 1.90, must be"),
        ({"tuned_share": float("nan")}, "tuned_share is nan"),
        ({"difference": 0.9}, "difference is 0.9000, must be at most"),
        ({"difference": float("nan")}, "difference is nan"),
        ({"from_disk": 0.2}, "from_disk is 0.2000, must be at most"),
        ({"top1_agreement": 0.3}, "top1_agreement is 0.300"),
        ({"first_token": 0.25}, "first_token is 0.25"),
        ({"stops_at": {"2": True, "7": False}}, "the server goes on after token 7"),
        ({"ended": [7, 8]}, "1 of 8 answers go on where the trained model's surely end"),
        ({"overrun": 2}, "2 answers go on behind a token that ends a turn"),
    ],
)
@pytest.mark.parametrize("format_name", LIMITS)
def test_each_failure_is_named(format_name, change, said):
    [failure] = failures({**copy.deepcopy(FIGURES), **change}, LIMITS[format_name], "smoke")
    assert said in failure
