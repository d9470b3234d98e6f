#!/usr/bin/env python3
"""terminal.py [--size ROWSxCOLUMNS] [--expect TEXT (--send TEXT | --resize ROWSxCOLUMNS)]... -- COMMAND...

Runs a command on a terminal of its own. For each step waits until TEXT was printed, then types or resizes. What the
command printed goes to stdout, its exit code is this program's; 124 when a step's text does not come within 60 s."""
import fcntl, os, pty, select, signal, struct, sys, termios, time


def size(text):
    rows, columns = text.split("x")
    return struct.pack("HHHH", int(rows), int(columns), 0, 0)


def main():
    words, steps, first = sys.argv[1:], [], size("24x80")
    while words[0] != "--":
        flag, value, words = words[0], words[1], words[2:]
        if flag == "--size":
            first = size(value)
        elif flag == "--expect":
            steps.append([value.encode(), None, None])
        else:
            steps[-1][1:] = [flag, value]
    pid, master = pty.fork()
    if pid == 0:
        fcntl.ioctl(0, termios.TIOCSWINSZ, first)
        os.execvp(words[1], words[1:])
    seen, limit = b"", time.monotonic() + 60
    while True:
        if steps and steps[0][0] in seen:
            _, flag, value = steps.pop(0)
            seen, limit = seen[seen.rindex(_) + len(_):], time.monotonic() + 60
            if flag == "--send":
                os.write(master, value.encode().decode("unicode_escape").encode())
            elif flag == "--resize":
                fcntl.ioctl(master, termios.TIOCSWINSZ, size(value))
        if steps and time.monotonic() > limit:
            print(f"terminal: {steps[0][0]!r} did not come", file=sys.stderr)
            os.kill(pid, signal.SIGKILL)
            sys.exit(124)
        if not select.select([master], [], [], 0.2)[0]:
            continue
        try:
            data = os.read(master, 65536)
        except OSError:  # the last process has closed it
            data = b""
        if not data:
            break
        seen += data
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 255)


main()
