"""
Runs programs that a model wrote, for HumanEval: in a sandbox, or not at all. Without a working sandbox run() refuses; it never falls back.

The sandbox is bubblewrap (Linux): namespaces of its own, so that no network and no other process is in sight and all in it ends together;
of files only Python's standard library and the system's libraries, read-only, /dev/null, and a small /tmp in memory, with neither /proc
nor a home; a user id that is not root; no environment. Hard limits bind memory, CPU time, threads and files, and a seccomp filter refuses
new processes, sockets, namespaces, tracing, and the kinds of memory that those limits do not count. Only the deadline bounds what the
kernel notes down for the program: empty files without end come to some 150 MB a second, all of it freed afterwards.

`passed` says that the interpreter came to the program's end within the limits and then exited with status 0. Its proof is a random token
that it writes to a pipe once the program's code has returned. Until then the token lies on the interpreter's value stack, where no frame,
traceback or garbage collector shows it, so leaving early (os._exit, SystemExit, exec), handlers at exit and writing to the pipe oneself do
not pass. It does not say that the assertions meant anything: a program shares its interpreter with them, so hostile code can still answer
with an object equal to everything, jump over lines with a trace function, or search its raw memory. That fools the score and no more.
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from nanochat.base.common import UserError

THREADS = 16  # of a program, which gets no second process
OUTPUT = 2**20  # bytes, stdout and stderr together
DISK = 2**24  # bytes of /tmp, and of any file
FILES = 64  # open at a time
_START = 20.0  # seconds that the sandbox may take before the program starts; 0.02 on a free machine


@dataclass(frozen=True)
class Outcome:
    passed: bool
    reason: str  # "" | timeout | memory | output | exit 3 | exit 0 before its end | an exception's last line, as in "AssertionError: no"
    stdout: str
    stderr: str


# Only its last line runs while the program does: a trace function finds no other to jump to, and there is no second token to read.
_HARNESS = """
import os, resource, sys
if os.getuid() == 0:
    os.setgroups([]); os.setresgid({uid}, {uid}, {uid}); os.setresuid({uid}, {uid}, {uid})
for name, value in {limits}.items():
    hard = resource.getrlimit(getattr(resource, "RLIMIT_" + name))[1]
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (value if hard < 0 else min(value, hard),) * 2)
main = sys.modules["__main__"] = type(sys)("__main__")
os.write({proof}, b"+")
os.write({proof}, os.read(0, {size}) + (exec(compile(sys.stdin.buffer.read(), "program", "exec"), main.__dict__) or b""))
"""

# Passes inside alone; the import needs a library from a file.
_PROBE = """
import math, os
try: os.close(os.memfd_create(""))
except PermissionError: assert os.getuid() > 0 and os.listdir("/dev") == ["null"], "nothing is shut off"
else: raise OSError("system calls are not filtered")
"""

# Calls that need no privilege and lead past the limits: (x86_64, arm64), from Linux' syscall_64.tbl and asm-generic/unistd.h
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
_NEW = 424  # from here on numbers are the same everywhere; clone3, io_uring and what is newer is "not known here", and libraries do without
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # the kernel's AUDIT_ARCH_*


def _seccomp() -> bytes:
    """The filter in classic BPF (Linux' filter.h, seccomp.h). An instruction: code, how many to skip if true and if false, operand."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, refuse, unknown = (
        0x7FFF0000,
        0x80000000,
        0x50000 + errno.EPERM,
        0x50000 + errno.ENOSYS,
    )
    machine = list(_MACHINES).index(platform.machine())
    code = [
        (load, 0, 0, 4),
        (equal, 1, 0, _MACHINES[platform.machine()]),
        (give, 0, 0, kill),
    ]  # calls of another architecture
    code += [(load, 0, 0, 0), (at_least, 0, 1, _NEW), (give, 0, 0, unknown)]
    for numbers in _REFUSED.values():
        if numbers[machine] is not None:
            code += [(equal, 0, 1, numbers[machine]), (give, 0, 0, refuse)]
    code += [
        (equal, 0, 3, _CLONE[machine]),
        (load, 0, 0, 16),
        (any_bit, 1, 0, 0x10000),
    ]  # CLONE_THREAD
    code += [(give, 0, 0, refuse), (give, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in code)


def _python() -> str:
    return getattr(
        sys, "_base_executable", sys.executable
    )  # the real one where this is a virtual environment's


def _bwrap() -> list[str]:
    """
    bwrap with its mounts. A normal user gets a user namespace. Root gets none, since in one it would still be the real root, whose threads
    no limit binds; the harness takes another id instead, after mounts that may need root (a Python under /root) and before the program.
    """
    libraries = [
        f"{base}/{name}" for base in ("", "/usr", sys.base_prefix) for name in ("lib", "lib64")
    ]
    shown = [
        path
        for path in dict.fromkeys([*libraries, "/etc/ld.so.cache", _python()])
        if os.path.exists(path)
    ]
    hidden = [
        path for folder in shown for path in glob.glob(f"{glob.escape(folder)}/python3*/*-packages")
    ]
    parents = dict.fromkeys(
        str(parent) for path in [*shown, "/dev/null"] for parent in list(Path(path).parents)[-2::-1]
    )
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-ipc",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.geteuid() == 0:
        command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    command += [
        "--die-with-parent",
        "--new-session",
        "--hostname",
        "sandbox",
        "--perms",
        "1777",
        "--size",
        str(DISK),
        "--tmpfs",
        "/tmp",
    ]
    for path in parents:
        command += ["--perms", "0755", "--dir", path]
    for path in shown:
        command += ["--ro-bind", path, path]
    for path in hidden:
        command += ["--tmpfs", path, "--remount-ro", path]
    return [
        *command,
        "--dev-bind",
        "/dev/null",
        "/dev/null",
        "--remount-ro",
        "/",
        "--chdir",
        "/tmp",
    ]


@functools.cache
def missing() -> str:
    """ "" where the sandbox works, which is tried once; otherwise a sentence that says why it does not and how to get one."""
    if platform.system() != "Linux" or platform.machine() not in _MACHINES:
        why = f"the sandbox needs Linux on {' or '.join(_MACHINES)}, not {platform.system()} on {platform.machine()}: use another machine"
    elif not shutil.which("bwrap"):
        why = "bubblewrap is not installed: get it with `apt install bubblewrap` (Debian, Ubuntu) or `dnf install bubblewrap` (Fedora)"
    else:
        try:
            why = _run(_PROBE, 10.0, 256).reason
        except UserError as e:
            why = str(e)
        why = why and f"the sandbox does not work ({why}): {_remedy(why)}"
    return why and f"cannot run model-written programs safely: {why}"


def _remedy(why: str) -> str:
    """How to make bubblewrap work, from its complaint and from what the kernel's settings forbid."""
    if "nknown option" in why:
        return "install bubblewrap 0.7 or later"
    for name, forbids, allows in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1", 0),
        ("kernel/unprivileged_userns_clone", "0", 1),
        ("user/max_user_namespaces", "0", 10000),
    ):
        setting = Path("/proc/sys", name)
        if os.geteuid() != 0 and setting.exists() and setting.read_text().strip() == forbids:
            return f"this kernel forbids user namespaces; `sysctl -w {name.replace('/', '.')}={allows}`, as root, allows them"
    return "a container must be started with the right to make namespaces (such as `docker run --privileged`)"


