"""`python -m scripts.chat_rl` runs the command nanochat/commands/chat_rl.py."""

from nanochat.base.common import entry
from nanochat.commands.chat_rl import main

if __name__ == "__main__":
    entry(main)
