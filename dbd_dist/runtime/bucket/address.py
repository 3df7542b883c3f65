"""Addresses of object stores, told from folders."""

from __future__ import annotations

import os
import re
from urllib.parse import parse_qsl, urlsplit

from data_prep.errors import UserError

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss")
EXPECTED = "a folder, or s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/PREFIX"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Variables with the server of S3, as AWS's own tools read them; pyarrow wants it without its scheme."""


def address_of(storage: str | os.PathLike[str]) -> str | None:
    """The address that a storage names; None for a folder.

    pathlib makes s3:/BUCKET of s3://BUCKET: both are taken.

    Raises:
        UserError: a scheme that is not known, or no bucket.
    """
    known = "|".join(SCHEMES)  # s3: is what pathlib leaves of s3://
    match = re.match(rf"([A-Za-z][A-Za-z0-9+.-]+(?=:/)|(?:{known})(?=:$)):/*(.*)", os.fspath(storage), re.DOTALL)
    if match is None:
        return None
    scheme, rest = match[1].lower(), match[2]
    address = f"{scheme}://{rest.rstrip('/')}"
    if scheme not in SCHEMES:
        raise UserError(f"the scheme {scheme} is not known", where=address, expected=EXPECTED)
    if not urlsplit(address).netloc or not rest.isprintable():
        raise UserError("no bucket is named", where=address, expected=EXPECTED)
    return address


def endpoint_of(address: str) -> str | None:
    """The server that an address of S3 is looked for at; None for the public one, and for other stores."""
    parts = urlsplit(address)
    if parts.scheme != "s3":
        return None
    given = dict(parse_qsl(parts.query)).get("endpoint_override")
    return given or next((os.environ[name] for name in ENDPOINTS if os.environ.get(name)), None)


def shown(address: str) -> str:
    """An address for people: without a password that it may hold."""
    parts = urlsplit(address)
    if parts.scheme != "s3" or "@" not in parts.netloc:  # before the @ of Azure's is the container
        return address
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
