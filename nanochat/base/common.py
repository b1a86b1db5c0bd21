"""
What every module may need: where files are, which rank this is, how figures are printed, and the
exception for mistakes that the user can fix. It imports nothing else of the project, nor torch.
"""

import errno
import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# C0 and C1 controls but tab, line break and carriage return, DEL, and halves of surrogate pairs
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_INVISIBLE = re.compile(r"[\r\u202a-\u202e\u2066-\u2069]")  # carriage return, text direction


class UserError(Exception):
    """
    A mistake that the user can fix. The message says what is wrong, the value, and what to do; it
    is never shown with a stack trace.
    """

    status = 2  # exit status of the command


class RankLost(UserError):
    """Another rank of the run has ended, so this one must end, too; it prints this if `aloud`."""

    aloud = False


def disk_error(path: Path | str, error: OSError) -> UserError:
    """The UserError for a file or folder that the disk refuses to write."""
    return UserError(
        f"cannot write {path} ({error.strerror}): free some space or set NANOCHAT_BASE_DIR to "
        "another disk"
    )


def user_path(text: Path | str) -> Path:
    """The path that a user wrote, with ~ replaced. UserError for the ~ of an unknown user."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UserError(
            f"there is no home folder {Path(text).parts[0]}: write the whole path"
        ) from None


def base_dir() -> Path:
    """
    The folder of all output, NANOCHAT_BASE_DIR or by default ~/.cache/nanochat, which is created.
    UserError if it cannot be.
    """
    path = user_path(os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(
            f"cannot create the base folder {path} ({e.strerror}): set NANOCHAT_BASE_DIR to a "
            "folder that you can write to"
        ) from e
    return path


def rank() -> int:
    """The rank of this process as torchrun set it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """The number of processes as torchrun set it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def printable(text: str) -> str:
    """
    The text without characters that could change a terminal's state, move its cursor or reverse the
    direction of text: files, models and servers can contain them. They are removed or replaced by
    U+FFFD. Line breaks and tabs stay.
    """
    return _CONTROL.sub("\ufffd", _INVISIBLE.sub("", text))


def in_line(text: object) -> str:
    """The text in one line, so that a name with line breaks cannot look like several messages."""
    return " ".join(str(text).splitlines())


def print0(*args: object, prefix: str = "", suffix: str = "", **options: Any) -> None:
    """
    print() on rank 0 only, flushed, so that the log of a background run is up to date. The text is
    made `printable`; only `prefix` and `suffix` may have control codes. If printing fails (the
    terminal is closed, the reader of a pipe has ended, the disk is full), the program continues.
    """
    if rank() == 0:
        try:
            text = options.pop("sep", " ").join(map(str, args))
            print(f"{prefix}{printable(text)}{suffix}", **{"flush": True, **options})
        except (OSError, ValueError) as e:  # ValueError: the stream was closed
            _discard_output(options.get("file") or sys.stdout, e)
        except RuntimeError:  # a signal arrived during a print, and its handler prints, too
            return


def notice(message: str) -> None:
    """Print a line on standard error, on rank 0, about something that is not an error."""
    print0(f"notice: {in_line(message)}", file=sys.stderr)


def before_torch() -> None:
    """On Linux, set what torch reads once, when it is loaded, unless the user has set it."""
    if sys.platform != "linux":
        return
    # Fragments a GPU's memory less
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    # A thread that waits for another sleeps after microseconds. By default it spins for
    # milliseconds, which on a busy machine keeps the other one from its core.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def opening(command: str, log: bool = False) -> None:
    """
    Say that a command is loading torch, which takes seconds: on standard error if that is a
    terminal or, with `log`, on standard output.
    """
    if "torch" not in sys.modules and (log or sys.stderr.isatty()):
        print0(f"{command}: loading PyTorch", file=sys.stdout if log else sys.stderr)


def human(n: float) -> str:
    """12_582_912 -> '12.6M': three digits and a decimal unit."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(n) < 999.5:
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}P"


def counted(n: float, things: str) -> str:
    """1, 'documents' -> '1 document'; 3167 -> '3,167 documents'."""
    return f"{n:,.0f} {things if n != 1 else things[:-1]}"


def duration(seconds: float) -> str:
    """5 -> '5s', 75 -> '1m15s', 7260 -> '2h01m'."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def optional(name: str, extra: str) -> Any:
    """
    A module of a package that one of nanochat's extras installs. Raises UserError if it cannot be
    imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise UserError(
            f"the package {name.split('.')[0]} cannot be used ({e}): run pip install -e "
            f'".[{extra}]" in the folder of nanochat'
        ) from e


