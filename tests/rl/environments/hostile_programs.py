# ruff: noqa: E501
"""Programs that do what a program must not; none of them is worth anything. MARK and PORT are filled in."""

PROGRAMS = {
    "fork bomb": "import os\nwhile 1:\n    try: os.fork()\n    except OSError: pass",
    "fork bomb in sessions": "import os\nwhile 1:\n    try:\n        os.fork()\n        os.setsid()\n    except OSError: pass",
    "thread bomb": "import threading, time\nwhile 1:\n    try: threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError: pass",
    "memory": "a = []\nwhile 1:\n    try: a.append(bytearray(10**7))\n    except MemoryError: pass",
    "memory of children": "import os\nfor _ in range(7): os.fork()\na = bytearray(4 * 10**8)",
    "disk": "with open('x', 'wb') as f:\n    while 1:\n        try: f.write(bytes(10**6)); f.flush()\n        except OSError: pass",
    "many files": "i = 0\nwhile 1:\n    i += 1\n    try: open(str(i), 'w').close()\n    except OSError: pass",
    "sparse file": "with open('x', 'wb') as f: f.truncate(10**15)",
    "writing outside": """
import os
for folder in ['/', '/etc', '/tmp', '/root', '/home', '/var/tmp', '/dev/shm', '/usr/lib', '/run', '..', '/proc/1/root/tmp']:
    try: open(folder + '/MARK', 'w').write('x')
    except OSError: pass
""",
    "writing by a link": """
import os
for target in ['/tmp', '/var/tmp', '/dev/shm', '/etc']:
    try:
        os.symlink(target, 'l'); open('l/MARK', 'w').write('x')
    except OSError: pass
    os.unlink('l')
""",
    "hard link": "import os\nfor f in ['/etc/passwd', '/etc/shadow', '/etc/ld.so.cache']:\n    try: os.link(f, 'h'); open('h', 'a').write('MARK')\n    except OSError: pass",
    "changing the interpreter": "import os, sys\nfor f in [os.__file__, sys.executable]:\n    try: open(f, 'a').write('#MARK')\n    except OSError: pass\n    try: os.rename(f, f + 'MARK')\n    except OSError: pass",
    "network": """
import socket
for host in ['127.0.0.1', '10.0.0.1', '::1', '8.8.8.8']:
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, kind)
            s.settimeout(0.2); s.connect((host, PORT)); s.send(b'out')
        except OSError: pass
""",
    "a socket of the system": "import socket, os\nfor p in ['\\0MARK', '/run/dbus/system_bus_socket', '/var/run/docker.sock']:\n    s = socket.socket(socket.AF_UNIX)\n    try: s.connect(p); print(42)\n    except OSError: pass",
    "name server": "import socket\nprint(42 if socket.gethostbyname('example.com') else 0)",
    "signals to all": "import os, signal\nfor p in [-1, 0, 1, os.getppid(), *range(2, 3000)]:\n    try: os.kill(p, signal.SIGKILL)\n    except OSError: pass\ntry: os.killpg(os.getppid(), 9)\nexcept OSError: pass",
    "deaf to signals": "import signal, time\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile 1: time.sleep(1)",
    "stopping itself": "import os, signal\nif os.fork() == 0: os.kill(os.getpid(), signal.SIGSTOP)\nos.kill(os.getpid(), signal.SIGSTOP)\nsignal.pause()",
    "output flood": "while 1: print('x' * 10**5)",
    "output without end of line": "import os\nwhile 1: os.write(1, b'4' * 10**6)",
    "error flood": "import sys\nwhile 1: sys.stderr.write('x' * 10**5)",
    "sleeping": "import time\ntime.sleep(10**6)",
    "sleeping with closed output": "import os, time\nos.close(1); os.close(2); os.close(0)\ntime.sleep(10**6)",
    "busy": "while 1: pass",
    "a number too large": "print(9 ** 9 ** 9 ** 9)",
    "a slow expression": "import re\nre.match('(a+)+b', 'a' * 100)",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(10**6)\n    os._exit(0)\nos._exit(0)",
    "silent daemon": "import os, time\nif os.fork() == 0:\n    os.setsid(); os.close(0); os.close(1); os.close(2)\n    if os.fork() == 0:\n        while 1: time.sleep(1)\nos._exit(0)",
    "outliving its parent": "import ctypes, time, os\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.fork()\ntime.sleep(10**6)",
    "debugger": "import ctypes, os\nl = ctypes.CDLL(None)\nfor p in [1, os.getppid(), *range(1, 2000)]: l.ptrace(16, p, 0, 0)\nfor p in range(1, 2000): l.process_vm_writev(p, 0, 0, 0, 0, 0)",
    "reading of processes": "import os\nfor p in [1, os.getppid(), 'self', *range(2, 500)]:\n    for n in ('environ', 'cmdline', 'maps', 'root/etc/passwd'):\n        try: print(open(f'/proc/{p}/{n}').read()[:50])\n        except OSError: pass",
    "mounting": "import ctypes\nl = ctypes.CDLL(None)\nl.mount(b'proc', b'/w', b'proc', 0, 0); l.umount2(b'/', 2); l.chroot(b'..'); l.unshare(0x10020000)\nl.mount(b'/', b'/w', None, 4096, None)\nl.mount(None, b'/', None, 32 | 4096, None)\ntry: open('/MARK', 'w')\nexcept OSError: pass",
    "leaving by a descriptor": "import os\nfor fd in range(64):\n    for up in ('../../../../tmp/MARK', '../MARK'):\n        try: os.open(up, os.O_CREAT | os.O_WRONLY, dir_fd=fd)\n        except OSError: pass\n    try: os.fchdir(fd); os.chroot('.')\n    except OSError: pass",
    "devices": "import os, stat\nfor n, d in (('sda', (8, 0)), ('mem', (1, 1)), ('vda', (254, 0))):\n    try: os.mknod(n, 0o666 | stat.S_IFBLK, os.makedev(*d)); open(n, 'rb').read(10); print(42)\n    except OSError: pass",
    "another user": "import os\nfor f in (os.setuid, os.setgid, os.seteuid):\n    try: f(0); open('/etc/MARK', 'w')\n    except OSError: pass\ntry: os.execv('/bin/su', ['su', '-c', 'touch /tmp/MARK'])\nexcept OSError: pass",
    "raised limits": "import resource\nfor n in range(16):\n    try: resource.setrlimit(n, (-1, -1))\n    except (OSError, ValueError): pass\na = bytearray(10**10)",
    "deep recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
    "deep nesting": "eval('(' * 10**6)",
    "deep object": "a = []\nfor _ in range(10**6): a = [a]\nrepr(a)",
    "bomb of zeros": "import zlib\nc = zlib.compressobj(9)\nd = b''.join(c.compress(bytes(10**7)) for _ in range(300)) + c.flush()\nopen('x', 'wb').write(zlib.decompress(d))",
    "shared memory": "import ctypes\nl = ctypes.CDLL(None)\nfor k in range(1, 100): l.shmget(k, 1 << 34, 0o1666)\nfor k in range(1, 10**4): l.msgget(k, 0o1666)",
    "crash": "import ctypes\nctypes.string_at(0)",
    "leaving with success": "import os\nos._exit(0)",
    "forged status": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"ended": "exit", "code": 0}\')\n    except OSError: pass\nos._exit(0)',
    "running itself again": "import os, sys\nos.execv(sys.executable, [sys.executable, '-I', '-S', 'main.py'])",
    "looking for the answer": "import os, sys, gc\nfor d, _, fs in os.walk('/'):\n    for f in fs:\n        if f.endswith(('.json', '.txt', '.py')):\n            try: print(open(os.path.join(d, f), errors='replace').read()[:100])\n            except OSError: pass\nprint(os.environ, sys.argv, [o for o in gc.get_objects() if o == '42'])",
    "no program": "]]]] \\ud800 \\0 (",
}

