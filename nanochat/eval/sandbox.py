"""
Runs programs that a model wrote, for HumanEval: in a sandbox or not at all. Without a working
sandbox run() refuses; it never falls back to anything weaker.

The sandbox is bubblewrap (Linux). Its own namespaces hide the network and all other processes, and
end everything inside together. The only files that a program sees are Python's standard library and
the system's libraries, read-only, /dev/null, and a small /tmp in memory; there is no /proc and no
home. Its user is not root, and its environment is empty. There are hard limits on memory, CPU time,
threads and files. A seccomp filter refuses new processes, sockets, namespaces, tracing, and the
kinds of memory that those limits do not count. Only the deadline bounds what the kernel records for
the program: a program that creates empty files in a loop takes about 150 MB per second, which are
freed afterwards.

`passed` means that the interpreter reached the end of the program within the limits and then exited
with status 0. The proof is a random token that it writes to a pipe once the program's code has
returned. Until then the token is on the interpreter's value stack, where no frame, traceback or
garbage collector shows it; so leaving early (os._exit, SystemExit, exec), exit handlers and writing
to the pipe do not pass. Code that searches its raw memory, or jumps over lines with a trace
function, can still pass. Therefore judge() runs a program and its tests in two sandboxes, which
share nothing but a pipe for plain values.
"""

import errno
import functools
import glob
import math
import os
import platform
import secrets
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent
from typing import Any

from nanochat.base.common import UserError

