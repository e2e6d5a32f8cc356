//! Hostile programs, one for every line of the threat list in `docs/sandbox.md`, and what must be
//! untouched after them.

mod sandbox_support;

use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, UdpSocket};
use std::os::unix::net::UnixListener;
use std::process::{Child, Command};

use dust_train::sandbox::{Layer, Limits, Verdict};
use sandbox_support::*;
use serde_json::json;

/// Kills its process at the end of a test, whatever the end.
struct Bystander(Child);

impl Drop for Bystander {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn bystander() -> Bystander {
    Bystander(Command::new("sleep").arg("60").spawn().expect("sleep"))
}

const TOOLS: &str = "
import ctypes, os, sys, signal, socket, struct, fcntl, resource, mmap
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    result = libc.syscall(ctypes.c_long(number), *args)
    if result < 0:
        raise OSError(ctypes.get_errno(), 'syscall')
    return result
";

/// Runs `body`, which must fail or die; a success is printed, and found.
#[track_caller]
fn blocked(body: &str) {
    let body = body.replace('\n', "\n    ");
    let source = format!(
        "{TOOLS}\ndef attempt():\n    {body}\ntry:\n    attempt()\n    print('SUCCEEDED')\n\
         except (OSError, ValueError) as e:\n    print('blocked')\n    print(repr(e), file=sys.stderr)\n"
    );
    let outcome = script(&source, "", "blocked");
    assert!(
        matches!(outcome.verdict, Verdict::Passed | Verdict::Denied),
        "{body}\n{outcome:#?}"
    );
}

#[test]
fn forged_verdicts_of_functions() {
    let forgeries = [
        // ends before the assert
        "import os\nos._exit(0)",
        "def f(x): exit(0)",
        "import atexit, os\natexit.register(lambda: os._exit(0))\ndef f(x): raise SystemExit(0)",
        "import sys\nsys.excepthook = lambda *a: None\ndef f(x): 1/0",
        // equal to everything
        "class E:\n  def __eq__(s, o): return True\n  __hash__ = None\ndef f(x): return E()",
        "class E(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\ndef f(x): return E(1)",
        "class E(list):\n  def __eq__(s, o): return True\n  def __len__(s): return 1\ndef f(x): return E()",
        "class E(str):\n  def __eq__(s, o): return True\ndef f(x): return E('a')",
        // patches what a grader might use
        "import builtins, json\njson.loads = lambda *a, **k: 0\njson.dumps = lambda *a, **k: '{\"v\": true}'\nbuiltins.all = lambda *a: True\ndef f(x): return 0",
        "import sys\nsys.settrace(lambda *a: None)\ndef f(x): return 0",
        // looks for the expected value in the frames and among all objects
        "import sys, gc\ndef f(x):\n  fr = sys._getframe()\n  while fr:\n    for v in list(fr.f_locals.values()) + list(fr.f_globals.values()):\n      if v == 7341: return v\n    fr = fr.f_back\n  for o in gc.get_objects():\n    if isinstance(o, dict) and 7341 in list(o.values()): return 7341",
        // writes an answer of its own making, and rubbish
        "import os, struct\ndef f(x):\n  m = b'{\"v\": true}'\n  os.write(3, struct.pack('=I', len(m)) + m)\n  os._exit(0)",
        "import os\ndef f(x):\n  os.write(3, b'\\xff' * 64)\n  os._exit(0)",
        "import os\ndef f(x):\n  os.write(3, b'S')\n  os.close(3)\n  return 0",
        "print('passed'); print('{\"verdict\": \"passed\"}')\ndef f(x): return None",
        // values that break readers
        "def f(x): return float('nan')",
        "def f(x):\n  a = []\n  a.append(a)\n  return a",
        "def f(x): return 1 << 4000000",
        "def f(x):\n  a = []\n  for _ in range(100000): a = [a]\n  return a",
        "def f(x): return '\\ud800'",
        "import pickle\nclass P:\n  def __reduce__(s): return (print, ('pwned',))\ndef f(x): return P()",
        "import pickle\nclass P:\n  def __reduce__(s): return (print, ('pwned',))\ndef f(x): return pickle.dumps(P())",
        // shadows modules
        "open('json.py', 'w').write('def dumps(*a): return \"{}\"')\nimport sys\nsys.path.insert(0, '.')\ndel sys.modules['json']\nimport json\ndef f(x): return 0",
    ];
    for source in forgeries {
        let outcome = function(source, "f", &[json!(1)], json!(7341));
        let verdict = outcome.verdict;
        assert!(
            !matches!(verdict, Verdict::Passed | Verdict::InfraError),
            "{source}\n{outcome:#?}"
        );
    }
}

#[test]
fn forged_verdicts_of_assertions() {
    let tests = "def check(candidate):\n    assert candidate(1) == 7341\n";
    let forgeries = [
        "import os\nos._exit(0)",
        "def f(x): exit(0)",
        "class E:\n  def __eq__(s, o): return True\ndef f(x): return E()",
        "class E(int):\n  def __eq__(s, o): return True\n  __hash__ = int.__hash__\ndef f(x): return E(1)",
        "import builtins\nbuiltins.__dict__['AssertionError'] = ValueError\ndef f(x): return 0",
        "def check(c): pass\ndef f(x): return 0",
        "import os, struct\ndef f(x):\n  m = b'{\"v\": true}'\n  for fd in range(3, 10):\n    try: os.write(fd, struct.pack('=I', len(m)) + m)\n    except OSError: pass\n  os._exit(0)",
        "import sys\ndef f(x):\n  fr = sys._getframe()\n  while fr:\n    for v in list(fr.f_globals.values()):\n      if v == 7341: return v\n    fr = fr.f_back",
        "import threading, __main__\n__main__.check = lambda c: None\ndef f(x): return 0",
        "import os\ndef f(x):\n  os.write(6, b'\\xff\\xff\\xff\\xff' + b'x' * 100)\n  return 0",
    ];
    // One promises more than it sends, and the test waits for the rest.
    let short = Limits {
        wall_s: 3.0,
        ..limits()
    };
    for source in forgeries {
        let outcome = sandbox().run(&assert_program(source, Some("f"), tests), &short);
        let verdict = outcome.verdict;
        assert!(
            !matches!(verdict, Verdict::Passed | Verdict::InfraError),
            "{source}\n{outcome:#?}"
        );
    }
}

#[test]
fn time_and_stop() {
    // CPU time decides over these. The clock is far off, so that a loaded host changes nothing.
    let busy = Limits {
        cpu_s: 0.5,
        wall_s: 120.0,
        ..limits()
    };
    for source in [
        "while True:\n  try:\n    while True: pass\n  except BaseException: pass",
        "x = 7 ** 10 ** 9",
        "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
        "import os\nfor fd in range(10):\n  try: os.close(fd)\n  except OSError: pass\nwhile True: pass",
        // many short-lived children spend the time
        "import os, signal\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nimport time\nwhile True:\n  if os.fork() == 0:\n    e = time.process_time() + 0.05\n    while time.process_time() < e: pass\n    os._exit(0)\n  time.sleep(0.05)",
    ] {
        let outcome = sandbox().run(&stdin_program(source, "", "x"), &busy);
        assert_eq!(outcome.verdict, Verdict::Timeout, "{source}\n{outcome:#?}");
        let wall_ms = outcome.tests[0].wall_ms;
        assert!(wall_ms < 120_000.0, "the clock decided: {source}");
    }
    // These spend none, and the clock ends them; what they wait for a core is not counted.
    let idle = Limits {
        cpu_s: 10.0,
        wall_s: 1.5,
        ..limits()
    };
    for source in [
        "import signal, time\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except Exception: pass\nwhile True: time.sleep(1)",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)\nimport time\ntime.sleep(60)",
    ] {
        let outcome = sandbox().run(&stdin_program(source, "", "x"), &idle);
        assert_eq!(outcome.verdict, Verdict::Timeout, "{source}\n{outcome:#?}");
        assert!(outcome.tests[0].cpu_ms < 5_000.0, "{source}\n{outcome:#?}");
        assert!(
            outcome.tests[0].wall_ms >= 1_500.0,
            "{source}\n{outcome:#?}"
        );
    }
    // A daemon that holds stdout does not hold the verdict.
    let daemon = "import os, time\nprint('done', flush=True)\nif os.fork() == 0:\n  time.sleep(60)\n  print('late')";
    expect(script(daemon, "", "done"), Verdict::Passed);
    let zombies = "import os\nfor _ in range(20):\n  if os.fork() == 0: os._exit(0)\nprint('done')";
    expect(script(zombies, "", "done"), Verdict::Passed);
}

