#!/usr/bin/env python3
"""kvferry beside the machine's limit and beside NIXL: same shapes, same machine, in turn, round by round.

usage: side_by_side.py --kvferry PROGRAM [--host-limit PROGRAM] [--libfabric-limit PROGRAM] [--nixl 'PYTHON SCRIPT'] [--rounds N] [--paths LIST]

PROGRAM of --kvferry is the release build of the command; that of --host-limit copies blocks without a transport and prints lines
`tcp sg n=.. bb=.. X GB/s` and `shm copy n=.. bb=.. X GB/s`; the script of --nixl takes READ|WRITE UCX LAYERS BLOCKS BLOCK_BYTES ITERS
and prints a JSON object. What is left out is skipped. In every round each program runs once for each shape; tables hold the medians
of the rounds, and ratios of one round's figures: their median, least and greatest. Run it on an otherwise idle machine.

Processor time is that of both ends while an iteration lasts; waiting by polling counts. NIXL's script does not tell its own: its clock, which it
reads before and behind each transfer, reads the processor clocks of both its processes, too.

The limit of libfabric:lo is what libfabric alone writes, 1 MiB at a time, with the same library (KVFERRY_LIBFABRIC_LIBRARY, or the system's):
--libfabric-limit is libfabric_limit.c, compiled.

Paths are transports, with a device where one is meant: shm,tcp,ucx:memory,ucx:lo,libfabric:lo; nixl and nixl:tcp are kvferry as the initiator by NIXL's protocol, with
all of UCX's transports or only tcp, of a NIXL agent that the Python of --nixl runs. For ucx and nixl let KVFERRY_UCX_LIBRARY name the library that NIXL
brings, so that both use one; UCX_MODULES=^ib keeps both from loading RDMA libraries of which the system has others.
"""

import argparse
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys

SHAPES = [(32, 160, 4 << 10), (32, 160, 16 << 10), (32, 128, 64 << 10)]
OPS = ["pull", "push"]
# Whose limit and whose setting of NIXL is meant.
LIKE = {"shm": "shm", "tcp": "tcp", "ucx:memory": "shm", "ucx:lo": "tcp", "nixl": "shm", "nixl:tcp": "tcp", "libfabric:lo": "libfabric"}
# What the destination reads and what the source writes.
NIXL_OP = {"pull": "READ", "push": "WRITE"}
WRITE_LINE = re.compile(r"^libfabric write n=\d+ bb=\d+ ([0-9.]+) GB/s")
LIMIT_LINE = re.compile(r"^(tcp sg|shm copy) n=\d+ bb=\d+ ([0-9.]+) GB/s")

# Runs NIXL's script. It reads its clock three times an iteration: before it prepares a transfer, before it moves it, and behind that.
CLOCKS = """
import json, os, runpy, statistics, sys, time
clock, dumps, calls, began, spent = time.perf_counter, json.dumps, 0, 0, []
def processor():
    parent = os.getppid()
    with open(f"/proc/{parent}/task/{parent}/children") as children:
        return sum(time.clock_gettime(~int(child) << 3 | 2) for child in children.read().split())
def read():
    global calls, began
    calls += 1
    if calls % 3 == 2:
        began = processor()
    now = clock()
    if calls % 3 == 0:
        spent.append(processor() - began)
    return now
time.perf_counter = read
json.dumps = lambda report: dumps(dict(report, cpu_seconds=statistics.median(spent[1:])))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kvferry", required=True, metavar="PROGRAM")
    parser.add_argument("--host-limit", metavar="PROGRAM")
    parser.add_argument("--libfabric-limit", metavar="PROGRAM")
    parser.add_argument("--nixl", metavar="'PYTHON SCRIPT'")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--iters", type=int, default=7, help="iterations of kvferry and NIXL in one round")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="for one run of one program")
    parser.add_argument("--paths", default="shm,tcp", help=f"of {', '.join(LIKE)} [default: shm,tcp]")
    parser.add_argument("--mebibyte", action="store_true", help="pieces of 1 MiB, too")
    options = parser.parse_args()
    options.paths = options.paths.split(",")
    if unknown := [path for path in options.paths if path not in LIKE]:
        parser.error(f"--paths: no {unknown[0]}; there are {', '.join(LIKE)}")
    options.cases = [(path, op) for path in options.paths for op in OPS]
    options.shapes = SHAPES + ([(32, 8, 1 << 20)] if options.mebibyte else [])
    if any(path.startswith("nixl") for path in options.paths) and not options.nixl:
        parser.error("--paths nixl: --nixl must name its Python")
    if options.nixl and len(shlex.split(options.nixl)) < 2:
        parser.error("--nixl must name a Python and NIXL's script")
    if options.rounds < 1 or options.iters < 1:
        parser.error("--rounds and --iters must be at least 1")

    rounds = []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        rounds.append({shape: one_round(options, shape) for shape in options.shapes})
    print(machine())
    print()
    print(table(rounds, options))


def one_round(options, shape):
    """GB/s of every program, by (program, transport, op); kvferry's planning and processor time too."""
    layers, blocks, block_bytes = shape
    figures = {}
    if options.host_limit:
        for transport, rate in host_limit(options, 2 * layers * blocks, block_bytes).items():
            figures["limit", transport] = rate
    if options.libfabric_limit and "libfabric:lo" in options.paths:
        figures["limit", "libfabric"] = libfabric_limit(options, 2 * layers * blocks * block_bytes)
    for transport, op in options.cases:
        report = kvferry(options, transport, op, shape)
        figures["kvferry", transport, op] = report["gigabytes_per_second"]
        figures["plan", transport, op] = report["plan_microseconds"]
        figures["cpu", transport, op] = report["cpu_seconds"] / gibibytes(shape)
        if options.nixl and LIKE[transport] != "libfabric":
            rate, processor = nixl(options, transport, op, shape)
            figures["nixl", transport, op] = rate
            figures["nixl cpu", transport, op] = processor / gibibytes(shape)
    return figures


