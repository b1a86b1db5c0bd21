"""
What a folder holds, before anything is trained: files read by format, files skipped by reason,
documents, duplicates, languages, what is long or odd, what is held out, and the conversations.

    found = take(sources)            # reads each file once; the result is kept in the base folder
    as_lines(found)                  # for the screen; the file has what the screen leaves out

Duplicates are removed before training: of equal documents the first one stays, and so it does of
nearly equal ones (see similar.py). Of a source of more than LIMIT characters, only the first LIMIT
are looked at; this is said.
"""

import hashlib
import heapq
import importlib.util
import json
import math
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.base.common import UserError, base_dir, counted, human, in_line, notice, print0
from nanochat.base.files import Hashes, atomic_write
from nanochat.base.progress import progress
from nanochat.data import conversations
from nanochat.data.documents import HELD, read_all, text_bytes
from nanochat.data.folders import CONVERSATIONS, ROWS, TEXT, Found, find, kind_of
from nanochat.data.rows import Report
from nanochat.data.split import LEAST, Division, division, place

if TYPE_CHECKING:
    from nanochat.data.similar import Sketch
    from nanochat.data.sources import Source

VERSION = 4
VALIDATION_SHARE = 0.01
LIMIT = 1 << 28  # characters of a source
SAMPLES = 200  # documents whose language is guessed
SHOWN = 10  # files of each reason
MOST_LINES = 500_000  # whose frequency is counted
MOST_PROBLEMS = 100_000  # rows that cannot be used, and are named
ASCII = bytes(range(128))
EXTRAS = "charset_normalizer selectolax mammoth defusedxml pypdf striprtf py3langid"


@dataclass
class SourceInventory:
    """What one source holds. Counts of documents are as read, before duplicates are removed."""

    name: str
    read: dict[str, int] = field(default_factory=dict)  # format -> files
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (reason, file)
    notes: dict[str, int] = field(default_factory=dict)  # what the readers came upon -> count
    bad_rows: list[str] = field(default_factory=list)  # "FILE, line N: reason"
    documents: int = 0
    characters: int = 0
    bytes: int = 0  # of these characters in UTF-8
    exact: int = 0  # documents that are equal to an earlier one
    near: int = 0  # documents that are nearly equal to an earlier one
    removed_characters: int = 0
    languages: dict[str, int] = field(default_factory=dict)  # of up to SAMPLES documents
    repeated_lines: list[tuple[int, str]] = field(default_factory=list)  # (documents, line)
    longest: list[tuple[int, str]] = field(default_factory=list)  # (characters, place and start)
    oddest: list[tuple[float, str]] = field(default_factory=list)  # (share of letters, the same)
    held_out: tuple[int, int] = (0, 0)  # documents or pieces, and their characters
    conversations: dict[str, dict[str, int]] = field(default_factory=dict)  # file -> shape -> count
    conversation_problems: list[str] = field(default_factory=list)  # "FILE, line N: reason"
    complete: bool = True  # False: only the first LIMIT characters were looked at
    # How training and validation are divided, and which documents are not trained on: see split.py
    share: float | None = None
    piece: int | None = None
    repeated: list[float] = field(default_factory=list)  # places of which the first stays
    dropped: list[float] = field(default_factory=list)
    file: str = ""  # that has all of this; "" for the embedded corpus and web text

    @property
    def division(self) -> Division | None:
        """How the source is divided; None if it has fewer than two different documents."""
        return None if self.share is None else Division(self.share, self.piece)

    def kept(self, documents: Iterator[str]) -> Iterator[str]:
        """The documents without duplicates."""
        repeated, left_out = set(self.repeated), set(self.dropped)
        for text in documents:
            where = place(text)
            if where not in left_out:
                yield text
            if where in repeated:
                left_out.add(where)

    def lines(self) -> list[str]:
        """The inventory as a new user reads it."""
        if not self.file:
            return []
        share = self.removed_characters / max(self.characters, 1)
        read = ", ".join(f"{n:,} {kind}" for kind, n in _most(self.read)) or "no file of text"
        out = [
            f"{self.name}: {counted(self.documents, 'documents')}, "
            f"{human(self.characters)} characters, from "
            f"{read}" + (f" (only the first {human(LIMIT)} looked at)" * (not self.complete)),
            *self._skipped_lines(),
        ]
        if self.documents:
            removed = f"; removed: {share:.1%} of the characters" * bool(share)
            out.append(f"duplicates: {self.exact:,} equal, {self.near:,} nearly equal{removed}")
        if self.notes:
            out.append("notes: " + "; ".join(f"{what}: {n:,}" for what, n in _most(self.notes)))
        if self.bad_rows:
            out.append(f"rows that cannot be used: {len(self.bad_rows):,}: {self.bad_rows[0]}")
        if self.languages:
            total = sum(self.languages.values())
            spoken = (
                f"{n / total:.0%} {c}" for c, n in _most(self.languages)[:6] if n > total / 50
            )
            out.append(
                f"languages: {', '.join(spoken)} (of {counted(total, 'documents')}, guessed)"
            )
        out += [f"in {counted(n, 'documents')}: {line}" for n, line in self.repeated_lines[:3]]
        out += [f"longest: {human(n)} characters, {where}" for n, where in self.longest[:1]]
        out += [f"oddest: {s:.0%} letters, {where}" for s, where in self.oddest[:1] if s < 0.6]
        if self.held_out[0]:
            kept = self.characters - self.removed_characters
            what = "pieces" if self.piece else "documents"
            share = self.held_out[1] / max(kept, 1)
            out.append(f"held out: {counted(self.held_out[0], what)}, {share:.1%}")
        return [*out, *self._conversation_lines()]

    def _skipped_lines(self) -> Iterator[str]:
        reasons: dict[str, list[str]] = {}
        for reason, name in self.skipped:
            reasons.setdefault(reason, []).append(Path(name).name)
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            more = f", and {len(names) - SHOWN:,} more" * (len(names) > SHOWN)
            yield f"skipped: {len(names):,}, {reason}: {', '.join(names[:SHOWN])}{more}"

    def _conversation_lines(self) -> Iterator[str]:
        shapes: Counter[str] = Counter()
        for counts in self.conversations.values():
            shapes.update(counts)
        if self.conversations:
            shown = ", ".join(f"{n:,} {shape}" for shape, n in shapes.most_common())
            n = len(self.conversations)
            yield f"conversations: {shown} in {counted(n, 'files')}"
        problems = self.conversation_problems
        yield from (f"not used as a conversation: {problem}" for problem in problems[:SHOWN])
        if len(problems) > SHOWN:
            yield f"not used as a conversation: {len(problems) - SHOWN:,} more"


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return Counter(counts).most_common()