def columns(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table for a terminal that is also valid Markdown; columns of figures are right-aligned."""
    laid_out = []
    for column in zip(head, *rows, strict=True):
        cells = [in_line(cell) for cell in column]
        width = max(map(len, cells))
        if all(re.match(r"[-+]?[\d.]|$", cell) for cell in cells[1:]):
            justify, rule = str.rjust, "-" * (width - 1) + ":"
        else:
            justify, rule = str.ljust, "-" * width
        title, *rest = (justify(cell, width) for cell in cells)
        laid_out.append([title, rule, *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in zip(*laid_out, strict=True))


def decoded(data: bytes) -> str:
    """
    The text of a small file as editors save it: UTF-8, or UTF-16 after a byte-order mark. Raises
    UnicodeDecodeError.
    """
    utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
    return data.decode("utf-16" if utf16 else "utf-8-sig")


def _discard_output(stream: Any, error: Exception) -> None:
    """Redirect a stream to the null device if the error says that its reader is gone."""
    if getattr(error, "errno", None) in (errno.EPIPE, errno.EIO, errno.EBADF):
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (OSError, ValueError):
            return  # not a file of the system, as in a notebook


def _flush() -> None:
    """Flush the streams, so that the interpreter has nothing to flush, and to fail at, later."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _discard_output(stream, OSError(errno.EIO, "the program ends"))


def forgiving_streams() -> None:
    """
    Make the console print '?' for a character that it cannot show, and read U+FFFD for bytes that
    are not text, where Python would raise an error. A stream that is closed from the start (`>&-`)
    becomes the null device.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="replace")


OUT_OF_MEMORY = (  # what messages of RuntimeErrors say
    "can't allocate memory",  # the CPU
    "not enough memory",  # Windows
    "could not create a primitive",  # oneDNN, if it cannot allocate buffers
    "could not create a memory",
    "out of memory",  # a GPU, MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def out_of_memory(e: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a GPU or on the host."""
    if isinstance(e, OSError):
        return e.errno == errno.ENOMEM
    return isinstance(e, MemoryError) or (
        isinstance(e, RuntimeError) and any(text in str(e) for text in OUT_OF_MEMORY)
    )


def explained(e: BaseException) -> UserError | None:
    """The UserError for lack of memory, disk space or permission; None for other exceptions."""
    if out_of_memory(e):
        return UserError(
            "out of memory: use a smaller model, a shorter context or smaller batches (in "
            "training, --device_batch_size), or end other programs"
        )
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG):
        return disk_error(e.filename or "a file", e)
    if isinstance(e, PermissionError) and e.filename:
        return UserError(
            f"there is no permission for {e.filename}: allow it with chmod or chown, or choose "
            "another file or folder"
        )
    return None


# Each function says whether some thread, which nothing can stop, is still running. Python would
# wait for it, or abort, at the end of the program.
unstoppable: list[Callable[[], bool]] = []


def entry(main: Callable[[], object]) -> None:
    """
    Run a command's main(). A UserError becomes one line on standard error and exit status 2, as do
    a full disk and memory that runs out; Ctrl+C becomes status 130. Any other exception is a bug
    and keeps its stack trace.
    """
    forgiving_streams()
    before_torch()
    try:
        main()
    except KeyboardInterrupt:
        print0("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError as e:  # `command | head`: give the interpreter somewhere to flush
        _discard_output(sys.stdout, e)
        sys.exit(1)
    except Exception as e:
        error = e if isinstance(e, UserError) else explained(e)
        if error is None:
            raise
        _print_error(error)
        sys.exit(error.status)
    finally:
        _flush()
        leaving = sys.exc_info()[1]
        if isinstance(leaving, SystemExit) and any(runs() for runs in unstoppable):
            os._exit(leaving.code if isinstance(leaving.code, int) else 1)


def _print_error(error: UserError) -> None:
    """
    Print one line on standard error. Ranks other than 0 wait a second before they do: if rank 0 has
    the same error, the launcher ends them meanwhile.
    """
    if isinstance(error, RankLost) and not error.aloud:
        return  # another rank prints the reason
    if rank() == 0:
        print0(f"error: {in_line(error)}", file=sys.stderr)
    else:
        time.sleep(0 if isinstance(error, RankLost) else 1)
        print(printable(f"error: rank {rank()}: {in_line(error)}"), file=sys.stderr, flush=True)
