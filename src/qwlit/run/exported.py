"""What the export of a run says beside the weights: where its files are from, and how its answers end."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwlit.config.run import RunConfig
from qwlit.core.errors import DataError
from qwlit.core.files import resolve_path
from qwlit.data.chat import ChatEncoder
from qwlit.data.chat_template import chat_template
from qwlit.data.recognise import resolve_template
from qwlit.data.samples import supervises
from qwlit.data.templates import ChatTemplate, ChatTemplateFamily
from qwlit.data.tokenizer import END_OF_TEXT, TextTokenizer
from qwlit.inference.export import ExportSources
from qwlit.inference.export_settings import GENERATION_CONFIG, SAMPLING, EndToken, as_list, sampling_values
from qwlit.inference.proof import FixedPrompt, fixed_prompts
from qwlit.model.config import ModelConfig
from qwlit.model.folder import read_json_if_there
from qwlit.model.load import tokenizer_folder, weights_folder
from qwlit.planning.setup import Setup

if TYPE_CHECKING:
    from qwlit.run.training_run import TrainingRun


def export_sources(model: ModelConfig, *, has_tokenizer: bool) -> ExportSources:
    """Return where the files are that training does not change."""
    base = None
    if model.init == "pretrained":
        base = str(resolve_path(model.path).resolve()) if model.path else model.hub_id
    tokenizer = tokenizer_folder(model)[0] if has_tokenizer else None
    return ExportSources(model=weights_folder(model), tokenizer=tokenizer, base=base)


def answers_end(run: "TrainingRun") -> str | None:
    """Return the token that the run trains the model to end its answers with; None: the base model's own one holds.

    Conversations end with the template's end of turn, whatever the end token of the base model is. Plain text ends
    with <|endoftext|>; a pretrained base model already ends with it.
    """
    encoder, train = run.data.tokenized.encoder, run.data.split.train
    if encoder.tokenizer is None:
        return None
    if encoder.chat is not None and supervises(train, encoder.chat.end_of_turn_id):
        return encoder.chat.template.end_of_turn
    end_of_text = encoder.tokenizer.control_ids.get(END_OF_TEXT)
    if run.config.model.init == "pretrained" or end_of_text is None or not supervises(train, end_of_text):
        return None
    return END_OF_TEXT


def end_token(
    config: RunConfig, end: str | None, chat: ChatEncoder | None, text: TextTokenizer | None, tokenizer: Any
) -> EndToken | None:
    """Return what the export says of the end of an answer.

    Args:
        end: see `answers_end`.
    """
    if end is None or text is None:
        return None
    if chat is None or end != chat.template.end_of_turn:
        return EndToken(end, text.control_ids[end], (), None)
    end_of_text = text.control_ids.get(END_OF_TEXT)
    others = () if end_of_text is None else (end_of_text,)
    template = _template_to_write(tokenizer, chat.template)
    return EndToken(end, chat.end_of_turn_id, others, template, sampling_values(config.generation))


def _template_to_write(tokenizer: Any, template: ChatTemplate) -> str | None:
    """Return the chat template of the training, unless the tokenizer's folder already has it."""
    if not isinstance(template, ChatTemplateFamily):
        return None  # it is the folder's own
    try:
        own = resolve_template(tokenizer, "auto")
    except DataError:
        own = None
    return None if own == template else chat_template(template)


def end_of_adapter(folder: Path, tokenizer: Any) -> EndToken | None:
    """Return how answers end by the generation configuration that an adapter's folder has."""
    values = read_json_if_there(folder / GENERATION_CONFIG)
    ids = as_list(values.get("eos_token_id"))
    if not ids:
        return None
    sampling = {key: values[key] for key in SAMPLING if key in values}
    return EndToken(tokenizer.convert_ids_to_tokens(ids[0]), ids[0], tuple(ids[1:]), None, sampling)


def proof_prompts(
    setup: Setup, chat: ChatEncoder | None, tokenizer: Any, records: list[dict[str, Any]]
) -> list[FixedPrompt]:
    """Return the prompts of a proof.

    Args:
        records: of samples.jsonl.
    """
    # A template of the folder's own does not have the system text of the settings; the user of the export gives it.
    is_own = chat is not None and not isinstance(chat.template, ChatTemplateFamily)
    samples = [record["prompt"] for record in records if "expected" in record]
    longest = setup.model.config.max_position_embeddings
    return fixed_prompts(chat, tokenizer, samples, system=setup.config.data.system if is_own else None, longest=longest)