def as_lines(inventories: Sequence[SourceInventory]) -> list[str]:
    """The inventories as a new user reads them, and where all of it is."""
    out = [f"  {in_line(line)}" for one in inventories for line in one.lines()]
    kept = [one.file for one in inventories if one.file]
    return [*out, f"  all of this: {', '.join(kept)}"] if kept else out


def take(sources: Sequence["Source"], me: str | None = None) -> list[SourceInventory]:
    """
    The inventory of each source (see sources.parse_sources). `me` is the person of a chat who is to
    be the assistant. Raises UserError if there is no file to read.
    """
    return [of(source, me) for source in sources]


def show(sources: Sequence["Source"]) -> float:
    """
    Print what `take` finds, in order that nobody trains on what they did not mean. Returns the
    characters of all sources; infinity with one that is not in files, or too large to count.
    """
    taken = take(sources)
    for line in as_lines(taken):
        print0(line)
    return characters_of(taken)


def characters_of(taken: Sequence[SourceInventory]) -> float:
    """The characters of inventories without duplicates; infinity where they are not counted."""
    return _sum(taken, lambda found: found.characters - found.removed_characters)


def text_bytes_of(sources: Sequence["Source"]) -> float:
    """Bytes in UTF-8 of the text of all sources; infinity where they are not counted."""
    return _sum(take(sources), lambda found: found.bytes)


def _sum(taken: Sequence[SourceInventory], count: Callable[[SourceInventory], int]) -> float:
    counted_all = all(found.file and found.complete for found in taken)
    return sum(map(count, taken)) if counted_all else math.inf


def of(source: "Source", me: str | None = None) -> SourceInventory:
    """The inventory of one source. It is taken once, and again when a file has changed."""
    if source.kind != "files":
        return SourceInventory(source.name)
    found = find(source.paths, source.name, (*TEXT, *ROWS))
    path = base_dir() / "inventory" / f"{source.name}-{_key(found, source.field, me)}.json"
    with suppress(OSError, ValueError, TypeError):
        return SourceInventory(**json.loads(path.read_bytes()))
    inventory = _survey(source.name, found, source.field, me)
    inventory.file = str(path)
    atomic_write(path, json.dumps(asdict(inventory), indent=1))
    return inventory


def installed() -> list[str]:
    """The optional packages that are there to read files with."""
    return [name for name in EXTRAS.split() if importlib.util.find_spec(name)]


def _key(found: Found, field: str | None, me: str | None) -> str:
    root = base_dir() / "tokens"
    hashes = Hashes(root / ".hashes.json")
    files = [(str(path), hashes.of(path)) for path in found.files]
    hashes.save()
    about = [VERSION, files, found.listed, field, me, installed()]
    return hashlib.sha256(json.dumps(about).encode("utf-8", "replace")).hexdigest()[:16]


def _survey(name: str, found: Found, field: str | None, me: str | None) -> SourceInventory:
    from nanochat.data.similar import sketched

    report, census = Report(limit=MOST_PROBLEMS), _Census()
    size = sum(map(text_bytes, found.files))
    with progress(min(size, LIMIT), f"looking through {name}", "characters") as bar:
        for text, path, sketch in sketched(_documents(found.files, field, report)):
            census.add(text, path, sketch)
            bar.advance(len(text))
            if census.result.characters >= LIMIT:
                census.result.complete = False
                break
    inventory = census.finish(name)
    inventory.read = dict(report.read)
    inventory.skipped = [*found.listed, *report.skipped]
    inventory.notes, inventory.bad_rows = dict(report.notes), report.problems
    _survey_conversations(inventory, found.files, me)
    return inventory


