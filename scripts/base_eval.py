"""`python -m scripts.base_eval` runs the command nanochat/commands/base_eval.py."""

from nanochat.base.common import entry
from nanochat.commands.base_eval import main

if __name__ == "__main__":
    entry(main)
