"""Load the tokenizer and the tokenized data that the settings name, for training and for `inspect`."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from transformers import PreTrainedTokenizerFast

from qwlit.config.run import RunConfig
from qwlit.core.console import showing_progress
from qwlit.core.errors import ConfigError, DataError
from qwlit.core.files import resolve_path
from qwlit.data.chat import ChatEncoder
from qwlit.data.config import parts_of
from qwlit.data.encoding import RowEncoder
from qwlit.data.jinja_template import JinjaTemplate
from qwlit.data.recognise import resolve_template
from qwlit.data.sources import find_sources
from qwlit.data.splits import open_stores
from qwlit.data.store import SampleStore, is_tokenized
from qwlit.data.store_writer import BuildProgress
from qwlit.data.templates import Supervision
from qwlit.data.tokenizer import TextTokenizer
from qwlit.model.load import check_vocabulary, load_tokenizer, vocabulary_size

# In run.root, so that the ranks of every node see it; hidden, so that runs/* matches only runs.
STORE_FOLDER = ".store"


@dataclass(frozen=True)
class TokenizedData:
    """Data as tokens, before validation samples are held out and before the ratio of bad rows is checked."""

    tokenizer: PreTrainedTokenizerFast | None
    """None if the rows are tokens already and the model has no tokenizer."""
    encoder: RowEncoder
    training: list[SampleStore]
    validation: list[SampleStore]


def load_tokenized_data(config: RunConfig, screen: Console) -> TokenizedData:
    """Load the tokenizer, and tokenize data that are not tokenized yet. Rows of tokens need no tokenizer.

    Raises:
        ConfigError, DataError: data or tokenizer are missing or wrong.
    """
    tokenizer, encoder = _encoder(config)
    if config.data.exact_match and encoder.chat is None:
        raise ConfigError(f"data.exact_match={config.data.exact_match} answers conversations, but {encoder.refusal}")
    with showing_progress("tokenizing", screen) as show:

        def progress(reading: BuildProgress) -> None:
            speed = f"{reading.tokens_per_second / reading.cores:,.0f} tokens/s per core, {reading.cores} cores"
            text = f"{reading.rows:,} rows, {reading.tokens:,} tokens, {speed}"
            show(reading.bytes_read, reading.bytes_in_all, text, finished=reading.finished)

        stores = open_stores(
            config.data,
            encoder,
            cache_root=_cache_root(config),
            progress=progress,
            say=lambda line: screen.print(escape(line)),
        )
    return TokenizedData(tokenizer, encoder, *stores)


def is_small_or_tokenized(config: RunConfig, most_bytes: int) -> bool:
    """Whether `load_tokenized_data` is quick: the data are small, or tokenized already.

    Raises:
        DataError: the data do not exist.
    """
    paths = [part.path for part in (*parts_of(config.data.path), *parts_of(config.data.val_path))]
    sources = [source for path in paths for source in find_sources(path)]
    if sum(source.estimated_bytes() for source in sources) <= most_bytes:
        return True
    _, encoder = _encoder(config)
    return all(is_tokenized(path, encoder, cache_root=_cache_root(config)) for path in paths)


def _cache_root(config: RunConfig) -> Path:
    return resolve_path(config.run.root) / STORE_FOLDER


def _encoder(config: RunConfig) -> tuple[PreTrainedTokenizerFast | None, RowEncoder]:
    data = config.data
    tokenizer = text = chat = refusal = None
    try:
        tokenizer = load_tokenizer(config.model)
        check_vocabulary(config.model, tokenizer)
        text = TextTokenizer(tokenizer)
        template = resolve_template(tokenizer, data.template)
        if data.system is not None:
            template = template.with_system(data.system)
        if data.thinking == "keep" and isinstance(template, JinjaTemplate):
            raise ConfigError(
                "data.thinking=keep has no effect with the tokenizer's own chat template, which decides itself what it"
                " writes of the reasoning; leave it out"
            )
        chat = ChatEncoder(text, template, Supervision(data.loss_on, data.thinking))
    except (ConfigError, DataError) as error:
        refusal = str(error)
    return tokenizer, RowEncoder(data, vocabulary_size(config.model), text, chat, refusal)
