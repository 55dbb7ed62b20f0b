"""Builds the demo corpus and its tokenizer: `python scripts/make_demo.py`, from the repository root.

The corpus asks for a date, a clock time, an amount of money or a measure to be rewritten in another style. Babel's
CLDR rules write the answers, so the text is true, bilingual and free of anybody's copyright, and a tiny model learns it
in minutes. Validation draws other values than training, so its exact match measures a learned rule and not memory.

Every run makes the same files. The chat template beside the tokenizer is written by hand and is read, not made, here.
"""

import datetime
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any

from babel.dates import format_date, format_skeleton
from babel.numbers import format_currency
from babel.units import format_unit

FOLDER = Path(__file__).parents[1] / "src/qwlit/resources/demo"
ROWS = {"train": 8000, "val": 400}
SHAPES = {"plain": 88, "thinking": 5, "turns": 4, "tool": 1, "system": 2}
"""Percent of the rows."""
VOCAB_SIZE = 520
"""Control tokens included."""

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
"""Control tokens that decoding keeps with `skip_special_tokens=True`, as in Qwen3."""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

STYLES = {
    "en": {
        "iso": "ISO form",
        "en": "English",
        "en_short": "short English",
        "zh": "Chinese",
        "zh_short": "short Chinese",
    },
    "zh": {"iso": "ISO 格式", "en": "英文", "en_short": "英文简写", "zh": "中文", "zh_short": "中文简写"},
}
"""Prompt language -> style -> what a prompt calls it."""
REQUESTS = {
    "en": (
        "Write {text} in {style}.",
        "Rewrite {text} in {style}.",
        "How do I write {text} in {style}?",
        "{text} in {style}, please.",
    ),
    "zh": ("把{text}写成{style}。", "请用{style}表示{text}。", "{text}用{style}怎么写？", "将 {text} 改写为{style}。"),
}
FOLLOW_UPS = {
    "en": ("Now in {style}.", "And in {style}?"),
    "zh": ("再写成{style}。", "用{style}呢？"),
}
THINK_FIRST = {"en": " Think first.", "zh": "先想一想。"}
SYSTEM = {"en": "Rewrite each message in {style}.", "zh": "把每条消息改写成{style}。"}

CURRENCIES = ("CNY", "USD", "EUR", "GBP", "HKD", "INR")
UNITS = {
    "length-kilometer": "short",
    "length-meter": "short",
    "mass-kilogram": "long",
    "mass-gram": "long",
    "volume-liter": "short",
    "duration-hour": "short",
    "duration-minute": "short",
    "temperature-celsius": "long",
}
"""CLDR unit -> the length at which Babel finds its Chinese name; the other is an alias that Babel does not follow."""


@dataclass(frozen=True)
class Value:
    """One date, time, amount or measure, and all the ways a prompt or an answer may write it."""

    kind: str
    key: str
    """What the split goes by. An amount's or a measure's is its number alone, whatever the currency or unit."""
    parts: tuple[tuple[str, str, str], ...]
    """(English name, Chinese name, text) of what the value consists of: the reasoning."""
    forms: dict[str, str]
    """Style -> text. The first one is also how a tool takes the value."""

    @property
    def held_out(self) -> bool:
        """Whether the value belongs to validation: about one in ten does."""
        return zlib.crc32(f"{self.kind} {self.key}".encode()) % 10 == 0

    def reasoning(self, language: str) -> str:
        if language == "en":
            return ", ".join(f"{name} {text}" for name, _, text in self.parts)
        return "，".join(f"{name} {text}" for _, name, text in self.parts)


@dataclass(frozen=True)
class Sample:
    value: Value
    row: dict[str, Any]


def draw_date(rng: Random) -> Value:
    day = datetime.date(2000, 1, 1) + datetime.timedelta(days=rng.randrange(30 * 365))
    forms = {
        "iso": day.isoformat(),
        "en": format_date(day, "long", "en_US"),
        "en_short": format_date(day, "medium", "en_US"),
        "zh": format_date(day, "long", "zh_CN"),
        "zh_short": format_date(day, "short", "zh_CN"),
    }
    parts = (("year", "年", str(day.year)), ("month", "月", str(day.month)), ("day", "日", str(day.day)))
    return Value("date", forms["iso"], parts, forms)


def draw_time(rng: Random) -> Value:
    # 00:00 and 12:00 have words of their own in CLDR: two exceptions, too rare to be learned.
    time = datetime.time(rng.randrange(24), rng.randrange(1, 60))
    forms = {
        "iso": time.isoformat("minutes"),
        # The skeleton's plain space; CLDR's ready-made English times have U+202F there, which nobody types.
        "en": format_skeleton("hm", time, locale="en_US"),
        "zh": format_skeleton("Bhm", time, locale="zh_CN"),
    }
    parts = (("hour", "时", str(time.hour)), ("minute", "分", str(time.minute)))
    return Value("time", forms["iso"], parts, forms)


def draw_amount(rng: Random) -> Value:
    number = Decimal(rng.randrange(200, 10 ** rng.randint(3, 5))) / 100
    code = rng.choice(CURRENCIES)
    forms = {
        "iso": f"{code} {number:.2f}",
        "en": format_currency(number, code, locale="en_US", format_type="name"),
        "en_short": format_currency(number, code, locale="en_US"),
        "zh": format_currency(number, code, locale="zh_CN", format_type="name"),
        "zh_short": format_currency(number, code, locale="zh_CN"),
    }
    parts = (("currency", "货币", code), ("number", "数值", f"{number:.2f}"))
    return Value("amount", f"{number:.2f}", parts, forms)


