"""
A folder that transformers loads: config, weights in safetensors, tokenizer, chat template, model
card. No pickle, no path of this machine.

`write_folder` writes it, `compare_logits` reloads it and compares it with the original model.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat.base.common import UserError
from nanochat.data.tokenizer import Tokenizer
from nanochat.export.target import Target, has_windows
from nanochat.export.template import CHAT_TEMPLATE
from nanochat.export.weights import NORM_EPS, XIELU, foreign_tensors
from nanochat.model.config import GPTConfig
from nanochat.model.gpt import GPT

ARCHITECTURES = {
    "nanochat": "NanoChatForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "apertus": "ApertusForCausalLM",
}
ACTIVATIONS = {"relu2": "relu2", "gelu": "gelu_pytorch_tanh", "silu": "silu"}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SHARD_BYTES = 5 * 10**9
TOLERANCE = 1e-4  # largest difference of a logit in float32


def require_transformers() -> Any:
    """The module transformers; UserError where it is not installed or too old."""
    try:
        import transformers
    except ModuleNotFoundError:
        raise UserError(
            'the package transformers is not installed: install it with pip install -e ".[export]"'
        ) from None
    if not hasattr(transformers, "NanoChatForCausalLM"):
        raise UserError(
            f"transformers {transformers.__version__} has no NanoChat class: "
            'install a newer one with pip install -e ".[export]"'
        )
    return transformers


def shipped_code(config: GPTConfig) -> Path:
    """The file with a class for a model that transformers has none for."""
    part = "prior" if config.rap else "lookback"
    return Path(__file__).parent / f"modeling_nanochat_{part}.py"


def config_json(config: GPTConfig, target: Target, tokenizer: Tokenizer, dtype: str) -> dict:
    """config.json of the target class."""
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
        code = shipped_code(config).stem
        values["model_type"] = code.removeprefix("modeling_")
        name = "NanoChatPrior" if config.rap else "NanoChatLookback"
        values["architectures"] = [f"{name}ForCausalLM"]
        values["auto_map"] = {
            "AutoConfig": f"{code}.{name}Config",
            "AutoModelForCausalLM": f"{code}.{name}ForCausalLM",
        }
        layers = range(config.n_layer)
        values |= (
            {"rap": config.rap}
            if config.rap
            else {
                "copy_heads": config.copy_heads,
                "convolutions": config.convolutions,
                "value_layers": [layer for layer in layers if config.has_value_table(layer)],
                "pair_rows": config.pair_rows,
                "windows": [config.window(layer) for layer in layers],
                "activation": config.activation,
                "use_cache": False,
            }
        )
    if target.name == "nanochat":
        values["hidden_act"] = ACTIVATIONS.get(config.activation, "silu")
        values["final_logit_softcapping"] = config.softcap or None
    elif target.name == "apertus":
        values["hidden_act"] = "xielu"
    else:
        values["hidden_act"] = "silu"
        if has_windows(config):
            windows = [config.window(layer) for layer in range(config.n_layer)]
            values["use_sliding_window"] = True
            values["sliding_window"] = max(windows)
            values["layer_types"] = [
                "sliding_attention" if window else "full_attention" for window in windows
            ]
    return values


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save(folder)
    (folder / "meta.json").unlink()  # ours alone
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


def _save_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """model.safetensors, or shards of at most 5 GB with their index."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(
        tensors,
        folder,
        max_shard_size=SHARD_BYTES,
        metadata={"format": "pt"},
        safe_serialization=True,
    )


def write_folder(
    model: GPT, tokenizer: Tokenizer, target: Target, folder: Path, dtype: str, sampling: dict
) -> None:
    """
    Everything but the model card. `sampling` goes into generation_config.json (temperature, top_k).
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = config_json(model.config, target, tokenizer, dtype)
    generation = {
        "bos_token_id": values["bos_token_id"],
        "eos_token_id": values["eos_token_id"],
        "pad_token_id": values["pad_token_id"],
        # The calculator's output is never the model's to write
        "suppress_tokens": list(tokenizer.never_sampled),
        "do_sample": True,
        **({"use_cache": False} if values.get("use_cache") is False else {}),
        **sampling,
    }
    for name, content in (("config.json", values), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    write_tokenizer(tokenizer, folder)
    if target.custom_code:
        shutil.copy(shipped_code(model.config), folder)
    kept_whole = tuple(f"act_fn.{name}" for name in XIELU)
    tensors = {
        name: t.to(DTYPES[dtype]) if t.is_floating_point() and not name.endswith(kept_whole) else t
        for name, t in foreign_tensors(model, target).items()
    }
    _save_weights(tensors, folder)


def probe_tokens(config: GPTConfig, rows: int = 3) -> Tensor:
    """(rows, T) random token ids that reach beyond every window and far into the context."""
    generator = torch.Generator().manual_seed(1)
    length = min(config.sequence_len, 512)
    return torch.randint(config.vocab_size, (rows, length), generator=generator)


@torch.no_grad()
def compare_logits(model: GPT, folder: Path, custom_code: bool = False) -> tuple[float, float]:
    """
    (largest absolute difference, largest logit) between our model and the folder as transformers
    loads it, both in float32.
    """
    transformers = require_transformers()
    transformers.utils.logging.disable_progress_bar()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=custom_code
    ).eval()
    tokens = probe_tokens(model.config)
    # Beyond the start of a document ours does not look, and no foreign class knows that
    tokens[tokens == model.config.document_start] = 0
    theirs = loaded(tokens).logits
    ours = model.logits(model(tokens)).float()[..., : model.config.vocab_size]
    return float((theirs - ours).abs().max()), float(ours.abs().max())
