"""The WAN lab's links as arithmetic, and the config group."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diloco.errors import ConfigError
from launch.forwarder import PREFIX, on_the_wire
from launch.links import HUB, Link, Network, WanConfig
from launch.wan import load_wan, split_wan

# ---- links ----


def test_a_link_serialises_in_virtual_time() -> None:
    link = Link(rate=8000.0, limit=0.25)  # a byte a millisecond
    assert link.depart(10.0, 100) == pytest.approx(10.1)
    assert link.depart(10.02, 100) == pytest.approx(10.2), "waits for the first"
    assert link.depart(10.02, 100) == pytest.approx(10.3)
    assert link.depart(10.02, 100) is None, "would wait 0.28 s"
    assert link.depart(10.06, 100) == pytest.approx(10.4)
    assert link.depart(11.0, 100) == pytest.approx(11.1), "idle since"
    link.set(80000.0, 0.25)
    assert link.depart(12.0, 100) == pytest.approx(12.01)


@given(
    st.lists(st.tuples(st.floats(0, 0.01), st.integers(40, 1500)), min_size=1, max_size=200),
    st.floats(0, 0.2),
    st.floats(0, 0.9),
)
def test_packets_stay_in_order_in_time_and_none_goes_missing(
    packets: list[tuple[float, int]], jitter: float, loss: float
) -> None:
    config = WanConfig(up=1e6, down=2e6, rtt=0.1, jitter=jitter, loss=loss, queue=0.05)
    path = Network(config, ["eu", "us"]).paths["eu", "us"]
    now, reached, out = 0.0, [0.0], [0.0]
    for gap, size in packets:
        now += gap
        arrival = path.send(now, size)
        if arrival is None:
            continue
        assert arrival >= max(reached[-1], now + size * 8e-6 + max(0.0, 0.05 - jitter / 2) - 1e-9)
        reached.append(arrival)
        left = path.arrive(arrival, size)
        if left is not None:
            assert left >= max(out[-1], arrival + size * 4e-6 - 1e-9)
            out.append(left)
    counts = path.counts
    assert counts.delivered == len(out) - 1 and counts.cut == 0
    assert counts.delivered + counts.lost + counts.dropped == len(packets)
    assert out[-1] <= now + 0.05 + 0.05 + 0.1 + 0.05 + 0.2 + 1500 * 12e-6, "queues are bounded"


def binomial(share: float, trials: int) -> tuple[float, float]:
    """The normal approximation's 95 % interval of the count."""
    spread = 1.96 * math.sqrt(trials * share * (1 - share))
    return trials * share - spread, trials * share + spread


def test_loss_is_what_was_asked_for_and_the_seed_decides_which() -> None:
    def fates(seed: int, a: str, b: str) -> list[bool]:
        path = Network(WanConfig(loss=0.01, seed=seed), ["eu", "us"]).paths[a, b]
        return [path.send(float(i), 1000) is None for i in range(20000)]

    first = fates(0, "eu", "us")
    low, high = binomial(0.01, len(first))
    assert low < sum(first) < high
    assert first == fates(0, "eu", "us") and first not in (fates(1, "eu", "us"), fates(0, "us", "eu"))


def rates(network: Network) -> dict[str, float]:
    """Of each region's uplink, and of each pair's own link."""
    own = {f"{a}>{b}": path.cap.rate for (a, b), path in network.paths.items() if path.cap}
    return {name: links["up"].rate for name, links in network.links.items()} | own


def test_cuts_and_slow_links_add_up_and_are_undone() -> None:
    network = Network(WanConfig(up=100.0, regions={"us": {"down": 50.0}}), ["eu", "us", "asia"])

    def cut() -> set[str]:
        return {f"{a}{b}" for (a, b), path in network.paths.items() if path.cut}

    network.change("cut", ["eu", "us"])
    assert cut() == {"euus", "useu"}
    network.change("cut", ["us"])
    assert cut() == {"euus", "useu", "usasia", "asiaus", "ushub", "hubus"}
    network.change("restore", ["us", "eu"])
    assert "euus" in cut(), "us itself is still cut"
    network.change("cut", ["eu", "asia"])
    network.change("restore", ["us"])
    assert cut() == {"euasia", "asiaeu"}
    network.change("restore", [])
    assert cut() == set()

    network.change("slow", ["eu"], 0.1)
    network.change("slow", ["eu", "us"], 0.5)
    assert rates(network) == {"eu": pytest.approx(10), "us": 100, "asia": 100, "eu>us": 25, "us>eu": 50}
    network.change("unslow", ["eu", "us"])
    assert rates(network) == {"eu": pytest.approx(10), "us": 100, "asia": 100}
    network.change("unslow", ["eu"])
    assert rates(network) == {"eu": 100, "us": 100, "asia": 100}


