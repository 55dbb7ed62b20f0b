"""`inspect`: shows the data as the model will see it, and trains nothing."""

import json
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qwlit.commands.help import inspect_help
from qwlit.commands.words import own_words
from qwlit.config.compose import compose
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, one_line

if TYPE_CHECKING:
    from qwlit.config.run import RunConfig
    from qwlit.data.samples import Samples
    from qwlit.data.splits import DataSplit
    from qwlit.data.templates import Family
    from qwlit.planning.tokenized_data import TokenizedData

OUTPUTS = ("text", "json")
SAMPLES_SHOWN, STEPS_SHOWN, REASONS_SHOWN = 3, 3, 10
BAR_WIDTH = 40
LONGEST_SYSTEM_TEXT = 200


def main(arguments: list[str]) -> int:
    if any(word in ("-h", "--help") for word in arguments):
        print(inspect_help(), end="")
        return 0
    own, overrides = own_words(arguments, {"output": OUTPUTS, "sample": None})
    sample = _sample(own["sample"] or None)
    config = compose(overrides).config
    try:
        inspect(config, str(own["output"]), sample)
    except BrokenPipeError:
        # The reader has seen enough (`| head`).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _sample(text: str | None) -> int | None:
    if text is not None and not text.isdecimal():
        raise ConfigError(f"sample={text}: give a sample's number, counted from 0")
    return None if text is None else int(text)


def inspect(config: "RunConfig", output: str, sample: int | None) -> None:
    """Tokenize what is not yet tokenized and show it: samples as JSON lines, or everything a person wants to see.

    Raises:
        ConfigError, DataError: what `train` would say of the same data; what was put aside is shown before.
    """
    from qwlit.data.splits import split_data
    from qwlit.planning.tokenized_data import load_tokenized_data

    screen = console(stderr=output == "json")
    tokenized = load_tokenized_data(config, screen)
    if sample is None:
        _show_account(tokenized, screen)
    data = split_data(config.data, tokenized.training, tokenized.validation)
    if sample is not None and sample >= len(data.train):
        raise ConfigError(f"sample={sample}: there are {len(data.train)} samples, 0 to {len(data.train) - 1}")
    if output == "json":
        for line in _json_lines(data.train, range(len(data.train)) if sample is None else [sample]):
            print(line)
    elif sample is not None:
        _show_sample(data.train, sample, tokenized, screen)
        _show_tokens(data.train, sample, tokenized, screen)
    else:
        _show_data(data, tokenized, config, screen)
        for number in range(min(SAMPLES_SHOWN, len(data.train))):
            _show_sample(data.train, number, tokenized, screen)


def _json_lines(samples: "Samples", numbers: Any) -> Iterator[str]:
    for number in numbers:
        input_ids, loss_mask = samples.sample(number)
        yield json.dumps(
            {
                "sample": number,
                "input_ids": input_ids.tolist(),
                "loss_mask": loss_mask.tolist(),
                "num_supervised_tokens": int(loss_mask.sum()),
            }
        )


def _show_account(tokenized: "TokenizedData", screen: Console) -> None:
    """Print what became of every row, and why rows were put aside."""
    from qwlit.data.store import rejections

    stores = [("data.path", store) for store in tokenized.training]
    stores += [("data.val_path", store) for store in tokenized.validation]
    for setting, store in stores:
        account = store.account
        parts = f"{account.accepted:,} accepted + {account.too_long:,} too long + {account.quarantined:,} put aside"
        more = [f"{getattr(account, name):,} {name}" for name in ("truncated", "split", "duplicates")]
        screen.print(f"[bold]{setting}[/]  {escape(store.path)}: {account.read:,} rows = {parts}; {', '.join(more)}")
    found = rejections(store for _, store in stores)
    if found:
        screen.print("\n[bold]put aside[/]")
    for rejection in found[:REASONS_SHOWN]:
        place = f"{rejection.first['file']}:{rejection.first['line']}"
        screen.print(f"  {rejection.number:>7,}  {escape(rejection.reason)}  [dim]{escape(place)}[/]")
    if len(found) > REASONS_SHOWN:
        rest = sum(rejection.number for rejection in found[REASONS_SHOWN:])
        screen.print(f"  {rest:>7,}  for {len(found) - REASONS_SHOWN} other reasons")


def _show_data(data: "DataSplit", tokenized: "TokenizedData", config: "RunConfig", screen: Console) -> None:
    """Print what is learnt of the data, how long the samples are, and how the first steps are laid out."""
    chat = tokenized.encoder.chat
    screen.print(f"\n[bold]to train on[/]  {data.describe()}")
    if chat is not None:
        supervision = chat.supervision
        template = f"{chat.template}{_other_system_text(chat.family)}"
        screen.print(f"  template {escape(template)}, loss on {supervision.loss_on}, thinking {supervision.thinking}")
    for text in (*data.describe_shares(config.seed), *data.remarks):
        screen.print(f"  {escape(text)}")
    _show_lengths(data.train, screen)
    _show_steps(data, config, screen)


