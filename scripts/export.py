"""`python -m scripts.export` runs the command nanochat/commands/export.py."""

from nanochat.base.common import entry
from nanochat.commands.export import main

if __name__ == "__main__":
    entry(main)