@pytest.mark.parametrize(
    ("what", "names", "share", "sentence"),
    [
        ("cut", ["mars"], 1, "cut mars: there is no such region, only eu, us, hub"),
        ("cut", [], 1, "cut: name one region or two"),
        ("cut", ["eu", "eu"], 1, "cut eu eu: name one region or two"),
        ("slow", ["eu"], 0.0, "slow eu 0: give a share of the rate above 0 and up to 1"),
        ("slow", ["hub"], 0.5, "slow hub: its links have no rate"),
        ("break", ["eu"], 1, "break is not a command: write cut, restore"),
    ],
)
def test_bad_commands_are_one_sentence(what: str, names: list[str], share: float, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        Network(WanConfig(), ["eu", "us"]).change(what, names, share)


# ---- config ----


def test_the_config_group_and_its_overrides() -> None:
    config, rest = split_wan(
        [
            "a.b=1",
            "+wan=global",
            "wan.up=50mbit",
            "wan.regions.us.down=1.5gbit",
            "wan.pairs.eu-us.loss=0.5%",
            "wan.pairs.us-asia=1s",
            "wan.queue=256kb",
            "wan.mtu=9000",
        ],
        ["eu", "us", "asia"],
    )
    assert rest == ["a.b=1"] and config is not None
    assert [config.rate("us", d) for d in ("up", "down")] == [50e6, 1.5e9]
    assert config.pair("us", "eu") == {"rtt": 0.09, "jitter": 0.002, "loss": 0.005}
    assert config.pair("asia", "us")["rtt"] == 1.0 and config.pair("eu", "mars")["rtt"] == 0.15
    assert config.limit("eu", ["eu", "us"], 50e6) == pytest.approx(256e3 * 8 / 50e6) and config.mtu == 9000
    assert split_wan(["a=1"], ["eu"]) == (None, ["a=1"])


def test_the_queue_holds_the_longest_round_trip_by_default() -> None:
    config = load_wan("global")
    assert config.limit("eu", ["eu", "us", "asia"], 1e6) == 0.23 and config.limit("eu", ["eu", "us"], 1e6) == 0.1


def test_ready_made_links() -> None:
    assert load_wan("lan").rtt == 0.001
    assert 0.08 <= load_wan("atlantic").pair("eu", "us")["rtt"] <= 0.1
    assert (load_wan("home").up, load_wan("home").down) == (110e6, 500e6)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        ("+wan=atlantik", "wan=atlantik is not there: set it to one of atlantic, global, home, lan"),
        ("wan.up=3mbit", "wan.up=3mbit needs a WAN to change: add +wan=atlantic"),
        ("+wan=lan wan.up=3", "wan.up=3 cannot be: set it to a rate above 0, such as 200mbit"),
        ("+wan=lan wan.regions.eu.up=0mbit", "wan.regions.eu.up=0mbit cannot be: set it to a rate"),
        ("+wan=lan wan.loss=100%", "wan.loss=100% cannot be: set it to a share of the packets"),
        ("+wan=lan wan.rtt=-3ms", "wan.rtt=-3ms cannot be: set it to a time"),
        (
            "+wan=lan wan.queue=3furlong",
            "wan.queue=3furlong cannot be: set it to a time such as 100ms, a size such as 256kb, or auto",
        ),
        ("+wan=lan wan.mtu=1500.5", "wan.mtu=1500.5 cannot be"),
        ("+wan=lan wan.mtu=100", "wan.mtu=100 cannot be"),
        ("+wan=lan wan.subnet=10.1", "wan.subnet=10.1 is not a /24"),
        ("+wan=lan wan.upp=3mbit", "unknown key wan.upp: did you mean wan.up?"),
        ("+wan=lan wan.rtt.eu=3ms", "unknown key wan.rtt.eu: did you mean wan.rtt?"),
        ("+wan=lan wan.pairs=3", "wan.pairs=3 is not a mapping: write it like {eu-us: 80ms}"),
        ("+wan=lan wan.pairs.eu-us.los=3", "wan.pairs.eu-us.los changes no link of this run"),
        ("+wan=lan wan.regions.eu=3", "wan.regions.eu=3 does not fit: write it like {us: {up: 50mbit}}"),
        ("+wan=lan wan.regions.eu.top=3", "wan.regions.eu.top changes no link of this run"),
        ("+wan=lan wan.pairs.eu-mars=3ms", "wan.pairs.eu-mars changes no link of this run: its regions are eu, us"),
    ],
)
def test_a_bad_config_is_one_sentence(overrides: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        split_wan(overrides.split(), ["eu", "us"])
    assert str(error.value).startswith(sentence) and "\n" not in str(error.value)


def test_bad_numbers_from_python_are_one_sentence() -> None:
    for values, sentence in [
        ({"up": -1.0}, "wan.up=-1.0 cannot be"),
        ({"loss": float("nan")}, "wan.loss=nan cannot be"),
        ({"pairs": {"eu-us": {"rt": 1.0}}}, "wan.pairs.eu-us has the unknown key rt: it takes rtt, jitter, loss"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            WanConfig(**values)  # type: ignore[arg-type]


def test_the_name_of_the_hub_is_refused() -> None:
    with pytest.raises(ConfigError, match="regions names hub, which is the launcher's own place"):
        split_wan(["+wan=lan"], ["eu", HUB])


def test_segments_that_travel_together_count_as_what_they_are_on_the_wire() -> None:
    tcp = bytes(12) + bytes([8 << 4]) + bytes(19)  # a header with 12 bytes of options
    packet = bytes(20) + tcp + bytes(3500)
    assert on_the_wire(PREFIX.pack(0, 0, 0, 0, 0, 0) + packet) == (3552, 1)
    assert on_the_wire(PREFIX.pack(1, 1, 52, 1000, 20, 16) + packet) == (3500 + 4 * 52, 4)
