"""`python -m scripts.mid_train` runs the command nanochat/commands/mid_train.py."""

from nanochat.base.common import entry
from nanochat.commands.mid_train import main

if __name__ == "__main__":
    entry(main)
