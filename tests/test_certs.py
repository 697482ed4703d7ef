"""`python -m launch.certs`: what it makes, and that it overwrites nothing."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography import x509

from elastic.security import SecurityError, choose
from launch.certs import main


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_an_authority_and_its_regions_and_more_of_them_later(tmp_path: Path) -> None:
    directory = tmp_path / "certs"
    assert main([str(directory), "eu", "us"]) == 0
    before = files(directory)
    services = [f"{name}.{kind}" for name in ("eu", "us", "lighthouse", "gateway") for kind in ("crt", "key")]
    assert sorted(before) == sorted(["authority.crt", "authority.key", "revoked.crl", *services])
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in directory.iterdir())
    assert main([str(directory), "--days", "2", "asia"]) == 0
    after = files(directory)
    assert {name: after[name] for name in before} == before and after.keys() - before.keys() == {"asia.crt", "asia.key"}
    assert [choose(str(directory), "", name).check() for name in ("eu", "us", "asia", "lighthouse")] == [
        "eu",
        "us",
        "asia",
        "lighthouse",
    ]
    asia = x509.load_pem_x509_certificate(after["asia.crt"])
    assert (asia.not_valid_after_utc - asia.not_valid_before_utc).days == 2
    assert "PRIVATE" not in before["eu.crt"].decode() + before["revoked.crl"].decode()


def test_revocations_add_up(tmp_path: Path) -> None:
    assert main([str(tmp_path), "eu", "us", "asia"]) == 0
    assert main([str(tmp_path), "--revoke", "eu"]) == 0 and main([str(tmp_path), "--revoke", "us"]) == 0
    for name in ("eu", "us"):
        with pytest.raises(SecurityError, match="its certificate is revoked"):
            choose(str(tmp_path), "", name).check()
    assert choose(str(tmp_path), "", "asia").check() == "asia"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["eu"], ["eu.crt is there already", "move"]),
        (["asia", "us"], ["us.crt is there already"]),
        (["as_ia"], ["as_ia cannot be a region"]),
        (["lighthouse"], ["lighthouse cannot be a region"]),
        (["../asia"], ["../asia cannot be a region"]),
        (["asia", "asia"], ["asia cannot be a region", "each once"]),
        (["asia", "--days", "0"], ["--days 0 is not between"]),
        (["--revoke", "asia"], ["--revoke asia", "asia.crt", "name a region"]),
        (["--revoke", "authority.key"], ["--revoke authority.key"]),
        ([], ["no region is named"]),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]
) -> None:
    assert main([str(tmp_path), "eu", "us"]) == 0
    before = files(tmp_path)
    capsys.readouterr()
    assert main([str(tmp_path), *arguments]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and all(part in said.err for part in parts), said.err
    assert said.out == "" and files(tmp_path) == before


def test_a_directory_without_the_authoritys_key_certifies_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path), "eu"]) == 0
    (tmp_path / "authority.key").unlink()
    before = files(tmp_path)
    assert main([str(tmp_path), "us"]) == 2 and "holds no run authority" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_a_certificate_of_another_authority_is_not_revoked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "a"), "eu"]) == 0 and main([str(tmp_path / "b"), "us"]) == 0
    (tmp_path / "a" / "us.crt").write_bytes((tmp_path / "b" / "us.crt").read_bytes())
    before = files(tmp_path / "a")
    assert main([str(tmp_path / "a"), "--revoke", "us"]) == 2
    assert "no certificate of this authority" in capsys.readouterr().err and files(tmp_path / "a") == before
