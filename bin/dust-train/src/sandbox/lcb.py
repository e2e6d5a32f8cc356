# LiveCodeBench's evaluator, as `lcb-strict` reproduces it: one process for all tests of a program, in
# their order, stopping at the first failure. zygote.py, which comes after this, has the helpers that
# it calls. Everything here that looks odd is what upstream's verdicts depend on, and is named in
# docs/benchmarks.md. One thing is different: nothing is compared here, the parent has the expected
# values.

LCB_MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json"
).split()
LCB_PRELUDE = (
    "".join(f"from {name} import *\n" for name in [*LCB_MODULES, "builtins", "typing"])
    + "".join(f"import {name}\n" for name in LCB_MODULES)
    + "sys.setrecursionlimit(50000)\n"
)
LCB_NOT_IN_OS = (
    "kill system putenv remove removedirs rmdir fchdir setuid fork forkpty killpg rename renames "
    "truncate replace unlink fchmod fchown chmod chown chroot lchflags lchmod lchown getcwd chdir"
).split()


def lcb_guard():
    """What the evaluator takes away before it loads a program."""
    import shutil
    import subprocess

    builtins.quit = builtins.help = None
    for name in LCB_NOT_IN_OS:
        setattr(os, name, None)
    shutil.rmtree = shutil.move = shutil.chown = None
    subprocess.Popen = None
    for name in ("ipdb", "joblib", "resource", "psutil", "tkinter"):
        sys.modules[name] = None


def lcb_without_main_guard(source):
    """A last `if __name__ == '__main__':` gives way to its body."""
    try:
        body = ast.parse(source).body
        guard = body[-1]
        if isinstance(guard, ast.If) and ast.unparse(guard.test) == "__name__ == '__main__'":
            return ast.unparse(body[:-1]) + "\n" + ast.unparse(guard.body)
    except Exception:
        pass
    return source


def lcb_as_function(source):
    """The imports at the top, everything else inside of a function."""
    try:
        body = ast.parse(source).body
        imports = [s for s in body if isinstance(s, (ast.Import, ast.ImportFrom))]
        others = [s for s in body if not isinstance(s, (ast.Import, ast.ImportFrom))]
        nothing = ast.parse("def f(): pass").body[0].args
        function = ast.FunctionDef("wrapped_function", nothing, others, [], lineno=1)
        return "\n".join([LCB_PRELUDE, ast.unparse(imports), ast.unparse(function)])
    except Exception:
        return source


def lcb_load(source, name):
    module = types.ModuleType("tmp_sol", "")
    exec(source, module.__dict__)
    return getattr(module.Solution() if "class Solution" in source else module, name)


class LcbBuffer:
    """sys.stdin.buffer: the first line again and again, or everything."""

    def __init__(self, text):
        self.content = text.encode()

    def read(self, *_):
        return self.content

    def readline(self, *_):
        return self.content.split(b"\n")[0] + b"\n"


class LcbStdin:
    """sys.stdin: cannot be iterated over, reads everything every time, cuts lines without their end."""

    def __init__(self, text):
        self.text, self.by_line, self.buffer = text, io.StringIO(text), LcbBuffer(text)

    def read(self, *_):
        return self.text

    def readline(self, *limit):
        return self.by_line.readline(*limit)

    def readlines(self, *_):
        return self.text.split("\n")

    def __getattr__(self, name):
        return getattr(self.by_line, name)


def lcb_printed(program, text):
    stdin, stdout = sys.stdin, sys.stdout
    printed = io.StringIO()
    printed.close = lambda stream: None  # not a method: sys.stdout.close() raises
    # The real stdin, which an import at the top has got hold of, is given the text, too: as lines
    # without their ends, and StopIteration after the last.
    lines = iter(text.split("\n"))
    stdin.read = lambda *_: text
    stdin.readline = lambda *_: next(lines)
    stdin.readlines = lambda *_: text.split("\n")
    sys.stdin, sys.stdout = LcbStdin(text), printed
    try:
        program()
    except SystemExit:
        pass
    finally:
        sys.stdin, sys.stdout = stdin, stdout
    return printed.getvalue()


def lcb_answer(prepare):
    """Answers every test, until one raises. What is no Exception ends the process without a word."""
    global ast
    import ast

    code = 1
    try:
        source, inputs = read_all(SOURCE), json.loads(read_all(EXTRA))
        lcb_guard()
        attempt = prepare(source)
        for given in inputs:
            write_frame(RESULT, {"v": plain(attempt(given))})
        code = 0
    except Exception as error:
        write_frame(RESULT, {"e": describe(error)})
        show(error)
    except BaseException as error:
        show(error)
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        pass
    os._exit(code)


def lcb_script(job):
    def prepare(source):
        program = lcb_load(lcb_as_function(lcb_without_main_guard(source)), "wrapped_function")
        return lambda text: lcb_printed(program, text)

    lcb_answer(prepare)


def lcb_function(job):
    def prepare(source):
        method = lcb_load(LCB_PRELUDE + "\n\n" + source, job["entry_point"])
        return lambda arguments: method(*arguments)

    lcb_answer(prepare)


