"""`python -m scripts.chat_sft` runs the command nanochat/commands/chat_sft.py."""

from nanochat.base.common import entry
from nanochat.commands.chat_sft import main

if __name__ == "__main__":
    entry(main)
