"""
An inventory of each source, taken before anything is trained: files read by format, files skipped
by reason, documents, duplicates, languages, what is long or odd, what is held out, conversations.

    inventories = take(sources)      # reads each file once and keeps the result in the base folder
    as_lines(inventories)            # for the screen; the file in the base folder has all details

Duplicates are removed before training: of documents that are equal, or nearly equal (see
similar.py), the first one stays. Of a source of more than LIMIT characters, only the first LIMIT
are read for the inventory, which says so.
"""

import hashlib
import heapq
import importlib.util
import json
import math
import operator
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from nanochat.base.common import UserError, base_dir, counted, human, in_line, notice, print0
from nanochat.base.files import Hashes, write_json
from nanochat.base.progress import progress
from nanochat.data import conversations
from nanochat.data.documents import HOLDS_CONVERSATIONS, read_all, text_bytes
from nanochat.data.folders import CONVERSATIONS, READABLE, ROWS, Found, find, kind_of
from nanochat.data.rows import Report, of_each, reading
from nanochat.data.split import LEAST, Division, division, place

if TYPE_CHECKING:
    from nanochat.data.similar import Sketch
    from nanochat.data.sources import Source

VERSION = 6  # of the stored inventories
VALIDATION_SHARE = 0.01
LIMIT = 1 << 28  # characters that are read of a source
SAMPLES = 200  # documents whose language is guessed
SHOWN = 10  # files named for each reason
MOST_LINES = 500_000  # different lines that are counted
MOST_PROBLEMS = 100_000  # unusable rows that are named
ASCII = bytes(range(128))
EXTRAS = "charset_normalizer selectolax mammoth defusedxml pypdf striprtf py3langid"


@dataclass
class SourceInventory:
    """What one source holds. Counts of documents are as read, before duplicates are removed."""

    name: str
    read: dict[str, int] = field(default_factory=dict)  # format -> files
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (reason, file)
    notes: dict[str, int] = field(default_factory=dict)  # of the readers: text -> count
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
    complete: bool = True  # False: only the first LIMIT characters were read
    # How training and validation are divided, and the places of duplicates: see split.py
    share: float | None = None
    piece: int | None = None
    # Equal documents, of which the first stays, by the file that holds it
    repeated: dict[str, list[float]] = field(default_factory=dict)
    dropped: list[float] = field(default_factory=list)  # documents that are nearly equal to another
    file: str = ""  # where this inventory is kept; "" for the embedded corpus and web text

    @property
    def division(self) -> Division | None:
        """How the source is divided; None if it has fewer than two different documents."""
        return None if self.share is None else Division(self.share, self.piece)

    @property
    def is_counted(self) -> bool:
        """Whether all of the source is counted: it is in files, and not larger than LIMIT."""
        return bool(self.file) and self.complete

    @property
    def kept_characters(self) -> int:
        """The characters without those of duplicates."""
        return self.characters - self.removed_characters

    def left_out(self, paths: Iterable[Path]) -> tuple[list[float], list[float]]:
        """
        Places of documents that are left out of some of the files: those of which the first copy
        stays, and those of which none does, as they are nearly equal to another document or have an
        earlier copy in another file.
        """
        files = set(map(str, paths))
        here, elsewhere = [], []
        for file, places in self.repeated.items():
            (here if file in files else elsewhere).extend(places)
        return sorted(here), [*self.dropped, *sorted(elsewhere)]

    def kept(self, documents: Iterator[str], paths: Iterable[Path]) -> Iterator[str]:
        """The documents of some of the files, without duplicates."""
        repeated, dropped = map(set, self.left_out(paths))
        for text in documents:
            where = place(text)
            if where not in dropped:
                yield text
            if where in repeated:
                dropped.add(where)

    def lines(self) -> list[str]:
        """The inventory in words; no lines for the embedded corpus and web text."""
        if not self.file:
            return []
        return [*self._file_lines(), *self._text_lines(), *self._conversation_lines()]

    def _file_lines(self) -> Iterator[str]:
        read = ", ".join(f"{n:,} {kind}" for kind, n in _most(self.read)) or "no file of text"
        limit = "" if self.complete else f" (only the first {human(LIMIT)} characters were read)"
        documents = counted(self.documents, "documents")
        yield f"{self.name}: {documents}, {human(self.characters)} characters, from {read}{limit}"
        reasons: dict[str, list[str]] = {}
        for reason, name in self.skipped:
            reasons.setdefault(reason, []).append(Path(name).name)
        for reason, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
            others = f", and {len(names) - SHOWN:,} more" if len(names) > SHOWN else ""
            yield f"skipped: {len(names):,}, {reason}: {', '.join(names[:SHOWN])}{others}"

    def _text_lines(self) -> Iterator[str]:
        if self.documents:
            line = f"duplicates: {self.exact:,} equal, {self.near:,} nearly equal"
            if self.removed_characters:
                share = self.removed_characters / self.characters
                line += f"; removed: {share:.1%} of the characters"
            yield line
        if self.notes:
            yield "notes: " + "; ".join(f"{note}: {n:,}" for note, n in _most(self.notes))
        if self.bad_rows:
            yield f"rows that cannot be used: {len(self.bad_rows):,}: {self.bad_rows[0]}"
        if self.languages:
            total = sum(self.languages.values())
            most = [(code, n / total) for code, n in _most(self.languages)[:6]]
            shares = ", ".join(f"{share:.0%} {code}" for code, share in most if share > 0.02)
            yield f"languages: {shares} (of {counted(total, 'documents')}, guessed)"
        for n, line in self.repeated_lines[:3]:
            yield f"in {counted(n, 'documents')}: {line}"
        for n, where in self.longest[:1]:
            yield f"longest: {human(n)} characters, {where}"
        for share, where in self.oddest[:1]:
            if share < 0.6:
                yield f"oddest: {share:.0%} letters, {where}"
        number, characters = self.held_out
        if number:
            share = characters / max(self.kept_characters, 1)
            unit = "pieces" if self.piece else "documents"
            yield f"held out: {counted(number, unit)}, {share:.1%}"

    def _conversation_lines(self) -> Iterator[str]:
        shapes = sum(map(Counter, self.conversations.values()), Counter())
        if self.conversations:
            shown = ", ".join(f"{n:,} {shape}" for shape, n in shapes.most_common())
            yield f"conversations: {shown} in {counted(len(self.conversations), 'files')}"
        problems = self.conversation_problems
        yield from (f"not used as a conversation: {problem}" for problem in problems[:SHOWN])
        if len(problems) > SHOWN:
            yield f"not used as a conversation: {len(problems) - SHOWN:,} more"


