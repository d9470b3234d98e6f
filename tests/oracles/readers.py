"""Compares our reader of YAML with PyYAML, in Python and by libyaml, from which Go's reader was made, and so kubectl's.

Usage: readers.py PROGRAM FILE...: FILEs, and documents that PyYAML writes of random values, have to be read as PyYAML reads
them. Whatever is read of either with random changes, PyYAML has to read, to the same.
"""

import collections
import json
import random
import subprocess
import sys

import yaml

program, files = sys.argv[1], sys.argv[2:]
seed = random.randrange(2**32)
dice = random.Random(seed)
print(f"seed {seed}")
READERS = [yaml.SafeLoader, yaml.CSafeLoader]


class Block(str):
    """Text to be written below its key."""


class Writer(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


class Indented(Writer):
    """Lists right of their keys."""

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)


yaml.SafeDumper.add_representer(
    Block, lambda writer, text: writer.represent_scalar("tag:yaml.org,2002:str", str(text), style=dice.choice("|>"))
)
WORDS = "yes no on 017 0x1f 12:30 1e3 null ~ true 1.50 -1 <<  = 2024-01-01 a b: c#d e #f - ? : -x 'it' \"q\" \\n é 😀 |2 > & * ! % @ ` { [ , ] }".split(" ")
LETTERS = "abc :#-'\"\\\n\t{}[],&*!|>%@`é\u2028\u0085\u00a0😀\0\x7f~"


def word(most):
    return "".join(dice.choice([dice.choice(LETTERS), dice.choice("abcdefgh")]) for _ in range(dice.randrange(most)))


def text():
    kind = dice.randrange(5)
    if kind == 0:
        return dice.choice(WORDS)
    if kind == 1:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randrange(40)))
    if kind == 2:
        return Block("".join(dice.choice([word(10), "\n", "  ", "\n\n", "a b"]) for _ in range(dice.randrange(12))))
    return word(30)


def value(depth):
    kind = dice.randrange(8 if depth else 4)
    if kind <= 1:
        return text()
    if kind == 2:
        return dice.choice([None, True, False, 0, 1.5, -0.25])
    if kind == 3:
        return dice.randrange(-(2**63), 2**63)
    if kind <= 5:
        return [value(depth - 1) for _ in range(dice.randrange(4))]
    return {dice.choice([dice.choice(WORDS), word(12).replace("\n", "")]): value(depth - 1) for _ in range(dice.randrange(5))}


def written():
    """Documents in the forms that PyYAML has: block with any width and indentation, or flow on one line."""
    documents = [{"k": value(4)} for _ in range(dice.choice([1, 1, 2]))]
    style = dice.choice([False, False, False, True, None])
    options = {
        "Dumper": dice.choice([Writer, Indented]),
        "default_flow_style": style,
        "width": dice.choice([8, 20, 80, 10**6]) if style is False else 10**6,
        "indent": dice.choice([2, 4, 7]),
        "allow_unicode": dice.choice([True, False]),
        "explicit_start": dice.choice([True, False]),
        "line_break": dice.choice(["\n", "\r\n"]),
        "sort_keys": False,
    }
    return yaml.dump_all(documents, **options)


def changed(source):
    """A text with a few letters or lines elsewhere."""
    for _ in range(dice.randrange(1, 4)):
        at, to = dice.randrange(len(source) + 1), dice.randrange(len(source) + 1)
        kind = dice.randrange(6)
        if kind == 0:
            source = source[:at] + source[at + dice.randrange(1, 4) :]
        elif kind <= 2:
            piece = dice.choice([" ", "  ", "\n", ": ", "- ", " #", "'", '"', "|", ">", "{", "}", "[", "]", ",", "\n  ", "a", "1", "e", ".", "0", "yes", "---\n", "\\"])
            source = source[:at] + piece + source[at:]
        elif kind == 3:
            source = source[:at] + source[min(at, to) : max(at, to)][:20] + source[at:]
        elif source:
            lines = source.split("\n")
            line = dice.randrange(len(lines))
            if kind == 4:
                lines[line] = " " * dice.randrange(5) + lines[line].lstrip(" ")
            else:
                lines[line], lines[line - 1] = lines[line - 1], lines[line]
            source = "\n".join(lines)
    return source


def ask(texts):
    lines = "".join(json.dumps(text) + "\n" for text in texts).encode()
    answer = subprocess.run([program], input=lines, stdout=subprocess.PIPE, check=True).stdout.decode()
    answers = [json.loads(line) for line in answer.removesuffix("\n").split("\n")]
    assert len(answers) == len(texts)
    return answers


def theirs(reader, source):
    try:
        return [document for document in yaml.load_all(source, reader) if document is not None]
    except (yaml.YAMLError, ValueError) as error:
        return str(error)


def same(one, other):
    """Equal, and of the same types: True is 1 to Python."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True) and one == other


def agree(source, answer):
    if "refused" in answer:
        return
    for reader in READERS:
        read = theirs(reader, source)
        if isinstance(read, str) or not same(read, answer["documents"]):
            sys.exit(f"{source!r}\nours:   {answer['documents']!r}\n{reader.__name__}: {read!r}")


real = [open(name, encoding="utf-8").read() for name in files]
for name, source, answer in zip(files, real, ask(real)):
    assert "refused" not in answer, f"{name}: {answer['refused']}"
    assert answer["documents"], name
    agree(source, answer)
print(f"files: {len(files)} as PyYAML reads them")

made = [written() for _ in range(1500)]
reasons = collections.Counter()
for source, answer in zip(made, ask(made)):
    if "refused" in answer:
        reasons[answer["refused"].split(": ", 2)[2]] += 1
        # 1e3 is text to PyYAML; the rest it writes raw, or as complex keys.
        if "to some readers" not in answer["refused"] and not any(mark in source for mark in ("? ", "\t", "\u2028", "\u0085")):
            sys.exit(f"{source!r}\nwritten by PyYAML: {answer['refused']}")
    agree(source, answer)
refused = sum(reasons.values())
assert refused < len(made) / 4, reasons.most_common(5)
print(f"written by PyYAML: {len(made) - refused} of {len(made)} read, as PyYAML reads them; the others have what is not read")

pool = real + made
hostile = [changed(dice.choice(pool)) for _ in range(6000)]
answers = ask(hostile)
for source, answer in zip(hostile, answers):
    agree(source, answer)
read = sum("documents" in answer for answer in answers)
assert read > 500, read
print(f"changed: {read} of {len(hostile)} read, and by PyYAML to the same")
