#!/usr/bin/env python3
"""What of a pod under a TEE its host can see.

plaintext.py wire FILE              records every frame on this host's interfaces into FILE until it is killed
plaintext.py memory WORD... -- PID...   a line for each WORD: how often it stands in the guest's private memory, which only the emulated machine
                                    lets anybody read, and how often anywhere else in these processes: shared memory, buffers, stacks
plaintext.py file WORD FILE         says how often WORD stands in FILE
"""
import socket
import sys

PIECE = 1 << 20
ETH_P_ALL = 3


def wire(path):
    heard = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    with open(path, "wb", buffering=0) as out:
        print("listening", flush=True)
        while True:
            out.write(heard.recv(1 << 16))


def count(words, pieces):
    """Of each word in a stream of pieces, also across their borders."""
    found, kept = [0] * len(words), [b""] * len(words)
    for piece in pieces:
        for i, word in enumerate(words):
            # What is kept is too short for the word by itself.
            found[i] += piece.count(word) + (kept[i] + piece[:len(word) - 1]).count(word)
            kept[i] = (kept[i] + piece[1 - len(word):])[1 - len(word):]
    return found


def mappings(pid):
    """(start, end, rights, name) of each."""
    for line in open(f"/proc/{pid}/maps"):
        fields = line.split(maxsplit=5)
        start, end = (int(n, 16) for n in fields[0].split("-"))
        yield start, end, fields[1], fields[5].strip() if len(fields) > 5 else ""


def private_range(pid):
    """Where the emulated machine keeps the guest's private memory: its first MiB is a file of that name, the rest follows it."""
    words = open(f"/proc/{pid}/cmdline", "rb").read().split(b"\0")
    if b"--memory-mib" not in words:
        return 0, 0
    size = int(words[words.index(b"--memory-mib") + 1]) << 20
    # Pages that are lent are mapped into the shared range too, one by one: the whole is longer than any of them.
    named = [m for m in mappings(pid) if "coffer-private" in m[3]]
    spans = {}
    for start, end, _, _ in named:
        joined = next((s for s, e in spans.items() if e == start), start)
        spans[joined] = end
    start = max(spans, key=lambda s: spans[s] - s)
    return start, start + size


def memory(words, pids):
    private, elsewhere = [0] * len(words), [0] * len(words)
    for pid in pids:
        first, last = private_range(pid)
        held = open(f"/proc/{pid}/mem", "rb", buffering=0)

        def pieces(at, end):
            while at < end:
                try:
                    held.seek(at)
                    piece = held.read(min(PIECE, end - at))
                except (OSError, ValueError, OverflowError):
                    return  # The kernel's own pages.
                if not piece:
                    return
                yield piece
                at += len(piece)

        for start, end, _, _ in mappings(pid):
            sums = private if first <= start < last else elsewhere
            for i, found in enumerate(count(words, pieces(start, end))):
                sums[i] += found
    for inside, outside in zip(private, elsewhere):
        print(f"private {inside} elsewhere {outside}")


if sys.argv[1] == "wire":
    wire(sys.argv[2])
elif sys.argv[1] == "memory":
    border = sys.argv.index("--")
    memory([word.encode() for word in sys.argv[2:border]], [int(pid) for pid in sys.argv[border + 1:]])
else:
    with open(sys.argv[3], "rb") as data:
        print(*count([sys.argv[2].encode()], iter(lambda: data.read(PIECE), b"")))
