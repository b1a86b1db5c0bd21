"""
Text to token ids and back: byte-pair encoding trained here, plus nine special tokens.

The ids of a text are defined as follows. Lone surrogates become U+FFFD. A text longer than WINDOW
characters is cut at the last place within each window where the split pattern has a boundary
anyway (so that the cut changes nothing) or, in a window without one, at its end. Each piece that
the pattern splits off becomes one token if the vocabulary has it; otherwise its bytes are merged,
lowest rank first.

Ordinary text never becomes a special token, whatever it spells; only rendering a conversation
places those. The files are JSON and hold no code.
"""

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.base.common import UserError, base_dir, notice
from nanochat.base.files import atomic_write, write_json
from nanochat.base.hardware import usable_cpus
from nanochat.base.strangers import read_json, shown
from nanochat.data.documents import well_formed
from nanochat.data.rendering import SPECIAL_TOKENS, checked_messages, conversation_pieces

MOST_BYTES = 2**30  # of tokenizer.json: the largest vocabulary, spelled out
DIGITS = (1, 2, 3)  # the most digits that a token may hold; llama.cpp knows 1 and 3
WINDOW = 1 << 16  # characters; the regular expression engines give up on runs of about a million
FORMAT = 1  # of the definition above; part of the fingerprint
# Every split pattern splits after these, whatever surrounds them
_BOUNDARY = re.compile(r"[A-Za-z0-9](?=[ \n])|\n(?=\S)")
_SPARE = 64  # additional merges to learn, because some spell a token that exists already


def split_pattern(digits: int) -> str:
    """
    The regular expression that splits a text into pieces: GPT-4's, with `digits` digits at most.
    """
    number = r"\p{N}" if digits == 1 else rf"\p{{N}}{{1,{digits}}}"
    return (
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|"
        + number
        + r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )


def fast_pattern(digits: int) -> str:
    """
    A pattern that splits every text as split_pattern does, a third faster: all but the lookahead is
    one group without possessive quantifiers, which the regular expression engine runs at once. The
    quantifiers change nothing, because what follows them never matches what they would give back.
    """
    others, lookahead, rest = split_pattern(digits).rsplit("|", 2)
    others = others.replace("?+", "?").replace("++", "+")
    return f"(?:{others})|{lookahead}|{rest}"


