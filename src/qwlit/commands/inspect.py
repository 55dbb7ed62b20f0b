"""`inspect`: show the data as the model will see it, without training."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.text import Text

from qwlit.commands.options import own_options, typed_number
from qwlit.config.compose import compose
from qwlit.config.run import RunConfig
from qwlit.core.console import console
from qwlit.core.errors import ConfigError, one_line
from qwlit.core.streams import write_json
from qwlit.data.inspect import length_histogram, spans
from qwlit.data.samples import Samples
from qwlit.data.splits import DataSplit, split_data
from qwlit.data.store import quarantine_reasons
from qwlit.data.templates import FAMILIES, ChatTemplate

if TYPE_CHECKING:
    from qwlit.planning.tokenized_data import TokenizedData

OUTPUTS = ("text", "json")
SAMPLES_SHOWN, STEPS_SHOWN, REASONS_SHOWN = 3, 3, 10
BAR_WIDTH = 40
LONGEST_SYSTEM_TEXT = 200


def main(arguments: list[str]) -> None:
    own, overrides = own_options(arguments, {"output": OUTPUTS, "sample": None})
    sample = typed_number(own, "sample", least=0)
    inspect(compose(overrides).config, str(own["output"]), sample)


def inspect(config: RunConfig, output: str, sample: int | None) -> None:
    """Tokenize the data if needed and show them: samples as JSON lines, or a page for a person.

    Raises:
        ConfigError, DataError: as `train` would raise on the same data. Quarantined rows are printed first.
    """
    # Importing this takes seconds: a wrong option must end the command before.
    from qwlit.planning.tokenized_data import load_tokenized_data

    screen = console(stderr=output == "json")
    tokenized = load_tokenized_data(config, screen)
    if sample is None:
        _show_row_counts(tokenized, screen)
    data = split_data(config.data, tokenized.training, tokenized.validation)
    if sample is not None and sample >= len(data.train):
        raise ConfigError(f"sample={sample}: there are {len(data.train)} samples, 0 to {len(data.train) - 1}")
    if output == "json":
        for line in _json_lines(data.train, range(len(data.train)) if sample is None else [sample]):
            write_json(line)
    elif sample is not None:
        _show_sample(data.train, sample, tokenized, screen)
        _show_tokens(data.train, sample, tokenized, screen)
    else:
        _show_data(data, tokenized, config, screen)
        for index in range(min(SAMPLES_SHOWN, len(data.train))):
            _show_sample(data.train, index, tokenized, screen)


def _json_lines(samples: Samples, indices: Any) -> Iterator[str]:
    for index in indices:
        input_ids, loss_mask = samples.read([index])
        yield json.dumps(
            {
                "sample": index,
                "input_ids": input_ids.tolist(),
                "loss_mask": loss_mask.tolist(),
                "num_supervised_tokens": int(loss_mask.sum()),
            }
        )


def _show_row_counts(tokenized: "TokenizedData", screen: Console) -> None:
    """Print how many rows were accepted, too long or quarantined, and the reasons."""
    stores = [("data.path", store) for store in tokenized.training]
    stores += [("data.val_path", store) for store in tokenized.validation]
    for setting, store in stores:
        counts = store.row_counts
        parts = f"{counts.accepted:,} accepted + {counts.too_long:,} too long + {counts.quarantined:,} quarantined"
        more = [f"{getattr(counts, name):,} {name}" for name in ("truncated", "split", "duplicates")]
        rows = f"the first {counts.read:,} rows" if store.stopped_early else f"{counts.read:,} rows"
        screen.print(f"[bold]{setting}[/]  {escape(store.path)}: {rows} = {parts}; {', '.join(more)}")
    found = quarantine_reasons(store for _, store in stores)
    if found:
        screen.print("\n[bold]quarantined[/]")
    for reason in found[:REASONS_SHOWN]:
        origin = f"{reason.first['file']}:{reason.first['line']}"
        screen.print(f"  {reason.num_rows:>7,}  {escape(reason.text)}  [dim]{escape(origin)}[/]")
    if len(found) > REASONS_SHOWN:
        rest = sum(reason.num_rows for reason in found[REASONS_SHOWN:])
        screen.print(f"  {rest:>7,}  for {len(found) - REASONS_SHOWN} other reasons")


def _show_data(data: DataSplit, tokenized: "TokenizedData", config: RunConfig, screen: Console) -> None:
    """Print what the loss covers, the lengths of the samples, and the micro-batches of the first steps."""
    chat = tokenized.encoder.chat
    screen.print(f"\n[bold]training data[/]  {escape(data.describe())}")
    if chat is not None:
        supervision = chat.supervision
        template = f"{chat.template.name}{_other_system_text(chat.template, config.data.system)}"
        screen.print(f"  template {escape(template)}, loss on {supervision.loss_on}, thinking {supervision.thinking}")
    for text in (*data.describe_shares(config.seed), *data.remarks):
        screen.print(f"  {escape(text)}")
    _show_lengths(data.train, screen)
    _show_steps(data, config, screen)


def _other_system_text(template: ChatTemplate, typed: str | None) -> str:
    """Describe the template's default system text if it is typed or not the family's default, else return ""."""
    if typed is not None:
        return f" with data.system='{one_line(typed, LONGEST_SYSTEM_TEXT)}'"
    text = template.default_system
    family = FAMILIES.get(template.name)
    if text == (family.default_system if family else None):
        return ""
    if text is None:
        return " without a default system text"
    return f" with the tokenizer's own system text '{one_line(text, LONGEST_SYSTEM_TEXT)}'"


def _show_lengths(samples: Samples, screen: Console) -> None:
    screen.print("\n[bold]tokens per sample[/]")
    histogram = length_histogram(samples)
    most = max(count for _, _, count in histogram)
    for shortest, longest, count in histogram:
        bar = "▇" * max(round(BAR_WIDTH * count / most), count > 0)
        screen.print(f"  {shortest:>7,} – {longest:>7,}  [cyan]{bar:<{BAR_WIDTH}}[/] {count:>9,}")


def _show_steps(data: DataSplit, config: RunConfig, screen: Console) -> None:
    """Print the micro-batches of the first steps as bars; a sample's part of the bar is proportional to its length."""
    from qwlit.planning.steps import build_step_plan

    hardware = config.hardware
    world_size = (1 if hardware.devices == "auto" else hardware.devices) * hardware.num_nodes
    plan = build_step_plan(config, data, world_size)
    how = "packed end to end" if plan.packing else "padded"
    on = f"{world_size} devices" if world_size > 1 else "one device"
    screen.print(f"\n[bold]the first steps[/]  {plan.global_batch_size} samples each, on {on}, {how}")
    for step in range(STEPS_SHOWN):
        ids = plan.samples(step)
        supervised = int(data.train.num_supervised(ids).sum())
        screen.print(f"  step {step + 1}: {int(data.train.lengths(ids).sum()):,} tokens, {supervised:,} supervised")
        layout = [(rank, micro) for rank, micros in enumerate(plan.layout(ids)) for micro in micros if not micro.filler]
        sums = [int(data.train.lengths(ids[list(micro.members)]).sum()) for _, micro in layout]
        for (rank, micro), tokens in zip(layout, sums, strict=True):
            members = ids[list(micro.members)]
            lengths = data.train.lengths(members).tolist()
            bar = "".join("▇" * max(0, round(BAR_WIDTH * length / max(sums)) - 1) + "▏" for length in lengths)
            named = " ".join(map(str, members[:8].tolist())) + (" …" if len(members) > 8 else "")
            screen.print(f"    device {rank}  [cyan]{bar}[/] {tokens:,} tokens  [dim]samples {named}[/]")


