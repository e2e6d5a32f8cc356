# The test of a HumanEval+ or MBPP+ problem, in the box that no program enters. PROBLEM is set above:
# {"reference", "entry_point", "atol", "base_input", "plus_input", "mbpp": number or None}. The
# expected value is what the reference solution returns; how it is compared is EvalPlus' rule.

import copy
import json
import math

# MBPP+ keeps its inputs as JSON, which has no tuples, sets and complex numbers. These problems take
# them, and each row says where: what to do with an argument, by position, the last for all the rest.
# `t` makes a tuple, `l` goes into a list, `d` into the values of a dictionary, `s` makes a set, `f` and
# `c` read a float and a complex number, `r` makes tuples all the way down, `-` does nothing.
ARGUMENTS = [
    ("t", "2 116 132 143 222 261 273 394 399 421 424 429 470 560 579 596 616 630 726 740 744 809"),
    ("lt", "63 64 70 94 120 237 272 299 400 409 417 438 473 614 780"),
    ("lt -", "75 413 444 753"),
    ("- t", "106 750"),
    ("ls", "115"),
    ("f c", "124"),
    ("t -", "250 307 405 446 617 720 763 808"),
    ("tlt", "259 278 401 445"),
    ("dt -", "722"),
    ("c", "252"),
    ("r", "580 615 791"),
]
# Of these only whether something came back counts; EvalPlus cannot store the match objects either.
IS_SOMETHING = ("check_str", "text_match_three", "text_starta_endb")
# The order and the number of equal items do not count for these.
AS_SETS = (
    "similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly", "larg_nnum",
    "intersection_array", "find_dissimilar", "Diff",
)


def shaped(value, shape):
    if shape in ("", "-"):
        return value
    head, rest = shape[0], shape[1:]
    if head == "t":
        return tuple(shaped(list(value), rest)) if isinstance(value, list) else value
    if head == "l":
        return [shaped(item, rest) for item in value]
    if head == "d":
        return {key: shaped(item, rest) for key, item in value.items()}
    if head == "s":
        return set(value) if isinstance(value, list) and value else {}
    if head == "f":
        return float(value)
    if head == "c":
        return complex(value)
    return tuple(shaped(item, shape) for item in value) if isinstance(value, list) else value


def arguments(given):
    for shapes, numbers in ARGUMENTS:
        if str(PROBLEM["mbpp"]) in numbers.split():
            shapes = shapes.split()
            return [shaped(v, shapes[min(i, len(shapes) - 1)]) for i, v in enumerate(given)]
    return given


def is_float(value):
    if isinstance(value, (list, tuple)) and value:
        return all(isinstance(item, float) for item in value)
    return isinstance(value, float)


def close(out, expected, atol):
    """numpy.allclose with a relative tolerance of 1e-7."""
    if isinstance(expected, (list, tuple)):
        return len(out) == len(expected) and all(close(o, e, atol) for o, e in zip(out, expected))
    if not isinstance(out, (bool, int, float, complex)):
        raise TypeError("not a number")
    return out == expected or abs(out - expected) <= atol + 1e-7 * abs(expected)


def called(function, given, name):
    try:
        out = function(*given)
    except Exception as error:
        # What cannot be sent from the program's process is at least something.
        if name not in IS_SOMETHING or not str(error).startswith("NotPlainData"):
            raise
        out = True
    return out if name not in IS_SOMETHING or isinstance(out, bool) else out is not None


def surface_area(base, height):
    return round(base**2 + 2 * base * math.sqrt((base / 2) ** 2 + height**2))


def digit_distance(one, other):
    width = max(len(str(one)), len(str(other)))
    pairs = zip(str(one).zfill(width), str(other).zfill(width))
    return sum(abs(int(a) - int(b)) for a, b in pairs)


def right(out, expected, given, name):
    """Whether it is equal, by the problem's own idea of it."""
    if PROBLEM["mbpp"] is not None:
        if name == "are_equivalent":
            return True
        if name == "sum_div" and out == 0:
            return True
        if name == "surface_Area" and abs(out - surface_area(*given)) <= PROBLEM["atol"]:
            return True
        if name == "digit_distance_nums" and out == digit_distance(*given):
            return True
        if name in AS_SETS:
            return set(out) == set(expected)
    return out == expected


def check(candidate):
    name, namespace = PROBLEM["entry_point"], {}
    exec(PROBLEM["reference"], namespace)
    reference = namespace[name]
    for given in PROBLEM["base_input"] + PROBLEM["plus_input"]:
        given = arguments(given)
        out = called(candidate, given, name)
        if name == "find_zero" and PROBLEM["mbpp"] is None:
            value = sum(c * math.pow(out, i) for i, c in enumerate(given[0]))
            assert abs(value) <= PROBLEM["atol"]
            continue
        expected = called(reference, copy.deepcopy(given), name)
        if right(out, expected, given, name):
            continue
        atol = PROBLEM["atol"] or (1e-6 if is_float(expected) else 0)
        assert atol and type(out) == type(expected) and close(out, expected, atol), given
