"""Scorers: how good an answer is, compared with the expected one, from 0 to 1."""

import importlib
import math
import re
import sys
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from qwlit.core.errors import ConfigError, nearest, one_line
from qwlit.core.extras import import_extra

Scorer = Callable[[str, str], float]
"""(answer, expected) → score."""
HAN_OR_KANA = r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"


def exact_match(answer: str, expected: str) -> float:
    """1 if the answer is the expected one, apart from spaces around it."""
    return float(answer.strip() == expected.strip())


def containment(answer: str, expected: str) -> float:
    """1 if the answer contains the expected one."""
    return float(expected.strip() in answer)


def rouge_l(answer: str, expected: str) -> float:
    """ROUGE-L: F1 of the longest common subsequence of words, in Chinese and Japanese of characters (Lin, 2004)."""
    # Own code: the package rouge-score reads a to z and digits alone, and has had no release since 2022.
    found, wanted = (
        re.findall(rf"{HAN_OR_KANA}|(?:(?!{HAN_OR_KANA})\w)+", text.lower()) for text in (answer, expected)
    )
    lengths = [0] * (len(wanted) + 1)
    for word in found:
        earlier = lengths.copy()
        for index, other in enumerate(wanted, 1):
            lengths[index] = earlier[index - 1] + 1 if word == other else max(earlier[index], lengths[index - 1])
    return 2 * lengths[-1] / (len(found) + len(wanted)) if lengths[-1] else 0.0


def bleu(answer: str, expected: str) -> float:
    """BLEU of one sentence, words or Chinese characters, n-grams as far as the texts have them (package sacrebleu)."""
    return float(_bleu(bool(re.search(HAN_OR_KANA, expected))).sentence_score(answer, [expected]).score) / 100


@cache
def _bleu(chinese: bool) -> Any:
    module = import_extra("sacrebleu.metrics", package="sacrebleu", setting="metrics=bleu")
    return module.BLEU(effective_order=True, tokenize="zh" if chinese else "13a")


SCORERS: dict[str, Scorer] = {
    "exact_match": exact_match,
    "containment": containment,
    "rouge_l": rouge_l,
    "bleu": bleu,
}


def find_scorer(name: str) -> Scorer:
    """Return the scorer of this name, or the function that module:function names, from the current folder too.

    Only the command line names functions: a settings file of somebody else cannot run code.

    Raises:
        ConfigError: there is none, or its package is missing.
    """
    if name in SCORERS:
        SCORERS[name]("a", "a")  # a missing package shows before the model is loaded
        return SCORERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        hint = nearest(name, SCORERS) or f" Known: {', '.join(SCORERS)}."
        if "," in name:
            hint = f" Several are written metrics=[{name}]."
        raise ConfigError(f"metrics={name}: no such metric.{hint} For a function of your own write module:function")
    sys.path.insert(0, str(Path.cwd()))
    try:
        scorer: Scorer = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # a module of the user can raise anything
        raise ConfigError(f"metrics={name}: cannot be imported ({type(error).__name__}: {error})") from None
    finally:
        sys.path.pop(0)
    return partial(_own_score, name, scorer)


def _own_score(name: str, scorer: Scorer, answer: str, expected: str) -> float:
    try:
        score = float(scorer(answer, expected))
        if not math.isfinite(score):
            raise ValueError(f"{score} is not finite")
        return score
    except Exception as error:  # a function of the user can raise anything
        said = one_line(f"{type(error).__name__}: {error}", 300)
        _, *inside = traceback.extract_tb(error.__traceback__)
        if inside:
            raise ConfigError(f"metrics={name}: {inside[0].filename}:{inside[0].lineno} raised {said}") from None
        raise ConfigError(f"metrics={name}: takes no (answer, expected), or returns no number ({said})") from None
