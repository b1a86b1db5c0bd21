"""
Text to token ids and back: byte-pair encoding trained here, nine special tokens, and conversations rendered with their supervision mask.

What a text's ids are, by definition: lone surrogates become U+FFFD; a text longer than WINDOW characters is cut at the last place within
each window where the split pattern has a boundary anyway (so the cut changes nothing) or, in a window without one, at its end; each piece
that the pattern splits off becomes one token if the vocabulary has it, else its bytes are merged, lowest rank first.

Ordinary text never becomes a special token here, whatever it spells; only rendering places those. Files are JSON and hold no code.
Cutting conversations to a length is the packer's business, not this module's.
"""

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tiktoken

from nanochat.base.common import UserError, base_dir, notice
from nanochat.base.files import atomic_write
from nanochat.data.documents import well_formed

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",  # the assistant calls the calculator
    "<|output_start|>",
    "<|output_end|>",  # and is told its result
)
# As GPT-4's, but digits go in ones and twos: a small vocabulary cannot spare a thousand tokens for numbers
PATTERN = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)
WINDOW = 1 << 16  # characters; the regular expression engines give up on runs of about a million
FORMAT = 1  # of the definition above; part of the fingerprint
_BOUNDARY = re.compile(
    r"[A-Za-z0-9](?=[ \n])|\n(?=\S)"
)  # PATTERN always splits after these, whatever stands around them
_SPARE = 64  # merges learned beyond those wanted: some spell a token that is already there

# ----------------------------------------------------------------------------------------------------
# Conversations

PART_TOKENS = {
    "text": None,
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}


def checked_messages(conversation: dict) -> list[dict]:
    """The messages with the system message merged into the first user message; UserError if the conversation has not the right shape."""
    messages = conversation.get("messages") if isinstance(conversation, dict) else None
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError('a conversation must be {"messages": [{"role": ..., "content": ...}, ...]}')
    for i, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role == "assistant" and isinstance(content, list):
            for part in content:
                if (
                    not isinstance(part, dict)
                    or part.get("type") not in PART_TOKENS
                    or not isinstance(part.get("text"), str)
                ):
                    kinds = ", ".join(PART_TOKENS)
                    raise UserError(
                        f'message {i}: a part must be {{"type": one of {kinds}; "text": ...}}, not {_brief(part)}'
                    )
        elif not isinstance(content, str):
            raise UserError(
                f"message {i}: the content of a message of role {role!r} must be text, not {_brief(content)}"
            )
    first = 1 if messages and messages[0].get("role") == "system" else 0
    for i, message in enumerate(messages[first:]):
        want = ("user", "assistant")[i % 2]
        if message.get("role") != want:
            raise UserError(
                f"message {first + i}: role {message.get('role')!r} where {want!r} must stand (user and assistant take turns)"
            )
    if len(messages) == first:
        raise UserError("a conversation needs a user message")
    if first:
        merged = {
            **messages[1],
            "content": messages[0]["content"] + "\n\n" + messages[1]["content"],
        }
        messages = [merged, *messages[2:]]
    return messages


def conversation_pieces(messages: list[dict]) -> Iterator[tuple[str, bool, bool]]:
    """(text, is it a special token, is it supervised) in order. The chat template of the export mirrors this function."""
    yield "<|bos|>", True, False
    for message in messages:
        if message["role"] == "user":
            yield "<|user_start|>", True, False
            yield message["content"], False, False
            yield "<|user_end|>", True, False
            continue
        content = message["content"]
        yield "<|assistant_start|>", True, False
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            supervised = (
                part["type"] != "python_output"
            )  # that comes from the tool: the model never has to say it
            start, end = PART_TOKENS[part["type"]] or (None, None)
            if start:
                yield start, True, supervised
            yield part["text"], False, supervised
            if end:
                yield end, True, supervised
        yield "<|assistant_end|>", True, True


