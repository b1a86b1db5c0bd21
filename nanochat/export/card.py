"""
The model card: the README.md of an exported folder, made from the checkpoint and its logbook.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.base.common import columns, counted
from nanochat.data.sources import name_of
from nanochat.eval.scores import stage_results, stage_table
from nanochat.export.target import Target
from nanochat.model.config import GPTConfig

STAGES = {
    "base": "It was pretrained on text and continues text; it does not converse.",
    "mid": "It was pretrained on text and midtrained on conversations.",
    "sft": "It was pretrained on text and finetuned on conversations.",
    "rl": "It was pretrained, finetuned on conversations, and reinforced on questions with "
    "checkable answers.",
}


CHAT_INPUTS = """messages = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)"""
TEXT_INPUTS = 'inputs = tokenizer("<|bos|>Once upon a time", return_tensors="pt")'
VLLM = "\n\nvLLM loads the same folder (not tested here): `vllm serve .`"


def _architecture(config: GPTConfig, parameters: int) -> str:
    """The shape of the model as a list in Markdown."""
    heads = (
        f"{config.n_head} query heads and {config.n_kv_head} key-value heads of {config.head_dim}"
    )
    cap = f"softcap {config.softcap:g}" if config.softcap else "no softcap"
    tables = "one table" if config.tie_embeddings else "separate tables"
    return f"""\
- {parameters:,} parameters: {counted(config.n_layer, "layers")} of width {config.n_embd}, {heads}
- MLP of width {config.hidden} with {config.activation}; {cap}; rotary base {config.rope_base:g}
- context of {config.sequence_len:,} tokens, vocabulary of {config.vocab_size:,}, {tables} for \
embedding and head"""


def _llama_usage(name: str, to: str) -> str:
    """How to run a GGUF file; a folder for Ollama also has a Modelfile."""
    if to == "ollama":
        return f"```sh\nollama create {name} -f Modelfile\nollama run {name}\n```"
    return "```sh\nllama-cli -m FILE.gguf\n```"


def _usage(target: Target, chat: bool) -> str:
    """How to run a folder in transformers: to answer a message (`chat`) or to continue a text."""
    trust = ", trust_remote_code=True" if target.custom_code else ""
    return f"""\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("."{trust})
model = AutoModelForCausalLM.from_pretrained("."{trust})
{CHAT_INPUTS if chat else TEXT_INPUTS}
answer = model.generate(**inputs, max_new_tokens=64)
reply = answer[0, inputs["input_ids"].size(1):]
print(tokenizer.decode(reply, skip_special_tokens=True))
```{"" if target.custom_code else VLLM}"""


def model_card(
    config: GPTConfig,
    parameters: int,
    meta: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    target: Target,
    name: str,
    licence: str,
    checked: str,
    to: str = "hf",
) -> str:
    """
    The text of README.md. `meta` belongs to the checkpoint and `rows` to its run's logbook; `name`
    is the model's, and `checked` says how the export compares with the original.
    """
    stage, in_transformers = meta["stage"], to == "hf"
    specs = meta["knobs"].get("data") or ["the default mixture"]
    sources = [name_of(str(spec)) for spec in specs]  # paths are private
    rows = [row for row in rows if (row.get("step") or 0) <= meta["step"]]
    rows.sort(key=lambda row: row.get("step") or 0)  # the last result is that of the exported step
    losses = [row["val_bpb"] for row in rows if row.get("kind") == "eval" and row.get("val_bpb")]
    loss = f", {losses[-1]:.4f} bits per byte on held-out data" if losses else ""
    results = stage_results({stage: rows})
    accuracy = columns(*stage_table(results)) if results else "Not measured."
    usage = _usage(target, stage != "base") if in_transformers else _llama_usage(name, to)
    return f"""\
---
license: {licence}
library_name: {"transformers" if in_transformers else "gguf"}
pipeline_tag: text-generation
---

# {name}

A small language model trained from nothing on one machine. {STAGES[stage]}

## Training

- stage {stage}, step {meta["step"]:,}, {meta.get("tokens", 0):,} tokens in this stage{loss}
- data: {", ".join(sources)}

## Architecture

{_architecture(config, parameters)}
- exported as {target.name}: {target.reason}

## Accuracy

{accuracy}

## Usage

{usage}

## Limits

It is small: it states wrong facts fluently and knows nothing beyond its training data. It was not \
tested for safety.
Its calculator runs in nanochat only: elsewhere the model writes a call and nobody answers it.

Compared with the original: {checked}
"""