MEMORY = 512  # MiB of address space
THREADS = 16  # per program; it cannot start a second process
OUTPUT = 2**20  # bytes of stdout and stderr together
DISK = 2**24  # bytes of /tmp, and of any one file
FILES = 64  # open at the same time
_START = 20.0  # seconds until the program must have started; 0.02 on an idle machine


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it wrote."""

    passed: bool
    # "", timeout, memory, output, "exit 3", "exit 0 before its end", or the last line of an
    # exception such as "AssertionError: no"
    reason: str
    stdout: str
    stderr: str


# While the program runs, only the last line is active (the backslash makes it one line), so that a
# trace function finds no other line to jump to, and there is no second token to read.
_HARNESS = """
import os, resource, sys
if os.getuid() == 0:
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
for name, value in {limits}.items():
    hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
    value = value if hard < 0 else min(value, hard)
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value, value))
main = sys.modules["__main__"] = sys.modules["{name}"] = type(sys)("{name}")
{begin}
os.write({proof}, b"+")
os.write({proof}, os.read(0, {size}) + (exec(\
compile(sys.stdin.buffer.read(), "program", "exec"), main.__dict__) or b""))
"""

# For both sides of judge(): plain values as JSON, each with its type
_CODEC = """
import builtins, json, os, sys
def encode(v):
    if v is None or isinstance(v, bool): return v
    if isinstance(v, str): return str(v)
    if isinstance(v, int): return {"int": hex(v)}
    if isinstance(v, float): return {"float": float.hex(v)}
    if isinstance(v, complex): return {"complex": [v.real.hex(), v.imag.hex()]}
    if isinstance(v, (bytes, bytearray)): return {"bytes": v.hex()}
    if isinstance(v, dict): return {"dict": [[encode(k), encode(x)] for k, x in v.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(v, kind): return {kind.__name__: [encode(x) for x in v]}
    raise TypeError(f"{type(v).__name__} is no plain value")
def decode(v):
    if not isinstance(v, dict): return v
    (kind, x), = v.items()
    if kind == "int": return int(x, 16)
    if kind == "float": return float.fromhex(x)
    if kind == "complex": return complex(*map(float.fromhex, x))
    if kind == "bytes": return bytes.fromhex(x)
    if kind == "dict": return {decode(k): decode(y) for k, y in x}
    return {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}[kind](map(decode, x))
"""
# Runs after the program: answers calls of its function until there are no more
_SERVER = """
def _serve():
{codec}
    with (
        open({calls}, encoding="ascii") as calls,
        open({results}, "w", encoding="ascii") as results,
    ):
        for line in calls:
            args, kwargs = json.loads(line)
            try: reply = encode(globals()["{name}"](*decode(args), **dict(decode(kwargs))))
            except Exception as e: reply = {{"error": [type(e).__name__, str(e)[:200]]}}
            results.write(json.dumps([reply]) + chr(10))
            results.flush()
_serve()
"""
# Stands in for the function in the tests
_ENDED = "the program ended before its function returned"
_CLIENT = """
def _client():
{codec}
    calls, results = open({calls}, "w", encoding="ascii"), open({results}, encoding="ascii")
    def candidate(*args, **kwargs):
        try:
            calls.write(json.dumps([encode(args), encode(kwargs)]) + chr(10))
            calls.flush()
        except BrokenPipeError: pass
        line = results.readline(2**22)
        if not line: raise RuntimeError("{ended}")
        (reply,) = json.loads(line)
        if isinstance(reply, dict) and "error" in reply:
            kind, text = reply["error"]
            kind = getattr(builtins, str(kind), RuntimeError)
            if not (isinstance(kind, type) and issubclass(kind, Exception)): kind = RuntimeError
            raise kind(text)
        return decode(reply)
    return candidate
candidate = {name} = _client()
"""

# Passes only inside the sandbox; importing math needs a library from a file.
_PROBE = """
import math, os
try: os.close(os.memfd_create(""))
except PermissionError:
    assert os.getuid() > 0 and os.listdir("/dev") == ["null"], "nothing is shut off"
else: raise OSError("system calls are not filtered")
"""

# Calls that need no privilege and evade the limits: numbers on (x86_64, arm64), from Linux'
# syscall_64.tbl and asm-generic/unistd.h
_REFUSED = {
    "fork": (57, None),
    "vfork": (58, None),
    "socket": (41, 198),
    "unshare": (272, 97),
    "setns": (308, 268),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "memfd_create": (319, 279),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_setup": (206, 0),
    "syslog": (103, 116),
}
_CLONE = (56, 220)  # makes threads, which are allowed, and processes, which are not
# System calls from this number on have the same number on all machines. clone3, io_uring and all
# newer ones are answered with "not implemented", and libraries do without them.
_NEW = 424
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's AUDIT_ARCH_*


def _seccomp() -> bytes:
    """
    The filter in classic BPF (Linux' filter.h, seccomp.h). An instruction is (code, how many
    instructions to skip if true, and if false, operand).
    """
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse, unknown = 0x50000 + errno.EPERM, 0x50000 + errno.ENOSYS
    architecture, number, first_argument, thread_flag = 4, 0, 16, 0x10000
    machine = list(_MACHINES).index(platform.machine())
    code = [
        (load, 0, 0, architecture),
        (equal, 1, 0, _MACHINES[platform.machine()]),
        (give, 0, 0, kill),
        (load, 0, 0, number),
        (at_least, 0, 1, _NEW),
        (give, 0, 0, unknown),
    ]
    for numbers in _REFUSED.values():
        if numbers[machine] is not None:
            code += [(equal, 0, 1, numbers[machine]), (give, 0, 0, refuse)]
    code += [
        (equal, 0, 3, _CLONE[machine]),
        (load, 0, 0, first_argument),
        (any_bit, 1, 0, thread_flag),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _python() -> str:
    """The path of the interpreter; in a virtual environment, of the real one behind it."""
    return getattr(sys, "_base_executable", sys.executable)


def _bwrap() -> list[str]:
    """
    bwrap with its mounts. A normal user gets a user namespace. Root gets none, because there it
    would still be the real root, whose threads no limit binds. Instead the harness changes to
    another id, after mounts that may need root (a Python under /root) and before the program runs.
    """
    libraries = [
        f"{base}/{name}" for base in ("", "/usr", sys.base_prefix) for name in ("lib", "lib64")
    ]
    wanted = dict.fromkeys([*libraries, "/etc/ld.so.cache", _python()])
    shown = [path for path in wanted if os.path.exists(path)]
    hidden = [
        path for folder in shown for path in glob.glob(f"{glob.escape(folder)}/python3*/*-packages")
    ]
    parents = dict.fromkeys(
        str(parent) for path in [*shown, "/dev/null"] for parent in list(Path(path).parents)[-2::-1]
    )
    options = "--unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try"
    if os.geteuid() == 0:
        options += " --cap-add CAP_SETUID --cap-add CAP_SETGID"
    else:
        options += " --unshare-user --uid 1000 --gid 1000"
    options += " --die-with-parent --new-session --hostname sandbox"
    options += f" --perms 1777 --size {DISK} --tmpfs /tmp"
    command = [shutil.which("bwrap") or "bwrap", *options.split()]
    for path in parents:
        command += ["--perms", "0755", "--dir", path]
    for path in shown:
        command += ["--ro-bind", path, path]
    for path in hidden:
        command += ["--tmpfs", path, "--remount-ro", path]
    command += ["--dev-bind", "/dev/null", "/dev/null", "--remount-ro", "/", "--chdir", "/tmp"]
    return command


@functools.cache
def missing() -> str:
    """
    "" if the sandbox works, which is tried once; otherwise a sentence that says why it does not
    work and what to do.
    """
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        problem = (
            f"the sandbox needs Linux on {' or '.join(_MACHINES)}, not {platform.system()} on "
            f"{platform.machine()}: use another machine"
        )
    elif not shutil.which("bwrap"):
        problem = (
            "bubblewrap is not installed: install it with `apt install bubblewrap` (Debian, "
            "Ubuntu) or `dnf install bubblewrap` (Fedora)"
        )
    else:
        try:
            reason = _run(_PROBE, 10.0, 256).reason
        except UserError as e:
            reason = str(e)
        problem = reason and f"the sandbox does not work ({reason}): {_remedy(reason)}"
    return problem and f"cannot run model-written programs safely: {problem}"


def _remedy(complaint: str) -> str:
    """How to make bubblewrap work, given its complaint and the kernel's settings."""
    if "nknown option" in complaint:
        return "install bubblewrap 0.7 or later"
    for name, forbids, allows in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", 0),
        ("kernel/unprivileged_userns_clone", "0", 1),
        ("user/max_user_namespaces", "0", 10000),
    ):
        setting = Path("/proc/sys", name)
        if os.geteuid() != 0 and setting.exists() and setting.read_text().strip() == forbids:
            key = name.replace("/", ".")
            return (
                "this kernel forbids user namespaces: allow them with "
                f"`sysctl -w {key}={allows}` as root"
            )
    return (
        "start the container with the right to create namespaces, for example with "
        "`docker run --privileged`"
    )


def run(program: str, seconds: float = 5.0, memory_mb: int = MEMORY) -> Outcome:
    """
    Run `program` in the sandbox: Python with the standard library, hash seed 0 and an empty stdin,
    for at most `seconds` of wall-clock time from its start and in at most `memory_mb` MiB of
    address space. Threads may call this concurrently. Raises UserError if the sandbox does not
    work, or if it breaks before the program begins, which must not count as the program's failure.
    """
    if problem := missing():
        raise UserError(problem)
    return _run(program, seconds, memory_mb)


def judge(program: str, name: str, problem: str, test: str, seconds: float = 5.0) -> Outcome:
    """
    Whether `check(candidate)` of `test` reaches its end, where candidate is the function `name` of
    `program`. Program and test run in two sandboxes at the same time. The program only sees the
    arguments of calls and returns values, all of them plain (numbers, texts, and containers of
    them). The verdict is that of the other sandbox, which runs `problem` and `test` but nothing of
    the program. So whatever the program does to its own interpreter, it cannot pass without
    returning the right values. Limits and errors are those of run().
    """
    if fault := missing():
        raise UserError(fault)
    (calls, calls_in), (results, results_in), (ready, ready_in) = os.pipe(), os.pipe(), os.pipe()
    codec = indent(_CODEC, "    ")
    server = _SERVER.format(codec=codec, calls=calls, results=results_in, name=name)
    client = _CLIENT.format(ended=_ENDED, codec=codec, calls=calls_in, results=results, name=name)
    checks = f"{problem}\n{client}\n{test}\ncheck(candidate)\n"
    begins = f'os.write({ready_in}, b"+"); os.close({ready_in})', f"os.read({ready}, 1)"
    with ThreadPoolExecutor(1) as pool:
        served = pool.submit(
            _run,
            f"{program}\n{server}",
            seconds + 1.0,
            MEMORY,
            begins[0],
            (calls, results_in, ready_in),
        )
        verdict = _run(checks, seconds, MEMORY, begins[1], (calls_in, results, ready))
        answers = served.result()
    ended = not verdict.passed and _ENDED in verdict.reason and answers.reason
    reason = answers.reason if ended else verdict.reason
    return Outcome(verdict.passed, reason, answers.stdout, answers.stderr or verdict.stderr)


def _run(
    program: str, seconds: float, memory_mb: int, begin: str = "", pipes: Sequence[int] = ()
) -> Outcome:
    """
    run() without its check. `begin` is a statement to execute just before the time starts to count;
    the program also gets `pipes`, which are closed here.
    """
    token = secrets.token_bytes(32)
    limits = {
        "AS": memory_mb << 20,
        "CPU": math.ceil(seconds) + 1,
        "NPROC": THREADS,
        "NOFILE": FILES,
        "FSIZE": DISK,
        "SIGPENDING": FILES,
        "CORE": 0,
    }
    (proof, proof_in), (rules, rules_in) = os.pipe(), os.pipe()
    os.write(rules_in, _seccomp())
    os.close(rules_in)
    # For root, a user id that nobody has (the range is reserved for transient services). It is
    # random, so that no program's threads count for another one.
    uid = 61184 + secrets.randbelow(4000)
    # As in the published harness, judge() runs a program as a module, without its script part
    name = "program" if begin else "__main__"
    harness = _HARNESS.format(
        uid=uid, limits=limits, proof=proof_in, size=len(token), begin=begin, name=name
    )
    python = [_python(), *["-P", "-s", "-S", "-X", "utf8", "-c"], harness]
    command = [*_bwrap(), "--seccomp", str(rules), "--", *python]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(proof_in, rules, *pipes),
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
    except OSError as e:
        os.close(proof)
        raise UserError(
            f"cannot start bubblewrap ({e.strerror}): reinstall it, or leave HumanEval out"
        ) from e
    finally:
        for fd in (proof_in, rules, *pipes):
            os.close(fd)
    feed = token + program.encode("utf-8", "surrogatepass")
    with process, open(proof, "rb", buffering=0) as proof_out:
        outputs = {pipe: bytearray() for pipe in (process.stdout, process.stderr, proof_out)}
        try:
            stop = _attend(process, outputs, feed, seconds)
        finally:
            if process.poll() is None:
                # When bwrap ends, so does the first process of the namespace, and with it all.
                os.killpg(process.pid, signal.SIGKILL)
    *texts, proven = outputs.values()
    stdout, stderr = (text.decode("utf-8", "replace") for text in texts)
    code = process.returncode
    last = stderr.rstrip().rpartition("\n")[2][:200]
    if not proven:
        complaint = last or stop or f"exit {code}"
        raise UserError(
            f"the sandbox failed before the program started ({complaint}): reinstall "
            "bubblewrap, or leave HumanEval out"
        )
    passed = not stop and code == 0 and proven == b"+" + token
    if passed or stop:
        reason = stop
    elif code == 0:
        reason = "exit 0 before its end"
    elif code == 1 and "Traceback (most recent call last):" in stderr:
        reason = "memory" if "MemoryError" in stderr else last
    else:
        reason = f"exit {code}"
    return Outcome(passed, reason, stdout, stderr)


def _attend(
    process: subprocess.Popen, outputs: dict[Any, bytearray], feed: bytes, seconds: float
) -> str:
    """
    Feed the sandbox and read its pipes into `outputs` until it ends or must be ended. Returns the
    reason to end it, "" if it has ended by itself. The time begins with the first byte from the
    last of the pipes.
    """
    assert process.stdin
    proof = [*outputs.values()][-1]
    deadline, begun = time.monotonic() + _START, False
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for pipe in outputs:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                return "timeout"
            for key, _ in selector.select(seconds_left):
                if key.fileobj is process.stdin:
                    try:
                        feed = feed[os.write(key.fd, feed[:65536]) :]
                    except BrokenPipeError:
                        feed = b""
                    if not feed:
                        selector.unregister(process.stdin)
                        process.stdin.close()
                elif chunk := os.read(key.fd, 65536):
                    outputs[key.fileobj] += chunk
                else:
                    selector.unregister(key.fileobj)
            if sum(map(len, outputs.values())) > OUTPUT:
                return "output"
            if proof and not begun:
                deadline, begun = time.monotonic() + seconds, True
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return "timeout"
    return ""
