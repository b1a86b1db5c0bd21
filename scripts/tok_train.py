"""`python -m scripts.tok_train` runs the command nanochat/commands/tok_train.py."""

from nanochat.base.common import entry
from nanochat.commands.tok_train import main

if __name__ == "__main__":
    entry(main)
