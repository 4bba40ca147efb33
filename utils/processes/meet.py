"""Where the processes of a run meet: `dist_url`, checked and held. Knows nothing of devices."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator, Mapping

import torch.distributed as dist

from utils.errors import UserError, listing
from utils.logger import log
from utils.processes.children import block_signals


def resolve(url: str, environment: Mapping[str, str]) -> str:
    """A `dist_url` as tcp://.

    Raises:
        UserError: it is malformed, or the environment lacks what it stands for.
    """
    if url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UserError(
                f"dist_url is 'env://', but the environment has no {listing(missing)}; set "
                "MASTER_ADDR to the name of node 0 and MASTER_PORT to a free port of it."
            )
        url = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    address(url)
    return url


def address(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL; `UserError` when it is another."""
    parts = re.fullmatch(r"tcp://([^:/]+):(\d+)", url)
    if parts is None or not 0 < int(parts[2]) < 65536:
        raise UserError(
            f"dist_url is '{url}'; it must be tcp://HOST:PORT or env://, which takes them from "
            "MASTER_ADDR and MASTER_PORT."
        )
    return parts[1], int(parts[2])


@contextlib.contextmanager
def hold(url: str) -> Iterator[str]:
    """Listen at `url` for the ranks of a single node, which all come as clients.

    So nobody takes the port before rank 0 could.

    Yields:
        The URL; with another port when that is busy.
    """
    listener = _listen(url)
    host, port = listener.getsockname()
    with block_signals():  # the store's thread shall leave signals to this one
        store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
    yield f"tcp://{host}:{store.port}"


def _listen(url: str) -> socket.socket:
    """Take the port of `url`, or a free one of its host when another program has it."""
    host, port = address(url)
    with contextlib.suppress(OSError):
        return socket.create_server((host, port))
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise UserError(
            f"dist_url is '{url}', but this node cannot listen there: {error}."
        ) from None
    free = listener.getsockname()[1]
    log.warning("dist_url: port %d is busy, port %d is taken instead", port, free)
    return listener


def warn_of_loopback() -> None:
    """Warn where gloo would have other nodes call this one in vain.

    gloo tells them the address that the host's name means, on Debian 127.0.1.1.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        own = socket.gethostbyname(name)
    except OSError:  # gloo then takes a loopback address
        own = "127.0.0.1"
    if own.startswith("127."):
        log.warning(
            "this node's name, %s, means %s, where other nodes cannot reach it: set "
            "GLOO_SOCKET_IFNAME to the network interface between the nodes; there are %s",
            *(name, own, listing(name for _, name in socket.if_nameindex())),
        )
