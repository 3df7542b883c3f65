"""An S3-compatible server (moto's) in a process of its own, for tests."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from pyarrow import fs

SERVE = "import sys; from moto.server import main; main(sys.argv[1:])"
KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_EC2_METADATA_DISABLED": "true"}
BUCKET = "bucket"


class Server:
    """Started on a free port, or on the one given, with an empty bucket; takes any credentials."""

    def __init__(self, *, port: int | None = None):
        self.port = port or free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-c", SERVE, "-H", "127.0.0.1", "-p", str(self.port)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        end = time.monotonic() + 60
        while not answers(self.port):
            assert self.process.poll() is None, "moto's server has ended"
            assert time.monotonic() < end, "moto's server does not start"
            time.sleep(0.1)
        self.files(allow_bucket_creation=True).create_dir(BUCKET)

    def files(self, **options: bool) -> fs.S3FileSystem:
        """Its content, past everything that is tested."""
        return fs.S3FileSystem(
            access_key="tests", secret_key="tests", region="us-east-1", scheme="http",
            endpoint_override=f"127.0.0.1:{self.port}", **options,
        )  # fmt: skip

    def names(self, prefix: str) -> set[str]:
        """What files there are below a prefix of the bucket."""
        base = f"{BUCKET}/{prefix}"
        found = self.files().get_file_info(fs.FileSelector(base, recursive=True, allow_not_found=True))
        return {info.path.removeprefix(f"{base}/") for info in found if info.is_file}

    def read(self, path: str) -> bytes:
        with self.files().open_input_stream(f"{BUCKET}/{path}") as file:
            return file.read()

    def download(self, prefix: str, to: Path) -> Path:
        """Copy what is below a prefix into a folder."""
        for name in self.names(prefix):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(self.read(f"{prefix}/{name}"))
        return to

    def begin_to_check_rights(self) -> dict[str, str]:
        """Take only credentials that it knows from now on.

        Returns:
            Those of a user who may do nothing, as variables.
        """
        import boto3

        keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "tests", "region_name": "us-east-1"}
        iam = boto3.client("iam", endpoint_url=self.endpoint, **keys)
        iam.create_user(UserName="nobody")
        made = iam.create_access_key(UserName="nobody")["AccessKey"]
        request = urllib.request.Request(
            f"{self.endpoint}/moto-api/reset-auth", data=b"0", method="POST", headers={"Content-Type": "text/plain"}
        )
        urllib.request.urlopen(request, timeout=10).close()
        return {"AWS_ACCESS_KEY_ID": made["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": made["SecretAccessKey"]}

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