def _most(counts: dict[str, int]) -> list[tuple[str, int]]:
    return Counter(counts).most_common()


def as_lines(inventories: Sequence[SourceInventory]) -> list[str]:
    """The inventories in words, and the files that have all details."""
    lines = [f"  {in_line(line)}" for inventory in inventories for line in inventory.lines()]
    files = [inventory.file for inventory in inventories if inventory.file]
    return [*lines, f"  details: {', '.join(files)}"] if files else lines


def take(sources: Sequence["Source"], me: str | None = None) -> list[SourceInventory]:
    """
    The inventory of each source (see sources.parse_sources). `me` is the name of the person who
    becomes the assistant of a chat. Raises UserError if there is no file to read.
    """
    return [of(source, me) for source in sources]


def show(sources: Sequence["Source"]) -> float:
    """
    Print the inventory of each source, so that nobody trains on the wrong files by mistake. Returns
    the characters of all sources, as characters_of does.
    """
    inventories = take(sources)
    for line in as_lines(inventories):
        print0(line)
    return characters_of(inventories)


def characters_of(inventories: Sequence[SourceInventory]) -> float:
    """The characters of all sources without duplicates; infinity if any are not counted."""
    return sum(i.kept_characters if i.is_counted else math.inf for i in inventories)


def text_bytes_of(sources: Sequence["Source"]) -> float:
    """The text of all sources in bytes of UTF-8; infinity if any are not counted."""
    return sum(i.bytes if i.is_counted else math.inf for i in take(sources))


def of(source: "Source", me: str | None = None) -> SourceInventory:
    """The inventory of one source: the stored one, or a new one if a file has changed."""
    if source.kind != "files":
        return SourceInventory(source.name)
    found = find(source.paths, source.name, READABLE)
    path = base_dir() / "inventory" / f"{source.name}-{_key(found, source.field, me)}.json"
    with suppress(OSError, ValueError, TypeError):
        return SourceInventory(**json.loads(path.read_bytes()))
    inventory = _survey(source.name, found, source.field, me)
    inventory.file = str(path)
    write_json(path, asdict(inventory))
    return inventory


def installed() -> list[str]:
    """The optional packages for reading files that are installed."""
    return [name for name in EXTRAS.split() if importlib.util.find_spec(name)]


def _key(found: Found, field: str | None, me: str | None) -> str:
    hashes = Hashes(base_dir() / "tokens" / ".hashes.json")
    files = [*map(str, found.files)], of_each(found.files, hashes.of)
    about = [VERSION, files, found.skipped, field, me, installed()]
    hashes.save()
    return hashlib.sha256(json.dumps(about).encode("utf-8", "replace")).hexdigest()[:16]


def _survey(name: str, found: Found, field: str | None, me: str | None) -> SourceInventory:
    from nanochat.data.similar import sketched

    report, census = Report(limit=MOST_PROBLEMS), _Census(name)
    size = sum(map(text_bytes, found.files))
    with progress(min(size, LIMIT), f"taking stock of {name}", "characters") as bar:
        for text, path, sketch in sketched(_documents(found.files, field, report)):
            census.add(text, path, sketch)
            bar.advance(len(text))
            if census.result.characters >= LIMIT:
                census.result.complete = False
                break
    inventory = census.finish()
    inventory.read = dict(report.read)
    inventory.skipped = [*found.skipped, *report.skipped]
    inventory.notes, inventory.bad_rows = dict(report.notes), report.problems
    # If a field is named, the user has said that rows are text
    may_hold = set(CONVERSATIONS).difference(ROWS if field else ())
    _survey_conversations(inventory, [f for f in found.files if kind_of(f) in may_hold], me)
    return inventory


