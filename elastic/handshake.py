"""How a connection begins: what `Security` asks for is proved, then the dialling side says hello and is answered.

Written without sockets: a step yields (bytes to send, bytes wanted at most) and is sent what came, so that the accepting side
can attend to hundreds of strangers in one thread (`elastic.door`), and nothing is read beyond what a step needs.

With a run secret: knock(nonce) · challenge(nonce) · proof, hello · proof, hello. The proofs are HMAC-SHA256, keyed by the
secret, over side, both nonces, purpose and member. The hellos and all that follows are tagged (`elastic.seal`): who sits on the
path can read, but change nothing.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import ssl
import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

from elastic.revocation import watch
from elastic.seal import TAG, Seal
from elastic.security import Security, region_of
from elastic.tls import HEADER, MAX_RECORD, Tls, TlsError
from elastic.wire import HEAD, MAGIC, NONSENSE, Connection, Message, WireError, decode, decode_head, encode

HANDSHAKE_TIMEOUT = 10.0
"""Seconds in total until a hello has to be there, or a dialled peer's answer."""
MAX_UNPROVEN = 8 << 10
"""Bytes that a stranger may send: a proof takes some hundreds, a TLS handshake with certificates 2 KiB."""
MAX_HELLO = 16 << 10
"""Bytes of JSON of a hello, which holds the fingerprint of the run."""
MAX_REASON = 1200

T = TypeVar("T")
Steps = Generator[tuple[bytes, int], bytes, T]


class Refused(ConnectionError):
    """The peer, or this side, refused the other: the two do not belong to the same run. One sentence."""


class Line:
    """One side of a connection that is being set up."""

    def __init__(self, security: Security) -> None:
        self.security = security
        self.tls: Tls | None = None
        self.seal: Seal | None = None
        """Once both sides' nonces are known, if there is a run secret."""
        self.region = ""
        """The name in the peer's certificate, if it had to show one."""
        self.budget = MAX_UNPROVEN
        """Bytes that may still come."""
        self.garbled = False
        """TLS has failed: a frame would not be understood any more."""
        self.refused = ""
        """Why the peer is; known before it is told, which may fail."""
        self.over = False
        """Everything is said; it is for the peer to close: closing with unread bytes would destroy that."""

    def send(self, message: Message) -> Steps[None]:
        data = _tagged(message, self.seal) if self.seal else encode(message)
        yield self.tls.seal(data) if self.tls else data, 0

    def receive(self) -> Steps[Message]:
        """Raises WireError, Refused."""
        head = yield from self._exactly(HEAD.size)
        size, _, checksum = decode_head(head, min(self.budget, MAX_HELLO), 0)
        data = yield from self._exactly(size)
        if self.seal and not self.seal.fits((yield from self._exactly(TAG)), head, data):
            raise WireError("a frame is not what the peer sent next")
        return decode(data, b"", None if self.tls or self.seal else checksum)

    def connection(self, sock: socket.socket) -> Connection:
        """What follows on the socket once everything is proved."""
        made = Connection(sock, self.tls, self.seal)
        if self.tls is not None:
            watch(self.security, made, self.tls.serial())
        return made

    def encrypt(self, server: bool) -> Steps[None]:
        """A TLS handshake; each side has seen the other's certificate then. Raises Refused."""
        try:
            first = (yield from self._record()) if server else b""  # who says nothing costs no session
            self.tls = Tls(_context(self.security, server), server).feed(first)
            done = self.tls.handshake()
            yield self.tls.take(), 0
            while not done:
                self.tls.feed((yield from self._record()))
                done = self.tls.handshake()
                yield self.tls.take(), 0
        except TlsError as error:
            self.garbled, self.refused = True, str(error)
            if self.tls is not None:
                yield self.tls.take(), 0  # the alert
            raise Refused(str(error)) from error
        except OSError:
            self.garbled = True
            raise
        self.region = self.tls.peer()

    def _exactly(self, size: int) -> Steps[bytes]:
        """As many bytes of what the peer means to say."""
        if self.tls is None:
            return (yield from self._raw(size))
        data, got = memoryview(bytearray(size)), 0
        try:
            while got < size:
                if not (n := self.tls.open_into(data[got:])):
                    self.tls.feed((yield from self._record()))
                got += n
        except TlsError as error:
            self.garbled = True
            raise Refused(str(error)) from error
        except EOFError as error:
            raise ConnectionResetError("the peer closed the connection") from error
        return bytes(data)

    def _record(self) -> Steps[bytes]:
        """A whole one and nothing of the next, which may be for somebody else (a gateway's caller)."""
        header = yield from self._raw(HEADER)
        if header[0] not in (20, 21, 22, 23):
            if MAGIC.startswith(header[:4]):
                yield encode(refusal("this run uses TLS: set elastic.tls")), 0
            raise Refused("it does not speak TLS: elastic.tls is not set there, or it is something else")
        size = int.from_bytes(header[3:])
        if size > MAX_RECORD:
            raise WireError("not a TLS record")
        return header + (yield from self._raw(size))

    def _raw(self, size: int) -> Steps[bytes]:
        if size > self.budget:
            raise WireError("too many bytes before a hello")
        data = b""
        while len(data) < size:
            data += yield b"", size - len(data)
        self.budget -= size
        return data


