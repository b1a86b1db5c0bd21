"""
SmolTalk (Allal et al. 2025, arXiv 2502.02737) in its version for small models: 460,000
conversations to train on. Nothing is evaluated on it.
"""

from nanochat.data.shapes import conversation
from nanochat.eval.tasks.data import DataSet

DATA = DataSet(
    "smoltalk",
    "HuggingFaceTB/smol-smoltalk",
    "f73fe857d519ff6ac5af2ea67c4d3834da7b8bcc",
    item=conversation,
    hub={"train": "data/train-*.parquet"},
    local={"train": ("smoltalk/train*.*",)},
)