#[test]
fn memory_disk_and_output() {
    expect(
        script("x = bytearray(1 << 30)\nprint(len(x))", "", "x"),
        Verdict::Memory,
    );
    expect(
        script("a = []\nwhile True: a.append('x' * 1000000)", "", "x"),
        Verdict::Memory,
    );
    if sandbox().effective().has(Layer::Cgroup) {
        let many = "import os, time\nfor _ in range(8):\n  if os.fork() == 0:\n    x = bytearray(b'x' * (40 << 20))\n    time.sleep(1)\n    os._exit(0)\nfor _ in range(8):\n  if os.wait()[1]: raise SystemExit(1)\nprint('held')";
        expect(script(many, "", "held"), Verdict::Memory);
    }
    let bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass";
    let outcome = script(bomb, "", "x");
    assert!(
        matches!(outcome.verdict, Verdict::Timeout | Verdict::Memory),
        "{outcome:#?}"
    );
    blocked("with open('big', 'wb') as f:\n    for _ in range(200): f.write(b'x' * (1 << 20))");
    if sandbox().effective().has(Layer::Namespaces) {
        blocked(
            "for i in range(100):\n    with open(f'f{i}', 'wb') as f: f.write(b'x' * (1 << 20))",
        );
        blocked("for i in range(100000): open(f'n{i}', 'w').close()");
    }
    blocked("kept = [open('/dev/null') for _ in range(10000)]");
    for endless in [
        "import sys\nwhile True: sys.stdout.write('x' * 100000)",
        "import os\nwhile True: os.write(1, b'\\xff\\x00' * 50000)",
        "while True: print()",
    ] {
        let small = Limits {
            output_bytes: 1 << 20,
            ..limits()
        };
        let outcome = sandbox().run(&stdin_program(endless, "", "x"), &small);
        assert_eq!(
            outcome.verdict,
            Verdict::OutputLimit,
            "{endless}\n{outcome:#?}"
        );
        assert!(outcome.tests[0].stdout.len() <= 3 << 20);
    }
    let outcome = function("def f(): return 'x' * (100 << 20)", "f", &[], json!("x"));
    assert!(
        matches!(outcome.verdict, Verdict::OutputLimit | Verdict::Memory),
        "{outcome:#?}"
    );
}

