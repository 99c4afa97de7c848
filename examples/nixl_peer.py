"""A Python NIXL agent that holds the KV of a request, for examples/nixl_peer.rs.

usage: python nixl_peer.py [PORT]
Needs: pip install --no-deps nixl-cu12 numpy
It holds the model "tiny" as kvferry lays it out: planes K and V of 4 layers, each of 32 blocks of 4096 bytes.
"""

import json
import os
import sys

import numpy as np
from nixl_cu12._api import nixl_agent, nixl_agent_config

PLANES, BLOCKS, BLOCK_BYTES = 8, 32, 4096

# It listens for metadata, and has a thread that keeps UCX going.
port = int(sys.argv[1]) if len(sys.argv) > 1 else 5555
agent = nixl_agent("prefill-0", nixl_agent_config(enable_listen_thread=True, listen_port=port, backends=["UCX"]))
plane, block, byte = np.ogrid[:PLANES, :BLOCKS, :BLOCK_BYTES]
kv = ((plane * 31 + block * 7 + byte) % 251).astype(np.uint8)
agent.register_memory([(kv.ctypes.data, kv.nbytes, 0, "")], "DRAM")
print(f"{agent.name} listens on port {port}", flush=True)

done = False
while not done:
    for peer, messages in agent.get_new_notifs().items():
        for message in messages:
            print(f"{peer}: {message.decode()}", flush=True)
            if message == b"done":
                done = True
                continue
            # Its metadata comes by another way than its question.
            while not agent.check_remote_metadata(peer):
                pass
            agent.send_notif(peer, json.dumps([20, 4, 11]).encode())
# Some of NIXL's wheels crash when their process ends in order.
os._exit(0)
