"""`python -m scripts.summary` runs the command nanochat/commands/summary.py."""

from nanochat.base.common import entry
from nanochat.commands.summary import main

if __name__ == "__main__":
    entry(main)
