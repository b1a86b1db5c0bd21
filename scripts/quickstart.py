"""`python -m scripts.quickstart` runs the command nanochat/commands/quickstart.py."""

from nanochat.base.common import entry
from nanochat.commands.quickstart import main

if __name__ == "__main__":
    entry(main)
