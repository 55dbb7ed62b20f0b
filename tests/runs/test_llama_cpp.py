"""An export computes in llama.cpp what qwlit computes: the tokens of a prompt, and the greedy answer.

Skipped without the packages llama-cpp-python and gguf, which qwlit does not need.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from qwlit.commands.generate import open_model
from qwlit.data.prompts import one_question
from qwlit.inference.answer import encode_prompt, generate
from qwlit.model.attention import generation_attention
from tests.runs.test_export import bases, exported, here, trained  # noqa: F401 - fixtures

gguf = pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")
"""Run with gguf 0.19.0 and llama-cpp-python 0.3.36."""
LONGEST = 48
"""Tokens compared after each prompt; more than the answer where the model ends it."""


def write_gguf(folder: Path, file: Path) -> None:
    """Write a Hugging Face folder of a Qwen2 or Qwen3 in float32 as a GGUF file."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind, layers, heads = config["model_type"], config["num_hidden_layers"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(file, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    _add_tokenizer(writer, folder, config["vocab_size"])
    arch = gguf.MODEL_ARCH.QWEN3 if kind == "qwen3" else gguf.MODEL_ARCH.QWEN2
    names = gguf.get_tensor_name_map(arch, layers)
    for part in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(part).items():
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer, folder: Path, vocab_size: int) -> None:
    file = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    ids = file["model"]["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
    special = {token["id"]: token["special"] for token in file["added_tokens"]}
    types = gguf.TokenType
    tokens, kinds = [f"[PAD{n}]" for n in range(vocab_size)], [types.UNUSED] * vocab_size
    for token, n in ids.items():
        tokens[n] = token
        kinds[n] = types.CONTROL if special.get(n) else types.USER_DEFINED if n in special else types.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in file["model"]["merges"]])
    writer.add_eos_token_id(ids["<|im_end|>"])
    writer.add_add_bos_token(False)


@pytest.mark.parametrize("kind", ["qwen2_tied", "qwen2_untied", "qwen3"])
def test_llama_cpp_reads_the_same_tokens_and_answers_greedily_the_same(kind, trained, here, tmp_path):  # noqa: F811
    folder, _ = exported(trained(kind, "full"), "dtype=float32")
    write_gguf(folder, tmp_path / "model.gguf")
    # By default llama.cpp rounds keys and values to 16 bits.
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32}
    file = str(tmp_path / "model.gguf")
    served = llama_cpp.Llama(file, n_ctx=256, logits_all=True, verbose=False, n_threads=1, **exact)
    words = ["hardware=cpu", "generation.temperature=0", f"generation.max_new_tokens={LONGEST}"]
    model = open_model(str(folder), [*words, "generation.repetition_penalty=1"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("7+7?", "把78 km写成英文。", "It's 3:45 pm,  isn't it?\n\n    yes 😀"):
        ids = encode_prompt(model, one_question(text), model.config.generation)
        rendered = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert served.tokenize(rendered.encode(), add_bos=False, special=True) == ids
        (expected,) = generate(model, [ids], model.config.generation)
        served.reset()
        served.eval(ids)
        answer: list[int] = []
        while len(answer) < LONGEST:
            answer.append(int(served.scores[served.n_tokens - 1].argmax()))
            served.eval([answer[-1]])
        assert answer[: len(expected)] == expected
        with generation_attention(model.causal_lm), torch.inference_mode():
            ours = model.causal_lm(torch.tensor([ids + answer])).logits[0]
        theirs = torch.from_numpy(served.scores[: len(ids + answer)].copy())
        difference = ((theirs - ours).abs().max() / ours.abs().max()).item()
        print(f"{kind}, {len(ids)} + {len(answer)} tokens: logits differ by {difference:.1e} of the largest")
        assert difference <= 1e-5
        assert ours.argmax(-1)[len(ids) - 1 : -1].tolist() == answer
