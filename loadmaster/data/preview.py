"""Looking at the data: rendered rows with the trained part marked, and a summary in a few lines."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from loadmaster.data.checks import marked
from loadmaster.data.faults import listed
from loadmaster.data.formats import Conversation, in_turn
from loadmaster.data.preference import PAIR_FIELDS
from loadmaster.data.prepared import PreparedData
from loadmaster.data.render import ChatRenderer, Rendering, Span
from loadmaster.data.tokens import answers, render_trained
from loadmaster.words import counted, visible

EQUAL_ENOUGH = 4 / 3
"""Weighted numbers of KTO's two kinds of answers should be within this ratio (Ethayarajh et al. 2024, eq. 9)."""

MUCH = 0.1
"""Of a plain text, cut off (a chat is whole up to where it ends, but of a text every piece teaches as much); of
pairs and judged answers, left out."""


SHOWN = 4_000
"""Characters of a row's beginning, and of its end, that are printed of a very long one."""


def show(data: PreparedData, tokenizer: Any, count: int, console: Any) -> None:
    """Print `count` rendered rows and the figures on a rich Console: trained text in green on a terminal, between ⟦ and
    ⟧ elsewhere."""
    from rich.text import Text

    for conversation, name in _named(islice(in_turn(data.train_conversations), count)):
        rendering = rendered(conversation, tokenizer)
        shown = visible(rendering.text)  # as long as the text, whose spans it is marked by
        if console.is_terminal:
            console.rule(name)
            text = Text(shown, style="dim")
            for span in rendering.spans:
                text.stylize("not dim bold green", span.start, span.end)
            console.print(_shortened(text), soft_wrap=True)
        else:
            plain = f"--- {name}\n{_shortened(marked(shown, rendering.spans))}"
            console.print(plain, markup=False, highlight=False, soft_wrap=True)
    console.print(describe(data.summary), markup=False, highlight=False, soft_wrap=True)


def _shortened(text: Any) -> Any:
    """A string or rich Text without what is between the beginning and the end of a very long one."""
    left_out = len(text) - 2 * SHOWN
    if left_out <= SHOWN:
        return text
    return text[:SHOWN] + f"\n... {left_out:,} characters ...\n" + text[-SHOWN:]


def _named(conversations: Iterable[Conversation]) -> Iterator[tuple[Conversation, str]]:
    """What is rendered, with its place; both answers of a preference pair, and the label of a single one."""
    for conversation in conversations:
        if conversation.label is not None:
            yield conversation, f"{conversation.origin} ({'desirable' if conversation.label else 'undesirable'})"
        elif conversation.rejected is None:
            yield conversation, conversation.origin
        else:
            for answer, kind in zip(answers(conversation), PAIR_FIELDS, strict=True):
                yield answer, f"{conversation.origin} ({kind})"


def rendered(conversation: Conversation, tokenizer: Any) -> Rendering:
    """The text that is tokenised and its trained spans; plain text is trained whole, with its EOS token."""
    if conversation.text is None:
        return render_trained(ChatRenderer(tokenizer), conversation)
    text = conversation.text + tokenizer.eos_token
    return Rendering(text, (Span(0, len(text), tokenizer.eos_token),))