def _other_system_text(family: "Family") -> str:
    """Return what a tokenizer's template says where a conversation has no system turn, if it is not the family's."""
    from qwlit.data.templates import FAMILIES

    text = family.default_system
    if text == FAMILIES[family.name].default_system:
        return ""
    if text is None:
        return " without a default system text"
    return f" with the tokenizer's own system text '{one_line(text, LONGEST_SYSTEM_TEXT)}'"


def _show_lengths(samples: "Samples", screen: Console) -> None:
    from qwlit.data.inspect import length_histogram

    screen.print("\n[bold]tokens a sample[/]")
    histogram = length_histogram(samples)
    most = max(number for _, _, number in histogram)
    for shortest, longest, number in histogram:
        bar = "▇" * max(round(BAR_WIDTH * number / most), number > 0)
        screen.print(f"  {shortest:>7,} – {longest:>7,}  [cyan]{bar:<{BAR_WIDTH}}[/] {number:>9,}")


def _show_steps(data: "DataSplit", config: "RunConfig", screen: Console) -> None:
    """Print the first steps' micro-batches, each sample as wide as it is long."""
    from qwlit.planning.steps import build_step_plan

    hardware = config.hardware
    world_size = (1 if hardware.devices == "auto" else hardware.devices) * hardware.num_nodes
    plan = build_step_plan(config, data, world_size)
    how = "packed end to end" if plan.packing else "padded"
    on = f"{world_size} devices" if world_size > 1 else "one device"
    screen.print(f"\n[bold]the first steps[/]  {plan.global_batch_size} samples each, on {on}, {how}")
    for step in range(STEPS_SHOWN):
        ids = plan.samples(step)
        learnt = int(data.train.num_supervised(ids).sum())
        screen.print(f"  step {step + 1}: {int(data.train.lengths(ids).sum()):,} tokens, {learnt:,} learnt")
        layout = [(rank, micro) for rank, micros in enumerate(plan.layout(ids)) for micro in micros if not micro.filler]
        sums = [int(data.train.lengths(ids[list(micro.members)]).sum()) for _, micro in layout]
        for (rank, micro), tokens in zip(layout, sums, strict=True):
            members = ids[list(micro.members)]
            lengths = data.train.lengths(members).tolist()
            bar = "".join("▇" * max(0, round(BAR_WIDTH * length / max(sums)) - 1) + "▏" for length in lengths)
            named = " ".join(map(str, members[:8].tolist())) + (" …" if len(members) > 8 else "")
            screen.print(f"    device {rank}  [cyan]{bar}[/] {tokens:,} tokens  [dim]samples {named}[/]")


def _show_sample(samples: "Samples", number: int, tokenized: "TokenizedData", screen: Console) -> None:
    """Print a sample's text: what is learnt in green, or in double brackets where there are no colours."""
    from qwlit.data.inspect import stretches

    input_ids, loss_mask = samples.sample(number)
    counts = f"{len(input_ids):,} tokens, {int(loss_mask.sum()):,} learnt"
    screen.print(f"\n[bold]sample {number}[/]  {escape(samples.origin(number))}  {counts}")
    colours = screen.is_terminal and not screen.no_color
    text = Text()
    was_learnt = False
    for stretch in stretches(input_ids, loss_mask, _control_ids(tokenized)):
        if not colours and stretch.supervised != was_learnt:
            text.append("[[" if stretch.supervised else "]]")
        was_learnt = stretch.supervised
        style = "green" if stretch.supervised else "dim"
        shown = _decode(tokenized, stretch.ids)
        # A line break is a token like others: whether it is learnt should show.
        shown = shown.replace("\n", "↵\n") if stretch.supervised else shown
        text.append(shown, f"{style} reverse" if stretch.kind == "control" else style)
    text.append("]]" if was_learnt and not colours else "")
    screen.print(text)


def _show_tokens(samples: "Samples", number: int, tokenized: "TokenizedData", screen: Console) -> None:
    screen.print("\n[bold]position      id  learnt  token[/]")
    input_ids, loss_mask = samples.sample(number)
    for position, (token, learnt) in enumerate(zip(input_ids.tolist(), loss_mask.tolist(), strict=True)):
        mark = "[green]yes[/]" if learnt else "   "
        screen.print(f"{position:>8}  {token:>6}  {mark}     {escape(repr(_decode(tokenized, (token,))))}")


def _control_ids(tokenized: "TokenizedData") -> set[int]:
    tokenizer = tokenized.encoder.tokenizer
    return set(tokenizer.control_ids.values()) if tokenizer else set()


def _decode(tokenized: "TokenizedData", ids: tuple[int, ...]) -> str:
    if tokenized.tokenizer is None:
        return " ".join(map(str, ids)) + " "
    return str(tokenized.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
