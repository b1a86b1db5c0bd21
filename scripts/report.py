"""`python -m scripts.report` runs the command nanochat/commands/report.py."""

from nanochat.base.common import entry
from nanochat.commands.report import main

if __name__ == "__main__":
    entry(main)
