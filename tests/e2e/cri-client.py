#!/usr/bin/python3
"""cri-client.py SOCKET HANDLER IMAGE [CGROUP]: what a kubelet does with a pod of two containers, over the CRI (runtime.v1).

Prints one `name: value` for each thing that it was told. Debian has no crictl, and the interface's definition only with its Go sources: the
numbers below are those of its messages' fields."""
import sys
import time

import grpc

socket, handler, image = sys.argv[1:4]
channel = grpc.insecure_channel("unix://" + socket)


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out + bytes([number]))


def message(fields):
    """Protocol buffers: {number: value or list}, a dict is a message."""
    out = b""
    for number, values in fields.items():
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, int):
                out += varint(number << 3) + varint(value)
                continue
            value = message(value) if isinstance(value, dict) else value.encode()
            out += varint(number << 3 | 2) + varint(len(value)) + value
    return out


def fields(data):
    """{number: last value}; messages and text are bytes."""
    at, out = 0, {}

    def number():
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value, shift = value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = number()
        if key & 7 == 0:
            out[key >> 3] = number()
        else:
            size = number()
            out[key >> 3], at = data[at:at + size], at + size
    return out


def call(method, request):
    send = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}", message, fields)
    return send(request, timeout=180, wait_for_ready=True)


def say(name, value):
    print(f"{name}: {value}", flush=True)


# LinuxPodSandboxConfig's resources: those of all containers together, as a kubelet sums them up.
limits = {1: 100000, 2: 150000, 3: 2, 4: 236 << 20}
pod = {1: {1: "pod", 2: "uid", 3: "default"}, 2: "pods-name", 3: "/run/cri-logs", 7: {1: "io.coffer.vcpus-max", 2: "3"}, 8: {5: limits}}
if sys.argv[4:]:
    pod[8][1] = sys.argv[4]
sandbox = call("RunPodSandbox", {1: pod, 2: handler})[1].decode()


def container(name, *command, **own):
    # A kubelet says these two of every container: no huge pages (hugepage_limits), no swap (unified).
    none = {8: {1: "2MB"}, 9: {1: "memory.swap.max", 2: "0"}}
    config = {1: {1: name}, 2: {1: image}, 3: list(command), 11: name + ".log", 15: {1: {4: 64 << 20} | none | own.get("limits", {})}}
    identifier = call("CreateContainer", {1: sandbox, 2: config, 3: pod})[1].decode()
    call("StartContainer", {1: identifier})
    return identifier


def run(identifier, *command):
    gave = call("ExecSync", {1: identifier, 2: list(command), 3: 60})
    return gave.get(1, b"").decode().strip(), gave.get(3, 0)


def exit_code(identifier):
    while True:
        status = fields(call("ContainerStatus", {1: identifier})[1])
        if status.get(3, 0) == 2:  # CONTAINER_EXITED
            return status.get(7, 0)
        time.sleep(0.2)


stays = container("stays", "sh", "-c", "trap 'exit 5' TERM; echo begun; while :; do sleep 0.1; done")
say("processors", run(stays, "nproc")[0])
ends = container("ends", "sh", "-c", "cat /proc/sys/kernel/random/boot_id; nproc; exit 42", limits={1: 100000, 2: 250000})
say("exit code", exit_code(ends))
say("exec", run(stays, "sh", "-c", "echo hi; exit 7"))
say("boot id", run(stays, "cat", "/proc/sys/kernel/random/boot_id")[0])
say("address", run(stays, "sh", "-c", "ip -4 -o addr show eth0 | awk '{ print $4 }'")[0])
say("name", run(stays, "hostname")[0])
say("MiB", run(stays, "sh", "-c", "awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo")[0])
call("StopContainer", {1: stays, 2: 30})
say("stopped", exit_code(stays))
if sys.argv[4:]:
    say("scope", f"cri-containerd-{sandbox}.scope")
for identifier in stays, ends:
    call("RemoveContainer", {1: identifier})
call("StopPodSandbox", {1: sandbox})
call("RemovePodSandbox", {1: sandbox})
