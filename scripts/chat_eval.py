"""`python -m scripts.chat_eval` runs the command nanochat/commands/chat_eval.py."""

from nanochat.base.common import entry
from nanochat.commands.chat_eval import main

if __name__ == "__main__":
    entry(main)
