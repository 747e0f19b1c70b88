"""DPO, ORPO and KTO: losses and gradients against the formulas on unpacked answers, and TRL's on the same answers."""

import dataclasses
import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PersimmonConfig

from loadmaster.config.schema import DataConfig, Job, LoraConfig, PreferenceConfig
from loadmaster.data import PackedRow, collate, prepare
from loadmaster.models import flash, preference
from loadmaster.models.adapters import make_trainable, trainable
from loadmaster.models.attention import PACKED
from loadmaster.models.dropout import as_loaded
from loadmaster.models.load import load_base
from loadmaster.models.preference import PreferenceLoss, answer_log_probs, dpo_loss, mismatched, orpo_loss

PAIRS = [
    {"prompt": "What boils at 100 degrees?", "chosen": "Water, at sea level.", "rejected": "I do not care to say."},
    {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven is a nice one, is it not? I think so."},
    {"prompt": "Add 2 and 2, and say how.", "chosen": "Two more than two is four.", "rejected": "5"},
]

@pytest.fixture(scope="module")
def draw() -> np.random.Generator:
    """The same numbers under every torch: of most models and adapters the answers below move enough to compare, but
    not of all."""
    return np.random.default_rng(1)


@pytest.fixture(scope="module")
def tiny(tiny, draw, tmp_path_factory):
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data = torch.from_numpy(draw.normal(0, 0.02, parameter.shape)).float()
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("drawn") / "tiny")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def policy(tiny, draw):
    """A model under an adapter that does something."""
    model = make_trainable(load_base(tiny, torch.float32, "cpu"), "lora", LoraConfig(rank=4))
    for name, parameter in trainable(model):  # B starts at zero, where policy and reference are the same
        spread = 0.3 if "lora_B" in name else 0.07
        parameter.data = torch.from_numpy(draw.normal(0, spread, parameter.shape)).float()
    return model


@pytest.fixture(scope="module")
def plain(policy, tiny):
    """The same weights as transformers runs them, without our attention, packing or loss."""
    model = make_trainable(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32), "lora", LoraConfig(rank=4))
    model.load_state_dict(policy.state_dict())
    return model


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOADMASTER_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def rows(tokenizer, tmp_path_factory):
    import json

    folder = tmp_path_factory.mktemp("pairs")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    job = Job(data=DataConfig(path=str(folder / "pairs.jsonl"), validation=None), objective="dpo", sequence_length=256)
    return prepare(job, tokenizer).train


def answers_apart(model, rows) -> list[tuple[float, int]]:
    """{(sum of log-probabilities, tokens)} of each answer, each document through the plain model by itself."""
    found = []
    for row in rows:
        starts = [*(row.position_ids == 0).nonzero()[0].tolist(), len(row)]
        for begin, end in itertools.pairwise(starts):
            ids, labels = (torch.tensor(array[begin:end])[None] for array in (row.input_ids, row.labels))
            log_probs = F.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), dim=-1)
            mask = labels[:, 1:] != -100
            picked = log_probs.gather(-1, ids[:, 1:, None])[..., 0][mask]
            found.append((picked.sum(), len(picked)))
    return found


def test_log_probs_of_packed_answers_are_those_of_the_answers_one_by_one(policy, plain, rows):
    batch = collate([rows[i] for i in range(len(rows))], 0, 256)  # padded: a document with nothing trained
    with torch.no_grad():
        together = answer_log_probs(policy, batch)
        apart = answers_apart(plain, rows)
    assert together.tokens.tolist() == [tokens for _, tokens in apart]
    torch.testing.assert_close(together.sums, torch.stack([s for s, _ in apart]), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_loss_and_gradients_are_the_formulas(policy, plain, rows, objective):
    loss_module = PreferenceLoss(policy, objective, PreferenceConfig(0.3, 0.1 if objective == "dpo" else 0.0))
    policy.zero_grad()
    loss = loss_module(collate([rows[i] for i in range(len(rows))], 0, 256))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in trainable(policy)}

    with torch.no_grad(), plain.disable_adapter():
        reference = torch.stack([s for s, _ in answers_apart(plain, rows)])
    plain.zero_grad()
    apart = answers_apart(plain, rows)
    sums, tokens = torch.stack([s for s, _ in apart]), torch.tensor([n for _, n in apart])
    if objective == "dpo":
        margin = 0.3 * ((sums[0::2] - reference[0::2]) - (sums[1::2] - reference[1::2]))
        expected = (-0.9 * F.logsigmoid(margin) - 0.1 * F.logsigmoid(-margin)).sum()
    else:
        mean = sums / tokens
        odds = mean - torch.log(1 - torch.exp(mean))
        margin = odds[0::2] - odds[1::2]
        expected = (-mean[0::2] - 0.3 * F.logsigmoid(margin)).sum()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainable(plain):
        off = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert off < 1e-4, f"{name}: {off}"
    pairs, correct, margins, *labelled = loss_module.figures.tolist()
    assert (pairs, correct) == (3, int((margin > 0).sum()))
    assert margins == pytest.approx(margin.sum().item(), rel=1e-4, abs=1e-4)  # differences of sums of about 100
    assert labelled == [0, 0, 0, 0]


