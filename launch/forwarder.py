"""`python -m launch.forwarder SPEC`: makes the namespaces of a WAN lab and moves packets between them, in one process.

Every region is a network namespace without a name, with one TUN device; the hub is a TUN device in the host's own
namespace. Namespaces are held by this process's file descriptors (others enter them as /proc/PID/fd/N) and devices by
theirs, so nothing of them outlives it, however it ends; when it is asked to end it kills what still runs in its namespaces.
SPEC is JSON: {"regions": [names], "wan": fields of WanConfig}. The first line that it prints is JSON, too: {"socket",
"namespaces", "addresses"}, or {"error": a sentence} before it exits with code 2. Linux, root.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import heapq
import json
import os
import secrets
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

from diloco.errors import ConfigError
from launch.child import CLONE_NEWNET, system_call
from launch.links import HUB, Network, Path, WanConfig

_PR_SET_TIMERSLACK = 29  # <linux/prctl.h>
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x400454CA, 0x0001, 0x1000, 0x4000  # <linux/if_tun.h>
_TUNSETOFFLOAD, _TUN_F_CSUM, _TUN_F_TSO4 = 0x400454D0, 0x01, 0x02
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C  # <linux/sockios.h>
_SIOCSIFMTU, _SIOCSIFTXQLEN = 0x8922, 0x8943
_IFF_UP = 0x1
QUEUE_PACKETS = 4096
"""Of a TUN device: what waits in the kernel while this process is not scheduled."""
BATCH = 64
"""Packets read from one device before what is due gets its turn."""
PREFIX = struct.Struct("=BBHHHH")
"""struct virtio_net_hdr of <linux/virtio_net.h> before every packet: flags, gso_type, hdr_len, gso_size, csum_start,
csum_offset. It is handed on as it came, so checksums are never computed and TCP's segments travel several at a time."""
TARGET = slice(PREFIX.size + 16, PREFIX.size + 20)
"""Address of the receiver, of IPv4; what the kernel says in IPv6 goes nowhere."""
EARLY = 20e-6
"""Seconds by which a packet may come too early: waiting for less than this takes longer."""


# ---- namespaces and devices ----


def _ioctl(name: str, request: int, payload: bytes) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, request, struct.pack("16s24s", name.encode(), payload))


def _inet(address: str) -> bytes:
    return struct.pack("HH4s", socket.AF_INET, 0, socket.inet_aton(address))


