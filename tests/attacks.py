"""
Programs that try to leave the sandbox of nanochat/eval/sandbox.py, to outlast it, to exhaust the
machine, or to pass without reaching their end. Each states the complete reason ("" for a harmless
end) and the complete stdout that must result, as regular expressions. @NAME@ stands for a fact of
the machine outside. `bare` ones run without the seccomp filter, to show that the layers below it
hold alone. Run as a program, this module tries them all as the current user and prints the outcomes
as JSON.
"""

import dataclasses
import json
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from nanochat.eval import sandbox as execution

EARLY = "exit 0 before its end"
ANYTHING = "(?s).*"


@dataclass(frozen=True)
class Attack:
    reason: str
    stdout: str
    program: str
    bare: bool = False


ATTACKS = {
    # --- using the machine up
    "fork bomb": Attack("PermissionError.*", "", "import os\nwhile True: os.fork()"),
    "stubborn fork bomb": Attack(
        "timeout",
        "",
        """
import os
while True:
    try: os.fork()
    except OSError: pass
""",
    ),
    "fork bomb, bare": Attack(
        "timeout",
        r"([1-9]|1[0-6])\n",
        """
import os, time
count = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        count += 1
except OSError:
    print(count, flush=True)
    time.sleep(60)
""",
        bare=True,
    ),
    "thread bomb": Attack(
        "",
        r"([1-9]|1[0-5])\n",
        """
import threading, time
count = 0
try:
    while True:
        threading.Thread(target=time.sleep, args=(0.2,)).start()
        count += 1
except RuntimeError:
    print(count)
""",
    ),
    "a gigabyte on stdout": Attack(
        "output", ANYTHING, "import os\nfor _ in range(1024): os.write(1, b'x' * 2**20)"
    ),
    "a gigabyte on stderr": Attack(
        "output", "", "import sys\nfor _ in range(2**20): sys.stderr.write('x' * 1023 + chr(10))"
    ),
    "a gigabyte as proof": Attack(
        "output",
        "",
        """
import os
for fd in range(3, 4096):
    try:
        for _ in range(2**14): os.write(fd, b'x' * 2**16)
    except OSError: pass
""",
    ),
    "one big allocation": Attack("memory", "", "x = bytearray(2**40)"),
    "many small allocations": Attack(
        "memory", "", "x = []\nwhile True: x.append(bytearray(2**20))"
    ),
    "mapped memory": Attack(
        "",
        r"1?\d\n",
        """
import mmap
maps = []
try:
    while True: maps.append(mmap.mmap(-1, 2**24))
except OSError: print(len(maps))
""",
    ),
    "shared memory": Attack(
        "",
        "refused\n",
        """
import multiprocessing.shared_memory
try: multiprocessing.shared_memory.SharedMemory(create=True, size=2**30)
except OSError: print('refused')
""",
    ),
    "memory in a file without a name": Attack(
        "PermissionError.*", "", "import os\nos.memfd_create('x')"
    ),
    "disk": Attack(
        "",
        r"1[0-6]\n",
        """
count = 0
try:
    for i in range(1000):
        with open(f'/tmp/{i}', 'wb') as f: f.write(b'x' * 2**20)
        count += 1
except OSError: print(count)
""",
    ),
    "one endless file": Attack(
        "OSError.*", "", "f = open('x', 'wb', 0)\nwhile True: f.write(b'x' * 2**20)"
    ),
    "higher limits": Attack(
        "",
        r"\[\]\n",
        """
import resource
raised = []
for name in ('AS', 'CPU', 'NPROC', 'NOFILE', 'FSIZE', 'CORE', 'SIGPENDING'):
    limit = getattr(resource, 'RLIMIT_' + name)
    hard = resource.getrlimit(limit)[1]
    try: resource.setrlimit(limit, (hard + 1, hard + 1)); raised.append(name)
    except ValueError: pass
print(raised)
""",
    ),
    "recursion": Attack(
        r"memory|exit \d+|timeout|RecursionError.*",
        "",
        """
import sys
sys.setrecursionlimit(2**31 - 1)
class A:
    def __getattr__(self, name): return getattr(self, name + 'x')
A().x
""",
    ),
    "many open files": Attack(
        "OSError.*Too many open files.*", "", "files = [open('/dev/null') for _ in range(1000)]"
    ),
    # --- outlasting the deadline
    "endless loop": Attack("timeout", "", "while True: pass"),
    "sleep": Attack(
        "timeout", "before\n", "import time\nprint('before', flush=True)\ntime.sleep(3600)"
    ),
    "all signals ignored": Attack(
        "timeout",
        "",
        """
import signal
for s in signal.valid_signals():
    try: signal.signal(s, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
while True: pass
""",
    ),
    "all exceptions caught": Attack(
        "timeout",
        "",
        """
while True:
    try:
        while True: pass
    except BaseException: pass
""",
    ),
    "one endless operation": Attack("timeout", "", "x = 9**9**9"),
    "stopped": Attack("timeout", "", "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"),
    "all files closed, then a loop": Attack(
        "timeout",
        "",
        """
import os
for fd in range(4096):
    try: os.close(fd)
    except OSError: pass
while True: pass
""",
    ),
    "endless handler at exit": Attack(
        "timeout",
        "",
        """
import atexit
@atexit.register
def f():
    while True: pass
""",
    ),
    "a thread that never ends": Attack(
        "timeout",
        "",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(3600,)).start()",
    ),
    "a daemon": Attack(
        "PermissionError.*",
        "",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass",
    ),
    "daemons of a program that ends, bare": Attack(
        "",
        "end\n",
        """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(4096):
            try: os.close(fd)
            except OSError: pass
        while True: time.sleep(1)
    os._exit(0)
os.wait()
print('end')
""",
        bare=True,
    ),
    "daemons of a program that does not, bare": Attack(
        "timeout",
        "",
        """
import os, signal, time
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True: time.sleep(1)
while True: pass
""",
        bare=True,
    ),
    # --- reaching out
    "sockets of every family": Attack(
        "",
        r"\[\]\n",
        """
import socket
made = []
for family in range(46):
    for kind in (1, 2, 3):
        try: made.append((socket.socket(family, kind), family))
        except OSError: pass
print(made)
""",
    ),
    "a server on this machine": Attack(
        "PermissionError.*", "", "import socket\nsocket.create_connection(('127.0.0.1', @PORT@), 1)"
    ),
    "a server on this machine, bare": Attack(
        "ConnectionRefusedError.*",
        "",
        """
import socket
socket.create_connection(('127.0.0.1', @PORT@), 1)
""",
        bare=True,
    ),
    "a server elsewhere, bare": Attack(
        "OSError.*Network is unreachable",
        "",
        """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.sendto(b'x', ('192.0.2.1', 53))
""",
        bare=True,
    ),
    "a name": Attack(
        ".*(gaierror|PermissionError).*", "", "import socket\nsocket.getaddrinfo('example.com', 80)"
    ),
    "unix sockets, bare": Attack(
        "",
        r"\[\]\n",
        """
import socket
reached = []
for name in ('@SOCKET@', chr(0) + '@ABSTRACT@', '/run/docker.sock', '/var/run/docker.sock', '/run/systemd/private'):
    try: socket.socket(socket.AF_UNIX).connect(name); reached.append(name)
    except OSError: pass
print(reached)
""",
        bare=True,
    ),
    "a connected pair turned elsewhere": Attack(
        "",
        "refused\n",
        """
import socket
a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
try: a.sendto(b'x', chr(0) + '@ABSTRACT@')
except OSError: print('refused')
""",
    ),
    "signals": Attack(
        "",
        "alive\n",
        """
import os, signal
for pid in (os.getppid(), 1, -1, @PID@):
    for s in (signal.SIGTERM, signal.SIGKILL):
        try: os.kill(pid, s)
        except OSError: pass
print('alive')
""",
    ),
    "signals to its own group": Attack(r"exit 1\d\d", "", "import os\nos.killpg(0, 9)"),
    "a shell": Attack(
        "PermissionError.*", "", "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'echo got'])"
    ),
    "becoming a shell": Attack(
        "FileNotFoundError.*", "", "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo got'])"
    ),
    # --- looking around
    "everything that can be seen": Attack(
        "",
        r"\[\] \[\]\n",
        """
import glob, os, sys
meant = ['/dev/null', '/etc/ld.so.cache', *(base + lib for base in ('', '/usr', sys.base_prefix) for lib in ('/lib', '/lib64'))]
seen, packages = [], [p for m in meant for p in glob.glob(m + '/python3*/*-packages/*')]
for folder, folders, files in os.walk('/'):
    seen += [p for f in files if (p := os.path.join(folder, f)) not in meant and p != sys.executable]
    folders[:] = [f for f in folders if os.path.join(folder, f) not in meant]
print(seen, packages)
""",
    ),
    "secrets": Attack(
        "",
        r"\[\]\n",
        """
import glob
seen = []
for name in ('@SECRET@', '@HERE@', '@HOME@/.bashrc', '/etc/passwd', '/etc/shadow', '/etc/hostname', '/etc/resolv.conf',
             '/sys/kernel/notes', '/proc/1/environ', '/proc/self/environ', '/proc/@PID@/environ', '/proc/self/mem', *glob.glob('/proc/*')):
    try: seen.append((name, open(name, 'rb').read(10)))
    except OSError: pass
print(seen)
""",
    ),
    "links": Attack(
        "",
        r"\[\]\n",
        """
import os
seen = []
os.symlink('/', 'root')
os.symlink('../../../../../../../..', 'up')
os.symlink('/proc/1/root', 'out')
for start in ('root', 'up', 'out', '/dev/null/..', '/..'):
    for name in ('/etc/passwd', '/proc/1/environ', '@SECRET@'):
        try: seen.append(open(start + name).read(10))
        except OSError: pass
print(seen)
""",
    ),
    "environment": Attack(
        "",
        r"\['LC_CTYPE', 'PATH', 'PWD', 'PYTHONHASHSEED'\] /usr/bin:/bin /tmp\n",
        """
import os
print(sorted(os.environ), os.environ['PATH'], os.environ['PWD'])
""",
    ),
    "who am I": Attack(
        "",
        r"\[\] sandbox\n",
        """
import os
ids = {*os.getresuid(), *os.getresgid(), *os.getgroups()}
print([i for i in ids if i in (0, @UID@) and i != 1000], os.uname().nodename)
""",
    ),
    "becoming root": Attack(
        "",
        r"\[\]\n",
        """
import os
became = []
for change in (os.setuid, os.setgid, os.seteuid, os.setegid, lambda i: os.setgroups([i]), lambda i: os.setresuid(i, i, i)):
    try: change(0); became.append(change)
    except OSError: pass
print(became)
""",
    ),
    "devices": Attack(
        "",
        r"\['null'\] refused\n",
        """
import os, stat
try: os.mknod('/tmp/kmsg', stat.S_IFCHR | 0o600, os.makedev(1, 11))
except OSError: print(os.listdir('/dev'), 'refused')
""",
    ),
    "inherited files": Attack(
        "",
        r"\[0, 1, 2\] \[True\]\n",
        """
import os, stat
found = {}
for fd in range(4096):
    try: found[fd] = os.fstat(fd)
    except OSError: pass
print([fd for fd in found if fd < 3], [stat.S_ISFIFO(s.st_mode) for fd, s in found.items() if fd > 2])
""",
    ),
    "stdin": Attack(
        "EOFError.*", "b''\n", "import os\nprint(os.read(0, 100), flush=True)\ninput()"
    ),
    "writing everywhere": Attack(
        "",
        r"\['/tmp'\]\n",
        """
import os
written = []
for folder, folders, files in os.walk('/'):
    try: open(folder + '/attack', 'w'); written.append(folder)
    except OSError: pass
    for f in files[:3]:
        try:
            if f != 'null' and folder != '/tmp': open(os.path.join(folder, f), 'r+b'); written.append(f)
        except OSError: pass
    folders[:] = [f for f in folders if folder.count('/') < 4]
print(written)
""",
    ),
    "writing to the interpreter": Attack(
        "(PermissionError|OSError).*", "", "import os\nopen(os.__file__, 'a')"
    ),
    "making the system writable": Attack(
        "",
        r"\[\]\n",
        """
import os
changed = []
for name in ('/', '/usr/lib', '/dev', os.__file__):
    try: os.chmod(name, 0o777); changed.append(name)
    except OSError: pass
print(changed)
""",
    ),
    "calls into the C library": Attack(
        "",
        r"\[\]\n",
        """
import ctypes
c = ctypes.CDLL(None, use_errno=True)
calls = {
    'ptrace': (0, 0, 0, 0), 'unshare': (0x10000000,), 'mount': (b'none', b'/tmp', b'tmpfs', 0, None), 'umount2': (b'/usr/lib', 2),
    'chroot': (b'/tmp',), 'setuid': (0,), 'setgid': (0,), 'sethostname': (b'x', 1), 'shmget': (0, 2**30, 0o1600), 'semget': (0, 8, 0o1600),
    'msgget': (0, 0o1600), 'memfd_create': (b'x', 0), 'process_vm_readv': (1, 0, 0, 0, 0, 0), 'klogctl': (3, None, 0), 'fork': (),
    'setns': (0, 0), 'vfork': (),
    'socket': (40, 1, 0), 'setpriority': (0, 0, -20), 'mq_open': (b'/x', 0o102, 0o600, None), 'swapon': (b'/tmp', 0), 'reboot': (0,),
}
reached = [name for name, arguments in calls.items() if hasattr(c, name) and getattr(c, name)(*arguments) != -1]
# clone into a new user namespace is left out: 425 io_uring_setup, 428 open_tree, 435 clone3, 438 pidfd_getfd, x32's getpid
reached += [number for number in (425, 428, 435, 438, 0x40000000 + 39) if c.syscall(number, 0, 0, 0, 0, 0) != -1]
print(reached)
""",
    ),
    "a new user namespace, bare": Attack(
        "",
        ANYTHING,
        """
import ctypes
c = ctypes.CDLL(None)
print(c.unshare(0x10000000 | 0x20000), c.mount(b'none', b'/usr/lib', b'tmpfs', 0, None))
""",
        bare=True,
    ),
    # --- passing without reaching the end
    "os._exit": Attack(EARLY, "", "import os\nos._exit(0)\nassert False"),
    "sys.exit": Attack(EARLY, "", "import sys\nsys.exit(0)\nassert False"),
    "SystemExit in a handler at exit": Attack(
        EARLY, "", "import atexit, os\natexit.register(os._exit, 0)\nassert False"
    ),
    "exit in an excepthook": Attack(
        EARLY, "", "import os, sys\nsys.excepthook = lambda *a: os._exit(0)\nassert False"
    ),
    "exit in a thread": Attack(
        EARLY,
        "",
        "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()\nwhile True: pass",
    ),
    "exit in a destructor": Attack(
        EARLY,
        "",
        """
import os
class A:
    def __del__(self, exit=os._exit): exit(0)
a = A()
assert False
""",
    ),
    "exit in a signal handler": Attack(
        EARLY,
        "",
        """
import os, signal
signal.signal(signal.SIGALRM, lambda *a: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.05)
while True: pass
""",
    ),
    "another program in its place": Attack(
        EARLY, "", "import os, sys\nos.execv(sys.executable, ['python', '-c', 'pass'])"
    ),
    "words in every pipe": Attack(
        EARLY,
        "passed.*\n?",
        """
import os
for fd in range(1, 4096):
    try: os.write(fd, b'passed' + bytes(32))
    except OSError: pass
os._exit(0)
""",
    ),
    "result files": Attack(
        EARLY,
        "",
        """
import os
for name in ('result', 'passed', 'result.json', 'exit_code', '/tmp/done', '/tmp/status'):
    open(name, 'w').write('{"passed": true}')
os._exit(0)
""",
    ),
    "all files closed, then the end": Attack(
        r"exit \d+",
        "",
        """
import os
for fd in range(4096):
    try: os.close(fd)
    except OSError: pass
""",
    ),
    "patched builtins": Attack(
        "AssertionError: here",
        "",
        """
import builtins, os, sys
def nothing(*a, **k): return b''
os.write = os.read = builtins.exec = builtins.compile = builtins.open = nothing
builtins.AssertionError = builtins.Exception = type('Harmless', (BaseException,), {})
sys.exit = sys.modules['posix'].write = nothing
sys.modules['__main__'] = None
assert False, 'here'
""",
    ),
    "walking the frames": Attack(
        EARLY,
        ANYTHING,
        """
import gc, os, sys
found, frame = [], sys._getframe()
while frame:
    found += [*frame.f_locals.values(), *frame.f_globals.values(), *frame.f_code.co_consts, *gc.get_referents(frame)]
    frame = frame.f_back
for thing in gc.get_objects():
    found += gc.get_referents(thing)
    found += gc.get_referrers(thing)[:1] if type(thing).__name__ == 'frame' else []
found = {bytes(x) for x in found if isinstance(x, (bytes, bytearray, memoryview)) and len(x) in (32, 33)}
print([x.hex() for x in found], flush=True)
for fd in range(3, 4096):
    try: [os.write(fd, x) for x in found]
    except OSError: pass
os._exit(0)
""",
    ),
    "jumping in the harness": Attack(
        "ValueError: no|timeout",
        "",
        """
import sys
def trace(frame, event, argument):
    for line in range(1, 20):
        try: frame.f_lineno = line
        except (ValueError, RuntimeError): pass
    return trace
frame = sys._getframe()
while frame:
    frame.f_trace, frame.f_trace_opcodes, frame = trace, True, frame.f_back
sys.settrace(trace)
raise ValueError('no')
""",
    ),
    "an exception of the harness's own": Attack(
        EARLY,
        "",
        """
import sys
def hook(frame, event, argument):
    if frame.f_back is None: raise SystemExit(0)
sys.setprofile(hook)
""",
    ),
    "reading on past its text": Attack(
        EARLY, "b''\n", "import os\nprint(os.read(0, 32), flush=True)\nos._exit(0)"
    ),
}

