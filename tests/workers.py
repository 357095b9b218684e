"""Parallel workers of pytest that share their imports: `--tx "4*popen//python=PYTHON tests/workers.py"`.

The first worker imports the large packages and is forked into the others. The product itself is not among
them, since pytest imports it with runtime checks of types. All share the server that forks the processes of
tests, which has the product's imports behind it, without these checks.
"""

from __future__ import annotations

import gc
import importlib
import os
import socket
import sys
from contextlib import suppress
from multiprocessing import forkserver

PACKAGES = [
    "diffusers.optimization",
    "gradio",
    "hypothesis",
    "lerobot.datasets.lerobot_dataset",
    "lerobot.policies",
    "lightning.pytorch",
    "torch._dynamo",
    "torchvision.transforms.v2",
    "vector_quantize_pytorch",
    "zarr",
]
PRODUCT = [
    "latentact.stages.compare",
    "lightning.pytorch",
    "torch._dynamo",
    "lerobot.datasets.lerobot_dataset",
]


def main() -> None:
    """Run as a worker: after the imports in the first process, as its fork in the others."""
    if sys.platform == "linux" and not _is_worker(f"\0latentact-tests-{os.getppid()}"):
        return
    exec(sys.argv[-1], {"__name__": "__main__"})


def _is_worker(address: str) -> bool:
    """Return whether this process is the first one or a fork of it; another waits for the end of its fork."""
    server = socket.socket(socket.AF_UNIX)
    try:
        server.bind(address)
    except OSError:
        server.connect(address)  # pytest starts one worker after the other
        socket.send_fds(server, [b"0"], [0, 1, 2])
        server.recv(1)
        return False
    server.listen(64)
    gc.disable()
    for name in PACKAGES:
        with suppress(ImportError):
            importlib.import_module(name)
    forkserver.set_forkserver_preload(PRODUCT)
    forkserver.ensure_running()
    worker = os.fork() > 0 or _is_fork(server)
    server.close()
    return worker


def _is_fork(server: socket.socket) -> bool:
    """Fork for each process that connects, until the first one ends; return whether this is a fork."""
    forkserver._forkserver.ensure_running = lambda: None  # it is the first worker's child
    first = os.getppid()
    server.settimeout(1)
    while os.getppid() == first:
        with suppress(TimeoutError):
            client, _ = server.accept()
            _, streams, _, _ = socket.recv_fds(client, 1, 3)
            forked = os.fork() == 0
            for number, stream in enumerate(streams):
                if forked:
                    os.dup2(stream, number)
                os.close(stream)
            if forked:
                client.detach()  # is closed when this process ends
                return True
            client.close()
    return False


if __name__ == "__main__":
    main()