def test_orpo_of_answers_that_are_nearly_certain_is_the_formula_in_float64():
    mean = [-1e-6, -3e-6, -2e-5, -4e-6]
    (loss, margin), (exact, exact_margin) = (
        orpo_loss(torch.tensor(mean, dtype=dtype), 0.3) for dtype in (torch.float32, torch.float64)
    )
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    torch.testing.assert_close(margin.double(), exact_margin, rtol=1e-5, atol=0)
    odds = torch.tensor([math.log(math.exp(m) / -math.expm1(m)) for m in mean], dtype=torch.float64)
    torch.testing.assert_close(exact_margin, odds[0::2] - odds[1::2], rtol=1e-9, atol=0)


def test_at_the_start_dpo_is_log_2_and_its_margin_zero(tiny, rows):
    fresh = make_trainable(load_base(tiny, torch.float32, "cpu"), "lora", LoraConfig(rank=4))
    module = PreferenceLoss(fresh, "dpo", PreferenceConfig(beta=0.1))
    with torch.no_grad():
        loss = module(collate([rows[0]], 0))
    assert loss.item() / module.figures[0].item() == pytest.approx(0.6931472, abs=1e-6)
    assert module.figures[2].item() == 0


def test_dropout_that_a_models_own_config_asks_for_does_not_part_policy_and_reference(tiny, rows):
    base = load_base(tiny, torch.float32, "cpu")
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.act_fn = torch.nn.Sequential(layer.mlp.act_fn, torch.nn.Dropout(0.5))
    module = PreferenceLoss(make_trainable(base, "lora", LoraConfig(rank=4)), "dpo", PreferenceConfig(beta=0.1)).train()
    batch = collate(rows, 0)
    assert module(batch).item() == pytest.approx(math.log(2) * module.figures[0].item(), rel=1e-5)


def test_before_training_there_is_no_margin_and_what_is_trained_stays_so(policy, rows):
    """eval.json's "before": the adapter is off around the loss, whose reference pass must not switch it on."""
    trained = [name for name, _ in trainable(policy)]
    loss = PreferenceLoss(policy, "dpo", PreferenceConfig(0.1))
    with torch.no_grad():
        loss(collate(rows, 0))
        assert loss.figures[2] != 0 and [name for name, _ in trainable(policy)] == trained
        with policy.disable_adapter():
            loss(collate(rows, 0))
    assert loss.figures[2] == 0


