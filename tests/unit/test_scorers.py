"""Scorers of answers, and the scripts of texts."""

from pathlib import Path

import pytest

from qwlit.core.errors import ConfigError
from qwlit.inference.sample_scores import script_of
from qwlit.inference.scorers import bleu, containment, exact_match, find_scorer, rouge_l


@pytest.mark.parametrize(
    ("answer", "expected", "score"),
    [
        # Measured with rouge-score 0.1.2.
        ("the cat sat on the mat", "the cat is on the mat", 5 / 6),
        ("police kill the gunman", "the gunman kill police", 0.5),
        ("a b c d", "d c b a", 0.25),
        ("12 May 2024", "2024 May 12 12", 2 / 7),
        ("", "x", 0.0),
        # By hand: 5 of 6 characters are common.
        ("今天天气很好。", "今天天气不好。", 5 / 6),
        ("Über uns", "über uns", 1.0),
    ],
)
def test_rouge_l_is_that_of_lin_and_reads_chinese_by_characters(answer: str, expected: str, score: float) -> None:
    assert rouge_l(answer, expected) == pytest.approx(score)


def test_bleu_is_one_for_equal_texts_and_reads_chinese_by_characters() -> None:
    assert bleu("the cat is on the mat", "the cat is on the mat") == pytest.approx(1)
    assert bleu("二", "二") == pytest.approx(1)
    assert bleu("今天天气很好。", "今天天气不好。") == pytest.approx(0.4889, abs=1e-4)
    assert bleu("a", "b") == 0


def test_exact_and_contained_answers() -> None:
    assert (exact_match(" 3\n", "3"), exact_match("3.", "3")) == (1, 0)
    assert (containment("it is 3.", "3"), containment("it is 4.", "3")) == (1, 0)


def test_a_function_of_the_current_folder_scores_and_a_wrong_name_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scorer.py").write_text("def same_length(answer, expected): return len(answer) == len(expected)\n")
    monkeypatch.chdir(tmp_path)
    assert find_scorer("own_scorer:same_length")("abc", "xyz")
    for name, said in (
        ("exact", "Did you mean 'exact_match'"),
        ("exact_match,rouge_l", r"Several are written metrics=\[exact_match,rouge_l\]"),
        ("own_scorer:nothing", "cannot be imported"),
        ("nowhere:f", "cannot be imported"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_scorer(name)


def test_what_a_function_of_ones_own_raises_has_its_line_and_a_score_that_is_no_number_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "poor_scorer.py").write_text(
        "def broken(answer, expected):\n    return len(answer) / 0\ndef empty(a, e): return float('nan')\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("broken", r"poor_scorer\.py:2 raised ZeroDivisionError: division by zero$"),
        ("empty", r"returns no number \(ValueError: nan is not finite\)$"),
    ):
        with pytest.raises(ConfigError, match=said):
            find_scorer(f"poor_scorer:{name}")("a", "a")


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello 12", "Latin"),
        ("2002年9月30日是星期一", "Han"),
        ("今日は良い天気です", "Kana"),
        ("Привет", "Cyrillic"),
        ("안녕하세요", "Hangul"),
        ("12:30", "other"),
        ("", "other"),
    ],
)
def test_the_script_of_most_letters(text: str, script: str) -> None:
    assert script_of(text) == script
