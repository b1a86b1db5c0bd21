"""`python -m scripts.plan` runs the command nanochat/commands/plan.py."""

from nanochat.base.common import entry
from nanochat.commands.plan import main

if __name__ == "__main__":
    entry(main)
