"""
Write docs/model_specifications.md: the standard models and what their training takes.

    python dev/specifications.py
"""

from pathlib import Path
from typing import Any

from nanochat.base.common import columns, human
from nanochat.plan import memory
from nanochat.plan.arch import PARTS, figures
from nanochat.plan.machine import GIB, of_card
from nanochat.plan.shapes import SizeKnobs

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "model_specifications.md"
STANDARD: dict[str, dict[str, Any]] = {  # name -> flags
    "37.75 M": {"depth": 4, "model_dim": 512, "head_dim": 64, "vocab": 24_576},  # ittybitty.sh
    **{f"d{depth}": {"depth": depth} for depth in (12, 16, 20, 26, 32)},
}
ROWS = 8


def specifications() -> str:
    """The text of the document."""
    rows = []
    for name, given in STANDARD.items():
        config = SizeKnobs(**given).config()
        f = figures(config)
        flags = " ".join(f"--{flag}={value}" for flag, value in given.items() if flag != "vocab")

        needed = memory.predict(config, ROWS, of_card("H100"), True)["total"]
        size = f"{config.n_layer} x {config.n_embd}, {config.n_head} heads"
        training = human(f["flops_per_token"]), human(f["tokens"]), f"{f['flops']:.3g}"
        counted = (f"{f[part]:,}" for part in PARTS)
        rows.append((name, f"`{flags}`", size, *counted, *training, f"{needed / GIB:.1f}"))
    head = ("model", "flags", "layers x width", *PARTS, "FLOPs/token", "tokens", "FLOPs", "GB")
    return f"""# Specifications of the standard models

```sh
nanochat plan arch --depth=12     # such figures for a model of any size
```

The table was written by `python dev/specifications.py`; a test compares it with the code.

{columns(head, rows)}

Vocabulary 65,536 (37.75 M: 24,576), context 2,048, all optional knobs at their defaults. FLOPs are
those of training, forward and backward, with causal attention counted at its mean length; tokens
are 20 per parameter. GB of 2^30 bytes are what one CUDA card needs for {ROWS} rows of
2,048 in bf16, compiled, as `plan memory` predicts; several cards share the optimizer's state and
need less.
"""


if __name__ == "__main__":
    DOCUMENT.write_text(specifications(), encoding="utf-8")
