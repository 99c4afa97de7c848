"""The second process of `kvferry bench --transport nixl --nixl-python`: a NIXL agent that holds the other side, and does what it is told.

usage: python -c SCRIPT pull|push LAYERS BLOCKS BLOCK_BYTES
It speaks the words of words.rs on stdin and stdout, and fills and compares blocks as kv.rs does.
"""

import importlib
import json
import os
import select
import sys
import time

import numpy as np

# What libraries print must not get among the words.
words = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

STRAY_AT_SOURCE, STRAY_AT_DESTINATION = 1 << 40, 2 << 40
PAGE = 4096


def api():
    for package in ("nixl_cu12", "nixl_cu13", "nixl"):
        try:
            return importlib.import_module(package + "._api")
        except ImportError:
            continue
    raise RuntimeError("this Python has no NIXL wheel: pip install --no-deps nixl-cu12 numpy")


def say(word):
    words.write(json.dumps(word) + "\n")
    words.flush()


def known_word(state, index):
    """As in transports/api/src/known.rs."""
    word = state + index * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
    return word ^ (word >> np.uint64(29))


def pages(*shape):
    """Zeros that begin at a page, as kvferry's pools do. numpy's own begin some bytes behind one, and processors copy at as little as a third of their
    rate between memory that lies differently in its pages."""
    size = int(np.prod(shape))
    raw = np.zeros(size + PAGE, dtype=np.uint8)
    at = -raw.ctypes.data % PAGE
    return raw[at : at + size].reshape(shape)


class Cache:
    def __init__(self, is_source, layers, blocks, block_bytes):
        planes, self.count = 2 * layers, 2 * blocks
        self.is_source = is_source
        self.kv = pages(planes, self.count, block_bytes)
        self.table = np.random.default_rng(2).permutation(self.count)[:blocks]
        self.labels = np.arange(self.count, dtype=np.uint64) | np.uint64(STRAY_AT_SOURCE if is_source else STRAY_AT_DESTINATION)
        self.labels[self.table] = np.arange(blocks, dtype=np.uint64)
        self.write()

    def due(self, plane):
        """Every block of a plane, as it must be once the request is here."""
        block_bytes = self.kv.shape[2]
        index = np.arange(-(-block_bytes // 8), dtype=np.uint64)
        one = np.uint64(1)
        states = known_word(known_word(np.uint64(plane << 48) ^ self.labels, one), one)
        return known_word(states[:, None], index[None, :]).view(np.uint8).reshape(self.count, -1)[:, :block_bytes]

    def write(self):
        for plane in range(len(self.kv)):
            self.kv[plane] = self.due(plane)
            if not self.is_source:
                self.kv[plane, self.table] ^= 0xFF

    def mismatch(self):
        for plane in range(len(self.kv)):
            wrong = np.argwhere(self.kv[plane] != self.due(plane))
            if len(wrong):
                return f"plane {plane}, block {wrong[0][0]}, byte {wrong[0][1]}: not what the source has"
        return None

    def layout(self):
        planes, count, block_bytes = self.kv.shape
        plane = {"region": 0, "blocks": count, "block_stride": block_bytes, "block_bytes": block_bytes}
        return {
            "regions": [self.kv.nbytes],
            "planes": [dict(plane, offset=number * count * block_bytes) for number in range(planes)],
        }


def spent():
    return {"Spent": {"processor": time.process_time_ns(), "gpu": 0}}


def serve(op, *sizes):
    nixl = api()
    agent = nixl.nixl_agent(f"bench-{os.getpid()}", nixl.nixl_agent_config(backends=["UCX"]))
    cache = Cache(op == "pull", *map(int, sizes))
    agent.register_memory([(cache.kv.ctypes.data, cache.kv.nbytes, 0, "")], "DRAM")
    address = list(agent.get_agent_metadata())
    say({"Hello": {"address": address, "keys": [], "layout": cache.layout(), "table": cache.table.tolist()}})
    heard, awaited = 0, None
    while True:
        heard += sum(map(len, agent.get_new_notifs().values()))
        if awaited is not None and heard > awaited:
            awaited = None
            say(spent())
        if not select.select([sys.stdin.buffer], [], [], 0.0005)[0]:
            continue
        line = sys.stdin.buffer.readline()
        word = json.loads(line) if line else "Leave"
        name = word if isinstance(word, str) else next(iter(word))
        if name == "Leave":
            return
        elif name == "End":
            # One notification for each transfer, counted from 0.
            awaited = word["End"]["handover"]
        elif name == "Verify":
            say({"Compared": {"mismatch": cache.mismatch()}})
        elif name == "Tell":
            say({"Knows": None})
        else:
            if name == "Write":
                cache.write()
            elif name == "Rest":
                np.ones(word["Rest"]["bytes"], dtype=np.uint8)
            say(spent())


code = 0
try:
    serve(*sys.argv[1:])
except Exception as error:  # noqa: BLE001: the first process says it
    say({"Failed": {"reason": f"{type(error).__name__}: {error}"}})
    code = 1
# Some of NIXL's wheels crash when their process ends in order.
os._exit(code)
