"""`python -m scripts.tok_data` runs the command nanochat/commands/tok_data.py."""

from nanochat.base.common import entry
from nanochat.commands.tok_data import main

if __name__ == "__main__":
    entry(main)
