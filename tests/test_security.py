"""Who belongs to a run: certificates of its authority or its secret, checked by both sides, with a sentence on both."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from elastic import tcp
from elastic.addresses import host_port
from elastic.gateway import Gateway
from elastic.node import Identity, Node, Refused
from elastic.security import OPEN, Security, SecurityError, choose
from elastic.tunnel import Entrance, Exit
from elastic.wire import Connection, Message
from launch.certs import Authority, issue

Make = Callable[..., Node]


def until(condition: Callable[[], object], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


@pytest.fixture(scope="module")
def certs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("certs") / "run"
    issue(directory, ["eu", "us"])
    return directory


def of(directory: Path, name: str) -> Security:
    return choose(str(directory), "", name)


def secret(directory: Path, text: str) -> Security:
    path = directory / f"secret-{abs(hash(text))}"
    path.write_text(text + "\n")
    return Security(secret_from=str(path))


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as stack:

        def made(member: str, security: Security, rank: int = 0) -> Node:
            node = Node("127.0.0.1", security=security)
            node.identity = Identity("run", "{}", member, rank)
            node.handlers["echo"] = echo
            stack.callback(node.close)
            return node

        yield made


def echo(connection: Connection, hello: Message) -> None:
    while True:
        connection.send(*connection.receive())


def refused(dialler: Node, endpoint: str) -> str:
    with pytest.raises(Refused) as caught:
        dialler.dial(endpoint, "echo", 10)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SECRET = "0123456789abcdef-run"


@pytest.fixture(params=["tls", "secret", "open"])
def pair(request: pytest.FixtureRequest, make: Make, certs: Path, tmp_path: Path) -> tuple[Node, Node]:
    kinds = {"tls": (of(certs, "eu"), of(certs, "us")), "secret": (secret(tmp_path, SECRET),) * 2, "open": (OPEN, OPEN)}
    eu, us = kinds[request.param]
    return make("eu_1", eu), make("us_2", us, 3)


def test_whole_frames_both_ways_at_once_from_several_threads(pair: tuple[Node, Node]) -> None:
    eu, us = pair
    connection, hello = us.dial(eu.endpoint, "echo", 30)
    assert (hello["member"], hello["rank"]) == ("eu_1", 0)
    payloads = [os.urandom(n) for n in (0, 1, 16_384, 130_000, 1_000_003, 3_000_000)]
    senders = [
        threading.Thread(target=lambda n=n: [connection.send({"n": [n, k]}, p) for k, p in enumerate(payloads)])
        for n in range(3)
    ]
    for sender in senders:
        sender.start()
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(3 * len(payloads)):
        message, payload = connection.receive()
        n, k = message["n"]
        assert payload == payloads[k]
        got[n].append(k)
    for sender in senders:
        sender.join(10)
    assert all(order == sorted(order) for order in got.values())
    seen = tcp.info(connection.sock)
    assert seen is None or seen.sent > 3 * sum(map(len, payloads))  # the kernel tells of the socket below
    tcp.tune(connection.sock, "cubic")
    us.release(connection)
    assert until(lambda: not eu._open) and eu.refusals == 0


def test_what_is_sent_under_tls_cannot_be_read_on_the_way(make: Make, certs: Path) -> None:
    """Through a gateway, too: it joins two ranks and sees their bytes go by."""
    seen = bytearray()
    gateway = Gateway("127.0.0.1", 0, of(certs, "gateway"))
    eu, us = make("eu_1", of(certs, "eu")), make("us_2", of(certs, "us"))
    real = Connection.receive_into

    def watched(self: Connection, view: memoryview, flags: int = 0) -> int:
        n = real(self, view, flags)
        if threading.current_thread().name == "node-peer" and self._tls is None:
            seen.extend(view[:n])
        return n

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Connection, "receive_into", watched)
        endpoint = eu.register(gateway.endpoint, "eu_1.0")
        connection, hello = us.dial(endpoint, "echo", 20)
        assert hello["member"] == "eu_1"
        connection.send({"a": 1}, b"attack at dawn" * 1000)
        assert connection.receive() == ({"a": 1}, b"attack at dawn" * 1000)
    gateway.close()
    assert len(seen) > 14_000 and b"attack" not in seen and b"hello" not in seen


@pytest.mark.parametrize("kind", ["tls", "secret"])
def test_a_gateway_asks_for_proofs_and_a_name_is_its_members(
    make: Make, certs: Path, tmp_path: Path, kind: str
) -> None:
    issue(tmp_path / "other", ["eu"])
    tls = kind == "tls"
    gateway = Gateway("127.0.0.1", 0, of(certs, "gateway") if tls else secret(tmp_path, SECRET))
    stranger = make("eu_9", of(tmp_path / "other", "eu") if tls else secret(tmp_path, SECRET + "?"))
    eu = make("eu_1", of(certs, "eu") if tls else secret(tmp_path, SECRET))
    us = make("us_2", of(certs, "us") if tls else secret(tmp_path, SECRET))
    for plain in (make("eu_9", OPEN), stranger):
        with pytest.raises(Refused):
            plain.register(gateway.endpoint, "eu_9.0")
    with pytest.raises(Refused, match=r"us_2 may not be called eu_1\.0"):
        us.register(gateway.endpoint, "eu_1.0")
    endpoint = eu.register(gateway.endpoint, "eu_1.0")
    with pytest.raises(Refused):
        stranger.dial(endpoint, "echo")
    assert us.dial(endpoint, "echo", 10)[1]["member"] == "eu_1"
    gateway.close()


# ---- certificates ----


def test_expired(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    issue(tmp_path / "c", ["eu"])
    issue(tmp_path / "c", ["us"], days=1e-7)
    eu, us = make("eu_1", of(tmp_path / "c", "eu")), make("us_2", of(tmp_path / "c", "us"))

    def expired() -> bool:
        with suppress(SecurityError):
            return not us.security.check()
        return True

    assert until(expired)
    with pytest.raises(SecurityError, match=r"us\.crt: its certificate has expired"):
        us.security.check()
    assert "it says that our certificate has expired" in refused(us, eu.endpoint)
    assert until(lambda: eu.refusal == "127.0.0.1: its certificate has expired")
    assert "its certificate has expired" in refused(eu, us.endpoint)
    assert until(lambda: us.refusal == "127.0.0.1: it says that our certificate has expired")
    assert capsys.readouterr().out.count("refused a connection: 127.0.0.1: its certificate has expired\n") == 1


def test_foreign(make: Make, certs: Path, tmp_path: Path) -> None:
    issue(tmp_path / "other", ["us"])
    eu, us = make("eu_1", of(certs, "eu")), make("us_2", of(tmp_path / "other", "us"))
    assert refused(us, eu.endpoint) == "its certificate is not of this run's authority"
    assert until(lambda: "it says that our certificate is not of its run's authority" in eu.refusal)
    # One that trusts our authority, with a certificate of its own.
    us.security = replace(us.security, authority=str(certs / "authority.crt"), revoked="")
    assert refused(us, eu.endpoint) == "it says that our certificate is not of its run's authority"
    assert until(lambda: eu.refusal == "127.0.0.1: its certificate is not of this run's authority")


def test_revoked_while_the_run_goes_on_and_certified_anew(make: Make, tmp_path: Path) -> None:
    directory = tmp_path / "c"
    issue(directory, ["eu", "us", "asia"])
    eu, us, asia = (make(f"{name}_1", of(directory, name)) for name in ("eu", "us", "asia"))
    assert us.dial(eu.endpoint, "echo", 10)
    Authority(directory).revoke("asia")
    Authority(directory).revoke("us")
    for one in (us, asia):
        assert refused(one, eu.endpoint) == "it says that our certificate is revoked"
        assert refused(eu, one.endpoint) == "its certificate is revoked"
    assert until(lambda: eu.refusal == "127.0.0.1: its certificate is revoked")
    with pytest.raises(SecurityError, match="revoked"):
        of(directory, "us").check()
    for file in ("us.crt", "us.key"):
        (directory / file).unlink()
    issue(directory, ["us"])
    us.security = of(directory, "us")
    assert us.dial(eu.endpoint, "echo", 10)  # the node was not started anew


def alive(connection: Connection) -> bool:
    """Whether the echo at its other end answers."""
    try:
        connection.send({"a": 1})
        return connection.receive()[0] == {"a": 1}
    except OSError:
        return False


def test_revocation_cuts_connections_that_stand_and_no_others(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory, copy = tmp_path / "c", tmp_path / "copy"
    issue(directory, ["eu", "us", "asia"])
    shutil.copytree(directory, copy)  # the others hear of a revocation at another time, or never
    eu, us, asia = make("eu_1", of(directory, "eu")), make("us_2", of(copy, "us")), make("asia_3", of(copy, "asia"))
    dialled, other, accepted = (a.dial(b.endpoint, "echo", 10)[0] for a, b in ((us, eu), (asia, eu), (eu, us)))
    issue(tmp_path / "foreign", ["us"])
    printed: list[str] = []

    def count(sentence: str) -> int:
        printed.append(capsys.readouterr().out)
        return "".join(printed).count(sentence)

    for n, data in enumerate(((tmp_path / "foreign" / "revoked.crl").read_bytes(), b"half a li")):
        (directory / "revoked.crl").write_bytes(data)
        assert until(lambda n=n: count("revoked.crl cannot be used") == n + 1)
        assert alive(dialled) and alive(other) and alive(accepted)
    (directory / "revoked.crl").write_bytes((copy / "revoked.crl").read_bytes())
    Authority(directory).revoke("us")
    assert until(lambda: not alive(dialled)) and until(lambda: not alive(accepted))
    assert alive(other) and count("cut a connection: its certificate is revoked") == 2
    assert refused(us, eu.endpoint) == "it says that our certificate is revoked"


def test_revocation_cuts_what_a_gateway_joins_and_a_tunnel_carries(make: Make, tmp_path: Path) -> None:
    directory, copy = tmp_path / "c", tmp_path / "copy"
    issue(directory, ["eu", "us"])
    shutil.copytree(directory, copy)
    gateway = Gateway("127.0.0.1", 0, of(directory, "gateway"))
    eu, us = make("eu_1", of(copy, "eu")), make("us_2", of(copy, "us"))
    through, _ = us.dial(eu.register(gateway.endpoint, "eu_1.0"), "echo", 10)
    with socket.create_server(("127.0.0.1", 0)) as behind:
        tunnel = Exit("127.0.0.1", 0, of(directory, "lighthouse"), behind.getsockname()[1])
        with Entrance("127.0.0.1", tunnel.port, of(copy, "us"), "us_2") as entrance:
            near = socket.create_connection(host_port(entrance.address), 10)
            far, _ = behind.accept()
            assert alive(through)
            Authority(directory).revoke("us")
            far.settimeout(10)
            assert far.recv(1) == b"" and near.recv(1) == b"" and until(lambda: not alive(through))
            near.close()
            far.close()
    tunnel.close()
    gateway.close()


def test_a_certificate_is_for_one_region_on_both_sides(make: Make, certs: Path) -> None:
    eu, false = make("eu_1", of(certs, "eu")), make("eu_2", of(certs, "us"))
    for dialler, dialled in ((false, eu), (eu, false)):
        said = refused(dialler, dialled.endpoint)
        assert said.startswith("the certificate is of ") and " the hello of eu_" in said
    assert until(lambda: eu.refusal == "127.0.0.1: the certificate is of us, the hello of eu_2")


def test_one_side_without_tls(make: Make, certs: Path) -> None:
    eu, us = make("eu_1", of(certs, "eu")), make("us_2", OPEN)
    assert refused(us, eu.endpoint) == "this run uses TLS: set elastic.tls"
    assert until(lambda: "it does not speak TLS" in eu.refusal)
    with pytest.raises(OSError):
        eu.dial(us.endpoint, "echo")
    assert us.refusals == 1


def test_files_that_are_gone_are_named_and_found_again(make: Make, tmp_path: Path) -> None:
    issue(tmp_path / "c", ["eu", "us"])
    eu, us = make("eu_1", of(tmp_path / "c", "eu")), make("us_2", of(tmp_path / "c", "us"))
    (tmp_path / "c" / "eu.key").rename(tmp_path / "eu.key")
    assert "eu.key" in refused(eu, us.endpoint)
    with pytest.raises(OSError):
        us.dial(eu.endpoint, "echo")
    assert until(lambda: "the certificates on this side cannot be used" in eu.refusal)
    (tmp_path / "eu.key").rename(tmp_path / "c" / "eu.key")
    assert us.dial(eu.endpoint, "echo", 10) and eu.dial(us.endpoint, "echo", 10)


# ---- a secret ----


def test_another_secret_and_none(make: Make, tmp_path: Path) -> None:
    eu, us = make("eu_1", secret(tmp_path, SECRET)), make("us_2", secret(tmp_path, SECRET + "x"))
    plain = make("asia_3", OPEN)
    for dialler, dialled in ((us, eu), (eu, us)):
        assert refused(dialler, dialled.endpoint) == "the run's secret is another one at the two ends"
        assert until(lambda dialled=dialled: "secret is another one" in dialled.refusal)
    assert "this run has a secret" in refused(plain, eu.endpoint)
    assert "it has a run secret, and here is none" in refused(eu, plain.endpoint)
    for node in (eu, us, plain):
        assert SECRET not in node.refusal


def test_who_asks_for_a_secret_has_to_know_it(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An accepting side that lets everybody in, but cannot prove itself."""
    from elastic import handshake

    eu, us = make("eu_1", secret(tmp_path, SECRET)), make("us_2", secret(tmp_path, SECRET))
    real = handshake._proof

    def proof(key: bytes, side: str, *more: list[str]) -> str:
        accepting = threading.current_thread().name == "door"
        return real(key[1:] if side == "answers" and accepting else key, side, *more)

    monkeypatch.setattr(handshake, "_proof", proof)
    assert refused(us, eu.endpoint) == "it does not know this run's secret"