# Each gets memory where the limit of address space doesn't count it, and prints how many bytes it has got.
HOARDS = {
    "System V memory": """
import ctypes
l, got = ctypes.CDLL(None), 0
l.shmat.restype = ctypes.c_void_p
while got < 800 << 20:
    piece = l.shmget(0, 8 << 20, 0o1600)
    place = l.shmat(piece, None, 0) if piece >= 0 else None
    if place in (None, ctypes.c_void_p(-1).value): break
    ctypes.memset(place, 1, 8 << 20)
    l.shmdt(ctypes.c_void_p(place))
    got += 8 << 20
print(got)
""",
    "memory in descriptors": """
import os
got, piece = 0, bytes(7 << 20)
for _ in range(61):
    try: got += os.write(os.memfd_create('x'), piece)
    except OSError: break
print(got)
""",
    "System V messages": """
import ctypes
l, got = ctypes.CDLL(None), 0
message = ctypes.create_string_buffer(b'\\1' + bytes(8199))
for _ in range(20000):
    queue = l.msgget(0, 0o1600)
    if queue < 0 or l.msgsnd(queue, message, 8192, 0o4000) or l.msgsnd(queue, message, 8192, 0o4000): break
    got += 16384
print(got)
""",
}

# Against assertions: each gives itself out as the program that is asked for.
FORGERIES = {
    "equal to all": "class E(int):\n    __eq__ = lambda *_: True\n    __ne__ = lambda *_: False\n    __hash__ = int.__hash__\ndef add(a, b): return E(5)",
    "equal to all, not data": "class E:\n    __eq__ = lambda *_: True\n    __bool__ = lambda *_: True\ndef add(a, b): return E()",
    "patched builtins": "import builtins\nbuiltins.abs = lambda *_: 0\nbuiltins.len = builtins.isinstance = builtins.all = lambda *_: True\nbuiltins.AssertionError = ValueError\ndef add(a, b): return 5",
    "patched mathematics": "import math\nmath.isclose = lambda *_, **__: True\nclass math:\n    isclose = lambda *_, **__: True\ndef add(a, b): return 5",
    "leaving": "import os\nos._exit(0)",
    "leaving at a call": "import os\ndef add(a, b): os._exit(0)",
    "exit": "def add(a, b): raise SystemExit(0)",
    "forged verdict": "import os\nfor fd in range(64):\n    try: os.write(fd, b'![true]\\n![true]\\n[true]\\ntrue\\n')\n    except OSError: pass\ndef add(a, b): return 5",
    "forged answers": "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": true}\\n' * 100)\n    except OSError: pass\n",
    "broken answers": "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"value\": {\"o\": []}}\\n\\xff\\n' + b'[' * 10**6 + b'\\n')\n    except OSError: pass\ndef add(a, b): return 5",
    "patched harness": "import sys, json\nm = sys.modules['__main__']\nm.encode = lambda *_: 3\nm._PLAIN = ()\njson.dumps = lambda *_: '!'\ndef add(a, b): return 5",
    "reading the caller": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for v in f.f_locals.values():\n            if isinstance(v, list) and v and isinstance(v[0], str): return 3\n        f = f.f_back\n    return open('tests.json').read()",
    "sleeping": "import time\ndef add(a, b): time.sleep(10**6)",
    "flood": "import os\nwhile 1: os.write(1, b'x' * 10**6)\n",
    "endless answer": "def add(a, b): return list(range(10**7))",
    "killing": "import os\nos.fork()\nos.kill(-1, 9)\n",
}
