"""Two machines made of one: network namespaces joined by a cable, each with a host name and temporary files of its own.

Needs root, `ip` and `unshare`. Everything that runs in a namespace, Ray's servers too, ends with it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ADDRESSES = ("192.0.2.1", "192.0.2.2")  # reserved for documentation; nothing leads out of this network
PORT = 6379
ENDS_S = 20.0
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # nobody else is on this network
    "RAY_worker_niceness": "0",
    "OMP_NUM_THREADS": "1",
}


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


class Machine:
    """One of the two. `temporary` stands for the machine's /tmp/ray, at the same path on both."""

    def __init__(self, number: int, temporary: Path):
        self.name, self.address, self.cable = f"dbd-node{number}", ADDRESSES[number], f"dbd-eth{number}"
        self._temporary, self._own = temporary, temporary.with_name(f"{temporary.name}-{number}")
        for folder in (self._temporary, self._own):
            folder.mkdir(exist_ok=True)

    def command(self, words: Sequence[str], environ: Mapping[str, str] | None = None) -> list[str]:
        """What runs `words` there."""
        more = {
            **ENVIRONMENT,
            "RAY_TMPDIR": str(self._temporary),
            "RAY_ADDRESS": f"{ADDRESSES[0]}:{PORT}",
            "GLOO_SOCKET_IFNAME": self.cable,
            **(environ or {}),
        }
        mounted = f'mount --bind {self._own} {self._temporary} && hostname {self.name} && exec "$@"'
        there = ["ip", "netns", "exec", self.name, "unshare", "--mount", "--uts", "sh", "-c", mounted, "sh"]
        return [*there, "env", *(f"{name}={value}" for name, value in more.items()), *words]

    def start_ray(self) -> None:
        """A node of one CPU: the head on the first machine, elsewhere one that joins it.

        Raises:
            SystemExit: it does not start.
        """
        head = f"--address={ADDRESSES[0]}:{PORT}"
        role = ["--head", f"--port={PORT}", "--include-dashboard=false"] if self.address == ADDRESSES[0] else [head]
        ray = str(Path(sys.executable).parent / "ray")
        words = [ray, "start", *role, f"--node-ip-address={self.address}", "--num-cpus=1", "--disable-usage-stats"]
        done = subprocess.run(self.command(words), capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"Ray does not start on {self.name}: {done.stdout[-500:]} {done.stderr[-1000:]}")

    def processes(self) -> list[int]:
        return [int(pid) for pid in ip("netns", "pids", self.name).split()]

    def has(self, program: str) -> bool:
        """Whether a program of this name runs there."""
        for pid in self.processes():
            try:
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            except OSError:
                continue
            if Path(words[0]).name == program:
                return True
        return False


class Pair:
    """Both machines, for the body of a `with`."""

    def __init__(self, temporary: Path):
        self.machines = [Machine(number, temporary) for number in (0, 1)]

    def __enter__(self) -> Pair:
        if os.geteuid() != 0:
            raise SystemExit("network namespaces need root")
        self._remove()  # of an earlier run that was killed
        first, second = self.machines
        for machine in self.machines:
            ip("netns", "add", machine.name)
        ip("link", "add", first.cable, "netns", first.name, "type", "veth", "peer", second.cable, "netns", second.name)
        for machine in self.machines:
            ip("-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", machine.cable)
            ip("-n", machine.name, "link", "set", "lo", "up")
            ip("-n", machine.name, "link", "set", machine.cable, "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def cut(self) -> None:
        """The cable is out at the second machine: neither hears of the other any more, no connection is closed."""
        second = self.machines[1]
        ip("-n", second.name, "link", "set", second.cable, "down")

    def mend(self) -> None:
        second = self.machines[1]
        ip("-n", second.name, "link", "set", second.cable, "up")

    def _remove(self) -> None:
        there = ip("netns", "list").split()
        for machine in self.machines:
            if machine.name in there:
                _end(machine)
                ip("netns", "del", machine.name)


def _end(machine: Machine) -> None:
    """End what runs on a machine, and what it starts meanwhile.

    Raises:
        SystemExit: something stays.
    """
    end = time.monotonic() + ENDS_S
    while machine.processes():
        for pid in machine.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        if time.monotonic() > end:
            raise SystemExit(f"{machine.name} does not end: {machine.processes()}")
        time.sleep(0.2)
