"""`python -m scripts.compare` runs the command nanochat/commands/compare.py."""

from nanochat.base.common import entry
from nanochat.commands.compare import main

if __name__ == "__main__":
    entry(main)
