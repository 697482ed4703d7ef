"""S3 by obstore, which is optional: s3fs moves the same bytes at several times the CPU time, all of it in one thread.

Credentials, region and endpoint are those that s3fs finds: botocore's, from the environment, the files in ~/.aws or the
machine. What obstore cannot do like s3fs is left to s3fs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fsspec.config import conf

if TYPE_CHECKING:
    from obstore.store import S3Credential

SWITCH = "CKPT_S3_CLIENT"
"""Environment variable: s3fs, where obstore is not wanted."""
ATTEMPTS = 5
"""Of a request, unless AWS_MAX_ATTEMPTS or ~/.aws/config say otherwise."""
PATIENCE = timedelta(seconds=60)
"""No try of a request begins later than this after the first one."""
CREDENTIALS = timedelta(minutes=5)
"""How long credentials are used before botocore is asked for them again; it renews them in time."""

_PLAIN = re.compile(r"[A-Za-z0-9_.=+@/-]*")  # obstore would percent-encode others


def backend(url: str, root: str) -> S3 | None:
    """None: s3fs is to do it. root: bucket/prefix."""
    scheme = url.partition("://")[0]
    told_s3fs = conf.get("s3") or conf.get("s3a")  # fsspec's own files and variables
    if scheme != "s3" or told_s3fs or os.environ.get(SWITCH) == "s3fs" or find_spec("obstore") is None:
        return None
    return S3(root) if _PLAIN.fullmatch(root) else None


class S3:
    """A bucket, or a folder in one. Writes are single requests, which leave nothing behind: objects have at most 5 GB."""

    def __init__(self, root: str):
        self._bucket, _, prefix = root.strip("/").partition("/")
        self._root = f"{prefix}/" if prefix else ""
        self._made: tuple[int, Any] | None = None

    def create(self, key: str, data: bytes) -> None:
        self._ask("put", key, data, mode="create", use_multipart=False)

    def write(self, key: str, data: bytes) -> None:
        self._ask("put", key, data, use_multipart=False)

    def read(self, key: str, start: int, stop: int | None) -> memoryview:
        if stop is not None:
            return memoryview(self._ask("get_range", key, start=start, end=stop))
        with _as_oserror():
            options = {"range": {"offset": start}} if start else None
            return memoryview(self._ask("get", key, options=options).bytes())

    def size(self, key: str) -> int:
        return int(self._ask("head", key)["size"])

    def delete(self, key: str) -> None:
        self._ask("delete", key)

    def find(self, folder: str) -> Iterator[str]:
        return (key for key, _ in self.modified(folder))

    def modified(self, folder: str) -> Iterator[tuple[str, float]]:
        with _as_oserror():
            for batch in self._ask("list", folder):
                for meta in batch:
                    yield meta["path"].removeprefix(self._root), meta["last_modified"].timestamp()

    def _ask(self, verb: str, key: str, *values: Any, **options: Any) -> Any:
        import obstore

        with _as_oserror():
            return getattr(obstore, verb)(self._store, (self._root + key).rstrip("/"), *values, **options)

    def sweep(self) -> None:
        pass

    @property
    def _store(self) -> Any:
        """Of this process, made when it is first needed: its threads do not survive a fork."""
        if self._made is None or self._made[0] != os.getpid():
            self._made = os.getpid(), _open(self._bucket)
        return self._made[1]


@contextmanager
def _as_oserror() -> Iterator[None]:
    """What obstore raises, without the several lines about its own insides; absent objects are FileNotFoundError already."""
    from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError

    try:
        yield
    except BaseError as error:
        kind = PermissionError if isinstance(error, PermissionDeniedError | UnauthenticatedError) else OSError
        raise kind(str(error).partition("\n\nDebug source")[0]) from error


def _open(bucket: str) -> Any:
    import botocore.session
    from obstore.store import S3Store

    session = botocore.session.Session()
    client = session.create_client("s3", region_name=session.get_config_variable("region") or "us-east-1")
    endpoint = str(client.meta.endpoint_url)
    credentials = session.get_credentials()
    if credentials is None:
        raise PermissionError(
            "no AWS credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws/credentials"
        )

    def provide() -> S3Credential:
        now = credentials.get_frozen_credentials()
        until = datetime.now(UTC) + CREDENTIALS
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": until,
        }

    attempts = ATTEMPTS
    with suppress(TypeError, ValueError):  # None
        attempts = int(session.get_config_variable("max_attempts"))
    options: Any = {"allow_http": endpoint.startswith("http://"), "timeout": "30 minutes", "read_timeout": "60 seconds"}
    if bundle := session.get_config_variable("ca_bundle"):
        options["root_certificate"] = Path(bundle).read_bytes()
    return S3Store(
        bucket,
        region=client.meta.region_name,
        endpoint=endpoint,
        virtual_hosted_style_request=False,
        credential_provider=provide,
        client_options=options,
        retry_config={"max_retries": max(attempts - 1, 0), "retry_timeout": PATIENCE},
    )
