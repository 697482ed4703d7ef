"""`python -m launch.certs DIR [--days N] eu us asia`: a run authority in DIR, and a certificate and key for each region.

Once more with other names adds regions; `python -m launch.certs DIR --revoke eu` puts eu's certificate on the revocation list.
Each region needs authority.crt, revoked.crl, NAME.crt and NAME.key, and `elastic.tls` set to their directory; a lighthouse or
a gateway on another host takes the certificate of its name, which is always made. authority.key stays with who runs this.
"""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from diloco.errors import ConfigError
from elastic.security import AUTHORITY, REGION_NAME, REVOKED

SERVICES = ("lighthouse", "gateway")
"""What else shows a certificate."""
DAYS = 365
AUTHORITY_DAYS = 3650
SKEW = dt.timedelta(hours=1)
"""Certificates are valid from so long ago, for machines whose clocks are behind."""


class Authority:
    """The run authority in a directory. Raises ConfigError if what is there is not one."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            self.certificate = x509.load_pem_x509_certificate((directory / AUTHORITY).read_bytes())
            key = serialization.load_pem_private_key((directory / "authority.key").read_bytes(), None)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{directory} holds no run authority ({error}): name the directory in which launch.certs made it"
            ) from error
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != self.certificate.public_key():
            raise ConfigError(f"{directory}/authority.key is not the key of authority.crt: put the right one there")
        self.key = key

    @classmethod
    def create(cls, directory: Path) -> Authority:
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"diloco run {x509.random_serial_number():x}"[:30])
        builder = _builder(name, name, key, AUTHORITY_DAYS)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        builder = builder.add_extension(_usage(sign=True), critical=True)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        certificate = builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())
        _write_new(directory / "authority.key", _private(key))
        _write_new(directory / AUTHORITY, certificate.public_bytes(serialization.Encoding.PEM))
        authority = cls(directory)
        authority._publish([])
        return authority

    def certify(self, name: str, days: float) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        builder = _builder(_name(name), self.certificate.subject, key, days)
        usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        builder = builder.add_extension(_usage(sign=False), critical=True).add_extension(usage, critical=False)
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, critical=False).add_extension(self._issuer(), critical=False)
        certificate = builder.sign(self.key, hashes.SHA256())
        _write_new(self.directory / f"{name}.key", _private(key))
        _write_new(self.directory / f"{name}.crt", certificate.public_bytes(serialization.Encoding.PEM))

    def revoke(self, name: str) -> None:
        """Puts the certificate in NAME.crt on the list. Raises ConfigError if it is none of this authority's."""
        path = self.directory / f"{name}.crt"
        try:
            certificate = x509.load_pem_x509_certificate(path.read_bytes())
            certificate.verify_directly_issued_by(self.certificate)
            known = list(x509.load_pem_x509_crl((self.directory / REVOKED).read_bytes()))
        except (OSError, ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(
                f"--revoke {name}: {path} is no certificate of this authority ({error or 'another has signed it'}): name a "
                "region whose certificate is there"
            ) from error
        if certificate.serial_number in [entry.serial_number for entry in known]:
            raise ConfigError(f"--revoke {name}: {path} is revoked already: name another region")
        now = dt.datetime.now(dt.UTC)
        entry = x509.RevokedCertificateBuilder().serial_number(certificate.serial_number).revocation_date(now)
        self._publish([*known, entry.build()])

    def _publish(self, revoked: list[x509.RevokedCertificate]) -> None:
        """The list does not run out before its authority: a forgotten file must not stop a run."""
        builder = x509.CertificateRevocationListBuilder().issuer_name(self.certificate.subject)
        builder = builder.last_update(dt.datetime.now(dt.UTC) - SKEW)
        builder = builder.next_update(self.certificate.not_valid_after_utc).add_extension(
            self._issuer(), critical=False
        )
        builder = builder.add_extension(x509.CRLNumber(len(revoked)), critical=False)
        for entry in revoked:
            builder = builder.add_revoked_certificate(entry)
        data = builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        written = self.directory / f".{REVOKED}-{os.getpid()}"
        _write_new(written, data)
        written.replace(self.directory / REVOKED)  # at once: regions may be reading it

    def _issuer(self) -> x509.AuthorityKeyIdentifier:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, days: float
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _usage(sign: bool) -> x509.KeyUsage:
    """sign: certificates and revocation lists, and nothing else."""
    others = dict.fromkeys(
        [
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ],
        False,
    )
    return x509.KeyUsage(digital_signature=not sign, key_cert_sign=sign, crl_sign=sign, **others)


def _private(key: ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write_new(path: Path, data: bytes) -> None:
    """Raises FileExistsError rather than overwrite. Nobody else may read it, from the first moment on."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)


def issue(directory: Path, names: Sequence[str], days: float = DAYS) -> None:
    """An authority unless there is one, and a certificate for each name. Raises ConfigError before anything is written."""
    if days <= 0 or days > AUTHORITY_DAYS:
        raise ConfigError(f"--days {days:g} is not between 0 and {AUTHORITY_DAYS}: set a validity in days")
    for name in names:
        if (
            not REGION_NAME.fullmatch(name)
            or len(name) > 64
            or name in (*SERVICES, "authority")
            or names.count(name) > 1
        ):
            raise ConfigError(
                f"{name} cannot be a region: name each once, with up to 64 letters, digits, . and -, and not authority, "
                f"{' or '.join(SERVICES)}"
            )
        for path in (directory / f"{name}.crt", directory / f"{name}.key"):
            if path.exists():
                raise ConfigError(
                    f"{path} is there already: move {name}.crt and {name}.key away for new ones (and revoke the old ones first "
                    "if they must not be used any more)"
                )
    if (directory / AUTHORITY).exists() or (directory / "authority.key").exists():
        authority, services = Authority(directory), tuple[str, ...]()
    else:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        authority, services = Authority.create(directory), SERVICES
    for name in (*services, *names):
        authority.certify(name, days)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch.certs", description=__doc__)
    parser.add_argument("dir", type=Path, metavar="DIR")
    parser.add_argument("regions", nargs="*", metavar="REGION")
    parser.add_argument("--days", type=float, default=DAYS, help=f"validity of the certificates (default {DAYS})")
    parser.add_argument("--revoke", action="append", default=[], metavar="REGION")
    options = parser.parse_intermixed_args(argv)  # a name may follow an option
    try:
        if not options.regions and not options.revoke:
            raise ConfigError("no region is named: write python -m launch.certs DIR eu us, or --revoke eu")
        if options.regions:
            issue(options.dir, options.regions, options.days)
            print(f"{options.dir}: {', '.join(options.regions)} certified for {options.days:g} days")
        for name in options.revoke:
            Authority(options.dir).revoke(name)
            print(f"{options.dir / REVOKED}: {name} added; copy it to every region, which reads it anew by itself")
    except (ConfigError, OSError) as error:
        print(f"launch.certs: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
