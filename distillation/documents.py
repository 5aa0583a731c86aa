"""Texts of language models as rows: cut into pieces of `max_length` tokens, and for masked models with some of them hidden.

A reading is the same rows in the tokens of another tokenizer, and which of its places say the same as one of the first's.
"""

from __future__ import annotations

import bisect
import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distillation.config import CausalLM, MaskedLM


@dataclass
class Encoded:
    """Rows that contents became: one each, for language models none or several."""

    columns: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Of `fields` but label and labels of a task whose labels have names or are numbers."""
    source: list[int] = field(default_factory=list)
    """Which of the contents each row is of."""
    labels: list[str | None] = field(default_factory=list)
    """Of each row; of words, the tags of those that are scored."""
    tallies: Counter[tuple[str, int]] = field(default_factory=Counter)
    """(what, which content) -> times: truncated, too_long and nothing_scored (no row left), split (several rows), pieces (rows beyond the
    first), rests (what was left of a text and has nothing to score)."""

    def add(self, source: int, label: str | None, **values: Any) -> None:
        """One more row; `values` are its columns."""
        self.source.append(source)
        self.labels.append(label)
        for name, value in values.items():
            self.columns[name].append(value)


def piece_id(id_: str, number: int) -> str:
    """Id of a row that is one of several of a text: they stay together, and in order."""
    return f"{id_[:24]}{number:08x}"


def _settle(made: Encoded, i: int, kept: int, dropped: int) -> None:
    """Tallies of a text that became `kept` rows, and `dropped` pieces in which nothing is scored."""
    made.tallies["nothing_scored", i] += not kept
    made.tallies["rests", i] += dropped if kept else 0
    made.tallies["split", i] += kept > 1
    made.tallies["pieces", i] += max(0, kept - 1)


@dataclass(frozen=True)
class Cut:
    """A text in the tokens of one tokenizer."""

    tokens: list[int]
    ends: list[int]
    """Characters of the text before the first token, and at the end of each. Special tokens end where the one before them does."""
    keys: list[int]
    """Of each token the characters up to its end, where a whole prefix of the text is said with it and the next word is foretold; else -1.

    So of several tokens of one character only the last has one, and of special tokens the last of those that a text begins with: 0.
    """


def cuts(tokenizer: Any, contents: list[Any]) -> Iterator[Cut]:
    """A text has the special tokens that the tokenizer adds; where that are none, its end-of-text token stands at the end."""
    end = [] if tokenizer.num_special_tokens_to_add(pair=False) or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    found = tokenizer(contents, return_offsets_mapping=True, verbose=False)
    for tokens, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
        stops = np.array([stop for _, stop in offsets] + [0] * len(end), np.int64)
        written = np.flatnonzero(stops > 0)
        keys = np.full(len(stops), -1, np.int64)
        last = np.append(stops[written][1:] != stops[written][:-1], True)[: len(written)]
        keys[written[last]] = stops[written[last]]
        if len(written) and written[0] > 0:
            keys[written[0] - 1] = 0
        yield Cut(tokens + end, np.maximum.accumulate([0, *stops]).tolist(), keys.tolist())


def encode_causal(
    task: CausalLM, tokenizer: Any, ids: list[str], contents: list[Any], labels: list[str | None], made: Encoded, reader: Any = None
) -> None:
    """Rows of up to max_length tokens of each text; all but the first token of a row are scored. reader: of a reading, see `_read`."""
    its = cuts(reader, contents) if reader is not None else itertools.repeat(None)
    for i, (found, other) in enumerate(zip(cuts(tokenizer, contents), its, strict=False)):
        tokens, ends = found.tokens, found.ends
        if len(tokens) > task.max_length and task.too_long == "drop":
            made.tallies["too_long", i] += 1
            continue
        kept = dropped = 0
        for start in range(0, len(tokens), task.max_length):
            row = tokens[start : start + task.max_length]
            if len(row) < 2:
                dropped += 1
                continue
            text = contents[i][ends[start] : ends[start + len(row)]]
            columns: dict[str, Any] = _columns(found, start, start + len(row), contents[i])
            if other is not None:
                columns, cut_off = _read(task, contents[i], found, (start, start + len(row)), other, reader)
                made.tallies["truncated", i] += cut_off
            made.add(i, None, id=piece_id(ids[i], kept), text=text.strip(), **columns)
            kept += 1
        _settle(made, i, kept, dropped)


def _columns(found: Cut, start: int, stop: int, text: str) -> dict[str, Any]:
    """Of a row of the tokens from start to stop."""
    scored = max(0, stop - start - 1)
    written = text[found.ends[min(start + 1, stop)] : found.ends[stop]]
    return {
        "input_ids": found.tokens[start:stop],
        "length": stop - start,
        "scored": scored,
        "labelled": scored,
        "bytes": len(written.encode()),
    }


def _read(task: CausalLM, text: str, found: Cut, row: tuple[int, int], other: Cut, reader: Any) -> tuple[dict[str, Any], bool]:
    """A row of another tokenizer: its tokens that end in the text of `row`, and which of its scored places are one of the row's, by `Cut.keys`.

    A token that reaches over the beginning belongs to the row, and so no piece of the text is missing; beyond max_length it is cut off, and
    that is said. Where no token ends in the row, it is one filler that nothing is said about.
    """
    ends, (start, stop) = other.ends[1:], row
    first = 0 if start == 0 else bisect.bisect_right(ends, found.ends[start])
    last = bisect.bisect_right(ends, found.ends[stop])
    cut_off = last - first > task.max_length
    last = min(last, first + task.max_length)
    columns = _columns(other, first, last, text)
    if first == last:
        filler = next((token for token in (reader.eos_token_id, reader.pad_token_id) if token is not None), 0)
        columns |= {"input_ids": [filler], "length": 1}
    places = {key: place for place, key in enumerate(found.keys[start : stop - 1]) if key >= 0}
    theirs = [places.get(key, -1) for key in other.keys[first : max(first, last - 1)]]
    return {**columns, "theirs": theirs, "told": stop - start - 1, "aligned": sum(place >= 0 for place in theirs)}, cut_off


def encode_masked(task: MaskedLM, tokenizer: Any, ids: list[str], contents: list[Any], labels: list[str | None], made: Encoded) -> None:
    """Rows of up to max_length tokens of each text, each with the special tokens of a whole text, some of the others hidden."""
    found = tokenizer(
        contents, truncation=True, max_length=task.max_length, return_overflowing_tokens=True, return_offsets_mapping=True,
        return_special_tokens_mask=True, verbose=False,
    )  # fmt: skip
    pieces: dict[int, list[int]] = defaultdict(list)
    for piece, i in enumerate(found["overflow_to_sample_mapping"]):
        pieces[i].append(piece)
    ordinary = ordinary_ids(tokenizer)
    for i in range(len(contents)):
        if len(pieces[i]) > 1 and task.too_long == "drop":
            made.tallies["too_long", i] += 1
            continue
        kept = 0
        for piece in pieces[i]:
            row, offsets = np.array(found["input_ids"][piece]), [o for o in found["offset_mapping"][piece] if o[1]]
            free = (np.array(found["special_tokens_mask"][piece]) == 0) & np.isin(row, ordinary)
            if not free.any():
                continue
            id_ = piece_id(ids[i], kept)
            hidden, places = hide(row, np.flatnonzero(free), task.mask, id_, tokenizer.mask_token_id, ordinary)
            text = contents[i][min((start for start, _ in offsets), default=0) : max((stop for _, stop in offsets), default=0)]
            made.add(i, None, id=id_, text=text, length=len(row), scored=len(places), labelled=len(places),
                     input_ids=hidden.tolist(), places=places.tolist(), labels=row[places].tolist())  # fmt: skip
            kept += 1
        _settle(made, i, kept, len(pieces[i]) - kept)


def ordinary_ids(tokenizer: Any) -> np.ndarray:
    """Ids of all tokens that stand for text, ascending: those that can be hidden."""
    special = {*tokenizer.all_special_ids, *tokenizer("")["input_ids"]}
    return np.array(sorted(set(tokenizer.get_vocab().values()) - special), np.int64)


def hide(row: np.ndarray, free: np.ndarray, share: float, id_: str, mask: int, ordinary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A row [tokens] with a share of the `free` places hidden, at least one, and these places, sorted. The id alone decides which.

    8 in 10 become the mask token, 1 a random one of `ordinary`, 1 stays what it is (Devlin et al. 2019).
    """
    # The stream of RandomState is frozen: the same bytes under every version of numpy.
    random = np.random.RandomState([int(id_[i : i + 8], 16) for i in range(0, 32, 8)])
    count = max(1, round(share * len(free)))
    places = np.sort(random.permutation(free)[:count])
    draw, others = random.random_sample(count), ordinary[random.randint(0, len(ordinary), count)]
    hidden = row.copy()
    hidden[places] = np.where(draw < 0.8, mask, np.where(draw < 0.9, others, row[places]))
    return hidden, places
