"""`python -m scripts.chat_web` runs the command nanochat/commands/serve.py."""

from nanochat.base.common import entry
from nanochat.commands.serve import main

if __name__ == "__main__":
    entry(main)
