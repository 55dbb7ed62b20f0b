"""A tokenizer that never makes a control token from plain text."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from qwlit.core.errors import DataError, naming_errors
from qwlit.data.long_texts import MANY_CHARACTERS, PIECE_CHARACTERS, WORD_END, LongEncoding, cut_text, group_texts

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = {"<|im_start|>", "<|im_end|>", END_OF_TEXT}
# Qwen publishes these as added tokens that are not special. Only a template or a tokenized row may produce them.
STRUCTURAL = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
STRUCTURAL |= {f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")}


class TextTokenizer:
    """A Hugging Face fast tokenizer without its control tokens, whose ids are in `control_ids`.

    Control tokens are the added tokens that are special or in STRUCTURAL. Other added tokens are vocabulary, as in the
    tokenizer itself: text that contains them gets their ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Copy model, normalizer and pre-tokenizer.

        Leave out the post-processor: it may trim spaces from the offsets, and we compute loss masks from offsets.
        """
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.control_ids = control_token_ids(tokenizer)
        # The new tokenizer does not know the control tokens, so their names stay plain text.
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            _check_growth(json.loads(backend.normalizer.__getstate__()))
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        if len(self.control_ids) < len(added):
            self._add_vocabulary(added)
        vocabulary = added.keys() - self.control_ids.values()
        # A long text is cut between words, but an added token may have several words.
        self._can_cut = not any(WORD_END.search(added[i].content) for i in vocabulary)
        # Everything that decides the ids of a text.
        parts = (json.dumps(self.control_ids, sort_keys=True), self._plain.to_str())
        self.fingerprint = hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
        self._end_of_text_id: int | None = self.control_ids.get(END_OF_TEXT, tokenizer.eos_token_id)
        names = {content for content in self.control_ids if content.startswith("<|") and content.endswith("|>")}
        self._control_names = re.compile("|".join(map(re.escape, sorted(names | CHAT_TOKENS))))
        self._check_that_text_stays_text()

    def spells_control_tokens(self, text: str) -> bool:
        """Return whether the text contains the name of a control token of the form `<|im_start|>`."""
        return "<|" in text and self._control_names.search(text) is not None

    def _add_vocabulary(self, added: "dict[int, AddedToken]") -> None:
        """Add all added tokens, with control tokens as special ones, which `encode_special_tokens` keeps as text.

        Control tokens must be added too, because the ids of added tokens follow from their order.

        Raises:
            DataError: the ids differ from those of the original tokenizer.
        """
        for token in added.values():
            token.special = _is_control(token)
        self._plain.add_tokens([token for _, token in sorted(added.items())])
        self._plain.encode_special_tokens = True
        actual = {token.content: i for i, token in self._plain.get_added_tokens_decoder().items()}
        if actual != (expected := {token.content: i for i, token in added.items()}):
            wrong = next(content for content, i in expected.items() if actual.get(content) != i)
            raise DataError(
                f"the tokenizer's added token {wrong!r} has id {expected[wrong]}, but its position among"
                " the added tokens gives another id; save the tokenizer again, without gaps between their ids"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set `encode_special_tokens` again: pickling loses it, and workers would make control tokens from text."""
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True

    def _check_that_text_stays_text(self) -> None:
        """Check that encoding the name of a control token as plain text does not give its id.

        A vocabulary that was trained on text with control tokens can contain them as plain words.

        Raises:
            DataError: the text of a control token becomes the token itself.
        """
        tags = [content for content in self.control_ids if content.startswith("<") and content.endswith(">")]
        for content in tags:
            if self.control_ids[content] in self.encode([content])[0]:
                raise DataError(f"the tokenizer turns the plain text {content!r} into the control token itself")

    @property
    def end_of_text_id(self) -> int:
        """The token between documents.

        Raises:
            DataError: the vocabulary has none.
        """
        if self._end_of_text_id is None:
            raise DataError(f"the tokenizer has no {END_OF_TEXT} and no other end-of-text token to separate documents")
        return self._end_of_text_id

    def encode_with_offsets(self, texts: Sequence[str]) -> "list[Encoding | LongEncoding]":
        """Encode on all cores; return ids and character offsets."""
        are_many = sum(map(len, texts)) > MANY_CHARACTERS
        encodings: list[Encoding | LongEncoding] = []
        for group in group_texts(texts):
            if are_many or self._is_cut(group[0]):
                encodings += [LongEncoding(self._encode_pieces(text)) for text in group]
            else:
                encodings += self._encode_batch(self._plain.encode_batch, group)
        return encodings

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode on all cores; return only ids, which is faster."""
        encode = self._plain.encode_batch_fast
        all_ids: list[list[int]] = []
        for group in group_texts(texts):
            if self._is_cut(group[0]):
                all_ids.append([i for piece in cut_text(group[0]) for i in self._encode_batch(encode, [piece])[0].ids])
            else:
                all_ids += [encoding.ids for encoding in self._encode_batch(encode, group)]
        return all_ids

    def _is_cut(self, text: str) -> bool:
        return len(text) > PIECE_CHARACTERS and self._can_cut

    def _encode_pieces(self, text: str) -> "Iterator[tuple[str, Encoding]]":
        for piece in cut_text(text) if self._can_cut else [text]:
            (encoding,) = self._encode_batch(self._plain.encode_batch, [piece])
            yield piece, encoding

    def _encode_batch(self, encode: Callable[..., Any], texts: list[str]) -> "list[Encoding]":
        with naming_errors(_cannot_encode):
            encodings: list[Encoding] = encode(texts, add_special_tokens=False)
        return encodings


def _cannot_encode(reason: str) -> DataError:
    return DataError(f"the tokenizer fails on a text ({reason}); set model.tokenizer to the model's own")


def _check_growth(normalizer: dict[str, Any]) -> None:
    """Refuse a normalizer that makes texts longer by any factor; Qwen's has none of this kind.

    Raises:
        DataError: naming it.
    """
    for part in normalizer.get("normalizers", ()):
        _check_growth(part)
    text = normalizer.get("content", normalizer.get("prepend", ""))
    if len(text) > 1 or "Regex" in normalizer.get("pattern", {}):
        kind = normalizer["type"]
        raise DataError(
            f"the tokenizer's normalizer {kind} can make a text much longer; set model.tokenizer to the model's own"
        )


def control_token_ids(tokenizer: Any) -> dict[str, int]:
    """Return the ids of a Hugging Face fast tokenizer's control tokens."""
    added: dict[int, AddedToken] = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if _is_control(token)}


def _is_control(token: "AddedToken") -> bool:
    return token.special or token.content in STRUCTURAL
