"""
Writes the text of the PDF on standard input to standard output. readers.py runs this file in a
process of its own, because a hostile PDF may use all time and memory. It imports nothing of the
project, so that it starts at once.

    python nanochat/data/pdf.py SECONDS MEMORY_BYTES TEXT_BYTES < paper.pdf > paper.txt
"""

import io
import logging
import sys
from contextlib import suppress


def main() -> None:
    """Print the pages. Exits with a message for a PDF that is encrypted or has too much text."""
    seconds, memory, most = map(int, sys.argv[1:])
    # Windows has no such limits, only the deadline of the parent process
    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    from pypdf import PdfReader

    logging.disable()
    reader = PdfReader(io.BytesIO(sys.stdin.buffer.read()))
    if reader.is_encrypted and not reader.decrypt(""):
        raise SystemExit("it is encrypted")
    for page in reader.pages:
        text = (page.extract_text() + "\n\n").encode("utf-8", "replace")
        most -= len(text)
        if most < 0:
            raise SystemExit("its text is too long")
        sys.stdout.buffer.write(text)


if __name__ == "__main__":
    main()