def _context(security: Security, server: bool) -> ssl.SSLContext:
    try:
        return security.context(server)
    except OSError as error:  # a file is gone, or half written: the next connection tries again
        raise Refused(f"the certificates on this side cannot be used: {error}") from error


def refusal(reason: str) -> Message:
    return {"type": "refused", "reason": reason}


# The dialling side


def introduce(line: Line, hello: Message) -> Steps[Message]:
    """Proves, says hello and returns the answer. Raises Refused, WireError, SecurityError."""
    security = line.security
    if security.tls:
        yield from line.encrypt(server=False)
    line.budget = 2 * MAX_HELLO
    if security.secret_from and not security.tls:
        yield from _knock(line, security.secret(), hello)
    else:
        yield from line.send(hello)
    answer = _expect((yield from line.receive()), "hello")
    # A gateway or a lighthouse is none, and is trusted with nothing but bringing members together.
    if "member" in answer:
        _vouch(line, answer)
    return answer


def _knock(line: Line, secret: bytes, hello: Message) -> Steps[None]:
    mine, who = secrets.token_hex(32), [hello["purpose"], hello["member"]]
    yield from line.send({"type": "knock", "nonce": mine})
    nonces = [mine, str(_expect((yield from line.receive()), "challenge")["nonce"])]
    seal = Seal(secret, nonces, who, "dials")
    proof = encode({"type": "proof", "who": who, "proof": _proof(secret, "dials", nonces, who)})
    yield proof + _tagged(hello, seal), 0
    answer = _expect((yield from line.receive()), "proof")
    if not hmac.compare_digest(str(answer["proof"]).encode(), _proof(secret, "answers", nonces, who).encode()):
        raise Refused("it does not know this run's secret")
    line.seal = seal  # not sooner: its proof, or why it refuses ours, has no tag yet


def _tagged(message: Message, seal: Seal) -> bytes:
    data = encode(message, checked=False)
    return data + seal.tag(data)


def _expect(message: Message, kind: str) -> Message:
    if message.get("type") == "refused":
        raise Refused(str(message.get("reason"))[:MAX_REASON])
    if message.get("type") != kind:
        raise Refused(
            f"it answers with {str(message.get('type'))[:20]!r}, not {kind!r}: has it the same run secret or TLS?"
        )
    return message


def _proof(secret: bytes, side: str, nonces: list[str], who: list[Any]) -> str:
    return hmac.new(secret, json.dumps([side, nonces, who]).encode(), "sha256").hexdigest()


# The accepting side