#[test]
fn file_system() {
    let folder = tempfile::tempdir().expect("folder");
    let canary = folder.path().join("canary");
    fs::write(&canary, "untouched").expect("canary");
    let before = fs::metadata(&canary).expect("canary");
    let path = canary.to_str().expect("path");
    for attempt in [
        format!("open({path:?}).read()"),
        format!("open({path:?}, 'r+').write('x')"),
        format!("os.unlink({path:?})"),
        format!("os.rename({path:?}, {path:?} + 'x')"),
        format!("os.truncate({path:?}, 0)"),
        format!("os.chmod({path:?}, 0o777)"),
        format!("os.chown({path:?}, 1, 1)"),
        format!("os.utime({path:?}, (0, 0))"),
        format!("os.setxattr({path:?}, 'user.x', b'x')"),
        format!("os.link({path:?}, 'here')"),
        "open('/usr/x', 'x')".into(),
        "open('/x', 'x')".into(),
        "os.mkdir('/usr/lib/x')".into(),
        "open('/etc/shadow').read()".into(),
        "open('/etc/passwd').read()".into(),
        "os.mkfifo('pipe')".into(),
        "os.mknod('node', 0o600 | 0o060000, os.makedev(254, 0))".into(),
        "open('/dev/vda', 'rb').read(1)".into(),
        "open('/dev/mem', 'rb').read(1)".into(),
        "os.chmod('/usr', 0o777)".into(),
        "os.utime('/usr', (0, 0))".into(),
        "os.utime(sys.executable, (0, 0))".into(),
        "open('/proc/1/environ', 'rb').read()".into(),
        "open('/proc/self/mem', 'rb').read(1)".into(),
        "os.listdir('/proc/1/root/')".into(),
        format!("open('/proc/{}/environ', 'rb').read()", std::process::id()),
    ] {
        blocked(&attempt);
    }
    let after = fs::metadata(&canary).expect("canary");
    assert_eq!(fs::read_to_string(&canary).expect("canary"), "untouched");
    assert_eq!(before.permissions(), after.permissions());
    assert_eq!(
        before.modified().expect("time"),
        after.modified().expect("time")
    );
    // Nothing is kept for the next one, and nothing is followed while clearing up.
    let leave = format!(
        "import os\nopen('kept', 'w').write('x')\nos.symlink({:?}, 'trap')\nos.makedirs('a/' * 200)\n\
         os.mkdir('locked', 0)\nopen('\\n\\xff', 'w').close()\nprint('left')",
        folder.path()
    );
    expect(script(&leave, "", "left"), Verdict::Passed);
    expect(
        script("import os\nprint(os.listdir('.'))", "", "[]"),
        Verdict::Passed,
    );
    expect(
        script(
            "import os\nprint(os.listdir(os.environ['TMPDIR']))",
            "",
            "[]",
        ),
        Verdict::Passed,
    );
    assert!(canary.exists());
}

