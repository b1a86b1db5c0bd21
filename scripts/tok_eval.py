"""`python -m scripts.tok_eval` runs the command nanochat/commands/tok_eval.py."""

from nanochat.base.common import entry
from nanochat.commands.tok_eval import main

if __name__ == "__main__":
    entry(main)