def test_the_dpo_loss_is_trls_on_the_same_batch(policy, plain, tiny, tokenizer, tmp_path):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def chat(role, text):
        return [{"role": role, "content": text}]

    data = Dataset.from_list(
        [
            {
                "prompt": chat("user", pair["prompt"]),
                "chosen": chat("assistant", pair["chosen"]),
                "rejected": chat("assistant", pair["rejected"]),
            }
            for pair in PAIRS
        ]
    )
    arguments = DPOConfig(
        output_dir=str(tmp_path), beta=0.3, use_cpu=True, report_to=[], per_device_train_batch_size=3, bf16=False
    )
    trainer = DPOTrainer(
        model=plain,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        expected = trainer.compute_loss(plain, batch)

    # TRL stacks all chosen answers over all rejected ones, padded; here they are packed in turn.
    rows = []
    for pair in range(3):
        documents = [
            (ids[mask == 1], trained[mask == 1])
            for ids, mask, trained in (
                tuple(batch[name][place] for name in ("input_ids", "attention_mask", "completion_mask"))
                for place in (pair, pair + 3)
            )
        ]
        ids = torch.cat([ids for ids, _ in documents]).numpy()
        trained = torch.cat([trained for _, trained in documents]).numpy()
        positions = np.concatenate([np.arange(len(ids)) for ids, _ in documents])
        rows.append(PackedRow(ids, np.where(trained == 1, ids, -100), positions, ["pair"] * 2))
    module = PreferenceLoss(policy, "dpo", PreferenceConfig(beta=0.3))
    with torch.no_grad():
        ours = module(collate(rows, 0)) / 3
    assert ours.item() == pytest.approx(expected.item(), abs=1e-5)
    assert abs(ours.item() - 0.6931472) > 1e-3, "a margin of zero would compare nothing"


def test_the_orpo_loss_is_trls_on_the_same_batch_but_for_its_prompts(policy, plain, rows):
    """TRL takes the likelihood of prompts as well, over all tokens of a batch; here it is the answer's, by pair."""
    from trl.experimental.orpo import ORPOTrainer

    documents = []
    for row in (rows[i] for i in range(len(rows))):
        starts = [*(row.position_ids == 0).nonzero()[0].tolist(), len(row)]
        documents += [(row.input_ids[a:b], row.labels[a:b]) for a, b in itertools.pairwise(starts)]
    length = max(len(ids) for ids, _ in documents)
    batch = {}
    for side, which in (("chosen", documents[0::2]), ("rejected", documents[1::2])):
        for name, column, filler in (("input_ids", 0, 0), ("labels", 1, -100)):
            padded = [np.pad(each[column], (0, length - len(each[column])), constant_values=filler) for each in which]
            batch[f"{side}_{name}"] = torch.from_numpy(np.stack(padded).astype(np.int64))
        lengths = torch.tensor([len(ids) for ids, _ in which])
        batch[f"{side}_attention_mask"] = (torch.arange(length) < lengths[:, None]).long()
    trainer = object.__new__(ORPOTrainer)
    trainer.beta, trainer.padding_value, trainer.is_encoder_decoder, trainer.aux_loss_enabled = 0.3, 0, False, False
    trainer.accelerator = SimpleNamespace(device=torch.device("cpu"))
    module = PreferenceLoss(policy, "orpo", PreferenceConfig(beta=0.3))
    with torch.no_grad():
        chosen, rejected, *_, with_prompts = trainer.concatenated_forward(plain, batch)
        odds, *_, margin = trainer.odds_ratio_loss(chosen, rejected)
        ours = module(collate([rows[i] for i in range(len(rows))], 0)) / len(PAIRS)
    assert ours.item() == pytest.approx((-chosen - odds).mean().item(), abs=1e-5)
    assert module.figures[2].item() / len(PAIRS) == pytest.approx(margin.item(), abs=1e-5)
    assert abs(with_prompts + chosen.mean()) > 1e-3 and abs(margin) > 1e-3, "nothing would be compared"


def trls_kto(plain, tiny, tokenizer, folder, answers, weights):
    """TRL's collated batch of (prompt, completion, label) answers, and its loss."""
    from datasets import Dataset
    from torch.utils.data import DataLoader
    from trl import KTOConfig, KTOTrainer

    data = Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": prompt}],
                "completion": [{"role": "assistant", "content": completion}],
                "label": label,
            }
            for prompt, completion, label in answers
        ]
    )
    arguments = KTOConfig(
        output_dir=str(folder), beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1], use_cpu=True,
        report_to=[], per_device_train_batch_size=len(answers), bf16=False, gradient_checkpointing=False,
    )
    trainer = KTOTrainer(
        model=plain,
        ref_model=AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
    )
    batch = next(iter(DataLoader(trainer.train_dataset, batch_size=len(answers), collate_fn=trainer.data_collator)))
    with torch.no_grad():
        expected = trainer.compute_loss(plain, batch)
    assert trainer._metrics["train"]["kl"][0] > 0, "a move of zero would compare nothing"
    return batch, expected.item(), trainer


def packed_from(batch, places, desirable=None) -> PackedRow:
    """Those documents of TRL's padded batch as one packed row."""
    documents = [
        (batch["input_ids"][place][batch["attention_mask"][place] == 1],
         batch["completion_mask"][place][batch["attention_mask"][place] == 1])
        for place in places
    ]
    ids = torch.cat([ids for ids, _ in documents]).numpy()
    trained = torch.cat([trained for _, trained in documents]).numpy()
    positions = np.concatenate([np.arange(len(ids)) for ids, _ in documents])
    return PackedRow(ids, np.where(trained == 1, ids, -100), positions, ["answer"] * len(documents), desirable)


