"""`python -m scripts.chat_cli` runs the command nanochat/commands/chat_cli.py."""

from nanochat.base.common import entry
from nanochat.commands.chat_cli import main

if __name__ == "__main__":
    entry(main)