#[test]
fn processes() {
    let mut near = bystander();
    let pid = near.0.id();
    let parent = std::process::id();
    for attempt in [
        format!("os.kill({pid}, 9)"),
        format!("os.kill({parent}, 0)"),
        "os.kill(-1, 9)\nimport time; time.sleep(0.1)".into(),
        format!("call(434, {pid}, 0)"),       // pidfd_open
        format!("call(101, 16, {pid}, 0, 0)"), // ptrace attach
        format!("call(310, {pid}, 0, 0, 0, 0, 0)"), // process_vm_readv
        format!("resource.prlimit({pid}, resource.RLIMIT_NOFILE, (1, 1))"),
        format!("os.setpriority(os.PRIO_PROCESS, {pid}, 19)"),
        format!("os.sched_setaffinity({pid}, [0])"),
        "os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))".into(),
        "os.setsid()".into(),
        "os.setpgid(0, 0)".into(),
        format!("r, w = os.pipe()\nfcntl.fcntl(r, 8, {pid})"), // F_SETOWN
        "resource.setrlimit(resource.RLIMIT_NOFILE, (1 << 20, 1 << 20))".into(),
        "resource.setrlimit(resource.RLIMIT_CORE, (1 << 20, 1 << 20))".into(),
        "os.nice(-5)".into(),
        "fcntl.ioctl(0, 0x5412, b'x')".into(), // TIOCSTI
        "if not [fd for fd in range(7, 512) if not libc.fcntl(fd, 1) < 0]: raise OSError('none open')".into(),
        "if not [k for k in os.environ if k not in ('PATH', 'HOME', 'TMPDIR', 'LANG')]: raise OSError('nothing')".into(),
    ] {
        blocked(&attempt);
    }
    assert!(
        near.0.try_wait().expect("bystander").is_none(),
        "the bystander is gone"
    );
}

