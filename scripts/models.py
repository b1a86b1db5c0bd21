"""`python -m scripts.models` runs the command nanochat/commands/models.py."""

from nanochat.base.common import entry
from nanochat.commands.models import main

if __name__ == "__main__":
    entry(main)
