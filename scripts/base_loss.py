"""`python -m scripts.base_loss` runs the command nanochat/commands/base_loss.py."""

from nanochat.base.common import entry
from nanochat.commands.base_loss import main

if __name__ == "__main__":
    entry(main)