def asked_before(tiny, row) -> PackedRow:
    """The row as a full fine-tune gets it: with what the model before training says of its answers."""
    asked = PreferenceLoss(load_base(tiny, torch.float32, "cpu"), "kto", PreferenceConfig())
    with torch.no_grad():
        return dataclasses.replace(row, reference=asked(collate([row], 0), answers_only=True).numpy())


def test_the_kto_loss_of_pairs_is_trls_on_the_same_batch(policy, plain, tiny, tokenizer, tmp_path, monkeypatch):
    answers = [(pair["prompt"], pair[side], side == "chosen") for pair in PAIRS for side in ("chosen", "rejected")]
    batch, expected, _ = trls_kto(plain, tiny, tokenizer, tmp_path, answers, (1.5, 0.7))
    rows = [packed_from(batch, (first, first + 1)) for first in (0, 2, 4)]
    monkeypatch.setattr(preference, "ROTATION", 1)  # TRL's, where a pair's prompt may get its own other answer
    module = PreferenceLoss(policy, "kto", PreferenceConfig(0.3, 0.0, 1.5, 0.7))
    for each in (rows, [asked_before(tiny, packed_from(batch, range(6)))]):
        with torch.no_grad():
            ours = module(collate(each, 0)) / 3
        assert ours.item() == pytest.approx(expected, abs=1e-5)


ANSWERS = [
    ("What boils at 100 degrees?", "Water, at sea level."),
    ("Name a colour.", "Seven is a nice one, is it not? I think so."),
    ("Add 2 and 2, and say how.", "Two more than two is four."),
    ("Who wrote this?", "A loadmaster did, before take-off."),
    ("Name a fish.", "Pike."),
]


@pytest.mark.parametrize(
    ("labels", "weights"),
    [((True, False, True, True, True), (0.6, 2.4)), ((False, False, True, False, False), (1.3, 0.5))],
)
def test_the_kto_loss_of_labelled_answers_is_trls_on_the_same_batch(
    policy, plain, tiny, tokenizer, tmp_path, labels, weights
):
    answers = [(*answer, label) for answer, label in zip(ANSWERS, labels, strict=True)]
    batch, expected, trainer = trls_kto(plain, tiny, tokenizer, tmp_path, answers, weights)
    rows = [packed_from(batch, places, np.array(labels)[list(places)]) for places in ((0, 1), (2,), (3, 4))]
    module = PreferenceLoss(policy, "kto", PreferenceConfig(0.3, 0.0, *weights))
    with torch.no_grad():
        ours = module(collate(rows, 0, 128)) / 5  # padded: documents that have no label
        whole = asked_before(tiny, packed_from(batch, range(5), np.array(labels)))
        assert (module(collate([whole], 0, 512)) / 5).item() == pytest.approx(expected, abs=1e-5)
    assert ours.item() == pytest.approx(expected, abs=1e-5)
    assert abs(ours.item() - 0.5) > 1e-3, "rewards of zero would compare nothing"

    figures = preference.mean_figures(module.figures)
    theirs = trainer._metrics["train"]
    # Differences of sums of log-probabilities in fp32.
    assert figures["reward_desirable"] == pytest.approx(theirs["rewards/chosen"][0], rel=1e-4, abs=1e-4)
    assert figures["reward_undesirable"] == pytest.approx(theirs["rewards/rejected"][0], rel=1e-4, abs=1e-4)
    assert figures["reward_margin"] == figures["reward_desirable"] - figures["reward_undesirable"]
    assert module.figures.tolist()[:5] == [0, 0, 0, sum(labels), 5 - sum(labels)]


def test_prompts_get_other_pairs_answers_and_no_token_is_lost(rows):
    batch = collate([rows[i] for i in range(len(rows))], 0, 256)
    other, apart = mismatched(batch, 2)
    assert apart.tolist() == list(range(6))
    assert other.input_ids.numel() == batch.input_ids.numel()
    assert sorted(other.input_ids[0].tolist()) == sorted(batch.input_ids.reshape(-1).tolist())
    assert (other.labels != -100).sum() == (batch.labels != -100).sum()

    def parts(of):
        found = []
        for start, end in itertools.pairwise(preference.document_bounds(of.position_ids)):
            ids, labels = of.input_ids.reshape(-1)[start:end], of.labels.reshape(-1)[start:end]
            if (labels != -100).any():
                first = int((labels != -100).nonzero()[0])
                found.append((ids[:first].tolist(), ids[first:].tolist()))
        return found

    before, after = parts(batch), parts(other)
    assert [prompt for prompt, _ in after] == [prompt for prompt, _ in before]
    assert [answer for _, answer in after] == [answer for _, answer in (*before[-2:], *before[:-2])]