def _brief(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ----------------------------------------------------------------------------------------------------
# The tokenizer


class Tokenizer:
    """
    `ranks` maps each token's bytes to its id: 0..255 some order of the single bytes, then the merges in the order learned.
    Special tokens take the last ids. Text and conversations in, ids out, and back.
    """

    def __init__(self, ranks: dict[bytes, int]):
        if sorted(ranks.values()) != list(range(len(ranks))) or not all(
            bytes([b]) in ranks for b in range(256)
        ):
            raise ValueError("a vocabulary needs all 256 bytes and ids without gaps")
        self.ranks = dict(sorted(ranks.items(), key=lambda item: item[1]))
        self.specials = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.bos = self.specials["<|bos|>"]
        self.vocab_size = len(ranks) + len(SPECIAL_TOKENS)
        digest = hashlib.sha256(json.dumps([FORMAT, PATTERN, WINDOW, self.specials]).encode())
        for token in self.ranks:
            digest.update(len(token).to_bytes(4, "little") + token)
        self.fingerprint: str = digest.hexdigest()
        self._bpe = tiktoken.Encoding(
            "nanochat", pat_str=PATTERN, mergeable_ranks=self.ranks, special_tokens=self.specials
        )

    # --- made, saved, loaded

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """
        Learn a vocabulary of `vocab_size` tokens, special ones included. The same texts in the same order give the same tokenizer.
        Texts too small for that many tokens give fewer, with a notice; none at all is a UserError.
        """
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise UserError(
                f"--vocab_size {vocab_size} is too small: the bytes and the special tokens alone need {least}"
            )
        pieces = (piece for text in texts for piece in segments(text) if piece)
        first = next(pieces, None)
        if first is None:
            raise UserError(
                "there is no text to train a tokenizer on: name files that hold some with --data"
            )
        wanted = vocab_size - len(SPECIAL_TOKENS)
        tokens = _learn(itertools.chain([first], pieces), wanted + _SPARE)
        tokens = list(dict.fromkeys(tokens))[:wanted]
        if len(tokens) < wanted:
            size = len(tokens) + len(SPECIAL_TOKENS)
            notice(
                f"the text holds enough for {size} tokens only, not for {vocab_size}: the vocabulary has {size}"
            )
        return cls({token: rank for rank, token in enumerate(tokens)})

    @classmethod
    def load(cls, directory: Path | str | None = None) -> "Tokenizer":
        """The tokenizer that save() wrote to `directory` (default: tokenizer/ in the base folder). Missing or damaged: UserError."""
        directory = Path(directory) if directory is not None else base_dir() / "tokenizer"
        remedy = "train one with python -m scripts.tok_train"
        if not (directory / "tokenizer.json").is_file():
            raise UserError(f"there is no tokenizer in {directory}: {remedy}")
        try:
            data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            byte_of = {letter: byte for byte, letter in enumerate(_byte_letters())}
            tokenizer = cls(
                {
                    bytes(byte_of[c] for c in token): rank
                    for token, rank in data["model"]["vocab"].items()
                }
            )
            if tokenizer.fingerprint != meta["fingerprint"] or {**data, "model": None} != {
                **tokenizer._json(),
                "model": None,
            }:
                raise ValueError("its files do not belong together, or another version wrote them")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise UserError(
                f"the tokenizer in {directory} is damaged ({type(e).__name__}: {_brief(str(e))}): {remedy}"
            ) from e
        return tokenizer

    def save(self, directory: Path | str) -> None:
        """Write tokenizer.json (what `tokenizers` and transformers read) and meta.json (for people, and to notice damage)."""
        directory = Path(directory)
        meta = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "vocab_size": self.vocab_size,
            "merges": len(self.ranks) - 256,
            "special_tokens": self.specials,
            "pattern": PATTERN,
        }
        data = self._json()
        data["model"]["merges"] = _merges(self.ranks)
        atomic_write(directory / "tokenizer.json", json.dumps(data, ensure_ascii=False, indent=1))
        atomic_write(directory / "meta.json", json.dumps(meta, indent=1) + "\n")

    def _json(self) -> dict:
        """The Hugging Face form of this tokenizer without its merges, which follow from the vocabulary."""
        letters = _byte_letters()
        flags = {
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        }
        split = {
            "type": "Split",
            "pattern": {"Regex": PATTERN},
            "behavior": "Isolated",
            "invert": False,
        }
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [
                {"id": i, "content": name, **flags} for name, i in self.specials.items()
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
                "vocab": {
                    "".join(letters[b] for b in token): rank for token, rank in self.ranks.items()
                },
            },
        }

    # --- used

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """The ids of ordinary text, with <|bos|> before them if asked."""
        ids = [self.bos] if bos else []
        for segment in segments(text):
            ids += self._bpe.encode_ordinary(segment)
        return ids

    def encode_batch(
        self, texts: Sequence[str], bos: bool = False, threads: int | None = None
    ) -> list[np.ndarray]:
        """encode() of each text as a uint32 array, on `threads` threads (default: one a core); lists of ids would cost more."""
        head = [np.array([self.bos], dtype=np.uint32)] if bos else []

        def encode(group: Sequence[str]) -> list[np.ndarray]:
            return [
                np.concatenate(
                    [
                        *head,
                        *(
                            self._bpe.encode_to_numpy(segment, disallowed_special=())
                            for segment in segments(text)
                        ),
                    ]
                )
                for text in group
            ]

        groups = [
            texts[i : i + 16] for i in range(0, len(texts), 16)
        ]  # one task a text would cost more than it saves
        with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
            return [ids for group in pool.map(encode, groups) for ids in group]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the ids stand for; special tokens give their names. KeyError for an id outside the vocabulary."""
        return self._bpe.decode_bytes([int(i) for i in ids])

    def decode(self, ids: Iterable[int]) -> str:
        """decode_bytes() as text; what is not UTF-8 (half a character at an end) becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        """(vocab_size,) int32: the UTF-8 bytes that each token stands for, 0 for special ones: the denominator of bits per byte."""
        return np.array(
            [len(token) for token in self.ranks] + [0] * len(self.specials), dtype=np.int32
        )

    def render_conversation(self, conversation: dict) -> tuple[list[int], list[int]]:
        """Ids and mask: 1 where the model learns to say the token (assistant text, tool calls, <|assistant_end|>), else 0."""
        return self._render(checked_messages(conversation))

    def render_prompt(self, conversation: dict) -> list[int]:
        """Ids that end with <|assistant_start|>: what the model answers. The last message must be the user's."""
        messages = checked_messages(conversation)
        if messages[-1]["role"] != "user":
            raise UserError("a prompt must end with a message of the user, not of the assistant")
        return [*self._render(messages)[0], self.specials["<|assistant_start|>"]]

    def _render(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        ids, mask = [], []
        for text, special, supervised in conversation_pieces(messages):
            new = [self.specials[text]] if special else self.encode(text)
            ids += new
            mask += [int(supervised)] * len(new)
        return ids, mask


class StreamDecoder:
    """Decodes ids one by one and never gives half a character: what it gives, joined, is decode() of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes: none, one or many."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for half a character. The decoder is then as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


# ----------------------------------------------------------------------------------------------------
# Splitting and learning


def segments(text: str) -> Iterator[str]:
    """The text in windows that the regular expression engines can take, and without lone surrogates: see the top of the file."""
    text = well_formed(text)
    start = 0
    while len(text) - start > WINDOW:
        end = start + WINDOW
        cut = end
        for reach in (256, WINDOW - 1):  # nearly always there is a place in the last 256 characters
            if places := [m.end() for m in _BOUNDARY.finditer(text, end - reach, end + 1)]:
                cut = places[-1]
                break
        yield text[start:cut]
        start = cut
    yield text[start:]


def _learn(texts: Iterator[str], size: int) -> list[bytes]:
    """Tokens in order of rank: the 256 bytes, then up to size - 256 merges; some may spell the same bytes."""
    try:
        import rustbpe
    except ImportError:
        return _learn_with_tokenizers(texts, size)
    bpe = rustbpe.Tokenizer()  # pyright: ignore[reportAttributeAccessIssue]  (a compiled module without types)
    bpe.train_from_iterator(texts, size, pattern=PATTERN)
    return [
        bytes(token) for token, _ in sorted(bpe.get_mergeable_ranks(), key=lambda pair: pair[1])
    ]


def _learn_with_tokenizers(texts: Iterator[str], size: int) -> list[bytes]:
    """The same through `tokenizers`, for machines that have no rustbpe: two to three times slower, and ties may fall differently."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as HFTokenizer

    bpe = HFTokenizer(models.BPE())
    splitter = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [splitter, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )  # type: ignore
    letters = _byte_letters()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=letters, show_progress=False)
    )  # type: ignore
    byte_of = {letter: byte for byte, letter in enumerate(letters)}
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    return [bytes([b]) for b in range(256)] + [
        bytes(byte_of[c] for c in token) for token, _ in learned if len(token) > 1
    ]


def _byte_letters() -> list[str]:
    """A visible character for each byte, as GPT-2 chose them: tokenizer.json holds text only."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = itertools.count(256)
    return [chr(byte if byte in visible else next(spare)) for byte in range(256)]


def _merges(ranks: dict[bytes, int]) -> list[list[str]]:
    """
    Every pair of tokens that joins to a token, in order of rank. `tokenizers` merges listed pairs only, tiktoken any pair
    whose joined bytes are a token: with all pairs listed the two agree.
    """
    letters = _byte_letters()
    merges = []
    for token in ranks:
        pairs = [
            (token[:i], token[i:])
            for i in range(1, len(token))
            if token[:i] in ranks and token[i:] in ranks
        ]
        for pair in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]])):
            merges.append(["".join(letters[b] for b in half) for half in pair])
    return merges
