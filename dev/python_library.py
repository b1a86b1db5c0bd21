"""
Write Python's standard library as training text, for trials on code that every machine has: one
JSON line {"text": ...} per file.

    python dev/python_library.py library.jsonl
"""

import json
import os
import sys
import sysconfig
from pathlib import Path


def main() -> None:
    if len(sys.argv) != 2:
        print(
            "error: give the file to write, as in python dev/python_library.py library.jsonl",
            file=sys.stderr,
        )
        sys.exit(2)
    out = Path(sys.argv[1])
    files = [
        p
        for p in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
        if "site-packages" not in p.parts
    ]
    texts = [
        text for p in files if (text := p.read_text(encoding="utf-8", errors="ignore")).strip()
    ]
    beside = out.with_name(out.name + ".new")
    beside.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8"
    )
    os.replace(beside, out)


if __name__ == "__main__":
    main()
