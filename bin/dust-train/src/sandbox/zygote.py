# The warm interpreter. It locks itself into its own namespaces once, then forks a fresh, fully
# restricted child (a "box") for each run. It never sees a program: the child reads source and
# arguments itself, after the last restriction is in force, so nothing of one program is left in
# the memory that the next one is forked from.
#
# Boot:  hello ->   <- config (+ Landlock ruleset)   unshared ->   <- mapped   ready ->
# Run:   <- start (+ descriptors)   started (+ pidfd) ->   exited ->      "kill" at any time
# End of file on the control socket means that the parent is gone: kill the box and leave.

import array, ctypes, gc, json, os, resource, select, signal, socket, struct, sys
import _sitebuiltins, atexit, builtins, io, linecache, threading, traceback, types

libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS = 0x00020000, 0x02000000, 0x04000000
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x08000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 8, 16384, 1 << 18, 2
AT_FDCWD, AT_RECURSIVE, AT_EMPTY_PATH = -100, 0x8000, 0x1000
OPEN_TREE_CLONE, MOVE_MOUNT_F_EMPTY_PATH = 1, 4
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
# These numbers are the same on every architecture.
SYS_OPEN_TREE, SYS_MOVE_MOUNT, SYS_MOUNT_SETATTR = 428, 429, 442
SYS_LANDLOCK_CREATE_RULESET, SYS_LANDLOCK_ADD_RULE, SYS_LANDLOCK_RESTRICT_SELF = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
INSIDE_ID = 1000
SCRATCH = "/box/tmp"
STACK_BYTES = 64 << 20
STARTED = b"S"
PLAIN_DEPTH = 120


def check(result, what):
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def syscall(what, number, *args):
    return check(libc.syscall(ctypes.c_long(number), *args), what)


# ---- control socket

control = socket.socket(fileno=os.dup(0))


def send(message, fds=()):
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    control.sendmsg([json.dumps(message).encode()], ancillary)


def receive():
    data, fds, flags, _ = socket.recv_fds(control, 1 << 18, 16)
    return (json.loads(data) if data else None), fds


# ---- once: namespaces, a root of our own, no privileges