def _show_sample(samples: Samples, index: int, tokenized: "TokenizedData", screen: Console) -> None:
    """Print a sample's text. Supervised tokens are green, or in double brackets on a screen without colours."""
    input_ids, loss_mask = samples.read([index])
    counts = f"{len(input_ids):,} tokens, {int(loss_mask.sum()):,} supervised"
    screen.print(f"\n[bold]sample {index}[/]  {escape(samples.origin(index))}  {counts}")
    colours = screen.color_system is not None and not screen.no_color
    text = Text()
    was_supervised = False
    for span in spans(input_ids, loss_mask, _control_ids(tokenized)):
        if not colours and span.supervised != was_supervised:
            text.append("[[" if span.supervised else "]]")
        was_supervised = span.supervised
        style = "green" if span.supervised else "dim"
        shown = _decode(tokenized, span.ids)
        # A line break is a token too: make visible that it is supervised.
        shown = shown.replace("\n", "↵\n") if span.supervised else shown
        text.append(shown, f"{style} reverse" if span.kind == "control" else style)
    text.append("]]" if was_supervised and not colours else "")
    screen.print(text)


def _show_tokens(samples: Samples, index: int, tokenized: "TokenizedData", screen: Console) -> None:
    screen.print("\n[bold]position      id  supervised  token[/]")
    input_ids, loss_mask = samples.read([index])
    for position, (token, supervised) in enumerate(zip(input_ids.tolist(), loss_mask.tolist(), strict=True)):
        mark = "[green]yes[/]" if supervised else "   "
        screen.print(f"{position:>8}  {token:>6}  {mark}         {escape(repr(_decode(tokenized, (token,))))}")


def _control_ids(tokenized: "TokenizedData") -> set[int]:
    tokenizer = tokenized.encoder.tokenizer
    return set(tokenizer.control_ids.values()) if tokenizer else set()


def _decode(tokenized: "TokenizedData", ids: tuple[int, ...]) -> str:
    if tokenized.tokenizer is None:
        return " ".join(map(str, ids)) + " "
    return str(tokenized.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