#[test]
fn network_and_ipc() {
    let tcp = TcpListener::bind("127.0.0.1:0").expect("tcp");
    let udp = UdpSocket::bind("127.0.0.1:0").expect("udp");
    let folder = tempfile::tempdir().expect("folder");
    let path = folder.path().join("socket");
    let unix = UnixListener::bind(&path).expect("unix");
    tcp.set_nonblocking(true).expect("tcp");
    udp.set_nonblocking(true).expect("udp");
    unix.set_nonblocking(true).expect("unix");
    let tcp_port = tcp.local_addr().expect("tcp").port();
    let udp_port = udp.local_addr().expect("udp").port();
    for attempt in [
        format!("socket.create_connection(('127.0.0.1', {tcp_port}), 1)"),
        format!("socket.socket(2, 1, 262).connect(('127.0.0.1', {tcp_port}))"), // MPTCP
        format!("socket.socket(2, 1).sendto(b'x', 0x20000000, ('127.0.0.1', {tcp_port}))"), // fast open
        format!("socket.socket(2, 2).sendto(b'x', ('127.0.0.1', {udp_port}))"),
        "socket.socket(2, 1).listen()".into(),
        "socket.socket(2, 3, 1)".into(),
        "socket.socket(17, 3)".into(),
        "socket.socket(16, 3)".into(),
        "socket.socket(40, 1)".into(),
        "socket.getaddrinfo('example.com', 80)".into(),
        format!("socket.socket(1, 1).connect({path:?})"),
        "socket.socket(1, 1).bind('\\0dust-test')".into(),
        "socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)".into(),
        "call(29, 0, 4096, 0o1600)".into(),           // shmget
        "call(64, 0, 1, 0o1600)".into(),              // semget
        "call(68, 0, 0o1600)".into(),                 // msgget
        "call(240, b'dust', 0o102, 0o600, 0)".into(), // mq_open
        "call(250, 0, -3, 1)".into(),                 // keyctl
    ] {
        blocked(&attempt);
    }
    assert_eq!(
        tcp.accept().expect_err("a connection").kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        udp.recv(&mut [0; 8]).expect_err("a datagram").kind(),
        ErrorKind::WouldBlock
    );
    assert_eq!(
        unix.accept().expect_err("a connection").kind(),
        ErrorKind::WouldBlock
    );
}

#[cfg(target_arch = "x86_64")]
#[test]
fn kernel_surface() {
    for attempt in [
        "call(425, 8, ctypes.create_string_buffer(256))", // io_uring_setup
        "call(272, 0x10000000)",                          // unshare user
        "call(56, 0x10000011, 0, 0, 0, 0)",               // clone new user
        "call(435, ctypes.create_string_buffer(struct.pack('=11Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0, 0, 0, 0)), 88)",
        "call(165, b'none', b'/box/tmp', b'tmpfs', 0, 0)", // mount
        "call(161, b'/box/tmp')",                          // chroot
        "call(105, 0)",                                    // setuid
        "call(126, ctypes.create_string_buffer(struct.pack('=Ii', 0x20080522, 0)), b'\\xff' * 24)",
        "call(321, 0, ctypes.create_string_buffer(128), 128)", // bpf
        "call(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)", // perf_event_open
        "call(323, 0)",                                        // userfaultfd
        "call(319, b'x', 0)",                                  // memfd_create
        "call(322, 3, b'', 0, 0, 0x1000)",                     // execveat
        "call(0x40000000 + 39)",                               // getpid by way of x32
        "call(175, 0, 0, b'')",                                // init_module
        "call(135, 0x0400000)",                                // personality
        "call(157, 4, 1)",                                     // prctl dumpable
        "call(157, 1, 0)",                                     // prctl pdeathsig
        "open('x', 'w').write('#!/bin/sh\\necho')\nos.chmod('x', 0o755)\nos.execv('./x', ['x'])",
    ] {
        blocked(attempt);
    }
    // int 0x80: the 32-bit door. mov eax, 20 (getpid); int 0x80; ret
    let machine = "m = mmap.mmap(-1, 4096, prot=7)\nm.write(b'\\xb8\\x14\\0\\0\\0\\xcd\\x80\\xc3')\n\
                   ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()";
    let outcome = script(&format!("{TOOLS}\n{machine}\nprint('SUCCEEDED')"), "", "x");
    assert_eq!(outcome.verdict, Verdict::Denied, "{outcome:#?}");
}