class Tokenizer:
    """
    `ranks` maps the bytes of each token to its id: first the 256 single bytes in some order, then
    the merges in the order learned. Special tokens have the last ids. `digits` is the most digits
    that the split pattern leaves together.
    """

    def __init__(self, ranks: dict[bytes, int], digits: int = 2):
        complete = all(bytes([b]) in ranks for b in range(256))
        if not complete or sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError("a vocabulary needs all 256 bytes and ids without gaps")
        if max(map(len, ranks)) > 4 * WINDOW:
            raise ValueError("it has a token that is longer than any text that is encoded at once")
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.specials = {name: i for i, name in enumerate(SPECIAL_TOKENS, len(ranks))}
        self.bos = self.specials["<|bos|>"]
        # What decode_bytes gives, by id; as it is no call of tiktoken, no thread waits for another
        self.pieces = [*self.ranks, *(name.encode() for name in self.specials)]
        self.vocab_size = len(self.pieces)
        self.digits, self.pattern = digits, split_pattern(digits)
        # UTF-8 bytes of a token, on average over text like its training text; 0 = not known
        self.bytes_per_token = 0.0
        digest = hashlib.sha256(json.dumps([FORMAT, self.pattern, WINDOW, self.specials]).encode())
        for token in self.ranks:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.fingerprint: str = digest.hexdigest()
        self._bpe = tiktoken.Encoding(
            "nanochat",
            pat_str=fast_pattern(digits),
            mergeable_ranks=self.ranks,
            special_tokens=self.specials,
        )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, digits: int = 2) -> "Tokenizer":
        """
        Learn a vocabulary of `vocab_size` tokens, special ones included. The same texts in the same
        order give the same tokenizer. Texts with too little variety give fewer tokens, with a
        notice; no text at all is a UserError.
        """
        import rustbpe

        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise UserError(
                f"--vocab_size={vocab_size} is too small: it must be at least {least}, for the "
                "256 bytes and the special tokens"
            )
        pieces = (piece for text in texts for piece in segments(text) if piece)
        first = next(pieces, None)
        if first is None:
            raise UserError("there is no text to train a tokenizer on: name some with --data")
        wanted = vocab_size - len(SPECIAL_TOKENS)
        bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (it has no types)
        texts = itertools.chain([first], pieces)
        bpe.train_from_iterator(texts, wanted + _SPARE, pattern=fast_pattern(digits))
        learned = sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
        tokens = list(dict.fromkeys(bytes(token) for token, _ in learned))[:wanted]
        tokenizer = cls({token: rank for rank, token in enumerate(tokens)}, digits)
        if tokenizer.vocab_size < vocab_size:
            notice(
                f"the text is too short or too uniform for {vocab_size} tokens: the vocabulary "
                f"has only {tokenizer.vocab_size}; add text for more"
            )
        return tokenizer

    @classmethod
    def load(cls, directory: Path | str | None = None) -> "Tokenizer":
        """
        The tokenizer that save() wrote to `directory` (default: tokenizer/ in the base folder).
        Raises UserError if it is missing or damaged.
        """
        directory = Path(directory or base_dir() / "tokenizer")
        remedy = "train one with nanochat tok_train"
        if not (directory / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer in {directory}: {remedy}")
        try:
            data = read_json(directory / "tokenizer.json", MOST_BYTES)
            meta = read_json(directory / "meta.json")
            byte_of = {letter: byte for byte, letter in enumerate(_LETTERS)}
            vocabulary = data["model"]["vocab"].items()
            ranks = {bytes(map(byte_of.__getitem__, token)): rank for token, rank in vocabulary}
            digits = {split_pattern(n): n for n in DIGITS}[meta["pattern"]]
            tokenizer = cls(ranks, digits)
            tokenizer.bytes_per_token = float(meta.get("bytes_per_token", 0.0))
            expected = {**tokenizer._json(), "model": data["model"]}
            if tokenizer.fingerprint != meta["fingerprint"] or data != expected:
                raise ValueError("its files do not match, or another version wrote them")
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as e:
            raise UserError(
                f"the tokenizer in {directory} is damaged ({type(e).__name__}: {shown(str(e))}): "
                f"{remedy}"
            ) from e
        return tokenizer

    def save(self, directory: Path | str) -> None:
        """
        Write tokenizer.json, which `tokenizers` and transformers read, and meta.json, which people
        read and which shows damage.
        """
        directory = Path(directory)
        meta = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "merges": len(self.ranks) - 256,
            "special_tokens": self.specials,
            "pattern": self.pattern,
            "bytes_per_token": self.bytes_per_token,
        }
        data = self._json()
        data["model"]["merges"] = _merges(self.ranks)
        atomic_write(directory / "tokenizer.json", json.dumps(data, ensure_ascii=False, indent=1))
        write_json(directory / "meta.json", meta)

    def spelled(self) -> tuple[list[str], list[list[str]]]:
        """The ordinary tokens in order of id, and the merges, in the letters of tokenizer.json."""
        return [*map(_spelled, self.ranks)], _merges(self.ranks)

    def _json(self) -> dict:
        """The Hugging Face form, without the merges, which follow from the vocabulary."""
        unset = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": self.pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **unset, "special": True}
                for name, i in self.specials.items()
            ],
            "normalizer": None,
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": True,
                "vocab": {_spelled(token): rank for token, rank in self.ranks.items()},
            },
        }

    @property
    def never_sampled(self) -> tuple[int, int]:
        """The ids around the calculator's output, which no model may write."""
        return self.specials["<|output_start|>"], self.specials["<|output_end|>"]

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of ordinary text, after <|bos|> if asked for."""
        ids = [self.bos] if bos else []
        for segment in segments(text):
            ids += self._bpe.encode_ordinary(segment)
        return ids

    def encode_batch(self, texts: Sequence[str], bos: bool = False) -> list[np.ndarray]:
        """encode() of each text as a uint32 array, on all cores."""
        head = np.array([self.bos] if bos else [], dtype=np.uint32)

        def encode(text: str) -> np.ndarray:
            ids = partial(self._bpe.encode_to_numpy, disallowed_special=())
            return np.concatenate([head, *map(ids, segments(text))])

        # In groups, because a task per text would cost more than it saves
        groups = [texts[i : i + 16] for i in range(0, len(texts), 16)]
        with ThreadPoolExecutor(usable_cpus()) as pool:
            encoded = pool.map(lambda group: [encode(text) for text in group], groups)
            return list(itertools.chain.from_iterable(encoded))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """
        The bytes that the ids stand for; special tokens give their names. KeyError for an id
        outside the vocabulary.
        """
        return self._bpe.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """decode_bytes() as text; what is not UTF-8 (half a character at an end) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: UTF-8 bytes per token, 0 for special ones, for bits per byte."""
        sizes = [len(token) for token in self.ranks] + [0] * len(self.specials)
        return np.array(sizes, dtype=np.int32)

    def render_conversation(self, conversation: dict) -> tuple[list[int], list[int]]:
        """
        The ids, and a mask that is 1 where the model learns to say the token (assistant text,
        calculator calls, <|assistant_end|>) and 0 elsewhere.
        """
        return self._render(checked_messages(conversation))

    def render_prompt(self, conversation: dict) -> list[int]:
        """Ids that end with <|assistant_start|>; the last message must be the user's."""
        messages = checked_messages(conversation)
        if messages[-1]["role"] != "user":
            raise UserError("a prompt must end with a message from the user, not the assistant")
        return [*self._render(messages)[0], self.specials["<|assistant_start|>"]]

    def _render(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        ids, mask = [], []
        for piece in conversation_pieces(messages):
            new = [self.specials[piece.text]] if piece.special else self.encode(piece.text)
            ids += new
            mask += [int(piece.supervised)] * len(new)
        return ids, mask


def in_common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens at their beginnings all sequences have in common."""
    shortest = min(sequences, key=len)
    for i, token in enumerate(shortest):
        if any(sequence[i] != token for sequence in sequences):
            return i
    return len(shortest)


class StreamDecoder:
    """Decodes ids one by one and never gives half a character; the pieces add up to decode()."""

    def __init__(self, tokenizer: Tokenizer):
        self._pieces = tokenizer.pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: none, one or many."""
        return self._utf8.decode(self._pieces[token])

    def flush(self) -> str:
        """The rest: U+FFFD for half a character. The decoder can then be used again."""
        return self._utf8.decode(b"", final=True)


def segments(text: str) -> Iterator[str]:
    """The text in windows that the regular expression engines can take; see the top of the file."""
    text, start = well_formed(text), 0
    while len(text) - start > WINDOW:
        end = cut = start + WINDOW
        for reach in (256, WINDOW - 1):  # nearly always the last 256 characters have a boundary
            if ends := [m.end() for m in _BOUNDARY.finditer(text, end - reach, end + 1)]:
                cut = ends[-1]
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _byte_letters() -> list[str]:
    """A visible character for each byte, as GPT-2 chose them: tokenizer.json holds text only."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


_LETTERS = _byte_letters()


def _spelled(token: bytes) -> str:
    return "".join(_LETTERS[byte] for byte in token)


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """
    Every pair of tokens that joins to a token, in order of rank. `tokenizers` merges only the pairs
    listed, tiktoken any pair whose joined bytes are a token; with all pairs listed the two agree.
    """
    merges = []
    for token in ranks:
        halves = ((token[:i], token[i:]) for i in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        pairs.sort(key=lambda pair: [ranks[half] for half in pair])
        merges += [[_spelled(half) for half in pair] for pair in pairs]
    return merges
