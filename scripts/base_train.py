"""`python -m scripts.base_train` runs the command nanochat/commands/base_train.py."""

from nanochat.base.common import entry
from nanochat.commands.base_train import main

if __name__ == "__main__":
    entry(main)
