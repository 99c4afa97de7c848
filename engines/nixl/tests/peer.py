"""A NIXL agent that does as it is told, one JSON object a line: for kvferry's tests.

usage: peer.py NAME BYTES [PORT]
Its memory is BYTES bytes of DRAM, byte i being (i * 7 + 3) mod 251. It says what it is, then answers every line. With a port it listens for metadata.
"""
import hashlib
import importlib
import json
import select
import sys

import numpy as np


def api():
    for package in ("nixl_cu12", "nixl_cu13", "nixl"):
        try:
            return importlib.import_module(package + "._api")
        except ImportError:
            continue
    raise SystemExit("no NIXL wheel is installed here")


nixl = api()
name, size = sys.argv[1], int(sys.argv[2])
port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
listens = {"enable_listen_thread": True, "listen_port": port} if port else {}
agent = nixl.nixl_agent(name, nixl.nixl_agent_config(backends=["UCX"], **listens))
memory = ((np.arange(size, dtype=np.uint64) * 7 + 3) % 251).astype(np.uint8)
registered = agent.register_memory([(memory.ctypes.data, size, 0, "")], "DRAM")
heard = []


def listen():
    for peer, messages in agent.get_new_notifs().items():
        heard.extend([peer, message.hex()] for message in messages)


def transfer(order):
    mine = np.array([[memory.ctypes.data + at, n, 0] for at, _, n in order["pieces"]], dtype=np.uint64)
    theirs = np.array([[address, n, 0] for _, address, n in order["pieces"]], dtype=np.uint64)
    local, remote = agent.get_xfer_descs(mine, "DRAM"), agent.get_xfer_descs(theirs, "DRAM")
    handle = agent.initialize_xfer(order["op"], local, remote, order["peer"], bytes.fromhex(order["notify"]))
    state = agent.transfer(handle)
    while state not in ("DONE", "ERR"):
        state = agent.check_xfer_state(handle)
    agent.release_xfer_handle(handle)
    return state


def answer(order):
    match order["do"]:
        case "add":
            added = agent.add_remote_agent(bytes.fromhex(order["metadata"]))
            return added.decode() if isinstance(added, bytes) else added
        case "remove":
            agent.remove_remote_agent(order["peer"])
        case "transfer":
            return transfer(order)
        case "send":
            agent.send_local_metadata(order["ip"], order["port"])
        case "fetch":
            agent.fetch_remote_metadata(order["peer"], order["ip"], order["port"])
        case "invalidate":
            agent.invalidate_local_metadata(order["ip"], order["port"])
        case "knows":
            return agent.check_remote_metadata(order["peer"])
        case "notify":
            agent.send_notif(order["peer"], bytes.fromhex(order["message"]))
        case "heard":
            listen()
            taken = list(heard)
            heard.clear()
            return taken
        case "digest":
            return hashlib.sha256(memory[order["at"] : order["at"] + order["bytes"]].tobytes()).hexdigest()
        case "dump":
            return memory.tobytes().hex()
        case "fill":
            memory[...] = order["byte"]
    return None


def say(value):
    print("PEER " + json.dumps(value), flush=True)


say({"metadata": agent.get_agent_metadata().hex(), "address": memory.ctypes.data, "bytes": size})
while True:
    # A NIXL agent without a progress thread moves only while it is asked.
    listen()
    if select.select([sys.stdin], [], [], 0.0005)[0]:
        line = sys.stdin.readline()
        if not line:
            break
        try:
            say({"ok": answer(json.loads(line))})
        except Exception as error:  # noqa: BLE001: the test sees it
            say({"error": f"{type(error).__name__}: {error}"})
