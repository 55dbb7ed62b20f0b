"""A tokenizer to which text is only text: no stretch of it can become a control token."""

import hashlib
import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwlit.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding

END_OF_TEXT = "<|endoftext|>"
CHAT_TOKENS = {"<|im_start|>", "<|im_end|>", END_OF_TEXT}
# Published as added tokens that are not special; only a template or a tokenized row writes them.
STRUCTURAL = {"<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}
STRUCTURAL |= {f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")}


class TextTokenizer:
    """A Hugging Face fast tokenizer without its control tokens, and their ids apart.

    Control tokens are the added tokens that are special or the Qwen families' own. Other added tokens are vocabulary,
    as for the tokenizer itself: text that holds them gets their ids.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer's parts.

        The post-processor stays behind too: it may trim spaces off the offsets, from which loss masks are read.
        """
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
        self.control_ids: dict[str, int] = {t.content: i for i, t in added.items() if _is_control(t)}
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        if len(self.control_ids) < len(added):
            self._add_vocabulary(added)
        parts = (json.dumps(self.control_ids, sort_keys=True), self._plain.to_str())
        self.fingerprint = hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        end = self.control_ids.get(END_OF_TEXT, tokenizer.eos_token_id)
        self._end_of_text_id: int | None = end
        named = {content for content in self.control_ids if content.startswith("<|") and content.endswith("|>")}
        self._spelled = re.compile("|".join(map(re.escape, sorted(named | CHAT_TOKENS))))
        self._refuse_text_that_controls()

    def spells_control_tokens(self, text: str) -> bool:
        """Whether the text holds a control token's name, `<|im_start|>` or another of that form."""
        return "<|" in text and self._spelled.search(text) is not None

    def _add_vocabulary(self, added: "dict[int, AddedToken]") -> None:
        """Add all added tokens, since their ids follow their order, the control tokens as special ones that stay text.

        Raises:
            DataError: the ids come out otherwise.
        """
        self._plain.add_tokens([_copy(token, special=_is_control(token)) for _, token in sorted(added.items())])
        self._plain.encode_special_tokens = True
        found = {token.content: i for i, token in self._plain.get_added_tokens_decoder().items()}
        if found != (expected := {token.content: i for i, token in added.items()}):
            wrong = next(content for content, i in expected.items() if found.get(content) != i)
            raise DataError(
                f"the tokenizer's added token {wrong!r} has id {expected[wrong]}, which its place among"
                " the added tokens does not give; save the tokenizer again, without gaps between their ids"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what the library does not pickle: without it a worker would make control tokens from text."""
        self.__dict__.update(state)
        self._plain.encode_special_tokens = True

    def _refuse_text_that_controls(self) -> None:
        """A vocabulary trained on text full of control tokens may build one out of plain letters.

        Raises:
            DataError: this one does.
        """
        tags = [content for content in self.control_ids if content.startswith("<") and content.endswith(">")]
        for content in tags:
            if self.control_ids[content] in self._plain.encode(content, add_special_tokens=False).ids:
                raise DataError(f"the tokenizer turns the plain text {content!r} into the control token itself")

    @property
    def end_of_text_id(self) -> int:
        """The token that stands between documents.

        Raises:
            DataError: the vocabulary has none.
        """
        if self._end_of_text_id is None:
            raise DataError(f"the tokenizer has no {END_OF_TEXT} and no other end-of-text token to part documents with")
        return self._end_of_text_id

    def encode_with_offsets(self, texts: Sequence[str]) -> "list[Encoding]":
        """Encode on all cores."""
        return self._plain.encode_batch(list(texts), add_special_tokens=False)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode on all cores, ids alone."""
        return [encoding.ids for encoding in self._plain.encode_batch_fast(list(texts), add_special_tokens=False)]


def _is_control(token: "AddedToken") -> bool:
    return token.special or token.content in STRUCTURAL


def _copy(token: "AddedToken", *, special: bool) -> "AddedToken":
    from tokenizers import AddedToken

    flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
    return AddedToken(token.content, special=special, **flags)
