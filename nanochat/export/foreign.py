"""
An exported folder as transformers loads it, with the methods of our model, tokenizer and engine
that evaluations call. Scoring it checks the export and the evaluation against each other.

Everything comes from the folder and from transformers: the tokenizer and its chat template, the
logits, the generation loop and its stop tokens. Only the calculator is ours.
"""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.base.common import UserError, user_path
from nanochat.base.files import sha256_file
from nanochat.base.runtime import Runtime, open_runtime
from nanochat.base.strangers import shown
from nanochat.chat.generate import Sample, clip
from nanochat.chat.tools import ToolCalls
from nanochat.data.rendering import SPECIAL_TOKENS
from nanochat.data.tokenizer import segments
from nanochat.export.hf import load_network, require_transformers
from nanochat.model.loss import capped


class ForeignTokenizer:
    """The folder's tokenizer and chat template, with the methods of Tokenizer that scoring uses."""

    def __init__(self, tokenizer: Any, fingerprint: str):
        self._tokenizer = tokenizer
        self.fingerprint = fingerprint  # in the names of token shards of this tokenizer
        self.specials = {name: tokenizer.get_vocab()[name] for name in SPECIAL_TOKENS}
        self.bos = self.specials["<|bos|>"]
        self.vocab_size = len(tokenizer)

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of ordinary text, after <|bos|> if `bos`."""
        return self.encode_batch([text], bos)[0].tolist()

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[np.ndarray]:
        """The ids of several texts, as encode() returns them, in uint32 arrays."""
        head = [self.bos] if bos else []
        parts = [list(segments(text)) for text in texts]
        encoded = self._tokenizer(
            [*chain.from_iterable(parts)], add_special_tokens=False, split_special_tokens=True
        )
        ids = iter(encoded["input_ids"])
        return [
            np.array([*head, *chain.from_iterable(islice(ids, len(part)))], dtype=np.uint32)
            for part in parts
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, with special tokens by name."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes per token, 0 for special ones."""
        special = set(self.specials.values())
        tokens = self._tokenizer.convert_ids_to_tokens(list(range(self.vocab_size)))
        # The vocabulary represents each byte by one letter
        sizes = [0 if i in special else len(token) for i, token in enumerate(tokens)]
        return np.array(sizes, dtype=np.int32)

    def pad(self, rows: Sequence[Sequence[int]]) -> Any:
        """The rows as one batch with its attention mask; padding comes first."""
        return self._tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")

    def render_prompt(self, conversation: dict) -> list[int]:
        """The ids of a conversation as a prompt for the assistant's next message."""
        return self._tokenizer.apply_chat_template(
            conversation["messages"], add_generation_prompt=True, tokenize=True, return_dict=False
        )


