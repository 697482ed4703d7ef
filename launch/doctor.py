"""`python -m launch.doctor +region=eu [key=value ...] [--json]`

Checks what a region needs before it trains, with the code that training uses: software, devices and their speed, disk and shared
memory, certificates or secret, store (credentials, conditional PUT, clock, rate), lighthouse, and the way to every other region:
ports both ways, round trip, rate both ways, clocks.

The others are doctors that run at the same time with the same run.store, and the members of a run that is under way, which is
not disturbed: their devices are compared as their last doctors found them. Start it in all regions at once.

    peers=N            other regions to wait for; default: elastic.start_regions - 1
    wait=60            seconds to wait for them
    seconds=2          of the measurement of a rate, 2 at most; half a second with a member of a live run
    --json             everything as one JSON object instead of a table

Everything else is config as diloco.train takes it. Exit code 1 if a check fails, 0 if all are ok or worth a warning only.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from typing import Any

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read as torch is imported

from ckpt.store import Store, StoreError
from diloco.composing import compose_config
from diloco.config import Config, store_url, validate, validate_anywhere
from diloco.errors import ConfigError
from diloco.fold import JournalError, State
from diloco.journal import Journal
from elastic.lighthouse import Lighthouse, LighthouseError, find_or_serve
from elastic.security import Security, region_of
from launch import checks
from launch.checks import FAIL, OK, WARN, Finding
from launch.peers import Meeting, Peer, examine
from launch.regions import split_own

OWN = {"peers": "", "wait": "60", "seconds": "2"}
LIVE_SECONDS = 0.5
"""Of a flood to a member of a live run."""


@dataclass(frozen=True)
class Request:
    cfg: Config
    peers: int
    wait: float
    seconds: float


def parse(argv: Sequence[str]) -> Request:
    """Raises ConfigError."""
    own, overrides = split_own(argv, OWN, "--json")
    cfg = compose_config(overrides)
    validate_anywhere(cfg, max(cfg.parallel.tp, 1))
    peers = _number("peers", own["peers"] or str(cfg.elastic.start_regions - 1))
    return Request(cfg, int(peers), _number("wait", own["wait"]), _number("seconds", own["seconds"]))


def _number(key: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e6:
        raise ConfigError(f"{key}={value} is not a number of 0 or more: set it to one")
    return number


def examine_all(request: Request) -> list[Finding]:
    """Every check; those that need what has failed are left out, with a word."""
    cfg = request.cfg
    host = f"{cfg.region.name}/{socket.gethostname()}"
    rates = [
        {"where": host, "device": str(d), "kind": checks.kind(d), "flops": checks.matmul(d, cfg.parallel.dtype)}
        for d in checks.devices(cfg)
    ]
    found = [checks.software()]
    facts = {"software": dict(found[0].values), "devices": rates}
    found += [checks.disk(cfg), checks.shared_memory()]
    proofs, security = checks.proofs(cfg)
    found.append(proofs)
    store = Store(store_url(cfg))
    stored = checks.store_findings(store)
    found += stored
    if security is None or any(finding.state == FAIL for finding in stored):
        found.append(Finding("peers", FAIL, "not looked for", "mend proofs and store first"))
        return [checks.slow(host, rates), *found]
    found.append(_config(cfg))
    finding, lighthouse = _lighthouse(cfg, security)
    found.append(finding)
    try:
        ways, peers, devices = _peers(request, store, security, facts)
    finally:
        if lighthouse is not None:
            lighthouse.shutdown()
    return [checks.slow(host, [*rates, *devices]), *found, *ways, *_versions(facts, peers)]


def _config(cfg: Config) -> Finding:
    try:
        validate(cfg, max(cfg.parallel.tp, 1))
    except ConfigError as error:
        sentence, _, remedy = str(error).rpartition(": ")
        return Finding("config", FAIL, sentence, remedy)
    return Finding("config", OK, "data, model and method fit")


def _lighthouse(cfg: Config, security: Security) -> tuple[Finding, Lighthouse | None]:
    """As a region that starts; one that had to be started lives as long as the doctor."""
    address = cfg.elastic.lighthouse
    try:
        started = find_or_serve(address, security=security, region=cfg.region.name)
    except LighthouseError as error:
        return Finding("lighthouse", FAIL, str(error), f"start it: python -m elastic.lighthouse, see {address}"), None
    how = "none is there yet: the first region on this machine starts one" if started else "it answers"
    return Finding("lighthouse", OK, f"{address}: {how}"), started


def _state(store: Store) -> State | None:
    """Of the run that is under way."""
    journal = Journal(store)
    journal.read()
    return journal.state


def _peers(
    request: Request, store: Store, security: Security, facts: dict[str, Any]
) -> tuple[list[Finding], list[Peer], list[dict[str, Any]]]:
    """What is found of them, them, and their devices."""
    try:
        meeting = Meeting(request.cfg, store, security, _state(store), facts)
    except (OSError, JournalError) as error:
        remedy = (
            "set elastic.host to an address of this machine, elastic.gateway to one that answers, run.store to a run"
        )
        return [Finding("peers", FAIL, f"cannot meet them: {error}", remedy)], [], []
    peers: list[Peer] = []
    try:
        if request.peers:
            print(
                f"waiting for {request.peers} other region(s), {request.wait:g} s at most", file=sys.stderr, flush=True
            )
        peers = meeting.find(request.peers, request.wait)
        found = [f for p in peers for f in examine(meeting, p, request.seconds if p.facts else LIVE_SECONDS)]
        names = meeting.regions(peers)
        if len(names) < request.peers:
            told = f"{len(names)} of {request.peers} came within {request.wait:g} s"
            found.append(
                Finding("peers", FAIL, told, "start the doctor in all regions at once, with the same run.store")
            )
        elif not peers:
            found.append(
                Finding("peers", WARN, "nobody else is there", "start it in all regions at once, with peers=N")
            )
        devices = [device for peer in peers for device in peer.facts.get("devices", [])]
        return found, peers, [*devices, *meeting.remembered(peers)]
    except StoreError as error:
        return [Finding("peers", FAIL, str(error), "see to it that run.store stays reachable")], peers, []
    finally:
        meeting.close(peers)


def _versions(facts: dict[str, Any], peers: Sequence[Peer]) -> list[Finding]:
    """What differs in a version's first two numbers."""
    found = []
    for peer in peers:
        theirs = peer.facts.get("software", {})
        pairs = [(name, mine, theirs.get(name, mine)) for name, mine in facts["software"].items()]
        odd = [f"{name} {b} there, {a} here" for name, a, b in pairs if a.split(".")[:2] != b.split(".")[:2]]
        if odd:
            name = f"peer {region_of(peer.member)}"
            found.append(Finding(name, WARN, ", ".join(odd), "install the same versions in all regions"))
    return found


def table(findings: Sequence[Finding]) -> str:
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<4}  {finding.check:<{width}}  {finding.found}")
        if finding.remedy:
            lines.append(f"{'':<6}{'':<{width}}  → {finding.remedy}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    as_json, rest = "--json" in argv, [text for text in argv if text != "--json"]
    try:
        request = parse(rest)
        Store(store_url(request.cfg))
    except (ConfigError, StoreError) as error:
        print(f"launch.doctor: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    with redirect_stdout(sys.stderr):  # what ports say of whom they refuse
        findings = examine_all(request)
    failed = any(finding.state == FAIL for finding in findings)
    if as_json:
        print(
            json.dumps({"region": request.cfg.region.name, "ok": not failed, "checks": [asdict(f) for f in findings]})
        )
    else:
        print(table(findings))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.stdout.flush()
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a daemon thread inside a lighthouse's call would abort the interpreter's end
