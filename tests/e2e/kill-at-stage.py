"""kill-at-stage.py STAGE TRACE PROGRAM: waits until a VMM's trace has the stage, kills every process of that name at once, and prints the trace's
last stage at that moment, after a line `ready` at its own start. Exit code 1: no process of that name, 2: the stage never came."""

import json
import os
import signal
import sys
import time

stage, trace, program = sys.argv[1:]


def last():
    try:
        with open(trace, encoding="utf-8") as lines:
            stages = [json.loads(line).get("stage") for line in lines if line.endswith("\n")]
    except FileNotFoundError:
        return []
    return [s for s in stages if s]


def processes():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/comm", encoding="utf-8") as name:
                if name.read().strip() == program:
                    yield int(pid)
        except OSError:
            pass


# Before everybody else, or the stage would be over when this runs.
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
print("ready", flush=True)
end = time.monotonic() + 60
while stage not in (seen := last()):
    if time.monotonic() > end:
        sys.exit(2)
    time.sleep(0.001)
killed = list(processes())
for pid in killed:
    os.kill(pid, signal.SIGKILL)
print(seen[-1])
sys.exit(0 if killed else 1)