def new_root(clones, pivot_root):
    check(libc.mount(b"", b"/", None, MS_REC | MS_PRIVATE, None), "mount private")
    base = "/tmp"
    options = b"size=1m,nr_inodes=4096,mode=755"
    check(libc.mount(b"tmpfs", base.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount root tmpfs")
    for path, kind, payload in clones:
        target = base + path
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        if kind == "link":
            os.symlink(payload, target)
            continue
        if kind == "dir":
            os.makedirs(target, 0o755, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        set_flags(payload, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID | (0 if kind == "device" else MOUNT_ATTR_NODEV))
        syscall("move_mount " + path, SYS_MOVE_MOUNT, payload, b"", AT_FDCWD, target.encode(), MOVE_MOUNT_F_EMPTY_PATH)
        os.close(payload)
    os.makedirs(base + SCRATCH, 0o755)
    os.symlink(SCRATCH, base + "/tmp")
    os.makedirs(base + "/dev", 0o755, exist_ok=True)
    os.symlink(SCRATCH, base + "/dev/shm")
    os.chdir(base)
    syscall("pivot_root", pivot_root, b".", b".")
    check(libc.umount2(b".", MNT_DETACH), "umount old root")
    os.chdir("/")
    root = os.open("/", os.O_PATH)
    set_flags(root, MOUNT_ATTR_RDONLY, recursive=False)
    os.close(root)


def set_flags(tree, flags, recursive=True):
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)
    at = AT_EMPTY_PATH | (AT_RECURSIVE if recursive else 0)
    syscall("mount_setattr", SYS_MOUNT_SETATTR, tree, b"", at, attributes, len(attributes))


def clone_tree(path):
    """What to put at `path` of the new root; taken before the uid changes, which may lose the way to it."""
    if os.path.islink(path):
        return path, "link", os.readlink(path)
    kind = "dir" if os.path.isdir(path) else "file" if os.path.isfile(path) else "device"
    flags = OPEN_TREE_CLONE | (AT_RECURSIVE if kind == "dir" else 0)
    return path, kind, syscall("open_tree " + path, SYS_OPEN_TREE, AT_FDCWD, path.encode(), flags)


def boot():
    abi = libc.syscall(ctypes.c_long(SYS_LANDLOCK_CREATE_RULESET), None, ctypes.c_size_t(0), 1)
    prefixes = sorted({os.path.realpath(p) for p in (sys.base_prefix, sys.base_exec_prefix, os.path.dirname(os.__file__))})
    send({"stage": "hello", "landlock_abi": abi, "prefixes": prefixes, "version": sys.version.split()[0]})
    config, fds = receive()
    if config is None:
        sys.exit(0)
    config["ruleset"] = fds[0] if fds else None
    missing = {}
    if os.geteuid() == 0:
        os.setgroups([])
    if config["namespaces"]:
        try:
            check(
                libc.unshare(CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP),
                "unshare",
            )
        except OSError as error:
            missing["namespaces"] = str(error)
    send({"stage": "unshared", "namespaces": "namespaces" not in missing and config["namespaces"]})
    reply, _ = receive()
    config["isolated"] = reply["mapped"]
    if config["isolated"]:
        isolate(config)
    elif os.geteuid() == 0 and config["uid"]:
        os.setresgid(config["uid"], config["uid"], config["uid"])
        os.setresuid(config["uid"], config["uid"], config["uid"])
        if not os.access(os.__file__, os.R_OK):
            raise PermissionError(f"the unprivileged user cannot read {sys.base_prefix}; choose another interpreter")
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    if config["ruleset"] is not None:
        base = "/box" if config["isolated"] else config["scratch"]
        parent = os.open(base, os.O_PATH)
        rule = struct.pack("=Qi", config["scratch_access"], parent)
        syscall("landlock_add_rule", SYS_LANDLOCK_ADD_RULE, config["ruleset"], 1, rule, 0)
        os.close(parent)
    config["filters"] = [seccomp_program(bytes.fromhex(f)) for f in config["filters"]]
    warm()
    gc.collect()
    gc.freeze()
    send({"stage": "ready", "missing": missing, "uid": os.geteuid()})
    return config


def isolate(config):
    # A pid namespace holds the children of the process that made it, so the work goes on in a child;
    # being its init, that child takes every box with it when it dies.
    child = os.fork()
    if child:
        control.close()
        os.closerange(0, 1024)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    config["pid_namespace"] = os.open("/proc/self/ns/pid", os.O_RDONLY)
    clones = [clone_tree(path) for path in config["paths"]]
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")  # setresuid cleared it
    new_root(clones, config["sys_pivot_root"])
    libc.sethostname(b"box", 3)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def seccomp_program(code):
    class sock_fprog(ctypes.Structure):
        _fields_ = [("len", ctypes.c_ushort), ("filter", ctypes.c_char_p)]

    return sock_fprog(len(code) // 8, code)


# ---- each run: the box


def serve(config):
    poller = select.poll()
    poller.register(control, select.POLLIN)
    while True:
        poller.poll()
        job, fds = receive()
        if job is None:
            return
        if job.get("kill"):
            continue  # it was meant for a box that has just ended
        try:
            run_box(config, job, fds)
        except OSError as error:
            send({"stage": "failed", "error": str(error)})


def run_box(config, job, fds):
    if config["isolated"]:
        options = f"size={job['files_bytes']},nr_inodes={job['files_count']},mode=700".encode()
        check(libc.mount(b"tmpfs", SCRATCH.encode(), b"tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, options), "mount scratch")
        check(libc.setns(config["pid_namespace"], CLONE_NEWPID), "setns")
        check(libc.unshare(CLONE_NEWPID), "unshare pid")
    try:
        child = os.fork()
        if child == 0:
            box(config, job, fds)  # does not return
        for fd in fds:
            os.close(fd)
        pidfd = os.pidfd_open(child)
        send({"stage": "started"}, [pidfd])
        poller = select.poll()
        poller.register(control, select.POLLIN)
        poller.register(pidfd, select.POLLIN)
        orphaned = False
        while True:
            ready = dict(poller.poll())
            if control.fileno() in ready:
                orphaned = receive()[0] is None
                kill_box(config, child)
                if orphaned:
                    poller.unregister(control)
            if pidfd in ready:
                break
        os.close(pidfd)
        kill_box(config, child)  # the rest of its process group, where there is no pid namespace
        _, status, usage = os.wait4(child, 0)
        if orphaned:
            os._exit(0)
        send({"stage": "exited", "status": status, "cpu_s": usage.ru_utime + usage.ru_stime, "maxrss_kb": usage.ru_maxrss})
    finally:
        if config["isolated"]:
            libc.umount2(SCRATCH.encode(), MNT_DETACH)


def kill_box(config, child):
    try:
        if config["isolated"]:
            os.kill(child, signal.SIGKILL)  # its init: the kernel kills the namespace
        else:
            os.killpg(child, signal.SIGKILL)  # setsid and setpgid are denied to it
    except ProcessLookupError:
        pass


def restrict(config, job, fds):
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "pdeathsig")
    os.setsid()
    scratch = SCRATCH if config["isolated"] else job["scratch"]
    os.chdir(scratch)
    os.environ.clear()
    os.environ.update(PATH="/usr/bin:/bin", HOME=scratch, TMPDIR=scratch, LANG="C.UTF-8")
    for name, (soft, hard) in job["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    stack_hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    stack = STACK_BYTES if stack_hard == resource.RLIM_INFINITY else min(STACK_BYTES, stack_hard)
    resource.setrlimit(resource.RLIMIT_STACK, (stack, stack_hard))
    if config["ruleset"] is not None:
        syscall("landlock_restrict_self", SYS_LANDLOCK_RESTRICT_SELF, config["ruleset"], 0)
    # Two steps, so that no target of dup2 is a source yet to be copied.
    high = [os.dup2(fd, 64 + i) for i, fd in enumerate(fds)]
    for number, fd in enumerate(high):
        os.dup2(fd, number)
    os.closerange(len(fds), 1 << 20)
    header = struct.pack("=Ii", 0x20080522, 0)  # capability version 3, this process
    check(libc.capset(header, bytes(24)), "capset")
    for program in config["filters"]:
        check(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(program), 0, 0), "seccomp")


def box(config, job, fds):
    try:
        restrict(config, job, fds)
    except BaseException as error:
        # Nothing of the program has run yet, and without the mark the parent calls it infra_error.
        for fd in (fds[2], 2):  # it may have been moved already
            try:
                os.write(fd, f"sandbox set-up: {error}\n".encode())
            except OSError:
                pass
        os._exit(1)
    control.detach()
    os.write(RESULT, STARTED)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors = "backslashreplace" if name == "stderr" else "strict"
        stream = open(fd, mode, encoding="utf-8", errors=errors, closefd=False, buffering=1 if name == "stderr" else -1)
        setattr(sys, name, stream)
        setattr(sys, "__" + name + "__", stream)
    ROLES[job["role"]](job)


# ---- what runs inside the box. Everything below is at the program's mercy and nothing relies on it.

RESULT, SOURCE, EXTRA = 3, 4, 5
CALLS = ANSWERS = 6  # of the two halves of an assertion test


def read_all(fd):
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return data.decode()


def write_frame(fd, message):
    data = json.dumps(message).encode()
    data = struct.pack("=I", len(data)) + data
    while data:
        data = data[os.write(fd, data):]


def read_frame(fd):
    def exactly(count):
        parts = bytearray()
        while len(parts) < count:
            part = os.read(fd, min(count - len(parts), 1 << 16))
            if not part:
                raise EOFError("the other side is gone")
            parts += part
        return bytes(parts)

    return json.loads(exactly(struct.unpack("=I", exactly(4))[0]))


class NotPlainData(Exception):
    pass


def plain(value, room=PLAIN_DEPTH):
    """`value` as tagged JSON. Instances of subclasses count as what they hold."""
    kind = type(value)
    if value is None or kind is bool:
        return value
    if room <= 0:
        raise NotPlainData("the value is nested too deeply")
    if issubclass(kind, str):
        value = str.__getitem__(value, slice(None))
        try:
            value.encode()
            return value
        except UnicodeEncodeError:
            return {"u": [ord(c) for c in value]}
    if issubclass(kind, int):
        value = int.__pos__(value)
        return value if -(2**53) < value < 2**53 else {"i": hex(value)}
    if issubclass(kind, float):
        return {"f": struct.unpack("=Q", struct.pack("=d", float.__pos__(value)))[0]}
    if issubclass(kind, list):
        return [plain(item, room - 1) for item in list.__iter__(value)]
    if issubclass(kind, tuple):
        return {"t": [plain(item, room - 2) for item in tuple.__iter__(value)]}
    if issubclass(kind, dict):
        return {"d": [[plain(k, room - 3), plain(v, room - 3)] for k, v in dict.items(value)]}
    if issubclass(kind, set):
        return {"s": [plain(item, room - 2) for item in set.__iter__(value)]}
    if issubclass(kind, frozenset):
        return {"z": [plain(item, room - 2) for item in frozenset.__iter__(value)]}
    if issubclass(kind, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    if kind is complex:
        return {"c": [plain(value.real), plain(value.imag)]}
    raise NotPlainData(f"{kind.__name__} is not plain data")


def unplain(data):
    if isinstance(data, list):
        return [unplain(item) for item in data]
    if not isinstance(data, dict):
        return data
    (tag, body), = data.items()
    return UNPLAIN[tag](body)


UNPLAIN = {
    "u": lambda b: "".join(map(chr, b)),
    "i": lambda b: int(b, 16),
    "f": lambda b: struct.unpack("=d", struct.pack("=Q", b))[0],
    "t": lambda b: tuple(map(unplain, b)),
    "d": lambda b: {unplain(k): unplain(v) for k, v in b},
    "s": lambda b: set(map(unplain, b)),
    "z": lambda b: frozenset(map(unplain, b)),
    "b": bytes.fromhex,
    "c": lambda b: complex(*map(unplain, b)),
}


def describe(error):
    try:
        return [type(error).__name__, str(error)[:500]]
    except BaseException:
        return [type(error).__name__, ""]


def show(error):
    """The traceback as the interpreter prints it, without our own frame."""
    try:
        trace = error.__traceback__
        error = error.with_traceback(trace.tb_next if trace else None)
        sys.excepthook(type(error), error, error.__traceback__)
    except BaseException:
        pass


def flush_output():
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not getattr(stream, "closed", False):
            stream.flush()


def leave(code):
    """What the interpreter does at the end of a script, up to the point where only memory is freed."""
    for step in (threading._shutdown, atexit._run_exitfuncs, flush_output):
        try:
            step()
        except BaseException as error:
            show(error)
            code = code or 120
    os._exit(code)


def exit_code(stop):
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code & 0xFF
    print(stop.code, file=sys.stderr)
    return 1


def load(name, namespace):
    module = types.ModuleType(name)
    module.__dict__.update(namespace)
    module.__dict__["__builtins__"] = builtins
    sys.modules[name] = module
    return module


def script(job):
    source = read_all(SOURCE)
    main = load("__main__", {})
    try:
        exec(compile(source, "solution.py", "exec"), main.__dict__)
        code = 0
    except SystemExit as stop:
        code = exit_code(stop)
    except BaseException as error:
        write_frame(RESULT, {"e": describe(error)})
        show(error)
        code = 1
    leave(code)


def load_solution(job):
    """The program as a module, with the names that LeetCode-style code takes for granted."""
    source = read_all(SOURCE)
    sys.setrecursionlimit(50000)
    module = load("solution", PRELUDE)
    exec(compile(source, "solution.py", "exec"), module.__dict__)
    return module, source


def entry(module, source, name):
    if "class Solution" in source and "Solution" in module.__dict__:
        return getattr(module.Solution(), name)
    return module.__dict__[name]


def function(job):
    answer = {"e": ["Unknown", ""]}
    try:
        module, source = load_solution(job)
        arguments = json.loads(read_all(EXTRA))
        answer = {"v": plain(entry(module, source, job["entry_point"])(*arguments))}
    except BaseException as error:
        answer = {"e": describe(error)}
        show(error)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass
    write_frame(RESULT, answer)
    os._exit(0)


def answer_calls(job):
    """The hostile half of an assertion test: called by name, answers with plain data."""
    try:
        module, source = load_solution(job)
    except BaseException as error:
        write_frame(ANSWERS, {"e": describe(error)})
        show(error)
        sys.stderr.flush()
        os._exit(1)
    write_frame(ANSWERS, {"v": None})
    while True:
        try:
            call = read_frame(EXTRA)
        except EOFError:
            os._exit(0)
        try:
            target = entry(module, source, call["name"])
            arguments, keywords = unplain(call["args"])
            answer = {"v": plain(target(*arguments, **keywords))}
        except BaseException as error:
            answer = {"e": describe(error)}
            show(error)
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except BaseException:
            pass
        write_frame(ANSWERS, answer)


class CandidateError(Exception):
    """The program raised something that has no counterpart here."""


class CandidateGone(BaseException):
    """The program's process ended or broke the protocol. No test catches this by accident."""


class Unsupported(BaseException):
    """The test passes what cannot be sent to another process: the test's fault, not the program's."""


FROM_CANDIDATE = []


class Proxy:
    """A function of the program, called in the program's own process."""

    def __init__(self, name):
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        try:
            call = {"name": self.__name__, "args": plain((args, kwargs))}
        except NotPlainData as error:
            raise Unsupported(str(error)) from None
        try:
            write_frame(CALLS, call)
            answer = read_frame(EXTRA)
            if "v" in answer:
                return unplain(answer["v"])
            kind, message = answer["e"]
        except BaseException as error:
            raise CandidateGone(str(error)) from None
        raise as_raised(kind, message)


def as_raised(kind, message):
    known = builtins.__dict__.get(kind) if isinstance(kind, str) else None
    if isinstance(known, type) and issubclass(known, Exception):
        try:
            error = known(message)
        except TypeError:  # UnicodeDecodeError and its kind want more arguments
            error = CandidateError(f"{kind}: {message}")
    else:
        error = CandidateError(f"{kind}: {message}")
    FROM_CANDIDATE.append(error)
    return error


def names_in(code):
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= names_in(constant)
    return found


def run_tests(job):
    """The trusted half of an assertion test: expected values live here, the program does not."""
    sys.setrecursionlimit(50000)
    try:
        code = compile(read_all(SOURCE), "tests.py", "exec")
    except BaseException as error:
        write_frame(RESULT, {"e": ["Unsupported", f"the test code does not compile: {error}"]})
        os._exit(0)
    try:
        loaded = read_frame(EXTRA)
        if "e" in loaded:
            raise as_raised(*loaded["e"])
        # Names that nothing here defines can only be the program's.
        names = names_in(code) - builtins.__dict__.keys()
        namespace = load("tests", {name: Proxy(name) for name in names}).__dict__
        entry_point = job["entry_point"]
        candidate = Proxy(entry_point) if entry_point else None
        if candidate:
            namespace[entry_point] = candidate
        exec(code, namespace)
        if candidate:
            namespace[entry_point] = candidate  # the test code may have held its stub
            if not isinstance(namespace.get("check", candidate), Proxy):
                namespace["check"](candidate)
        verdict = {"v": True}
    except BaseException as error:
        kind, message = describe(error)
        if any(error is raised for raised in FROM_CANDIDATE):
            kind, message = "CandidateError", f"{kind}: {message}"
        elif isinstance(error, ImportError):
            kind, message = "Unsupported", f"it imports what is not there: {message}"
        verdict = {"e": [kind, message]}
        show(error)
    sys.stdout.flush()
    sys.stderr.flush()
    write_frame(RESULT, verdict)
    os._exit(0)


ROLES = {
    "script": script, "function": function, "answer": answer_calls, "test": run_tests,
    "lcb-script": lcb_script, "lcb-function": lcb_function,
}
PRELUDE = {}


def warm():
    """What LiveCodeBench imports ahead of every function problem, imported once."""
    for name in [*LCB_MODULES, "builtins", "typing"]:
        exec(f"from {name} import *", PRELUDE)
        exec(f"import {name}", PRELUDE)
    del PRELUDE["__builtins__"]
    # `site` would bring these, and much else; scripts do end with them.
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")
    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")


if __name__ == "__main__":
    sys.path = [path for path in sys.path if path]
    try:
        configuration = boot()
    except Exception as trouble:
        send({"stage": "failed", "error": f"{type(trouble).__name__}: {trouble}"})
        sys.exit(1)
    serve(configuration)
