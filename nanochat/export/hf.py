"""
A folder that transformers loads: config, weights in safetensors, tokenizer, chat template, model
card. It has no pickle and no path of this machine.

`write_folder` writes it (the command export adds the model card), and `compare_logits` reloads it
and compares it with the original model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.base.common import UserError, optional
from nanochat.data.tokenizer import Tokenizer
from nanochat.export.target import Target, layer_windows
from nanochat.export.template import CHAT_TEMPLATE
from nanochat.export.weights import NORM_EPS, foreign_tensors
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

ARCHITECTURES = {
    "nanochat": "NanoChatForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "apertus": "ApertusForCausalLM",
}
ACTIVATIONS = {"relu2": "relu2", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
TOLERANCE = 1e-4  # largest difference of a logit in float32
PROBE_ROWS, PROBE_TOKENS = 3, 512  # that logits are compared on


def require_transformers() -> Any:
    """The module transformers. Raises UserError if it cannot be imported or is too old."""
    transformers = optional("transformers", "export")
    if not hasattr(transformers, "NanoChatForCausalLM"):
        raise UserError(
            f"transformers {transformers.__version__} has no NanoChat class: "
            'install a newer one with pip install -e ".[export]"'
        )
    return transformers


def shipped_code(config: GPTConfig) -> Path:
    """The file with the class for a model for which transformers has none."""
    part = "prior" if config.rap else "lookback"
    return Path(__file__).parent / f"modeling_nanochat_{part}.py"


def config_json(config: GPTConfig, target: Target, tokenizer: Tokenizer, dtype: str) -> dict:
    """The contents of config.json for the target class; `dtype` is a key of DTYPES."""
    stops = [tokenizer.specials["<|assistant_end|>"], tokenizer.bos]
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURES[target.name]],
        "model_type": target.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings and target.name == "nanochat",
        "bos_token_id": tokenizer.bos,
        "eos_token_id": stops,
        "pad_token_id": stops[0],
        "dtype": str(DTYPES[dtype]).removeprefix("torch."),
    }
    if target.custom_code:
        values |= _custom_values(config)
    if target.name == "nanochat":
        values["hidden_act"] = ACTIVATIONS.get(config.activation, "silu")
        values["final_logit_softcapping"] = config.softcap or None
    elif target.name == "apertus":
        values["hidden_act"] = "xielu"
    else:
        values["hidden_act"] = "silu"
        windows = layer_windows(config)
        if any(windows):
            values |= {
                "use_sliding_window": True,
                "sliding_window": max(windows),
                "layer_types": [
                    "sliding_attention" if window else "full_attention" for window in windows
                ],
            }
    return values


def _custom_values(config: GPTConfig) -> dict[str, Any]:
    """The values of config.json that only a class of shipped_code() has."""
    code = shipped_code(config).stem
    name = "NanoChatPrior" if config.rap else "NanoChatLookback"
    values = {
        "model_type": code.removeprefix("modeling_"),
        "architectures": [f"{name}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{code}.{name}Config",
            "AutoModelForCausalLM": f"{code}.{name}ForCausalLM",
        },
    }
    if config.rap:
        return {**values, "rap": config.rap}
    return {
        **values,
        "copy_heads": config.copy_heads,
        "convolutions": config.convolutions,
        "value_layers": [i for i in range(config.n_layer) if config.has_value_table(i)],
        "pair_rows": config.pair_rows,
        "windows": layer_windows(config),
        "activation": config.activation,
        "use_cache": False,
    }


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(folder)
    (folder / "meta.json").unlink()  # which only nanochat reads
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "extra_special_tokens": list(tokenizer.specials),
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def write_folder(
    model: GPT, tokenizer: Tokenizer, target: Target, folder: Path, dtype: str, sampling: dict
) -> None:
    """
    Write everything but the model card. `dtype` is a key of DTYPES; `sampling` (temperature, top_k)
    goes into generation_config.json. Weights of more than 5 GB become several files.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    values = config_json(model.config, target, tokenizer, dtype)
    generation = {
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        # The special tokens around the calculator's output, which the model must not write
        "suppress_tokens": list(tokenizer.never_sampled),
        "do_sample": True,
        **({"use_cache": False} if "use_cache" in values else {}),
        **sampling,
    }
    for name, content in (("config.json", values), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)
    if target.custom_code:
        shutil.copy(shipped_code(model.config), folder)
    tensors = foreign_tensors(model, target)
    for name, t in tensors.items():
        if t.is_floating_point() and ".act_fn." not in name:  # parameters of xIELU stay exact
            tensors[name] = t.to(DTYPES[dtype])
    save_torch_state_dict(tensors, folder, metadata={"format": "pt"})


def probe_tokens(config: GPTConfig) -> Tensor:
    """
    Random token ids, always the same: (PROBE_ROWS, T), where T is PROBE_TOKENS, or more if the last
    64 would not be beyond every window, but at most the context.
    """
    length = min(config.sequence_len, max(PROBE_TOKENS, max(layer_windows(config)) + 64))
    generator = torch.Generator().manual_seed(1)
    return torch.randint(config.vocab_size, (PROBE_ROWS, length), generator=generator)


def load_network(folder: Path, dtype: torch.dtype, with_code: bool) -> tuple[Any, dict[str, Any]]:
    """(the model of a folder as transformers loads it, what transformers reports on its weights)"""
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    network, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        local_files_only=True,
        use_safetensors=True,  # never a pickle
        trust_remote_code=with_code,
        output_loading_info=True,
    )
    return network.eval(), report


@torch.no_grad()
def compare_logits(model: GPT, folder: Path, custom_code: bool = False) -> tuple[float, float]:
    """
    (largest absolute difference of a logit, largest absolute logit) of the model and the folder as
    transformers loads it, both in float32.
    """
    network, _ = load_network(folder, torch.float32, custom_code)
    tokens = probe_tokens(model.config)
    # Our model does not attend beyond the start of a document; no foreign class does the same
    tokens[tokens == model.config.document_start] = 0
    theirs = network(tokens).logits
    ours = model.logits(model(tokens)).float()[..., : model.config.vocab_size]
    return float((theirs - ours).abs().max()), float(ours.abs().max())