ALLOW_ALL = struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)


def attempt(facts: dict[str, str]) -> dict[str, execution.Outcome]:
    """
    Name -> outcome of every attack, eight at a time: with one second where the deadline must end
    it, otherwise with ample time. `facts` fill the @NAME@s, and facts["marker"] becomes part of the
    command line of every process.
    """

    def one(attack: Attack) -> execution.Outcome:
        program = attack.program
        for name, value in facts.items():
            program = program.replace(f"@{name}@", value)
        return execution.run(program, 1.0 if "timeout" in attack.reason else 20.0, 256)

    outcomes, harness, seccomp = {}, execution._HARNESS, execution._seccomp
    execution._HARNESS = f"# {facts['marker']}\n{harness}"
    try:
        for bare in (False, True):
            execution._seccomp = (lambda: ALLOW_ALL) if bare else seccomp
            with ThreadPoolExecutor(8) as pool:
                names = [name for name in ATTACKS if ATTACKS[name].bare == bare]
                outcomes |= zip(
                    names, pool.map(one, [ATTACKS[name] for name in names]), strict=True
                )
    finally:
        execution._HARNESS, execution._seccomp = harness, seccomp
    return outcomes


if __name__ == "__main__":
    print(
        json.dumps(
            {
                name: dataclasses.asdict(outcome)
                for name, outcome in attempt(json.loads(sys.argv[1])).items()
            }
        )
    )