def draw_measure(rng: Random) -> Value:
    number = Decimal(rng.randrange(2, 10 ** rng.randint(1, 3)))
    number += Decimal(rng.choice((0, rng.randrange(1, 10)))) / 10
    unit = rng.choice(list(UNITS))
    forms = {
        "en_short": format_unit(number, unit, "short", locale="en_US"),
        "en": format_unit(number, unit, "long", locale="en_US"),
        "zh": format_unit(number, unit, UNITS[unit], locale="zh_CN"),
    }
    symbol = forms["en_short"].removeprefix(str(number)).strip()
    parts = (("number", "数值", str(number)), ("unit", "单位", symbol))
    return Value("measure", str(number), parts, forms)


DRAWS = {draw_date: 4, draw_time: 3, draw_amount: 2, draw_measure: 2}
"""How often each is drawn: dates and times have the most rules to be learned."""


def draw_value(rng: Random, split: str) -> Value:
    (draw,) = rng.choices(list(DRAWS), DRAWS.values())
    while True:
        value = draw(rng)
        if value.held_out == (split == "val"):
            return value


def tool_for(kind: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {kind: {"type": "string"}, "style": {"type": "string"}},
        "required": [kind, "style"],
    }
    function = {"name": f"format_{kind}", "description": f"Write the {kind} in a style.", "parameters": parameters}
    return {"type": "function", "function": function}


def make_sample(rng: Random, split: str, shape: str) -> Sample:
    """One conversation of the given shape; its prompt and its value leave exactly one right answer."""
    value = draw_value(rng, split)
    language = rng.choice(list(STYLES))
    styles = STYLES[language]
    source, target, second = rng.sample(list(value.forms), 3)
    text, answer = value.forms[source], value.forms[target]
    request = rng.choice(REQUESTS[language]).format(text=text, style=styles[target])
    reply = {"role": "assistant", "content": answer}
    messages: list[dict[str, Any]] = [{"role": "user", "content": request}, reply]

    if shape == "thinking":
        messages[0]["content"] += THINK_FIRST[language]
        reply["reasoning_content"] = value.reasoning(language)
    elif shape == "turns":
        follow_up = rng.choice(FOLLOW_UPS[language]).format(style=styles[second])
        messages += [{"role": "user", "content": follow_up}, {"role": "assistant", "content": value.forms[second]}]
    elif shape == "system":
        messages[0]["content"] = text
        messages.insert(0, {"role": "system", "content": SYSTEM[language].format(style=styles[target])})
    elif shape == "tool":
        arguments = {value.kind: next(iter(value.forms.values())), "style": styles[target]}
        call = {"type": "function", "function": {"name": f"format_{value.kind}", "arguments": arguments}}
        messages[1:1] = [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": answer},
        ]
        return Sample(value, {"messages": messages, "tools": [tool_for(value.kind)]})
    return Sample(value, {"messages": messages})


def make_corpus(split: str) -> list[Sample]:
    """The samples of one split, shuffled, no conversation twice."""
    rng = Random(split)
    samples: dict[str, Sample] = {}
    for shape, percent in SHAPES.items():
        enough = len(samples) + ROWS[split] * percent // 100
        while len(samples) < enough:
            sample = make_sample(rng, split, shape)
            samples.setdefault(to_json(sample.row), sample)
    shuffled = list(samples.values())
    rng.shuffle(shuffled)
    return shuffled


def to_json(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False)


def jsonl(samples: Iterable[Sample]) -> str:
    return "".join(to_json(sample.row) + "\n" for sample in samples)


def plain_text(rows: Iterable[dict[str, Any]], template: str) -> Iterator[str]:
    """What lies between the control tokens of the rendered rows, for the BPE to learn from.

    Chinese has no spaces, so the names of styles are cut out of their sentences: no token shall glue one to its verb.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    controls = "|".join(re.escape(token) for token in SPECIAL_TOKENS + MARKUP_TOKENS)
    names = "中文|英文|简写|格式"
    for row in rows:
        rendered, _ = render_jinja_template([row["messages"]], tools=row.get("tools"), chat_template=template)
        yield from filter(None, re.split(f"{controls}|({names})", rendered[0]))


def train_tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE of Qwen's make: its normalizer, its pre-tokenization, control tokens after the vocabulary."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Split(Regex(QWEN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = Sequence([split, ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS + MARKUP_TOKENS),
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "unk_token": None,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }


def make_files(corpus: dict[str, list[Sample]]) -> dict[str, str]:
    """Path below the demo folder -> text, for all files but the template."""
    template = (FOLDER / "tokenizer/chat_template.jinja").read_text(encoding="utf-8")
    tokenizer = train_tokenizer(plain_text((sample.row for sample in corpus["train"]), template))
    return {f"{split}.jsonl": jsonl(samples) for split, samples in corpus.items()} | {
        "tokenizer/tokenizer.json": tokenizer.to_str(pretty=True) + "\n",
        "tokenizer/tokenizer_config.json": json.dumps(tokenizer_config(), indent=2) + "\n",
    }


def main() -> None:
    corpus = {split: make_corpus(split) for split in ROWS}
    for name, text in make_files(corpus).items():
        (FOLDER / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
