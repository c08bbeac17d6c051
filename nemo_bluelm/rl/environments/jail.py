"""Runs one Python program in a jail: a script of the standard library alone, which ``sandbox.py`` starts.

It is two processes. The outer one, in namespaces of its own but outside the jail, waits and ends the program; the inner
one builds the jail and becomes the program, as process 1 of its PID namespace: with it the kernel ends whatever the
program started, in whatever session. The jail's root is a small file system in memory with the interpreter, its
libraries and /dev/null, read-only, and a folder ``/w`` of limited size that may be written; it goes with the program.
The network has no interface, the user is nobody without capabilities who can make no namespaces.

Memory: the limit is one of address space, of each process. What holds memory that no address space counts (System V
IPC, message queues, memfd and the like) is refused by a filter of system calls. So all processes together have at most
the limit times their number, the folder ``/w``, and the pipes and sockets of 64 descriptors each.

Argument: JSON of ``sandbox.run``. What happened is written to the descriptor ``status``, as JSON.
"""

import ctypes
import errno
import json
import os
import platform
import resource
import select
import shutil
import signal
import struct
import sys
import time

_NEW_NAMESPACES = {
    **{"user": 0x10000000, "mount": 0x20000, "process": 0x20000000},
    **{"network": 0x40000000, "messages": 0x8000000, "host name": 0x4000000},
}
_BIND, _RECURSIVE, _PRIVATE, _NOSUID, _NODEV = 0x1000, 0x4000, 0x40000, 2, 4
_MOUNT_SETATTR, _AT_RECURSIVE, _READ_ONLY = 442, 0x8000, 1
_DETACH = 2
_PARENT_DEATH_SIGNAL, _SUBREAPER, _NO_NEW_PRIVILEGES = 1, 36, 38
_INSIDE, _NOBODY = 1000, 65534  # the program's user, in the jail and outside of it where root starts it
_SYSTEM = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_SECCOMP, _FILTER = 22, 2
# Of each machine: what the kernel calls it, and the system calls that get memory outside of an address space: shmget,
# semget, msgget, mq_open, add_key, vmsplice, memfd_create, bpf, io_uring_setup, memfd_secret.
_HOARDING = {
    "x86_64": (0xC000003E, (29, 64, 68, 240, 248, 278, 319, 321, 425, 447)),
    "aarch64": (0xC00000B7, (194, 190, 186, 180, 217, 75, 279, 280, 425, 447)),
}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name, *arguments):
    function = getattr(_libc, name)
    if function(*(a.encode() if isinstance(a, str) else a for a in arguments)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def _mount(source, target, kind=None, flags=0, data=None):
    _call("mount", source, target, kind, ctypes.c_ulong(flags), data)


def _restrict(path, attributes, recursive=True):
    structure = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    _call("syscall", ctypes.c_long(_MOUNT_SETATTR), -100, path, flags, ctypes.byref(structure), ctypes.c_size_t(32))


def _enter_namespaces():
    """As a user who is nobody inside. Root maps itself too, to read an interpreter below its home."""
    own, user, group = os.getpid(), os.geteuid(), os.getegid()
    ready, go = os.pipe()
    mapper = os.fork()
    if mapper == 0:  # it stays outside, where it has the right to say who is who
        try:
            os.close(go)
            os.read(ready, 1)
            if user != 0:
                _write(f"/proc/{own}/setgroups", "deny")
            for name, number in (("uid", user), ("gid", group)):
                mine = f"{_INSIDE} {number} 1" if user else f"0 {number} 1\n{_INSIDE} {_NOBODY} 1"
                _write(f"/proc/{own}/{name}_map", mine)
            os._exit(0)
        except OSError:
            os._exit(1)
    try:
        _call("unshare", sum(_NEW_NAMESPACES.values()))
    finally:
        os.close(ready)
        os.close(go)
        mapped = os.waitpid(mapper, 0)[1] == 0
    if not mapped:
        raise OSError("the user namespace can't have its users mapped")


def _write(path, text):
    with open(path, "w") as file:
        file.write(text)


def _build(task):
    """The jail's files, and this process in it."""
    _write("/proc/sys/user/max_user_namespaces", "0")
    _mount(None, "/", None, _RECURSIVE | _PRIVATE)
    sources, links = _sources(task["python"], task["prefix"])
    held = {path: os.open(path, os.O_PATH) for path in (*sources, *_DEVICES)}  # they may lie below what is covered now
    root = "/tmp"
    _mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=0755")
    for path, descriptor in held.items():
        target, source = root + path, f"/proc/self/fd/{descriptor}"
        if os.path.isdir(source):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT))
        _mount(source, target, None, _BIND | _RECURSIVE)
        os.close(descriptor)
        _restrict(target, _READ_ONLY | _NOSUID | (0 if path in _DEVICES else _NODEV))
    for path, target in links.items():
        if not os.path.lexists(root + path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(target, root + path)
    os.mkdir(f"{root}/w")
    _mount("tmpfs", f"{root}/w", "tmpfs", _NOSUID | _NODEV, f"size={task['disk']},nr_inodes=1024,mode=0777")
    _restrict(root, _READ_ONLY | _NOSUID | _NODEV, recursive=False)
    os.chdir(root)
    _call("pivot_root", ".", ".")
    _call("umount2", ".", _DETACH)
    os.chdir("/w")


def _sources(python, prefix):
    """Folders and files that the interpreter needs, and links to some of them."""
    own = ["/usr/bin" if prefix == "/usr" else prefix, os.path.dirname(python)]
    links = {path: os.readlink(path) for path in _SYSTEM if os.path.islink(path)} | {"/tmp": "w"}
    paths = [path for path in (*own, *_SYSTEM) if path not in links and os.path.exists(path)]
    return [path for path in dict.fromkeys(paths) if not any(path.startswith(f"{other}/") for other in paths)], links


def _limit(task, processes):
    limits = {
        "AS": task["memory"],
        "CPU": int(task["seconds"]) + 1,
        "NPROC": processes,
        "FSIZE": task["disk"],
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _refuse_hoarding():
    """Let system calls fail that get memory which the limit of address space doesn't see; no program can undo it.

    Raises:
        OSError: the kernel has no such filters, or this machine's calls aren't known.
    """
    if platform.machine() not in _HOARDING:
        raise OSError(f"the system calls of {platform.machine()} are not known")
    machine, numbers = _HOARDING[platform.machine()]
    load, equal, at_least, end = 0x20, 0x15, 0x35, 0x06
    allow, fail, kill = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
    steps = [(load, 0, 0, 4), (equal, 1, 0, machine), (end, 0, 0, kill)]  # calls in the manner of another machine,
    steps += [(load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (end, 0, 0, kill)]  # or of x32, have other numbers
    for number in numbers:
        steps += [(equal, 0, 1, number), (end, 0, 0, fail)]
    steps.append((end, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
    _call("prctl", _SECCOMP, ctypes.c_ulong(_FILTER), program, 0, 0)


def _become(task, strong):
    """The inner process: never returns."""
    _call("prctl", _PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # and again below: another user forgets it
    if strong:
        _build(task)
        _limit(task, task["processes"] + (os.getuid() != 0))  # the outer process is root's, or counts too
    else:
        os.chdir(task["folder"])
        _limit(task, task["processes"] + _threads_of(os.getuid()))
    os.setsid()
    for name, text in task["files"].items():
        with open(name, "w", encoding="utf-8", errors="surrogatepass") as file:
            file.write(text)
    if strong and os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_INSIDE, _INSIDE, _INSIDE)
        os.setresuid(_INSIDE, _INSIDE, _INSIDE)
    _call("prctl", _PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    _call("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if strong:
        _refuse_hoarding()
    for number in (signal.SIGINT, signal.SIGXFSZ, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    os.execve(task["python"], [task["python"], "-I", "-S", "-B", *task["command"]], {})


def _threads_of(user):
    count = 0
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            count += len(os.listdir(f"/proc/{number}/task")) if os.stat(f"/proc/{number}").st_uid == user else 0
        except OSError:
            pass  # it has ended
    return count


def _watch(inner, task):
    """Wait for the inner process as long as it may run and the sandbox's side is there."""
    handle = os.pidfd_open(inner)
    found = select.select([handle, task["lifeline"]], [], [], task["seconds"])[0]
    if not found:
        return {"ended": "time"}
    if handle not in found:
        return {"ended": "killed"}
    code = os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1])
    return {"ended": "exit" if code >= 0 else "signal", "code": abs(code)}


def _end(inner, found, strong):
    """End all that is left, wherever it hides; in a PID namespace nothing outlives the inner process."""
    if strong:
        if "code" not in found:
            os.kill(inner, signal.SIGKILL)
            os.waitpid(inner, 0)
        return
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        for process in _descendants(os.getpid()):
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _descendants(process):
    found = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                found += [int(child) for child in file.read().split()]
    except OSError:
        pass  # it has ended
    return [*found, *(below for child in found for below in _descendants(child))]


def main():
    with open(int(sys.argv[1]), encoding="utf-8", errors="surrogatepass") as file:
        task = json.load(file)
    for descriptor in (task["status"], task["lifeline"]):
        os.set_inheritable(descriptor, False)
    os.umask(0o022)
    strong = task["isolation"] == "strong"
    try:
        if strong:
            _enter_namespaces()
        else:
            _call("prctl", _SUBREAPER, 1, 0, 0, 0)
        nothing = os.open("/dev/null", os.O_RDWR)
        failed, failure = os.pipe()
        inner = os.fork()
        if inner == 0:
            try:
                _become(task, strong)
            except BaseException as error:  # the outer process tells it
                os.write(failure, f"{type(error).__name__}: {error}".encode()[:500])
            os._exit(1)
        os.close(failure)
        for standard in (0, 1, 2):
            os.dup2(nothing, standard)
        problem = os.read(failed, 500)  # nothing, when it has become the program
        found = {"ended": "error", "problem": problem.decode()} if problem else _watch(inner, task)
        _end(inner, found, strong)
        if not strong:
            shutil.rmtree(task["folder"], ignore_errors=True)
    except OSError as error:
        found = {"ended": "error", "problem": str(error)}
    os.write(task["status"], json.dumps(found).encode())


main()
