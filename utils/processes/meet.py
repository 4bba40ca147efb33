"""Where the processes of a run meet: `dist_url`, checked and held, and the way to other nodes.

Knows nothing of ranks and devices.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from utils.errors import UserError, listing
from utils.logger import log
from utils.processes.children import block_signals

STALE = 600  # seconds after which a file to meet at is no other node's of the same run
SIOCGIFADDR = 0x8915  # of Linux' ioctl: the IPv4 address of a network interface


def resolve(url: str, nodes: int, environment: Mapping[str, str]) -> str:
    """A `dist_url` as tcp:// or file://; another file when that of a single node is taken.

    Raises:
        UserError: it is malformed, the environment lacks what it stands for, or no file can be
            written there.
    """
    if url == "env://":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
        if missing:
            raise UserError(
                f"dist_url is 'env://', but the environment has no {listing(missing)}; set "
                "MASTER_ADDR to the name of node 0 and MASTER_PORT to a free port of it."
            )
        url = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    if url.startswith("file:"):
        return _free_file(url, nodes)
    address(url)
    return url


def _free_file(url: str, nodes: int) -> str:
    """`url`; another file when that of a single-node run is there, as a killed run leaves it."""
    if not re.fullmatch(r"file:///[^?#]*[^/?#]", url):  # torch would read the rest as no path
        raise UserError(
            f"dist_url is '{url}'; file:// needs an absolute path to a file, without ? and #, such "
            "as file:///shared/meet."
        )
    path = Path(url.removeprefix("file://"))
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(
            f"dist_url is '{url}', but no file can be written there; name one in an existing "
            "folder that this user may write to."
        )
    if not path.exists():
        return url
    if nodes == 1:
        log.warning("dist_url: %s exists, %s.%d is taken instead", path, path, os.getpid())
        return f"{url}.{os.getpid()}"
    if time.time() - path.stat().st_mtime > STALE:  # a younger one may be another node's
        raise UserError(
            f"dist_url is '{url}', but this file is of an earlier run, which was killed; delete it."
        )
    return url


def address(url: str) -> tuple[str, int]:
    """Host and port of a tcp:// URL; `UserError` when it is another."""
    parts = re.fullmatch(r"tcp://([^:/]+):(\d+)", url)
    if parts is None or not 0 < int(parts[2]) < 65536:
        raise UserError(
            f"dist_url is '{url}'; it must be tcp://HOST:PORT, env:// (which takes them from "
            "MASTER_ADDR and MASTER_PORT) or file:///PATH."
        )
    return parts[1], int(parts[2])


@contextlib.contextmanager
def held(url: str, nodes: int, node: int) -> Iterator[str]:
    """Where the processes that are started in this block meet.

    On a single node this process listens itself, so that nobody takes the port before rank 0 could,
    and all ranks come as clients.

    Args:
        url: as `resolve` returned it.
        nodes, node: number of nodes and this node's number.
    """
    if url.startswith("file:"):
        try:
            yield url
        finally:
            if node == 0:  # ranks that failed left it
                Path(url.removeprefix("file://")).unlink(missing_ok=True)
    elif nodes > 1:
        yield url
    else:
        listener = _listen(url)
        host, port = listener.getsockname()
        with block_signals():  # the store's thread shall leave signals to this one
            store = dist.TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
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


def place(url: str, nodes: int, timeout: timedelta) -> dict[str, Any]:
    """How `init_process_group` is told of a URL: as such or, where it is held, as the store."""
    if url.startswith("tcp:") and nodes == 1:
        return {"store": dist.TCPStore(*address(url), timeout=timeout)}
    return {"init_method": url}


# ----------------------------------------------------------------------------------- several nodes
def name_interface(url: str) -> None:
    """Set GLOO_SOCKET_IFNAME where gloo would have other nodes call this one in vain.

    gloo tells them the address that the host's name resolves to, on Debian 127.0.1.1. Whatever the
    user has set stays.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    interfaces = addresses()
    name = matching(os.environ.get("NCCL_SOCKET_IFNAME", ""), interfaces)
    if name is None:
        try:
            own = socket.gethostbyname(socket.gethostname())
        except OSError:  # gloo then takes a loopback address
            own = "127.0.0.1"
        if not own.startswith("127."):
            return
        host = re.match(r"tcp://([^:]+)", url)
        name = towards(host[1] if host else os.environ.get("MASTER_ADDR"), interfaces)
    if name is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = name
        return
    log.warning(
        "this node's name, %s, means %s, where other nodes cannot reach it: set GLOO_SOCKET_IFNAME "
        "to the network interface between the nodes; there are %s",
        socket.gethostname(),
        own,
        listing(interfaces) or "none with an IPv4 address",
    )


def addresses() -> dict[str, str]:
    """Network interfaces with their IPv4 addresses, loopback last; empty where it is not Linux."""
    found: dict[str, str] = {}
    if sys.platform != "linux":
        return found
    import fcntl

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                found[name] = socket.inet_ntoa(answer[20:24])
    return dict(sorted(found.items(), key=lambda item: item[1].startswith("127.")))


def matching(wanted: str, interfaces: dict[str, str]) -> str | None:
    """The first interface that a NCCL_SOCKET_IFNAME means.

    Args:
        wanted: prefixes such as `eth,ib`; after `=` whole names; after `^` those it must not be.
        interfaces: as `addresses` returns them.
    """
    text = wanted.removeprefix("^")
    words = tuple(word for word in text.removeprefix("=").split(",") if word)
    for name in interfaces if words else ():
        named = name in words if text.startswith("=") else name.startswith(words)
        if named != wanted.startswith("^"):
            return name
    return None


def towards(host: str | None, interfaces: dict[str, str]) -> str | None:
    """The interface by which `host` is reached, or the only one that leads out of this machine."""
    outside = {address: name for name, address in interfaces.items() if address[:4] != "127."}
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        if host is not None:
            probe.connect((host, 9))  # sends nothing, but chooses the way
            if (own := probe.getsockname()[0]) in outside:
                return outside[own]
    return next(iter(outside.values())) if len(outside) == 1 else None