def describe(summary: dict[str, Any]) -> str:
    """The summary of PreparedData as lines for the log."""
    took = f"tokenised in {summary['seconds']:.1f} s" if summary["cache"] == "built" else "from the cache"
    formats = summary.get("formats", [])  # entries of the cache from before have none
    several = formats if len(formats) > 1 else []
    read_as = f"in {len(several)} formats" if several else f"as {_known(summary)}"
    lines = [f"data: {counted(summary['rows_read'], 'row')} read {read_as}, {took}"]
    lines += [f"  {counted(each['rows_read'], 'row')} of {listed(each['files'])} as {_known(each)}" for each in several]
    for split in ("train", "validation"):
        figures = summary[split]
        if figures is None:
            continue
        share = figures["trained_tokens"] / figures["tokens"]
        kind = "packed row" if summary["packing"] else "row"
        lines.append(
            f"  {split}: {counted(figures['conversations'], 'row')} -> {counted(figures['rows'], kind)} of "
            f"{summary['sequence_length']:,}, {figures['fill']:.1%} full; {figures['tokens']:,} tokens, "
            f"{share:.1%} of them trained; length median {figures['median_length']:,}, longest {figures['longest']:,}"
        )
        if "desirable" in figures:
            lines.append(f"  {split}: {_labels(figures['desirable'], figures['undesirable'], split == 'train')}")
        long, policy = figures["long_rows"], summary["on_long_row"]
        judged = {"preference": "pair", "unpaired": "answer"}.get(summary["format"])
        if long["long"] and (judged or policy == "drop"):
            what = counted(long["dropped"], judged or "row")
            lost = _much_left_out(figures) if split == "train" else ""
            lines.append(f"  {split}: {what} longer than sequence_length, left out whole{lost}")
        elif long["long"]:
            lines.append(
                f"  {split}: {counted(long['long'], 'row')} longer than sequence_length (data.on_long_row={policy}): "
                f"{counted(long['pieces'], 'piece')} kept, {counted(long['cut_tokens'], 'token')} cut off, "
                f"{counted(long['dropped'], 'piece')} dropped with nothing trained in them"
            )
            lost = long["cut_tokens"] / (figures["tokens"] + long["cut_tokens"])
            if split == "train" and "text" in summary["format"] and lost > MUCH:
                what, of_it = ("the text", "it") if summary["format"] == "text" else ("all tokens", "plain text")
                advice = f"of {what} is cut off; data.on_long_row=split keeps {of_it}, in rows of sequence_length"
                lines.append(f"  {split}: {lost:.0%} {advice}")
    return "\n".join(lines + [f"  note: {note}" for note in summary["notes"]])


def _known(read_as: dict[str, Any]) -> str:
    """A format, and what gave it away."""
    fields = read_as["recognised_by"]
    return read_as["format"] + (f" (recognised by {fields})" if fields else "")


def _much_left_out(figures: dict[str, Any]) -> str:
    """What share of pairs, answers or rows is lost where it is much, and the length that keeps nine in ten."""
    share, length = figures["long_rows"]["dropped"] / figures["conversations"], figures.get("nine_in_ten")
    if share <= MUCH or length is None:  # entries of the cache from before have none
        return ""
    return f": {share:.0%} of them; sequence_length={length} would hold nine in ten"


def judged_alone(summary: dict[str, Any], micro_batch_size: int, by_row: bool = False) -> str | None:
    """That a micro-batch of kto has fewer than two pairs or answers on average, and what gives it two; or None.

    How far the policy moved is told by prompts under another's answer: where there is none it counts as nothing.
    by_row: the other answer is of the same row.
    """
    figures, paired = summary["train"], summary["format"] == "preference"
    each = figures["documents"] / (2 if paired else 1) / figures["rows"]
    together = each if by_row else each * micro_batch_size
    if together >= 2:
        return None
    what = "pairs" if paired else "labelled answers"
    more = f"micro_batch_size={math.ceil(2 / each)} or more (batch.global_size a multiple of it), or "
    return (
        f"kto: a {'packed row' if by_row else 'micro-batch'} has {together:.1f} {what} on average, and with one alone "
        f"nothing tells how far the model moved: {'' if by_row else more}a longer sequence_length"
    )


def _labels(desirable: int, undesirable: int, trained: bool) -> str:
    """How many answers have which label, and where those trained on are far from equal, the weight that would make up
    for it."""
    said = f"{desirable:,} desirable and {undesirable:,} undesirable answers"
    few, many = sorted((desirable, undesirable))
    if not trained or not few or many <= few * EQUAL_ENOUGH:
        return said
    name = "desirable" if few == desirable else "undesirable"
    return f"{said}; preference.{name}_weight={round(many / few, 1):g} would weigh both alike"