def test_ktos_move_takes_two_pairs(tiny, policy, rows):
    alone = PackedRow(*(getattr(rows[0], name) for name in ("input_ids", "labels", "position_ids", "document_ids")))
    ends = [*(alone.position_ids == 0).nonzero()[0].tolist(), len(alone)]
    one = PackedRow(alone.input_ids[: ends[2]], alone.labels[: ends[2]], alone.position_ids[: ends[2]], ["pair"] * 2)
    assert PreferenceLoss(policy, "kto", PreferenceConfig(0.3))._moved(collate([one], 0)).item() == 0


def labelled(rows, count: int) -> PackedRow:
    """The first `count` answers of the pairs as one row of answers by themselves, every second one desirable."""
    row = rows[0]
    end = [*(row.position_ids == 0).nonzero()[0].tolist(), len(row)][count]
    parts = (array[:end] for array in (row.input_ids, row.labels, row.position_ids))
    return PackedRow(*parts, row.document_ids[:count], np.arange(count) % 2 == 0)


def test_ktos_move_takes_two_labelled_answers(policy, rows):
    module = PreferenceLoss(policy, "kto", PreferenceConfig(0.3))
    assert module._moved(collate([labelled(rows, 1)], 0, 256)).item() == 0
    moved = module._moved(collate([labelled(rows, 2)], 0, 256))
    with torch.no_grad():
        other, _ = mismatched(collate([labelled(rows, 2)], 0), 1)  # each prompt under the other answer
        ratios = answer_log_probs(policy, other).sums - module._reference(other)
    assert moved.item() == pytest.approx(max(0, ratios.mean().item()), rel=1e-5) and ratios.any()