class ForeignModel(nn.Module):
    """A causal language model of transformers, with the methods of GPT that scoring uses."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self.embed: nn.Module = network.get_input_embeddings()
        config = network.config
        self.config = SimpleNamespace(
            sequence_len=config.max_position_embeddings,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
            hidden=config.intermediate_size,
            softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
        )

    @property
    def head_weight(self) -> Tensor:
        """(V, D)"""
        return self.network.get_output_embeddings().weight

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden states (B, T, D) of the token ids (B, T)."""
        states: list[Tensor] = []
        hook = self.network.base_model.register_forward_hook(
            lambda module, args, output: states.append(output.last_hidden_state)
        )
        with hook:
            self.network(input_ids=ids, use_cache=False, logits_to_keep=1)
        return states[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """The logits (..., V) of hidden states (..., D)."""
        return capped(self.network.get_output_embeddings()(hidden), self.config.softcap)

    def token_losses(self, ids: Tensor, targets: Tensor) -> Tensor:
        """
        The negative log-likelihood in nats of every target: (B, T), 0 where a target is -1. The
        logits of a whole row are in memory at once, so rows are computed one by one.
        """
        losses = []
        for row, target in zip(ids, targets, strict=True):
            logits = self.network(input_ids=row[None], use_cache=False).logits[0]
            losses.append(
                F.cross_entropy(logits.float(), target, ignore_index=-1, reduction="none")
            )
        return torch.stack(losses)


class _Calculator:
    """
    A logits processor that makes the calculator's output the next tokens of a row that calls it.
    `masks` has a list for each row: 1 for a sampled token, 0 for a forced one.
    """

    def __init__(self, tokenizer: Any, rows: int):
        self.masks: list[list[int]] = [[] for _ in range(rows)]
        self._calls = [ToolCalls(tokenizer) for _ in range(rows)]
        self._outputs: list[deque[int]] = [deque() for _ in range(rows)]

    def __call__(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Change logits (B, V) for the token after ids (B, T) where that token is forced."""
        for row, (mask, output) in enumerate(zip(self.masks, self._outputs, strict=True)):
            if mask and mask[-1]:
                output.extend(self._calls[row].answer(int(ids[row, -1])))
            mask.append(int(not output))
            if output:
                logits[row] = -torch.inf
                logits[row, output.popleft()] = 0
        return logits


@dataclass
class ForeignEngine:
    """An exported folder that is ready to be scored. It replaces a Loaded and its Engine."""

    folder: Path
    model: ForeignModel
    tokenizer: ForeignTokenizer
    runtime: Runtime

    def describe(self) -> str:
        """For example "exports/d4-sft-hf in transformers 5.24.0, float32 on cpu"."""
        version, runtime = require_transformers().__version__, self.runtime
        place = f"{runtime.dtype_name} on {runtime.device.type}"
        return f"{self.folder} in transformers {version}, {place}"

    @torch.inference_mode()
    def generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        num_samples: int = 1,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        seed: int | Sequence[int] = 42,
    ) -> list[Sample]:
        """
        The greedy continuation of each prompt, as Engine.generate_batch returns it. UserError if
        the temperature is not 0, or for several samples; `top_k` and `seed` have no effect.
        """
        if temperature != 0 or num_samples != 1:
            raise UserError(
                f"--hf answers greedily, once per question (got --temperature={temperature:g} "
                f"--num_samples={num_samples}): leave out both"
            )
        context = self.model.config.sequence_len
        kept = [clip(prompt, max(1, context - 1)) for prompt in prompts]
        limits = [min(max_tokens, context + 1 - len(prompt)) for prompt in kept]
        batch = self.tokenizer.pad(kept).to(self.runtime.device)
        calculator = _Calculator(self.tokenizer, len(prompts))
        generated = self.model.network.generate(
            **batch,
            max_new_tokens=max(limits),
            do_sample=False,
            logits_processor=require_transformers().LogitsProcessorList([calculator]),
        )
        rows = generated[:, batch["input_ids"].size(1) :].tolist()
        stops = self.tokenizer.specials["<|assistant_end|>"], self.tokenizer.bos
        samples = []
        for i, limit in enumerate(limits):
            sample = Sample(kept[i], len(prompts[i]) - len(kept[i]))
            sample.finish = "length" if limit == max_tokens else "context"
            samples.append(sample)
            for token, sampled in zip(rows[i][:limit], calculator.masks[i], strict=False):
                if token in stops:
                    sample.finish, sample.stop = "stop", token
                    break
                sample.tokens.append(token)
                sample.mask.append(sampled)
        return samples


def load_exported(
    folder: str | Path,
    device_type: str = "auto",
    dtype: str = "auto",
    seed: int = 42,
    with_code: bool = False,
) -> ForeignEngine:
    """
    Load a folder that `nanochat export --to hf` wrote. UserError if it is missing or incomplete, or
    if it ships code and `with_code` does not allow to run it.
    """
    folder = user_path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"there is no exported model in {folder}: write one with nanochat export --to hf"
        )
    transformers = require_transformers()
    transformers.utils.logging.set_verbosity_error()
    runtime = open_runtime(device_type, dtype, seed)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in config and not with_code:
            raise UserError(
                f"{folder} ships Python code, which would run on this machine: "
                "add --with_code if you trust it"
            )
        network, report = load_network(folder, runtime.dtype, with_code)
        if absent := sorted(report["missing_keys"]):
            raise ValueError(f"the weights lack {absent[0]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=with_code
        )
        ours = ForeignTokenizer(tokenizer, sha256_file(folder / "tokenizer.json"))
    except UserError:
        raise
    except Exception as e:
        raise UserError(
            f"transformers cannot load {folder} ({type(e).__name__}: {shown(str(e))}): "
            "write it again with nanochat export --to hf"
        ) from e
    return ForeignEngine(folder, ForeignModel(network.to(runtime.device)), ours, runtime)
