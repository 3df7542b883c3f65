"""Object stores: opened with time limits, tried before anything starts, and what to say of one that does not work."""

from __future__ import annotations

import os
import re
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import pyarrow as pa
from pyarrow import fs

from data_prep.errors import UserError
from dbd_dist.runtime.bucket.address import ENDPOINTS, endpoint_of, shown

OBJECT_STORES = ("s3", "gcs", "abfs")
"""pyarrow's names of file systems that have no folders, and where a file appears when it is whole."""
WANTED = "a bucket that you may list, read, write and delete in"
CHECK_LIMIT_S = 13.0
"""How long the first contact may take: credentials and names are looked up without limits of ours."""

_FAILURES = (
    (r"NO_SUCH_BUCKET|Bucket '.*' not found|specified bucket does not exist", "there is no such bucket",
     "make the bucket, or correct its name"),
    (r"INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|EXPIRED_TOKEN|No credentials|"
     r"UNAUTHENTICATED|HTTP status 401", "the credentials are missing or not accepted",
     "set them as the store's own tools take them (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws)"),
    (r"ACCESS_DENIED|PERMISSION_DENIED|HTTP status 403|AuthorizationPermissionMismatch", "access is denied",
     "get the right to list, read, write and delete there"),
    (r"curlCode|NETWORK_CONNECTION|RESOURCE_NOT_FOUND.*No response body|no answer", "the server cannot be reached",
     f"check the network, and the endpoint if it is not the public one ({ENDPOINTS[1]})"),
)  # fmt: skip
"""What pyarrow's messages say, in words, and a hint. The first that fits."""


@dataclass(frozen=True)
class Place:
    """An address, opened."""

    system: fs.FileSystem
    base: str
    """Bucket and prefix, as the file system takes them."""


def open_address(address: str, *, request_s: float = 10.0, attempts: int = 2) -> Place:
    """The file system of an address that pyarrow knows (also file: and hdfs:); nothing is sent yet, as a rule.

    Args:
        request_s: an answer that does not move for so long is given up.
        attempts: of a request.

    Raises:
        OSError, ValueError, pa.ArrowException: it is no address, or its store does not answer.
    """
    parts = urlsplit(address)
    if parts.scheme == "s3":
        return _open_s3(address, request_s, attempts)
    if parts.scheme in ("gs", "gcs"):  # its own limit is 15 minutes
        limited = {"retry_limit_seconds": f"{attempts * request_s:.0f}"} | dict(parse_qsl(parts.query))
        address = parts._replace(query=urlencode(limited)).geturl()
    system, base = fs.FileSystem.from_uri(address)
    return Place(system, base)


def _open_s3(address: str, request_s: float, attempts: int) -> Place:
    """pyarrow's own `from_uri` sets neither limits nor, from the variable, a scheme."""
    parts = urlsplit(address)
    options: dict[str, Any] = dict(parse_qsl(parts.query))
    unknown = options.keys() - {"region", "scheme", "endpoint_override"}
    if unknown:
        raise ValueError(f"options that are not known: {', '.join(sorted(unknown))}")
    bucket = parts.netloc.rpartition("@")[2]
    if parts.username:
        options |= {"access_key": unquote(parts.username), "secret_key": unquote(parts.password or "")}
    endpoint = endpoint_of(address)
    if "endpoint_override" not in options and endpoint is not None:
        scheme, colon, server = endpoint.rpartition("://")
        options |= {"endpoint_override": server.strip("/"), "scheme": scheme if colon else "https"}
    custom = options.get("endpoint_override")
    if "scheme" in options and options["scheme"] not in ("http", "https"):
        raise ValueError(f"{options['scheme']!r} is no scheme of an endpoint, http:// and https:// are")
    if "region" not in options:
        named = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if named is None and custom is None:
            named = fs.resolve_s3_region(bucket)  # AWS refuses requests to another region than the bucket's
        options["region"] = named or "us-east-1"
    system = fs.S3FileSystem(
        **options,
        connect_timeout=3.0,
        request_timeout=request_s,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
    )
    return Place(system, f"{bucket}{parts.path}".rstrip("/"))


def check(address: str) -> None:
    """Write a small file there, list it, read it back and remove it, within `CHECK_LIMIT_S`.

    Raises:
        UserError: the store cannot be reached, or does not allow that.
    """
    within(CHECK_LIMIT_S, lambda: _try(address), address)


def _try(address: str) -> None:
    place = open_address(address, request_s=5.0, attempts=2)
    path = f"{place.base}/.mark-{uuid.uuid4().hex}"
    with place.system.open_output_stream(path) as file:
        file.write(b"dbd")
    list_place(place)
    with place.system.open_input_stream(path) as file:
        if file.read() != b"dbd":
            raise OSError("it does not give back what was written")
    place.system.delete_file(path)


def list_place(place: Place) -> None:
    """List what is directly there.

    Raises:
        OSError, pa.ArrowException: that is not allowed, or there is no answer.
    """
    place.system.get_file_info(fs.FileSelector(place.base, allow_not_found=True))


def within(limit_s: float, action: Callable[[], Any], address: str) -> Any:
    """Call `action`; one that takes longer is left behind, in a thread that ends with the process.

    Raises:
        UserError: it failed, or took too long.
    """
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((action(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=body, name="address", daemon=True)
    thread.start()
    thread.join(limit_s)
    value, error = outcome[0] if outcome else (None, OSError(f"no answer within {limit_s:.0f} s"))
    if isinstance(error, OSError | ValueError | pa.ArrowException):
        raise explained(address, error) from error
    if error is not None:
        raise error
    return value


def explained(address: str, error: Exception) -> UserError:
    """The message for an address that does not work."""
    reason = reason_of(error)
    hint = next((hint for pattern, _, hint in _FAILURES if re.search(pattern, str(error))), None)
    server = endpoint_of(address)
    at = f" at {server}" if server else ""
    return UserError(f"the storage cannot be used{at}: {reason}", where=shown(address), expected=WANTED, hint=hint)


def reason_of(error: Exception) -> str:
    """Why, in a few words, with the first line of what pyarrow said."""
    said = (str(error).splitlines() or [type(error).__name__])[0]
    known = next((words for pattern, words, _ in _FAILURES if re.search(pattern, str(error))), None)
    said = re.sub(r" \(Request ID: .*?\)|^.*?(?=AWS Error )", "", said)
    return said if known is None else f"{known} ({said})"
