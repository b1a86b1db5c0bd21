"""The two sides of a terminal: what a command shows there, and what a person types."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from nanochat.base.common import base_dir, notice, printable

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.key_binding.key_processor import KeyPressEvent

GREY, BOLD, NORMAL = "\033[90m", "\033[1m", "\033[0m"


def in_terminal() -> bool:
    """Whether a person types and reads here."""
    return sys.stdin.isatty() and sys.stdout.isatty()


class Screen:
    """
    Where text is shown. In a terminal (`styled`), remarks are grey and labels are bold; otherwise
    remarks go to standard error and there are no labels, so that standard output has text alone.
    """

    def __init__(self, styled: bool):
        self.styled = styled
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        self._coloured = styled and not plain
        self._line_open = False  # whether the cursor stands behind text

    def write(self, text: str) -> None:
        """Show a piece of text; nothing in it can change the terminal's state."""
        print(visible := printable(text), end="", flush=True)
        if visible:
            self._line_open = not visible.endswith("\n")

    def end(self) -> None:
        """End a text with a line break; in a terminal, only if the cursor stands behind text."""
        if self._line_open or not self.styled:
            print(flush=True)
        self._line_open = False

    def remark(self, text: str) -> None:
        """Show something that is not part of the text."""
        if self.styled:
            self.end()
            print(self._in_colour(GREY, printable(text)), flush=True)
        else:
            print(printable(text), file=sys.stderr, flush=True)

    def label(self, name: str) -> None:
        """In a terminal, show who speaks next."""
        if self.styled:
            print(self._in_colour(BOLD, printable(name)), end=" ", flush=True)
            self._line_open = True

    def _in_colour(self, colour: str, text: str) -> str:
        return f"{colour}{text}{NORMAL}" if self._coloured else text


class Prompt:
    """
    What a person types, one text after the other, until Ctrl+D, or Ctrl+C twice on an empty line.
    Ctrl+C clears a line that holds text. Alt+Enter begins a new line, and so does Enter after a
    backslash if texts can be `continued`; a paste of several lines comes as one text. `history` is
    the file in the base folder that keeps the texts; Tab completes `words`.
    """

    def __init__(
        self,
        label: str,
        history: str,
        style: Mapping[str, str] | None = None,
        words: Iterable[str] = (),
        continued: bool = True,
    ):
        self.label, self.history, self.style, self.words = label, history, style or {}, words
        self.continued = continued
        self.prefilled: str | None = None  # the next line begins with this text, to be edited
        self.editing = False  # whether the line is such a text, which Ctrl+C has not cleared
        self._warned = False  # whether the last key was Ctrl+C on an empty line

    def __iter__(self) -> Iterator[str]:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.shortcuts import CompleteStyle
        from prompt_toolkit.styles import Style

        session: PromptSession[str] = PromptSession(
            multiline=True,
            history=self._open_history(),
            style=Style.from_dict({"label": "bold", **self.style}),
            key_bindings=self._keys(),
            completer=WordCompleter([*self.words], sentence=True),
            complete_style=CompleteStyle.READLINE_LIKE,
            complete_while_typing=False,
        )
        while True:
            prefilled, self.prefilled = self.prefilled, None
            self.editing = prefilled is not None
            try:
                text = session.prompt(
                    [("class:label", self.label)],
                    default=prefilled or "",
                    prompt_continuation=" " * len(self.label),
                )
            except EOFError:
                return
            except KeyboardInterrupt:
                if self._warned:
                    return
                self._warned = True
                Screen(True).remark("Ctrl+C once more exits")
            else:
                self._warned = False
                yield text

    def _keys(self) -> "KeyBindings":
        from prompt_toolkit.enums import DEFAULT_BUFFER
        from prompt_toolkit.filters import has_focus
        from prompt_toolkit.key_binding import KeyBindings

        keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)  # and not searching

        @keys.add("enter", filter=typing)
        def _(event: "KeyPressEvent") -> None:
            buffer = event.current_buffer
            document = buffer.document
            at_backslash = document.is_cursor_at_the_end and document.current_line.endswith("\\")
            if self.continued and at_backslash:
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @keys.add("escape", "enter", filter=typing)
        def _(event: "KeyPressEvent") -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("c-c", filter=typing)
        def _(event: "KeyPressEvent") -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
                self.editing = self._warned = False
            else:
                event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

        return keys

    def _open_history(self) -> "History":
        """The file of earlier texts, or memory alone where it cannot be written."""
        from prompt_toolkit.history import FileHistory, InMemoryHistory

        path = base_dir() / self.history
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            path.chmod(0o600)  # for nobody else to read, if an earlier version made it
        except OSError as e:
            notice(f"cannot write {path} ({e.strerror}): what you type is not kept")
            return InMemoryHistory()
        return FileHistory(str(path))