def receive_hello(line: Line) -> Steps[Message]:
    """The hello of a peer that has proved what it has to; it is not answered yet. Raises Refused, which the peer has been told
    of, WireError, SecurityError."""
    try:
        return (yield from _receive_hello(line))
    except Refused as error:
        line.refused = str(error)
        if not line.garbled:
            yield from line.send(refusal(str(error)))
        line.over = True
        with suppress(OSError):
            for _ in range(MAX_UNPROVEN):
                yield b"", MAX_UNPROVEN
        raise


def _receive_hello(line: Line) -> Steps[Message]:
    who: list[Any] = []
    if line.security.tls:
        yield from line.encrypt(server=True)
    elif line.security.secret_from:
        who = yield from _challenge(line, line.security.secret())
    line.budget = 2 * MAX_HELLO
    hello = yield from line.receive()
    if hello.get("type") == "knock":
        raise Refused(
            "it has a run secret, and here is none: set DILOCO_SECRET or elastic.secret_file alike everywhere"
        )
    if hello.get("type") != "hello":
        raise WireError("no hello")
    if who and who != [hello.get("purpose"), hello.get("member")]:
        raise Refused("its hello is not what it proved")
    _vouch(line, hello)
    return hello


def _challenge(line: Line, secret: bytes) -> Steps[list[Any]]:
    """Returns the purpose and member that are proved."""
    knock = yield from line.receive()
    if knock.get("type") != "knock":
        raise Refused("this run has a secret: set DILOCO_SECRET or elastic.secret_file alike everywhere")
    nonces = [str(knock.get("nonce")), secrets.token_hex(32)]
    yield from line.send({"type": "challenge", "nonce": nonces[1]})
    answer = yield from line.receive()
    who = [str(said) for said in answer.get("who", [])]
    if not hmac.compare_digest(str(answer.get("proof")).encode(), _proof(secret, "dials", nonces, who).encode()):
        raise Refused("the run's secret is another one at the two ends")
    yield from line.send({"type": "proof", "proof": _proof(secret, "answers", nonces, who)})
    line.seal = Seal(secret, nonces, who, "answers")
    return who


def _vouch(line: Line, hello: Message) -> None:
    """The certificate is that of the region which the hello names."""
    if line.tls and region_of(hello.get("member")) != line.region:
        raise Refused(f"the certificate is of {line.region[:100]}, the hello of {str(hello.get('member'))[:100]}")


# With a socket


def drive(sock: socket.socket, steps: Steps[T], deadline: float) -> T:
    """Takes the steps. deadline: of time.monotonic(), for all of them. Raises OSError."""
    data: bytes | None = None
    try:
        while True:
            out, wanted = steps.send(data) if data is not None else next(steps)
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("the peer does not answer in time")
            sock.settimeout(left)
            with suppress(ConnectionError):  # who has hung up may have said why: that is received next
                sock.sendall(out)
            data = sock.recv(wanted) if wanted else b""
            if wanted and not data:
                raise ConnectionResetError("the peer closed the connection before it answered")
    except StopIteration as end:
        result: T = end.value
        return result
    except NONSENSE as error:  # SecurityError among them
        raise ConnectionAbortedError(f"a handshake that makes no sense: {error}") from error


def dial(endpoint: str, hello: Message, security: Security, timeout: float) -> tuple[Connection, Message]:
    """A connection to `host:port`, or through the gateway there to `host:port/name`, and the answer to the hello. timeout: s,
    for all of it. Raises OSError, Refused among them."""
    address, _, name = endpoint.partition("/")
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout
    sock = socket.create_connection((host, int(port)), timeout)
    try:
        if name:  # what follows is between the two ranks: the gateway copies it unread
            call = {"type": "hello", "purpose": "call", "member": hello["member"], "to": name}
            drive(sock, introduce(Line(security), call), deadline)
        line = Line(security)
        answer = drive(sock, introduce(line, hello), deadline)
        sock.settimeout(None)
        return line.connection(sock), answer
    except BaseException:
        sock.close()
        raise