def gibibytes(shape):
    layers, blocks, block_bytes = shape
    return 2 * layers * blocks * block_bytes / 2**30


def kvferry(options, transport, op, shape):
    layers, blocks, block_bytes = map(str, shape)
    transport, _, device = transport.partition(":")
    command = [options.kvferry, "bench", "--transport", transport, "--op", op, "--layers", layers, "--blocks", blocks]
    if transport == "nixl":
        command += ["--nixl-python", shlex.split(options.nixl)[0]] + (["--tls", device] if device else [])
    elif device:
        command += ["--device", device]
    command += ["--block-bytes", block_bytes, "--iters", str(options.iters), "--json"]
    report = json.loads(run(command, options.timeout))
    if report["verified"] is not True:
        raise SystemExit(f"not verified: {shlex.join(command)}")
    return report


def nixl(options, transport, op, shape):
    """GB/s, and the processor seconds of an iteration."""
    *python, script = shlex.split(options.nixl)
    command = [*python, "-c", CLOCKS, script, NIXL_OP[op], "UCX", *map(str, shape), str(options.iters)]
    environment = dict(os.environ, NIXL_LOG_LEVEL="ERROR")
    environment.pop("UCX_TLS", None)
    if LIKE[transport] == "tcp":
        environment["UCX_TLS"] = "tcp"
    output = run(command, options.timeout, environment)
    lines = [line for line in output.splitlines() if line.startswith("{")]
    if not lines:
        raise SystemExit(f"no JSON object from {options.nixl} {shlex.join(command[-6:])}:\n{output}")
    report = json.loads(lines[-1])
    return report["gigabytes_per_second"], report["cpu_seconds"]


def host_limit(options, pieces, block_bytes):
    rates = {"shm": [], "tcp": []}
    for line in run([options.host_limit, str(pieces), str(block_bytes)], options.timeout).splitlines():
        if match := LIMIT_LINE.match(line):
            rates[match[1][:3]].append(float(match[2]))
    if not all(rates.values()):
        raise SystemExit(f"{options.host_limit} printed no figures")
    return {transport: statistics.median(values) for transport, values in rates.items()}


def libfabric_limit(options, size):
    library = os.environ.get("KVFERRY_LIBFABRIC_LIBRARY") or "libfabric.so.1"
    command = [options.libfabric_limit, library, "tcp", "127.0.0.1", str(size), str(1 << 20), str(options.iters)]
    rates = [float(match[1]) for line in run(command, options.timeout).splitlines() if (match := WRITE_LINE.match(line))]
    if not rates:
        raise SystemExit(f"{options.libfabric_limit} printed no figures")
    return statistics.median(rates)


def run(command, timeout, environment=None):
    """Its output. A program that runs too long is killed with everything that it started."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    try:
        output, _ = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, 9)
        process.wait()
        raise
    if process.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{output}")
    return output


def table(rounds, options):
    head = ["path", "op", "pieces", "kvferry GB/s", "limit GB/s", "kvferry / limit", "NIXL GB/s", "kvferry / NIXL"]
    head += ["plan µs", "CPU s / GiB", "NIXL's", "CPU µs / piece", "NIXL's"]
    rows = [head, ["---"] * len(head)]
    for transport, op in options.cases:
        for shape in options.shapes:
            figures = [each[shape] for each in rounds]
            own, limit, rival = ("kvferry", transport, op), ("limit", LIKE[transport]), ("nixl", transport, op)
            row = [transport, op, f"{2 * shape[0] * shape[1]:,} × {shape[2] >> 10} KiB", middle(figures, own)]
            row += [middle(figures, limit), ratio(figures, own, limit), middle(figures, rival), ratio(figures, own, rival)]
            row += [middle(figures, (figure, transport, op)) for figure in ("plan", "cpu", "nixl cpu")]
            each = 1e6 * gibibytes(shape) / (2 * shape[0] * shape[1])
            row += [middle(figures, (figure, transport, op), each) for figure in ("cpu", "nixl cpu")]
            rows.append(row)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"Medians of {options.rounds} rounds of {options.iters} iterations; ratios within a round: median (least-greatest)."]
    return "\n".join(lines)


def middle(figures, key, factor=1):
    values = [each[key] * factor for each in figures if key in each]
    return f"{statistics.median(values):.2f}" if values else "-"


def ratio(figures, over, under):
    values = [each[over] / each[under] for each in figures if under in each and each[under] > 0]
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})" if values else "-"


def machine():
    model = "unknown processor"
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = names[0] if names else model
    except OSError:
        pass
    load = os.getloadavg()[0]
    return f"Machine: {model}, {os.cpu_count()} cores, Linux {platform.release()}, load at the end {load:.1f}."


if __name__ == "__main__":
    main()
