"""A tokenizer to which text is only text: no stretch of it can become a control token."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwlit.core.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Encoding

END_OF_TEXT = "<|endoftext|>"


class TextTokenizer:
    """A Hugging Face fast tokenizer without its added tokens, and their ids apart."""

    def __init__(self, tokenizer: Any) -> None:
        """Take the tokenizer's parts.

        The post-processor stays behind too: it may trim spaces off the offsets, from which loss masks are read.
        """
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        self.control_ids: dict[str, int] = {t.content: i for i, t in backend.get_added_tokens_decoder().items()}
        self._plain = Tokenizer(backend.model)
        if backend.normalizer is not None:
            self._plain.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._plain.pre_tokenizer = backend.pre_tokenizer
        parts = (json.dumps(self.control_ids, sort_keys=True), self._plain.to_str())
        self.fingerprint = hashlib.sha256("\0".join(parts).encode("utf-8")).hexdigest()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        end = self.control_ids.get(END_OF_TEXT, tokenizer.eos_token_id)
        self._end_of_text_id: int | None = end
        self._refuse_text_that_controls()

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