def test_the_secret_is_nowhere_but_where_it_was_put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DILOCO_SECRET", SECRET)
    chosen = choose("", "", "eu")
    assert chosen.secured and chosen.secret() == SECRET.encode()
    assert SECRET not in json.dumps(asdict(chosen)) + repr(chosen)
    assert Security(**json.loads(json.dumps(asdict(chosen)))) == chosen
    assert (
        choose("", str(secret(tmp_path, "another one, as long").secret_from), "eu").secret() == b"another one, as long"
    )
    monkeypatch.setenv("DILOCO_SECRET", "short")
    with pytest.raises(SecurityError, match=r"\$DILOCO_SECRET holds fewer than 16 characters"):
        choose("", "", "eu").check()
    monkeypatch.delenv("DILOCO_SECRET")
    assert choose("", "", "eu") == OPEN


# ---- what can be set ----


def test_three_paths_and_a_directory(certs: Path, tmp_path: Path) -> None:
    paths = [str(certs / name) for name in ("authority.crt", "eu.crt", "eu.key", "revoked.crl")]
    assert choose(paths, "", "") == of(certs, "eu") and choose(paths[:3], "", "").check() == "eu"
    with pytest.raises(SecurityError, match=r"asia\.crt is not there"):
        of(certs, "asia")
    with pytest.raises(SecurityError, match="neither a directory nor"):
        choose(paths[:2], "", "eu")
    with pytest.raises(SecurityError, match="do not fit together"):
        choose([*paths[:2], str(certs / "us.key")], "", "eu").check()
    (tmp_path / "empty").touch()
    with pytest.raises(SecurityError, match="do not fit together or cannot be read"):
        choose([str(tmp_path / "empty"), *paths[1:]], "", "eu").check()