#[test]
fn honest_programs_pass() {
    for (source, input, output) in [
        (
            "import threading\nr = []\nt = [threading.Thread(target=r.append, args=(i,)) for i in range(8)]\n[x.start() for x in t]\n[x.join() for x in t]\nprint(len(r))",
            "",
            "8",
        ),
        (
            "import tempfile\nwith tempfile.TemporaryFile() as f:\n  f.write(b'ok')\n  f.seek(0)\n  print(f.read().decode())\nwith tempfile.TemporaryDirectory() as d:\n  open(d + '/x', 'w').close()",
            "",
            "ok",
        ),
        (
            "import os\nif os.fork() == 0: os._exit(3)\nprint(os.waitstatus_to_exitcode(os.wait()[1]))",
            "",
            "3",
        ),
        (
            "from decimal import *\nprint(Decimal(1) / 7)",
            "",
            "0.1428571428571428571428571429",
        ),
        (
            "print('first', flush=True)\nprint(input())",
            "second",
            "first\nsecond",
        ),
        (
            "import sys\nprint('noise ' * 1000000, file=sys.stderr)\nprint(1)",
            "",
            "1",
        ),
        ("print(1)", "never read\n", "1"),
        (
            "import sys\nprint(sum(map(int, sys.stdin)))",
            "1\n2\n3\n",
            "6",
        ),
        ("import os\nprint(os.read(0, 5).decode())", "hello", "hello"),
        ("import sys\nsys.stdout.buffer.write(b'raw\\n')", "", "raw"),
        ("print(open(0).read())", "text", "text"),
        (
            "global x\nx = 1\nexec('y = 2')\nprint(x + y)\nquit()",
            "",
            "3",
        ),
        (
            "def main():\n  print(1)\nif __name__ == '__main__':\n  main()",
            "",
            "1",
        ),
        (
            "import sys\nsys.setrecursionlimit(10**6)\nimport threading\nthreading.stack_size(1 << 26)\ndef f(n): return n and 1 + f(n - 1)\nt = threading.Thread(target=lambda: print(f(20000)))\nt.start()\nt.join()",
            "",
            "20000",
        ),
        (
            "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (1 << 26, resource.RLIM_INFINITY))\nprint(1)",
            "",
            "1",
        ),
        (
            "import subprocess\nprint(subprocess.run(['/bin/echo', 'hi'], capture_output=True, text=True).stdout)",
            "",
            "hi",
        ),
        (
            "import asyncio\nasync def f():\n  await asyncio.sleep(0.01)\n  return 4\nprint(asyncio.run(f()))",
            "",
            "4",
        ),
        (
            "from multiprocessing import Pool\nif __name__ == '__main__':\n  print(len({1, 2}))",
            "",
            "2",
        ),
        (
            "import atexit\natexit.register(print, 'last')\nprint('first')",
            "",
            "first\nlast",
        ),
        ("print(0.1 + 0.2)", "", "0.30000000000000004"),
    ] {
        expect(script(source, input, output), Verdict::Passed);
    }
    let lines = "1\n".repeat(500_000);
    expect(
        script(
            "import sys\nsys.stdout.write(sys.stdin.read())",
            &lines,
            &lines,
        ),
        Verdict::Passed,
    );
}