def open_tun(name: str, address: str, mtu: int, offload: int) -> int:
    """A TUN device in this process's namespace, up, with a route to its /24. offload: what its kernel may leave undone.
    Returns its non-blocking descriptor; the device ends with that."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR))
    fcntl.ioctl(fd, _TUNSETOFFLOAD, offload)
    _ioctl(name, _SIOCSIFMTU, struct.pack("i", mtu))
    _ioctl(name, _SIOCSIFTXQLEN, struct.pack("i", QUEUE_PACKETS))
    _ioctl(name, _SIOCSIFADDR, _inet(address))
    _ioctl(name, _SIOCSIFNETMASK, _inet("255.255.255.0"))
    _ioctl(name, _SIOCSIFFLAGS, struct.pack("H", _IFF_UP))
    return fd


def new_namespace() -> int:
    """Moves this process to a new network namespace with loopback up. Returns a descriptor of that."""
    system_call("unshare", CLONE_NEWNET)
    _ioctl("lo", _SIOCSIFFLAGS, struct.pack("H", _IFF_UP))
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def free_subnet(wanted: str) -> str:
    """The first three bytes, with dots, of a /24 that no route of this machine but the default one leads to: `wanted`, or
    any in 10.0.0.0/8, starting from this pid so that labs that start at once do not meet. Raises ConfigError."""
    with open("/proc/net/route") as table:
        rows = [line.split() for line in table.readlines()[1:]]
    taken = [(socket.ntohl(int(row[1], 16)), socket.ntohl(int(row[7], 16))) for row in rows if int(row[7], 16)]

    def free(net: int) -> bool:
        return not any((net & mask) == target or (target & 0xFFFFFF00) == net for target, mask in taken)

    nets = [(10 << 24) + ((os.getpid() + i) % 65536 << 8) for i in range(65536)]
    if wanted:
        nets = [struct.unpack("!I", socket.inet_aton(wanted))[0] & 0xFFFFFF00]
    net = next(filter(free, nets), None)
    if net is None:
        raise ConfigError(f"wan.subnet={wanted} is in use on this machine: set it to another /24, or leave it out")
    return socket.inet_ntoa(struct.pack("!I", net)).rpartition(".")[0]


def on_the_wire(packet: bytes) -> tuple[int, int]:
    """(bytes, packets) that a packet with its `PREFIX` stands for: TCP segments that travel together have a header each."""
    size = len(packet) - PREFIX.size
    _, together, _, segment, tcp, _ = PREFIX.unpack_from(packet)
    if not together:
        return size, 1
    header = tcp + (packet[PREFIX.size + tcp + 12] >> 4) * 4
    count = -(-(size - header) // segment)
    return size + (count - 1) * header, count


def _missing(error: OSError) -> ConfigError:
    """What this machine lacks for a lab."""
    if error.filename == "/dev/net/tun" and error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        lack = "/dev/net/tun, which is not there: load the kernel module tun, or add --device=/dev/net/tun to the container"
    elif error.errno in (errno.EPERM, errno.EACCES):
        lack = f"root (CAP_NET_ADMIN and CAP_SYS_ADMIN), which this process is not ({error}): start it as root"
    else:
        lack = f"network namespaces and TUN devices, and here that fails with: {error}"
    return ConfigError(f"+wan needs {lack}")


# ---- forwarding ----


class Forwarder:
    """The lab's devices, the packets on the way, and the socket that commands come through."""

    def __init__(self, config: WanConfig, regions: Sequence[str]) -> None:
        self.network = Network(config, regions)
        subnet = free_subnet(config.subnet)
        hosts = {name: i + 1 for i, name in enumerate(regions)} | {HUB: 254}
        self.addresses = {name: f"{subnet}.{host}" for name, host in hosts.items()}
        try:
            self.namespaces, self.devices = self._open(config)
        except OSError as error:
            raise _missing(error) from error
        targets = {name: socket.inet_aton(address) for name, address in self.addresses.items()}
        self.routes = {a: {targets[b]: self.network.paths[a, b] for b in targets if b != a} for a in targets}
        self._heap: list[tuple[float, int, Path | None, int, bytes]] = []
        """(time, order, path, device, packet): reaches path's downlink at that time, or leaves it (no path)."""
        self.inodes = {os.fstat(fd).st_ino for fd in self.namespaces.values()}
        self._order = 0
        self._started = time.monotonic()

    def _open(self, config: WanConfig) -> tuple[dict[str, int], dict[str, int]]:
        """Where packets are lost, each is on its own."""
        offload = _TUN_F_CSUM if config.loses else _TUN_F_CSUM | _TUN_F_TSO4
        own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        devices = {HUB: open_tun(f"wan{os.getpid()}", self.addresses[HUB], config.mtu, offload)}
        namespaces = {}
        for name, address in self.addresses.items():
            if name != HUB:
                namespaces[name] = new_namespace()
                devices[name] = open_tun("wan0", address, config.mtu, offload)
        system_call("setns", own, CLONE_NEWNET)
        os.close(own)
        return namespaces, devices

    def run(self) -> None:
        """Forwards until a signal raises."""
        self.control = Control(self.command)
        handlers: dict[int, Callable[[], object]] = {self.control.fileno(): self.control.accept}
        for name, fd in self.devices.items():
            handlers[fd] = lambda name=name, fd=fd: self._read(fd, self.routes[name])  # type: ignore[misc]
        self._tell()
        heap, clock = self._heap, time.monotonic
        while True:
            now = clock() + EARLY
            while heap and heap[0][0] <= now:
                self._due(*heapq.heappop(heap))
            wait = max(0.0, heap[0][0] - clock()) if heap else None
            watched = [*handlers, *self.control.clients]
            for fd in select.select(watched, [], [], wait)[0]:
                (handlers.get(fd) or self.control.clients[fd])()

    def _tell(self) -> None:
        namespaces = {name: f"/proc/{os.getpid()}/fd/{fd}" for name, fd in self.namespaces.items()}
        told = {"socket": self.control.name, "namespaces": namespaces, "addresses": self.addresses}
        print(json.dumps(told), flush=True)

    def _read(self, fd: int, routes: dict[bytes, Path]) -> None:
        clock, names = time.monotonic, self.devices
        for _ in range(BATCH):
            try:
                packet = os.read(fd, PREFIX.size + 65536)
            except BlockingIOError:
                return
            path = routes.get(packet[TARGET])
            if path is None:
                continue
            now = clock()
            arrival = path.send(now, *on_the_wire(packet))
            if arrival is None:
                continue
            if arrival <= now:  # the hub: no way to go
                self._due(arrival, 0, path, names[path.target], packet)
            else:
                self._push(arrival, path, names[path.target], packet)

    def _push(self, when: float, path: Path | None, device: int, packet: bytes) -> None:
        self._order += 1
        heapq.heappush(self._heap, (when, self._order, path, device, packet))

    def _due(self, when: float, _: int, path: Path | None, device: int, packet: bytes) -> None:
        if path is not None:
            departure = path.arrive(when, *on_the_wire(packet))
            if departure is None:
                return
            if departure > time.monotonic() + EARLY:
                self._push(departure, None, device, packet)
                return
        os.write(device, packet)

    # ---- commands ----

    def command(self, request: dict[str, Any]) -> dict[str, Any]:
        """{"do": cut, restore, slow or unslow, "names": [regions], "share": of the rate} or {"do": "status"}."""
        if request["do"] != "status":
            self.network.change(request["do"], request["names"], request.get("share", 1.0))
        usage = {"seconds": time.monotonic() - self._started, "cpu_seconds": time.process_time()}
        return {**self.network.status(), **usage, "addresses": self.addresses}