def test_kto_of_all_weights_is_the_formula_in_float64(tiny, policy, tokenizer):
    """Prompts under answers of their own rows, of which the middle one has a single answer, which tells no move."""
    prompts, answers = ([tokenizer(text)["input_ids"] for text in texts] for texts in zip(*ANSWERS, strict=True))
    labels = np.array([True, False, True, False, True])
    exact = make_trainable(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float64), "lora", LoraConfig(rank=4))
    exact.load_state_dict(policy.state_dict())
    rows = []
    for places in ((3, 4), (0,), (2, 3, 1)):
        documents = [(prompts[place], answers[place]) for place in places]
        ids = np.concatenate([prompt + answer for prompt, answer in documents])
        trained = np.concatenate([[-100] * len(prompt) + answer for prompt, answer in documents])
        positions = np.concatenate([np.arange(len(prompt) + len(answer)) for prompt, answer in documents])
        row = PackedRow(ids, trained, positions, ["answer"] * len(places), labels[list(places)])
        rows.append(asked_before(tiny, row))
    policy.zero_grad()
    loss = PreferenceLoss(policy, "kto", PreferenceConfig(0.3, 0.0, 1.5, 0.7))(collate(rows, 0, 128))
    loss.backward()

    def log_prob(prompt, answer):
        logits = exact(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return F.log_softmax(logits, -1).gather(-1, torch.tensor(answer)[:, None]).sum()

    def ratio(prompt, answer):
        with torch.no_grad(), exact.disable_adapter():
            before = log_prob(prompts[prompt], answers[answer])
        return log_prob(prompts[prompt], answers[answer]) - before

    with torch.no_grad():
        others = [(3, 4), (4, 3), (2, 1), (3, 2), (1, 3)]
        moved = torch.stack([ratio(prompt, answer) for prompt, answer in others]).mean().clamp(min=0)
    assert moved > 0.1, "a move of zero would compare nothing"
    expected = sum(
        1.5 * (1 - torch.sigmoid(0.3 * (ratio(place, place) - moved))) if labels[place]
        else 0.7 * (1 - torch.sigmoid(0.3 * (moved - ratio(place, place))))
        for place in (3, 4, 0, 2, 3, 1)
    )
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for (name, parameter), (_, theirs) in zip(trainable(policy), trainable(exact), strict=True):
        off = (parameter.grad - theirs.grad).norm() / theirs.grad.norm()
        assert off < 1e-4, f"{name}: {off}"


def test_gradients_of_labelled_answers_are_the_formulas(policy, plain, rows, monkeypatch):
    monkeypatch.setattr(PreferenceLoss, "_moved", lambda self, batch: torch.tensor(0.4))
    row = labelled(rows, 3)  # desirable, undesirable, desirable
    policy.zero_grad()
    loss = PreferenceLoss(policy, "kto", PreferenceConfig(0.3, 0.0, 1.5, 0.7))(collate([row], 0, 256))
    loss.backward()
    ours = {name: p.grad.clone() for name, p in trainable(policy)}

    with torch.no_grad(), plain.disable_adapter():
        reference = torch.stack([s for s, _ in answers_apart(plain, [row])])
    plain.zero_grad()
    first, second, third = torch.stack([s for s, _ in answers_apart(plain, [row])]) - reference
    good = sum(1.5 * (1 - torch.sigmoid(0.3 * (ratio - 0.4))) for ratio in (first, third))
    expected = good + 0.7 * (1 - torch.sigmoid(0.3 * (0.4 - second)))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in trainable(plain):
        off = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
        assert off < 1e-4, f"{name}: {off}"


@pytest.mark.parametrize("label", [True, False])
def test_a_micro_batch_of_one_label_has_its_loss_and_no_margin(policy, rows, label):
    row = dataclasses.replace(labelled(rows, 2), desirable=np.array([label, label]))
    module = PreferenceLoss(policy, "kto", PreferenceConfig(0.3))
    with torch.no_grad():
        assert 0 < module(collate([row], 0, 256)).item() < 2
    assert list(preference.mean_figures(module.figures)) == ["reward_desirable" if label else "reward_undesirable"]


def test_pair_losses_do_not_overflow():
    loss, margin = dpo_loss(torch.tensor([-1e4, 0.0]), torch.zeros(2), 1.0)
    assert loss.item() == pytest.approx(1e4) and margin.item() == -1e4
    loss, _ = orpo_loss(torch.tensor([0.0, -50.0]), 1.0)
    assert torch.isfinite(loss).all()


@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
def test_gradients_of_chunked_log_probs_are_autograds(monkeypatch, softcap, scale):
    monkeypatch.setattr(preference, "CHUNK_TOKENS", 3)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((8, 4), (11, 4), (11,)))
    targets, upstream = torch.arange(8), torch.randn(8, generator=generator)

    def plainly(hidden, weight):
        logits = F.linear(hidden, weight, bias) * scale
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        return F.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]

    def chunked(hidden, weight):
        return preference._TokenLogProbs.apply(hidden, weight, bias, targets, softcap, scale)

    results = []
    for function in (plainly, chunked):
        inputs = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        log_probs = function(*inputs)
        log_probs.backward(upstream)
        results.append((log_probs.detach(), *(tensor.grad for tensor in inputs)))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("objective", "known"), [("dpo", None), ("kto", None), ("kto", (2, 2))])
def test_a_batch_without_answers_has_loss_zero_and_gradients_of_zero(policy, rows, objective, known):
    row = labelled(rows, 2) if objective == "kto" else rows[0]
    row = dataclasses.replace(row, reference=known and np.ones(known, dtype=np.float32))
    idle = dataclasses.replace(row, labels=np.full_like(row.labels, -100))
    policy.zero_grad()
    module = PreferenceLoss(policy, objective, PreferenceConfig(beta=0.1))
    loss = module(collate([idle], 0))
    loss.backward()
    assert loss.item() == 0 and not module.figures.any()
    assert all(p.grad is None or not p.grad.any() for _, p in trainable(policy))


def test_dropout_that_layers_read_from_the_config_is_off_and_written_as_it_was(rows, tmp_path):
    """Persimmon's attention and Falcon's layers ask their config on each pass."""
    sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=50000)
    made = PersimmonConfig(**sizes, attention_dropout=0.5, hidden_dropout=0.25)
    lm = AutoModelForCausalLM.from_config(made, dtype=torch.float32, attn_implementation=PACKED)
    adapted = make_trainable(lm, "lora", LoraConfig(rank=2, targets="all-linear"))
    module = PreferenceLoss(adapted, "dpo", PreferenceConfig(beta=0.1)).train()
    batch = collate(rows, 0)
    assert module(batch).item() == pytest.approx(math.log(2) * module.figures[0].item(), rel=1e-5)
    assert flash.own_kernel(lm.config, torch.device("cuda")) == "varlen"
    with as_loaded(module.module):
        lm.config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert (written["attention_dropout"], written["hidden_dropout"]) == (0.5, 0.25)
    assert lm.config.attention_dropout == lm.config.hidden_dropout == 0.0
