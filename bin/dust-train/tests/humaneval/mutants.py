"""Mutants of HumanEval's canonical solutions, and whether each passes when Python runs it directly.

In: {"id", "program", "test", "entry_point"}, one a line, the program being prompt + solution. Out:
{"id", "operator", "program", "passes"}, one for each operator that finds a place in the program. The
direct run is HumanEval's own rule: program, test and check(entry_point) in one namespace, with a
limit on CPU time and memory. The test comes first, as it begins with the bare prompt.
"""

import ast
import json
import os
import resource
import sys

CPU_S = 2
MEMORY = 512 << 20

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}
ARITHMETIC = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitXor: ast.BitAnd,
}


def comparison(node):
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        return lambda: node.ops.__setitem__(0, COMPARISONS[type(node.ops[0])]())


def constant(node):
    if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        new = not node.value if type(node.value) is bool else node.value + 1
        return lambda: setattr(node, "value", new)


def arithmetic(node):
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in ARITHMETIC:
        return lambda: setattr(node, "op", ARITHMETIC[type(node.op)]())


def mutate(program, entry_point, operator):
    """The program with `operator` applied at the last place in the function under test."""
    tree = ast.parse(program)
    function = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == entry_point][-1]
    changes = [change for node in ast.walk(function) if (change := operator(node))]
    if not changes:
        return None
    changes[-1]()
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


def passes(program, test, entry_point):
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            namespace = {}
            exec(f"{test}\n{program}\ncheck({entry_point})", namespace)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def main():
    for line in sys.stdin:
        row = json.loads(line)
        for operator in (comparison, constant, arithmetic):
            program = mutate(row["program"], row["entry_point"], operator)
            if program is not None:
                verdict = passes(program, row["test"], row["entry_point"])
                out = {"id": row["id"], "operator": operator.__name__, "program": program, "passes": verdict}
                print(json.dumps(out))


main()