def kill_inhabitants(namespaces: Collection[int]) -> None:
    """SIGKILL to every process in the network namespaces with these inodes, until there is none."""
    deadline = time.monotonic() + 10
    while left := [pid for pid in os.listdir("/proc") if _network(pid) in namespaces]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {', '.join(left)} cannot be killed")
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _network(pid: str) -> int | None:
    """The inode of a process's network namespace, None if it is none, or has ended."""
    if not pid.isdigit():
        return None
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:
        return None


class Control:
    """A Unix socket for commands, JSON lines both ways: {"ok": ...} or {"error": a sentence}. Its name is abstract, so
    there is no file to leave behind, and only this user may talk to it."""

    def __init__(self, command: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.name, self._command = f"diloco-wan-{os.getpid()}-{secrets.token_hex(4)}", command
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind("\0" + self.name)
        self._listener.listen()
        self.clients: dict[int, Callable[[], object]] = {}

    def fileno(self) -> int:
        return self._listener.fileno()

    def accept(self) -> None:
        client, _ = self._listener.accept()
        _, user, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if user != os.getuid():
            client.close()
            return
        client.settimeout(1.0)  # a client that does not read does not stop the packets for long
        lines = bytearray()
        self.clients[client.fileno()] = lambda: self._hear(client, lines)

    def _hear(self, client: socket.socket, lines: bytearray) -> None:
        try:
            data = client.recv(65536)
            lines += data
            while b"\n" in lines:
                line, _, rest = bytes(lines).partition(b"\n")
                lines[:] = rest
                client.sendall(self._answer(line) + b"\n")
        except OSError:
            data = b""
        if not data:
            del self.clients[client.fileno()]
            client.close()

    def _answer(self, line: bytes) -> bytes:
        try:
            return json.dumps({"ok": self._command(json.loads(line))}).encode()
        except ConfigError as error:
            return json.dumps({"error": str(error)}).encode()
        except (ValueError, KeyError, TypeError) as error:
            return json.dumps({"error": f"not a command: {error!r}"}).encode()


def _be_punctual() -> None:
    """Sharp timers, no pauses for garbage (there are no cycles), and a turn before the training on the same cores."""
    system_call("prctl", _PR_SET_TIMERSLACK, 1)
    gc.disable()
    with suppress(PermissionError):  # a container may lack it; then timing is as good as the load allows
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))


def main(argv: Sequence[str]) -> int:
    spec = json.loads(argv[0])
    try:
        forwarder = Forwarder(WanConfig(**spec["wan"]), spec["regions"])
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    _be_punctual()
    try:
        forwarder.run()
    finally:
        kill_inhabitants(forwarder.inodes)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