def _documents(files: list[Path], field: str | None, report: Report) -> Iterator[tuple[str, str]]:
    """Each document and the file that holds it, which may be an archive."""
    for path in files:
        try:
            for text in read_all([path], field, report, len(files)):
                yield text, str(path)
        except UserError as e:  # whoever reads the file for training gets this error
            if str(path) not in {name for _, name in report.skipped}:
                report.skip(path, e)
            return


def _survey_conversations(inventory: SourceInventory, files: list[Path], me: str | None) -> None:
    """Count and check the conversations in files, which may also have been read as text."""
    report = Report(limit=MOST_PROBLEMS)
    for path in files:
        with reading(path):
            if counts := conversations.survey(path, report, me):
                inventory.conversations[str(path)] = dict(counts)
    inventory.conversation_problems = report.problems
    inventory.notes = {**report.notes, **inventory.notes}
    # Files that are skipped as text because they hold conversations are not skipped after all
    inventory.skipped = [
        (reason, name)
        for reason, name in inventory.skipped
        if not (HOLDS_CONVERSATIONS in reason and name in inventory.conversations)
    ]


class _Census:
    """Counts documents one by one into `result`."""

    def __init__(self, name: str) -> None:
        from nanochat.data.similar import Similar

        self.result = SourceInventory(name)
        self.seen: dict[float, str] = {}  # a document -> the file of its first copy
        self.sizes: list[tuple[float, int]] = []
        self.first: list[str] = []  # the documents that decide how the source is divided
        self.held_out = 0  # of them, if VALIDATION_SHARE decides
        self.lines: Counter[str] = Counter()
        self.samples: list[tuple[float, str]] = []
        self.similar = Similar()

    def add(self, text: str, path: str, sketch: "Sketch | None") -> None:
        """Count a document of a file; see similar.py for its sketch."""
        result, where = self.result, place(text)
        result.documents += 1
        result.characters += len(text)
        result.bytes += len(text.encode())
        is_equal = where in self.seen
        first = self.seen.setdefault(where, path)
        if is_equal:
            result.exact += 1
            result.repeated.setdefault(first, []).append(where)
        elif self.similar.to_an_earlier_one(sketch):
            result.near += 1
            result.dropped.append(where)
        else:
            self._keep(text, where, path)
            return
        result.removed_characters += len(text)

    def _keep(self, text: str, where: float, path: str) -> None:
        """Note a document that is no duplicate."""
        self.sizes.append((where, len(text)))
        if self.held_out < LEAST:
            self.first.append(text)
            self.held_out += int(where <= VALIDATION_SHARE)
        heapq.heappush(self.samples, (-where, text[:1000]))
        if len(self.samples) > SAMPLES:
            heapq.heappop(self.samples)
        if len(self.lines) < MOST_LINES:
            first, last = text[:1000].splitlines()[:3], text[-1000:].splitlines()[-3:]
            ends = {line.strip() for line in (*first, *last)}
            self.lines.update(line for line in ends if 12 <= len(line) <= 200)
        where_and_start = f"{path}: {' '.join(text[:60].split())}"
        result, by_number = self.result, operator.itemgetter(0)
        result.longest.append((len(text), where_and_start))
        result.longest = heapq.nlargest(3, result.longest, key=by_number)
        if len(text) >= 200:
            head = text[:2000]
            share = round(_letters(head) / max(1, len(head) - head.count(" ")), 3)
            result.oddest.append((share, where_and_start))
            result.oddest = heapq.nsmallest(3, result.oddest, key=by_number)

    def finish(self) -> SourceInventory:
        """The inventory of the documents."""
        result = self.result
        result.repeated = {file: sorted(set(places)) for file, places in result.repeated.items()}
        often = max(3, len(self.sizes) // 10)
        common = self.lines.most_common(10)
        result.repeated_lines = [(n, line) for line, n in common if n >= often]
        if classify := _classifier():
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
    """How many characters are letters; those beyond ASCII are tested one by one."""
    data = text.encode()
    ascii_letters = len(data) - len(data.translate(None, string.ascii_letters.encode()))
    return ascii_letters + sum(map(str.isalpha, data.translate(None, ASCII).decode()))


def _classifier() -> Callable[[str], tuple[str, float]] | None:
    """The function that guesses a text's language; None if its package is missing or fails."""
    try:
        from py3langid import classify

        classify("")
        return classify
    except ImportError:
        return None
    except OSError as e:  # it unpacks its model into a temporary file
        notice(
            f"languages are not guessed, because temporary files cannot be written ({e}): free "
            "some space, or set TMPDIR to another folder"
        )
        return None
