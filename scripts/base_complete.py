"""`python -m scripts.base_complete` runs the command nanochat/commands/base_complete.py."""

from nanochat.base.common import entry
from nanochat.commands.base_complete import main

if __name__ == "__main__":
    entry(main)
