"""`python -m scripts.mine` runs the command nanochat/commands/mine.py."""

from nanochat.base.common import entry
from nanochat.commands.mine import main

if __name__ == "__main__":
    entry(main)
