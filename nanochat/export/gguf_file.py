"""
One GGUF file for llama.cpp and Ollama: Qwen3 or Apertus, in f32, f16, bf16 or q8_0, with the
tokenizer and the chat template.

llama.cpp's own converter refuses tokenizers whose hash it does not know, so the file is written
here, with the package `gguf`. `LlamaCpp` runs the file in llama.cpp if the package `xllamacpp` is
installed.
"""

import importlib
import json
import urllib.request
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from nanochat.base.common import optional
from nanochat.data.tokenizer import Tokenizer
from nanochat.export.target import PRE_TOKENIZERS, Target
from nanochat.export.template import CHAT_TEMPLATE
from nanochat.export.weights import NORM_EPS, XIELU, foreign_tensors
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

OLLAMA_TEMPLATE = (  # a Go template that renders messages as CHAT_TEMPLATE does
    "<|bos|>{{- range $i, $message := .Messages }}"
    '{{- if eq .Role "user" }}<|user_start|>'
    "{{ if and (eq $i 1) $.System }}{{ $.System }}\n\n{{ end }}"
    "{{ .Content }}<|user_end|>"
    '{{- else if eq .Role "assistant" }}<|assistant_start|>'
    "{{ .Content }}<|assistant_end|>{{- end }}"
    "{{- end }}<|assistant_start|>"
)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, gguf: Any) -> None:
    tokens, merges = tokenizer.spelled()
    kinds = [gguf.TokenType.NORMAL] * len(tokenizer.ranks)
    kinds += [gguf.TokenType.CONTROL] * len(tokenizer.specials)
    end = tokenizer.specials["<|assistant_end|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZERS[tokenizer.digits])
    writer.add_token_list([*tokens, *tokenizer.specials])
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(end)
    writer.add_eot_token_id(end)
    writer.add_add_bos_token(False)  # the chat template writes it
    writer.add_chat_template(CHAT_TEMPLATE)


def _add_shape(writer: Any, config: GPTConfig, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(config.sequence_len)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.hidden)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_kv_head)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_vocab_size(config.vocab_size)


def _stored(tensor: Tensor, dtype: str, gguf: Any) -> tuple[np.ndarray, Any]:
    """
    The array to write for a float32 tensor, and its GGUF type. Vectors stay float32. With q8_0,
    whose blocks have 32 values, a matrix whose rows are no multiple of that becomes float16.
    """
    array = tensor.numpy()
    if array.ndim < 2:
        dtype = "f32"
    elif dtype == "q8_0" and array.shape[-1] % 32:
        dtype = "f16"
    kind = gguf.GGMLQuantizationType[dtype.upper()]
    return gguf.quants.quantize(array, kind), kind


def write_gguf(
    model: GPT, tokenizer: Tokenizer, target: Target, file: Path, dtype: str, name: str
) -> None:
    """
    Write the model as one GGUF file. `target` is Qwen3 or Apertus, from choose_target; `dtype` is
    f32, f16, bf16 or q8_0. UserError if the package gguf is not installed.
    """
    gguf = optional("gguf", "export")
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(file), target.name)
    _add_shape(writer, model.config, name)
    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(gguf.LlamaFileType[kinds[dtype]])
    if target.name == "apertus":
        for parameter, value in XIELU.items():
            getattr(writer, f"add_xielu_{parameter}")([value] * model.config.n_layer)
    _add_tokenizer(writer, tokenizer, gguf)
    architecture = gguf.MODEL_ARCH[target.name.upper()]
    names = gguf.get_tensor_name_map(architecture, model.config.n_layer)
    for name, tensor in foreign_tensors(model, target).items():
        if ".act_fn." not in name:
            array, kind = _stored(tensor, dtype, gguf)
            writer.add_tensor(names.get_name(name, (".weight",)), array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def modelfile(file: str, context: int, sampling: dict) -> str:
    """
    Ollama's Modelfile for a GGUF file in the same folder; `sampling` has temperature and top_k.
    """
    parameters = "".join(f"PARAMETER {name} {value:g}\n" for name, value in sampling.items())
    # Ollama's defaults of repeat_penalty and top_p are 1.1 and 0.9
    return f'''\
# Written by nanochat export. It was not run in Ollama itself.
FROM ./{file}
TEMPLATE """{OLLAMA_TEMPLATE}"""
PARAMETER stop "<|assistant_end|>"
PARAMETER stop "<|bos|>"
PARAMETER num_ctx {context}
PARAMETER repeat_penalty 1
PARAMETER top_p 1
{parameters}'''


class LlamaCpp:
    """
    A llama.cpp server for a GGUF file, through the package xllamacpp, as a context manager.
    """

    def __init__(self, file: Path, context: int):
        xllamacpp: Any = importlib.import_module("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.cpuparams.n_threads = 1
        parameters.cpuparams_batch.n_threads = 1
        parameters.warmup = False
        parameters.verbosity = 0
        # The defaults are less exact: keys and values in float16, and flash attention
        off = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        parameters.flash_attn_type = off
        parameters.cache_type_k = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        self._server: Any = xllamacpp.Server(parameters)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self._server = None

    def post(self, endpoint: str, body: dict) -> dict:
        """The server's answer to a request."""
        request = urllib.request.Request(
            self._server.listening_address + endpoint,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        # Without the user's proxy, which does not lead to this machine
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=120) as answer:
            return json.load(answer)

    def greedy(self, prompt: Sequence[int], count: int, never: Iterable[int] = ()) -> list[int]:
        """Up to `count` greedy tokens after the prompt's ids, without those in `never`."""
        body = {
            "prompt": list(prompt),
            "n_predict": count,
            "temperature": 0,
            "return_tokens": True,
            "cache_prompt": False,
            "samplers": ["top_k"],
            "top_k": 1,
            "logit_bias": [[id, False] for id in never],
        }
        return self.post("/completion", body)["tokens"]
