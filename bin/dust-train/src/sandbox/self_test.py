# Runs in a box at start, as a program under test. Attempts what must fail and returns what did not.
import ctypes, os, signal, socket

libc = ctypes.CDLL(None, use_errno=True)


def probe(canary, pid):
    def read_outside():
        open(canary).read()

    def write_outside():
        open(canary, "r+").close()

    def create_outside():
        open("/usr/dust-self-test", "x").close()

    def tcp():
        socket.create_connection(("127.0.0.1", 9), 1)

    def udp():
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    def signal_parent():
        os.kill(pid, 0)

    def become_root():
        os.setuid(0)

    def raise_limit():
        import resource

        resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))

    def shared_memory():
        if libc.shmget(0, 4096, 0o1600) < 0:
            raise OSError(ctypes.get_errno(), "shmget")

    def drop_executable():
        with open("probe", "w") as f:
            f.write("#!/bin/sh\n")
        os.chmod("probe", 0o700)

    def leave_session():
        os.setsid()

    def device():
        os.mknod("device", 0o600 | 0o020000, os.makedev(1, 3))

    def read_environment():
        open(f"/proc/{pid}/environ", "rb").read()

    def descriptors():
        # 0 to 3 are ours; whatever else is open came from outside.
        extra = [fd for fd in range(4, 256) if is_open(fd)]
        if not extra:
            raise OSError("none")

    attempts = [
        read_outside, write_outside, create_outside, tcp, udp, signal_parent, become_root, raise_limit, shared_memory,
        drop_executable, leave_session, device, read_environment, descriptors,
    ]
    succeeded = []
    for attempt in attempts:
        try:
            attempt()
            succeeded.append(attempt.__name__)
        except (OSError, ValueError):
            pass
    print("tried", *(a.__name__ for a in attempts))
    print("succeeded", *succeeded)
    return succeeded


def is_open(fd):
    try:
        os.fstat(fd)
        return True
    except OSError:
        return False