def _documents(files: list[Path], field: str | None, report: Report) -> Iterator[tuple[str, str]]:
    """Each document and the file that holds it."""
    try:
        for text in read_all(files, field, report):
            yield text, str(report.path)
    except UserError as e:  # of the only file; whoever reads it to train hears the reason
        path = report.path or files[0]
        if str(path) not in {name for _, name in report.skipped}:
            report.skip(path, e)


def _survey_conversations(inventory: SourceInventory, files: list[Path], me: str | None) -> None:
    """Count and check the conversations. What is plain text besides is read as text too."""
    report = Report(limit=MOST_PROBLEMS)
    for path in files:
        if kind_of(path) in CONVERSATIONS and (counts := conversations.survey(path, report, me)):
            inventory.conversations[str(path)] = dict(counts)
    inventory.conversation_problems = report.problems
    inventory.notes = {**report.notes, **inventory.notes}
    # As text they were skipped, and now they are found
    inventory.skipped = [
        (reason, name)
        for reason, name in inventory.skipped
        if not (HELD in reason and name in inventory.conversations)
    ]


class _Census:
    """Counts documents one after the other; what it says of them is in `result`."""

    def __init__(self) -> None:
        from nanochat.data.similar import Similar

        self.result = SourceInventory("")
        self.seen: set[float] = set()
        self.sizes: list[tuple[float, int]] = []
        self.first: list[str] = []  # as many as decide how the source is divided
        self.held_out = 0
        self.lines: Counter[str] = Counter()
        self.samples: list[tuple[float, str]] = []
        self.similar = Similar()
        pool = ThreadPoolExecutor(1)  # its model takes half a second to load
        self.classifier = pool.submit(_classifier)
        pool.shutdown(wait=False)

    def add(self, text: str, path: str, sketch: "Sketch | None") -> None:
        """Count a document of a file; see similar.py for its sketch."""
        result, where = self.result, place(text)
        result.documents += 1
        result.characters += len(text)
        result.bytes += len(text.encode())
        if where in self.seen:
            result.exact += 1
            result.repeated.append(where)
        elif self.similar.to_an_earlier_one(sketch):
            result.near += 1
            result.dropped.append(where)
            self.seen.add(where)
        else:
            self.seen.add(where)
            self._keep(text, where, path)
            return
        result.removed_characters += len(text)

    def _keep(self, text: str, where: float, path: str) -> None:
        """Note a document that is no duplicate."""
        self.sizes.append((where, len(text)))
        if self.held_out < LEAST:
            self.first.append(text)
            self.held_out += where <= VALIDATION_SHARE
        heapq.heappush(self.samples, (-where, text[:1000]))
        if len(self.samples) > SAMPLES:
            heapq.heappop(self.samples)
        if len(self.lines) < MOST_LINES:
            first, last = text[:1000].splitlines()[:3], text[-1000:].splitlines()[-3:]
            ends = {line.strip() for line in (*first, *last)}
            self.lines.update(line for line in ends if 12 <= len(line) <= 200)
        named = f"{path}: {' '.join(text[:60].split())}"
        result = self.result
        if len(result.longest) < 3 or len(text) > result.longest[-1][0]:
            result.longest = heapq.nlargest(3, [*result.longest, (len(text), named)])
        if len(text) >= 200:
            head = text[:2000]
            letters = round(_letters(head) / max(1, len(head) - head.count(" ")), 3)
            if len(result.oddest) < 3 or letters < result.oddest[-1][0]:
                result.oddest = heapq.nsmallest(3, [*result.oddest, (letters, named)])

    def finish(self, name: str) -> SourceInventory:
        """What has been found."""
        result = self.result
        result.name, result.repeated = name, sorted(set(result.repeated))
        often = max(3, len(self.sizes) // 10)
        common = self.lines.most_common(10)
        result.repeated_lines = [(n, line) for line, n in common if n >= often]
        if classify := self.classifier.result():
            result.languages = dict(Counter(classify(text)[0] for _, text in self.samples))
        if (divided := division(self.first, VALIDATION_SHARE)) is None:
            return result
        result.share, result.piece = divided.share, divided.piece
        if divided.piece is None:
            held = [n for where, n in self.sizes if where <= divided.share]
        else:
            held = [len(part) for text in self.first for part in divided.texts(text, "val")]
        result.held_out = len(held), sum(held)
        return result


def _letters(text: str) -> int:
    """How many characters are letters; those that are no ASCII are looked at one by one."""
    data = text.encode()
    ascii_letters = len(data) - len(data.translate(None, string.ascii_letters.encode()))
    return ascii_letters + sum(map(str.isalpha, data.translate(None, ASCII).decode()))


def _classifier() -> Callable[[str], tuple[str, float]] | None:
    """What guesses a text's language, loaded; None where the library is missing or cannot work."""
    try:
        from py3langid import classify

        classify("")
        return classify
    except ImportError:
        return None
    except OSError as e:  # it unpacks its model into a temporary file
        notice(f"languages are not guessed, because temporary files cannot be written ({e})")
        return None
