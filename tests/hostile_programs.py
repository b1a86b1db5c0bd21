"""
Programs that try to pass HumanEval's judge without the right answer, and calls that tools.calculate must survive. Each program defines f;
the tests want f(x) == 2 * x. None may pass.
"""

PROBLEM = 'def f(x):\n    """Twice x."""\n'
TEST = "def check(candidate):\n    for x in (1, 2.5, 'ab', [3]):\n        assert candidate(x) == x * 2, candidate\n"
EVIL = "class E:\n    def __getattr__(s, n): return s\n    def __call__(s, *a): return s\n    def __iter__(s): return iter(())\n"

FORGERIES = {
    "an object that equals everything": "class E:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x): return E()",
    "a number that equals everything": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x): return E()",
    "a text that equals everything": "class E(str):\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(x): return E('zz')",
    "a float whose hex lies": "class E(float):\n    def hex(s): return '0x1'\n    def __eq__(s, o): return True\ndef f(x): return E()",
    "a dict that lies": "class E(dict):\n    def items(s): return [(1, 2)]\ndef f(x): return E()",
    "the argument changed in place": "def f(x):\n    if isinstance(x, list): x *= 2\n    return x",
    "assert patched": "import builtins\nbuiltins.AssertionError = type('H', (BaseException,), {})\ndef f(x): return 0",
    "check replaced": "def check(c): pass\ndef f(x):\n    globals()['check'] = lambda c: None\n    return 0",
    "json patched": "import json\njson.dumps = lambda *a: '[true]'\ndef f(x): return 0",
    "open patched": "import builtins, io\nbuiltins.open = lambda *a, **k: io.StringIO('x')\ndef f(x): return 0",
    "os._exit(0) at once": "import os\nos._exit(0)",
    "os._exit(0) in the call": "import os\ndef f(x): os._exit(0)",
    "sys.exit in the call": "import sys\ndef f(x): sys.exit(0)",
    "atexit": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit",
    "a thread that exits": "import os, threading\nthreading.Timer(0.1, os._exit, (0,)).start()\ndef f(x):\n    while True: pass",
    "fork": "import os\ndef f(x):\n    try: os.fork()\n    except OSError: pass\n    return 0",
    "exec": "import os, sys\ndef f(x): os.execv(sys.executable, ['python', '-c', 'pass'])",
    "passed in every pipe": "import os\ndef f(x):\n    for fd in range(3, 64):\n        for data in (b'+' + bytes(32), b'[true]\\n', b'passed\\n'):\n            try: os.write(fd, data)\n            except OSError: pass\n    return 0",
    "answers ahead of the questions": "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'[true]\\n' * 9)\n    except OSError: pass\ndef f(x): return 0",
    "the questions read back": "import os\ndef f(x):\n    for fd in range(3, 64):\n        try:\n            os.set_blocking(fd, False); os.write(fd, os.read(fd, 9999))\n        except OSError: pass\n    return 0",
    "raw memory with ctypes": "import ctypes, os, sys\ntop = id(sys._getframe())\nfor at in range(top - 4096, top + 4096, 8):\n    try: token = ctypes.string_at(at, 32)\n    except Exception: continue\n    for fd in range(3, 40):\n        try: os.write(fd, b'+' + token)\n        except OSError: pass\n    break\nos._exit(0)",
    "ctypes calls exit": "import ctypes\ndef f(x): ctypes.CDLL(None)._exit(0)",
    "every frame": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for name, value in list(frame.f_locals.items()):\n            if callable(value): frame.f_locals[name] = lambda *a, **k: True\n        frame = frame.f_back\n    return 0",
    "garbage collector": "import gc\ndef f(x):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'candidate' in o: o['candidate'] = lambda y: y * 2\n    return 0",
    "a trace function": "import sys\ndef f(x):\n    sys.settrace(lambda *a: None)\n    sys.setprofile(lambda *a: None)\n    return 0",
    "/proc/self/mem": "def f(x):\n    open('/proc/self/mem', 'r+b')\n    return 0",
    "/proc of others": "import glob\ndef f(x):\n    for name in glob.glob('/proc/[0-9]*/mem'): open(name, 'r+b').write(b'x')\n    return 0",
    "a reply of deep lists": "def f(x):\n    y = []\n    for _ in range(10**5): y = [y]\n    return y",
    "a reply of 100 MB": "def f(x): return 'x' * 10**8",
    "a reply that never ends": "import itertools\ndef f(x): return itertools.count()",
    "an error with a strange name": "SystemExit2 = type('SystemExit', (Exception,), {})\ndef f(x): raise SystemExit2('x')",
    "an error that is an exit": "class KeyboardInterrupt(Exception): pass\ndef f(x): raise KeyboardInterrupt",
    "half a reply": "import os\ndef f(x):\n    for fd in range(3, 64):\n        try: os.write(fd, b'[')\n        except OSError: pass\n    os._exit(0)",
    "all files closed": "import os\ndef f(x): os.closerange(0, 4096)",
    "a generator": "def f(x): yield x * 2",
    "mocked modules": EVIL + "import sys\nfor n in list(sys.modules): sys.modules[n] = E()\ndef f(x): return 0",
    "the function replaced after the first call": "def f(x):\n    globals()['f'] = None\n    return x * 2",
}  # fmt: skip
HONEST = {
    "plain": "def f(x): return x * 2",
    "after printing": "print('hello')\ndef f(x):\n    print(x)\n    return x * 2",
    "a subclass of list": "class L(list): pass\ndef f(x): return L(x * 2) if isinstance(x, list) else x * 2",
    "with helpers and imports": "import math, typing\ndef g(x): return x\ndef f(x): return g(x) * 2",
}
