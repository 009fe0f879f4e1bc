"""Held-out accuracy by family.

An answer counts when every one of its tokens, the end included, is the model's first choice given
the tokens before it: exactly then greedy decoding writes it.
"""

from collections.abc import Callable, Sequence

import numpy as np
from tokenizers import Tokenizer

from sona.bench.tasks import TWO_VOICED, Item
from sona.models.nano.data import LENGTHS, TRAINED, answer_ids, chat_ids, held_out
from sona.models.nano.tokenizer import PAD_ID

Predict = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""tokens [B,T] -> (nll [B,T], best next token [B,T])."""

_ROWS = 64


def held_out_accuracy(
    predict: Predict, tokenizer: Tokenizer, *, num_items: int, seed: int
) -> dict[str, float]:
    """Share of right answers per family. F5 and F6: mean chance of the first voice."""
    result: dict[str, float] = {}
    for index, family in enumerate(TRAINED):
        items = held_out(family, np.random.default_rng([seed, index]), num_items)
        result[family.name] = float(np.mean(scores(predict, tokenizer, items)))
    return result


def scores(predict: Predict, tokenizer: Tokenizer, items: Sequence[Item]) -> np.ndarray:
    """One number per item: 1 right, 0 wrong; for two voices the chance of the first voice."""
    rows = [_row(tokenizer, item, item.answer) for item in items]
    found = np.zeros(len(items))
    for length in LENGTHS:
        chosen = [i for i, (ids, _) in enumerate(rows) if _fitting(len(ids)) == length]
        for start in range(0, len(chosen), _ROWS):
            part = chosen[start : start + _ROWS]
            found[part] = _score_rows(predict, [rows[i] for i in part], length)
    if items[0].family in TWO_VOICED:
        return found
    return (found > 0.5).astype(float)


def _row(tokenizer: Tokenizer, item: Item, answer: str) -> tuple[list[int], int]:
    prompt = chat_ids(tokenizer, item)
    end = 1 if item.family in TWO_VOICED else None  # two voices part at the first token
    return prompt + answer_ids(tokenizer, answer)[:end], len(prompt)


def _score_rows(
    predict: Predict, rows: Sequence[tuple[list[int], int]], length: int
) -> list[float]:
    num_rows = _ROWS if length < LENGTHS[-1] else 4
    out: list[float] = []
    for start in range(0, len(rows), num_rows):
        some = rows[start : start + num_rows]
        tokens = np.full((num_rows, length), PAD_ID, np.int32)
        for index, (ids, _) in enumerate(some):
            tokens[index, : len(ids)] = ids
        nll, best = predict(tokens)
        for index, (ids, begin) in enumerate(some):
            if len(ids) == begin + 1:  # one token: its chance
                out.append(float(np.exp(-nll[index, begin - 1])))
            else:
                out.append(float(ids[begin:] == best[index, begin - 1 : len(ids) - 1].tolist()))
    return out


def _fitting(length: int) -> int:
    return next(n for n in LENGTHS if n >= length)