def run(program: str, seconds: float = 5.0, memory_mb: int = 512) -> Outcome:
    """
    Run `program` (Python with the standard library, hash seed 0, nothing to read on stdin) in the sandbox, for at most `seconds` by the
    clock from its start and in at most `memory_mb` MiB of address space. Threads may call this side by side. UserError where no sandbox
    works, or where it breaks before the program begins: that must not count as the program's failure.
    """
    if why := missing():
        raise UserError(why)
    return _run(program, seconds, memory_mb)


def _run(program: str, seconds: float, memory_mb: int) -> Outcome:
    token, cpu = secrets.token_bytes(32), math.ceil(seconds) + 1
    limits = {
        "AS": memory_mb << 20,
        "CPU": cpu,
        "NPROC": THREADS,
        "NOFILE": FILES,
        "FSIZE": DISK,
        "SIGPENDING": FILES,
        "CORE": 0,
    }
    (proof, proof_in), (rules, rules_in) = os.pipe(), os.pipe()
    os.write(rules_in, _seccomp())
    os.close(rules_in)
    # for root, an id that is nobody's (the range is set aside for passing services), drawn anew so that none counts another's threads
    harness = _HARNESS.format(
        uid=61184 + secrets.randbelow(4000), limits=limits, proof=proof_in, size=len(token)
    )
    command = [
        *_bwrap(),
        "--seccomp",
        str(rules),
        "--",
        _python(),
        "-P",
        "-s",
        "-S",
        "-X",
        "utf8",
        "-c",
        harness,
    ]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            pass_fds=(proof_in, rules),
            env={"PATH": "/usr/bin:/bin", "PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
    except OSError as e:
        os.close(proof)
        raise UserError(f"cannot start bubblewrap ({e.strerror})") from e
    finally:
        os.close(proof_in)
        os.close(rules)
    with process, open(proof, "rb", buffering=0) as proof_out:
        try:
            stop, outputs = _attend(
                process, proof_out, token + program.encode("utf-8", "surrogatepass"), seconds
            )
        finally:
            if (
                process.poll() is None
            ):  # with bwrap dies the first process of the namespace, and with that all others
                os.killpg(process.pid, signal.SIGKILL)
    stdout, stderr, code = (
        *(output.decode("utf-8", "replace") for output in outputs[:2]),
        process.returncode,
    )
    last = stderr.rstrip().rpartition("\n")[2][:200]
    if not outputs[2]:
        raise UserError(
            f"the sandbox broke before the program began: {last or stop or f'exit {code}'}"
        )
    passed = not stop and code == 0 and outputs[2] == b"+" + token
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
    process: subprocess.Popen, proof: IO[bytes], feed: bytes, seconds: float
) -> tuple[str, list[bytearray]]:
    """Feeds and reads the sandbox until it has ended or must: why it must, or "", and what came from stdout, stderr and `proof`."""
    assert process.stdin and process.stdout and process.stderr
    outputs = {process.stdout: bytearray(), process.stderr: bytearray(), proof: bytearray()}
    deadline, begun = time.monotonic() + _START, False
    os.set_blocking(process.stdin.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        for pipe in outputs:
            selector.register(pipe, selectors.EVENT_READ)
        while selector.get_map():
            if (left := deadline - time.monotonic()) <= 0:
                return "timeout", list(outputs.values())
            for key, _ in selector.select(left):
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
                return "output", list(outputs.values())
            if outputs[proof] and not begun:
                deadline, begun = time.monotonic() + seconds, True
    try:
        process.wait(max(deadline - time.monotonic(), 0))
    except subprocess.TimeoutExpired:
        return "timeout", list(outputs.values())
    return "", list(outputs.values())
