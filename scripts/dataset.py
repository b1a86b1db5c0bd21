"""`python -m scripts.dataset` runs the command nanochat/commands/dataset.py."""

from nanochat.base.common import entry
from nanochat.commands.dataset import main

if __name__ == "__main__":
    entry(main)
