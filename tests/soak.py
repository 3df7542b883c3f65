"""Random kills over whole runs on Ray: whatever is killed and whenever, a run ends with the same bytes.

    python -m tests.soak [--kills 50] [--per-run 1] [--seed 0] [--out runs/soak.jsonl] [--work runs/soak]
                         [--victims NAME ...]

Every configuration is first run undisturbed. Then each disturbed run loses a process to SIGKILL: a training worker,
Ray Train's controller, Ray's raylet or gcs_server, or the command itself, at a drawn moment of a drawn stage; with
--per-run 5 each of them once, a different one at every moment. Where the command has ended, the same command is given
again at once, until there is a result. `check` says what must hold then.

Everything is drawn from the seed. Each run adds a line to --out; the same command resumes after the last line of the
same commit (not of a tree with changes). What belongs to a failed run stays in WORK/failed. Exit code 1 if a run has
failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from data_prep.attacks import BadNets
from data_prep.config import PrepareConfig
from data_prep.io.hashes import sha256_file
from data_prep.pipeline import prepare
from data_prep.sources import Digits
from dbd_dist.config import TrainConfig
from dbd_dist.fields import to_dict
from dbd_dist.presets import preset
from dbd_dist.runtime.machine import commit
from dbd_dist.runtime.run_folder import RAY_FOLDER

ROOT = Path(__file__).resolve().parents[1]
RUN = "run"

VICTIMS = ("worker", "controller", "raylet", "gcs_server", "driver")
TITLES = {"worker": "ray::RayTrainWorker", "controller": "ray::TrainController"}
"""How the processes of actors call themselves; the others are told by the name of their program."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Of the raylet. They end by themselves, a minute after one that was killed."""

MOMENTS = ("start", "early", "middle", "late", "end")
"""Before the first epoch; in the first, the second, the last stage (or third of a run with one stage); after the last
epoch, when the result is measured and written."""

ATTEMPTS = 4
"""Commands beyond one for each kill."""
HANG_S = 180.0
"""No progress for so long is a hang. The start of Ray takes a fifth of it on a busy machine."""
LEFT_S = 90.0
"""How long processes of a run may outlive its command: Ray's two agents wait a minute for a head that was killed."""
LOOK_S = 0.03
UNEQUAL = ("time_s", "images_per_s")
"""What differs between equal rows of metrics.jsonl."""


# -- configurations


def configurations(data: Path) -> dict[str, TrainConfig]:
    """Whole runs of seconds: every stage, with one worker and with two; and without a defence. States are also kept
    inside epochs, but in one."""
    smoke = preset("smoke").change(
        simclr={"epochs": 12, "batch": 60},
        warmup={"epochs": 30, "batch": 60},
        mixmatch={"epochs": 10},
        supervised={"epochs": 40, "batch": 60},
    )
    compute = replace(smoke.compute, workers=2, threads=1, precision="fp32", device="cpu", checkpoint_steps=2)
    smoke = replace(smoke, evaluate_every=2, compute=compute)  # checkpoints after two of four steps an epoch
    defended, plain = (replace(smoke.config(method), data=data) for method in ("dbd", "none"))
    return {
        "dbd-2": defended,
        "dbd-1": replace(defended, compute=replace(compute, workers=1, checkpoint_steps=None)),
        "none-2": plain,
    }


def make_data(datasets: Path) -> Path:
    """240 training and 50 test images of digits, 24 of them poisoned."""
    source = Digits(train_per_class=24, test_per_class=5)
    config = PrepareConfig(source=source, attack=BadNets(), rate=0.1, datasets=datasets, workers=1)
    return prepare(config, progress=False).folder.resolve()


def epochs_of(config: TrainConfig) -> list[tuple[str, int]]:
    stages: tuple[Any, ...] = config.method.trained()
    return [(stage.name, epoch) for stage in stages for epoch in range(1, stage.epochs + 1)]


# -- what is killed, and when


@dataclass(frozen=True, kw_only=True)
class Kill:
    """SIGKILL to `victim`, `delay_s` after the row of `after` was written (None: after the victim has appeared)."""

    victim: str
    moment: str
    after: tuple[str, int] | None
    delay_s: float


def draw(seed: int, number: int, config: TrainConfig, victims: Sequence[str] = VICTIMS) -> Kill:
    """The `number`-th kill of a seed. Each victim comes once in as many kills as there are victims, and meets every
    moment once in as many of those rounds as there are moments."""
    lap, place = divmod(number, len(victims))
    at = random.Random(f"{seed} {lap} victims").sample(range(len(victims)), len(victims))[place]
    moments = random.Random(f"{seed} {lap // len(MOMENTS)} moments").sample(MOMENTS, len(MOMENTS))
    moment = moments[(at + lap) % len(MOMENTS)]
    dice = random.Random(f"{seed} {number}")
    rows = epochs_of(config)
    if moment == "start":
        after = None
    elif moment == "end":
        after = rows[-1]
    elif len({stage for stage, _ in rows}) == 1:
        third = MOMENTS.index(moment) - 1
        after = dice.choice(rows[third * len(rows) // 3 : (third + 1) * len(rows) // 3][:-1])
    else:
        stage = ("simclr", "warmup", "mixmatch")[MOMENTS.index(moment) - 1]
        after = dice.choice([row for row in rows if row[0] == stage][:-1])
    longest = {"start": 6.0, "end": 0.6}.get(moment, 0.25 if after and after[0] == "warmup" else 1.0)
    return Kill(victim=victims[at], moment=moment, after=after, delay_s=round(dice.uniform(0, longest), 3))


def draw_all(seed: int, number: int, config: TrainConfig, victims: Sequence[str], count: int) -> list[Kill]:
    """The kills of the `number`-th run, in the order that it meets them."""
    kills = [draw(seed, count * number + i, config, victims) for i in range(count)]
    return sorted(kills, key=lambda kill: (MOMENTS.index(kill.moment), kill.victim))


# -- the processes of one run, and of no other


class Processes:
    """Told by their sessions (each command leads one, which what it starts inherits), and by the run's own folder for
    temporary files, which the others have in their arguments."""

    def __init__(self, temporary: Path):
        self._temporary, self._sessions = str(temporary), set[int]()

    def add(self, leader: int) -> None:
        self._sessions.add(leader)

    def alive(self) -> Iterator[tuple[psutil.Process, list[str]]]:
        for process in psutil.process_iter():
            try:
                words = process.cmdline()
                ours = os.getsid(process.pid) in self._sessions or any(self._temporary in word for word in words)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    yield process, words
            except (psutil.Error, ProcessLookupError):
                continue

    def named(self, victim: str) -> list[psutil.Process]:
        title = TITLES.get(victim)
        return [
            process
            for process, words in self.alive()
            if words and (words[0].startswith(title) if title else Path(words[0]).name == victim)
        ]

    def end(self, signal_number: int = signal.SIGKILL) -> None:
        for process, _ in self.alive():
            try:
                process.send_signal(signal_number)
            except psutil.Error:
                continue


# -- one run


@dataclass(kw_only=True)
class Record:
    """What was done to one run, and what came of it."""

    config: str
    kills: list[dict[str, Any]] = field(default_factory=list)
    attempts: list[dict[str, Any]] = field(default_factory=list)
    epochs_again: int = 0
    """Rows of metrics.jsonl that were written a second time."""
    steps_again: int = 0
    """Steps between the furthest progress before and the first after a new start, as progress.json tells them."""
    seconds: float = 0.0
    ray_mib: float = 0.0
    """What Ray left below its own folder for temporary files."""
    failures: list[str] = field(default_factory=list)


class Observer:
    """Follows the files of a run: where it stands, and what is done twice."""

    def __init__(self, folder: Path, config: TrainConfig):
        self._folder = folder
        self._order = {row: i for i, row in enumerate(epochs_of(config))}
        self._written: set[tuple[str, int, float]] = set()
        self._furthest = (0, 0)
        self._steps_again = 0
        self._seen: Any = None
        self._since = time.monotonic()

    def rows(self) -> list[dict[str, Any]]:
        try:
            lines = (self._folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        except OSError:
            return []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        self._written |= {(row["stage"], row["epoch"], row["time_s"]) for row in rows}
        return rows

    def position(self) -> dict[str, Any] | None:
        """Stage, epoch, step as progress.json has them now."""
        try:
            state = json.loads((self._folder / "progress.json").read_text())
        except (OSError, ValueError):
            return None
        if (state["stage"], state["epoch"]) in self._order:  # not so where other work is shown
            here = (self._order[state["stage"], state["epoch"]], state["step"])
            if here < self._furthest and here[0] >= 0:
                epochs = self._furthest[0] - here[0]
                self._steps_again += epochs * state["steps"] + self._furthest[1] - here[1]
                self._furthest = here
            self._furthest = max(self._furthest, here)
        return {name: state[name] for name in ("stage", "epoch", "step", "steps")}

    def reached(self, row: tuple[str, int]) -> bool:
        rows = self.rows()
        return bool(rows) and self._order[rows[-1]["stage"], rows[-1]["epoch"]] >= self._order[row]

    def changed_at(self) -> float:
        """When rows were last written, also by a run that resumes: it writes those that count anew."""
        try:
            return (self._folder / "metrics.jsonl").stat().st_mtime
        except OSError:
            return 0.0

    def idle_s(self, processes: Processes) -> float:
        """For how long nothing has changed: neither files nor processes."""
        files = []
        for path in self._folder.glob("*"):
            try:
                files.append((path, path.stat().st_mtime))
            except OSError:  # renamed meanwhile
                continue
        state = (files, [process.pid for process, _ in processes.alive()])
        if state != self._seen:
            self._seen, self._since = state, time.monotonic()
        return time.monotonic() - self._since

    def again(self) -> tuple[int, int]:
        return len(self._written) - len(self.rows()), self._steps_again


def run(
    name: str,
    config: TrainConfig,
    place: Path,
    kills: Sequence[Kill] = (),
    flags: Sequence[str] = (),
    seed: int = 0,
    await_agents: bool = True,
) -> Record:
    """One run below `place`, with its kills one after the other; a command that has ended is given again.

    Its data set is not copied. `place` must not exist. Without `await_agents`, Ray's agents may outlive it.
    """
    storage, started = place / "storage", time.monotonic()
    storage.mkdir(parents=True)
    (place / "run.json").write_text(json.dumps({"config": to_dict(config)}))
    record, observer = Record(config=name), Observer(storage / RUN, config)
    temporary = Path(tempfile.mkdtemp(prefix="dbd-soak-", dir="/tmp"))  # short: sockets' names have 107 characters
    processes, dice, left = Processes(temporary), random.Random(f"{seed} which"), list(kills)
    try:
        while not record.attempts or record.attempts[-1]["code"] != 0:
            if len(record.attempts) == len(kills) + ATTEMPTS:
                record.failures.append(f"not finished after {len(record.attempts)} commands")
                break
            if not _attempt(record, place, temporary, flags, processes, observer, left, dice):
                break
        record.kills += [vars(kill) | {"missed": True} for kill in left]
        record.epochs_again, record.steps_again = observer.again()
        record.failures += _left_behind(processes, temporary, await_agents)
        record.ray_mib = round(sum(p.stat().st_size for p in temporary.rglob("*") if p.is_file()) / 2**20, 1)
    finally:
        processes.end()
        shutil.rmtree(temporary, ignore_errors=True)
    record.seconds = round(time.monotonic() - started, 1)
    return record


def _attempt(
    record: Record,
    place: Path,
    temporary: Path,
    flags: Sequence[str],
    processes: Processes,
    observer: Observer,
    left: list[Kill],
    dice: random.Random,
) -> bool:
    """Give the command once, and carry out the first of the kills that are left; False where it hung."""
    argv = ["train", "--config", str(place / "run.json"), "--name", RUN, "--storage", str(place / "storage"), *flags]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    environ |= {
        "RAY_ADDRESS": "local",
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",
    }
    log, begun, killed = place / f"output-{len(record.attempts)}.txt", time.monotonic(), None
    begun_at = time.time()
    with open(log, "w") as output:
        driver = subprocess.Popen(
            [sys.executable, "-m", "dbd_dist.cli", *argv],
            cwd=place, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    processes.add(driver.pid)
    due: float | None = None
    last: Kill | None = None
    hung, looked = False, 0.0
    while driver.poll() is None:
        position = observer.position()
        if left:
            kill = left[0]
            if due is None and _is_time(kill, processes, observer, begun_at):
                due = time.monotonic() + kill.delay_s
            if due is not None and time.monotonic() >= due:
                killed = _carry_out(kill, driver, processes, dice)
                if killed is not None:
                    record.kills.append(vars(kill) | {"at": position, "rows": len(observer.rows()), "killed": killed})
                    last, due = left.pop(0), None
        observer.rows()
        if time.monotonic() - looked > 1:
            looked = time.monotonic()
            hung = observer.idle_s(processes) > HANG_S
            if hung:
                record.failures.append(f"command {len(record.attempts)}: no progress for {HANG_S:.0f} s")
                _end_hung(place, processes, temporary)
                break
        time.sleep(LOOK_S)
    code = driver.wait()
    text = log.read_text()
    by_us = code == -signal.SIGKILL and killed == driver.pid
    record.attempts.append({"code": code, "seconds": round(time.monotonic() - begun, 1), "errors": errors_in(text)})
    if code == 1 and last is not None and last.moment == "start" and _ends_us(last.victim, text):
        return not hung
    record.failures += [f"command {len(record.attempts) - 1}: {what}" for what in _said(text, code, by_us or hung)]
    return not hung


def _ends_us(victim: str, text: str) -> bool:
    """Whether Ray's library has ended the process, in its own words: nobody can be faster then."""
    words = ("Failed to register worker to Raylet", "Failed to get the system config from raylet")
    return victim == "gcs_server" or (victim == "raylet" and any(said in text for said in words))


def _is_time(kill: Kill, processes: Processes, observer: Observer, begun_at: float) -> bool:
    if kill.after is not None:
        # workers outlive a killed command for seconds: its rows may be ahead before the next one trains
        workers = (_started_at(worker) for worker in processes.named("worker"))
        since = min((moment for moment in workers if moment >= begun_at), default=math.inf)
        return observer.changed_at() > since and observer.reached(kill.after)
    return kill.victim == "driver" or bool(processes.named(kill.victim))


def _started_at(process: psutil.Process) -> float:
    try:
        return process.create_time()
    except psutil.Error:
        return 0.0


def _carry_out(kill: Kill, driver: subprocess.Popen, processes: Processes, dice: random.Random) -> int | None:
    """The pid that was killed; None while there is no such process, as between two groups of workers."""
    pids = [driver.pid] if kill.victim == "driver" else sorted(p.pid for p in processes.named(kill.victim))
    if not pids:
        return None
    pid = dice.choice(pids)
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return None
    return pid


def _end_hung(place: Path, processes: Processes, temporary: Path) -> None:
    """End a hung run; its stacks and Ray's logs stay below `place`."""
    _write_stacks(place / "stacks.txt", processes, temporary)
    processes.end(signal.SIGABRT)  # the stacks of Python's threads go to where their output goes
    time.sleep(3)
    shutil.copytree(temporary / "ray", place / "ray", symlinks=True, ignore=_sockets, dirs_exist_ok=True)
    processes.end()


def _sockets(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if not (Path(folder) / name).is_file() and not (Path(folder) / name).is_dir()]


def _write_stacks(path: Path, processes: Processes, temporary: Path) -> None:
    """What the system knows of every process of a hung run, and what their logs say last."""
    with open(path, "w") as file:
        for process, words in processes.alive():
            print(f"\n# {process.pid} {' '.join(words)[:150]}", file=file)
            for task in sorted(Path(f"/proc/{process.pid}/task").glob("*")):
                try:
                    waits = (task / "wchan").read_text(), (task / "comm").read_text().strip()
                    print(f"  {task.name} {waits[1]}: {waits[0]}", file=file)
                except OSError:
                    continue
        for log in sorted(temporary.glob("ray/session_2*/logs/*")):
            if log.is_file() and log.stat().st_size:
                print(f"\n# {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:]), file=file)


# -- what must hold


def errors_in(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error:")]


def _said(text: str, code: int, killed: bool) -> list[str]:
    """What is wrong with the output of one command."""
    wrong = []
    if "Traceback (most recent call last)" in text:
        wrong.append("a traceback")
    expected = 0 if code == 0 or killed else 1
    if len(errors_in(text)) != expected:
        wrong.append(f"exit code {code} with {len(errors_in(text))} messages")
    if code not in (0, 1) and not killed:
        wrong.append(f"exit code {code}")
    foreign = [
        line for line in text.splitlines() if re.match(r"(\x1b\[\d+m)?\((raylet|autoscaler|pid)|\[20\d\d-", line)
    ]
    if foreign:
        wrong.append(f"{len(foreign)} lines of Ray's own: {foreign[0][:120]}")
    return wrong


def _left_behind(processes: Processes, temporary: Path, await_agents: bool) -> list[str]:
    """Processes and temporary files that outlive a run. Not counted: Ray's own folder; what its dashboard
    (multiprocessing's pymp-) and torch (torchinductor_) leave behind after every run, undisturbed ones too."""
    end = time.monotonic() + LEFT_S
    while (alive := _alive_but(() if await_agents else AGENTS, processes)) and time.monotonic() < end:
        time.sleep(0.2)
    wrong = [f"still running: {process.pid} {' '.join(words)[:100]}" for process, words in alive]
    for path in sorted(temporary.iterdir()):
        if path.name != "ray" and not path.name.startswith(("pymp-", "torchinductor_")):
            wrong.append(f"temporary file left: {path.name}")
    return wrong


def _alive_but(titles: tuple[str, ...], processes: Processes) -> list[tuple[psutil.Process, list[str]]]:
    return [(process, words) for process, words in processes.alive() if not words or not words[0].startswith(titles)]


def outcome(storage: Path) -> dict[str, Any]:
    """All that equal runs have in common."""
    folder = storage / RUN
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((folder / "result.json").read_text())
    return {
        "rows": [{k: v for k, v in row.items() if k not in UNEQUAL} for row in rows],
        "result": {k: v for k, v in result.items() if k not in ("seconds", "commit")},
        "bytes": {p.name: sha256_file(p) for p in folder.iterdir() if p.suffix in (".safetensors", ".parquet")},
        "files": listing(storage),
    }


def listing(storage: Path) -> list[str]:
    """The files below a storage, hidden ones too; without the log that there is only where workers failed and Ray
    Train's own folder, and with # for the numbers of checkpoints and for what tells event files apart."""
    found = set()
    for path in storage.rglob("*"):
        name = str(path.relative_to(storage))
        if name == f"{RUN}/logs/driver.jsonl" or (name + "/").startswith(f"{RUN}/{RAY_FOLDER}/"):
            continue
        if name.startswith((f"{RUN}/tensorboard/", f"{RUN}/checkpoints/")):
            name = re.sub(r"\d+", "#", re.sub(r"(?<=tfevents\.).*", "#", name))
            name = re.sub(r"#([-_.]#)+", "#", name)
        found.add(name)
    return sorted(found)


def check(storage: Path, reference: dict[str, Any], config: TrainConfig) -> list[str]:
    """What a finished run has that its undisturbed twin has not, and the other way round."""
    try:
        mine = outcome(storage)
    except (OSError, ValueError) as error:
        return [f"not finished: {error}"]
    wrong = []
    epochs = [(row["stage"], row["epoch"]) for row in mine["rows"]]
    if epochs != epochs_of(config):
        wrong.append(f"epochs: {len(epochs)} rows, {len(set(epochs))} different, {len(epochs_of(config))} expected")
    wrong += [f"{name} differs" for name in ("rows", "result", "bytes", "files") if mine[name] != reference[name]]
    if mine["bytes"] != reference["bytes"]:
        pairs = mine["bytes"].items() ^ reference["bytes"].items()
        wrong.append(f"bytes: {', '.join(sorted({name for name, _ in pairs}))}")
    for sign, ours, theirs in (("+", mine, reference), ("-", reference, mine)):
        wrong += [f"file {sign}{name}" for name in sorted(set(ours["files"]) - set(theirs["files"]))]
    if config.method.name != "none":
        assert config.data is not None
        manifest = json.loads((config.data / "manifest.json").read_text())
        wrong += _check_split(storage / RUN / "split.parquet", manifest)
    return wrong


def _check_split(path: Path, manifest: dict[str, Any]) -> list[str]:
    import pyarrow.parquet as pq

    if not path.exists():
        return ["no split.parquet"]
    indices = pq.read_table(path)["index"].to_pylist()
    return [] if sorted(indices) == list(range(manifest["counts"]["train"])) else ["split.parquet is not complete"]


# -- the whole


def references(configs: dict[str, TrainConfig], work: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """The outcome of every configuration undisturbed, as this commit computes it.

    Raises:
        SystemExit: an undisturbed run already fails.
    """
    path, code = work / "references.json", commit()
    outcomes: dict[str, Any] = {}
    if path.exists() and not str(code).endswith("+"):
        stored = json.loads(path.read_text())
        outcomes = stored["outcomes"] if stored["commit"] == code else {}
    for name, config in configs.items():
        if name in outcomes:
            continue
        place = work / "reference" / name
        shutil.rmtree(place, ignore_errors=True)
        record = run(name, config, place)
        if not record.failures:
            outcomes[name] = json.loads(json.dumps(outcome(place / "storage")))
            record.failures += check(place / "storage", outcomes[name], config)
        say(f"reference {name}: {record.seconds:.0f} s, {record.ray_mib} MiB left by Ray")
        if record.failures:
            raise SystemExit(f"the undisturbed run {name} fails ({place}): {'; '.join(record.failures)}")
        path.write_text(json.dumps({"commit": code, "outcomes": outcomes}))
    return outcomes


def soak(
    kills: int, per_run: int, seed: int, out: Path, work: Path, victims: Sequence[str], say: Callable[[str], None]
) -> bool:
    """Runs until there were `kills`, so many a run; True where all were as they must be."""
    work = work.resolve()
    for folder in (work, out.parent):
        folder.mkdir(parents=True, exist_ok=True)
    configs = configurations(make_data(work / "datasets"))
    code = commit()
    done = {}
    for line in out.read_text().splitlines() if out.exists() else ():
        row = json.loads(line)
        same = (row["commit"], row["seed"], row["per_run"], row["victims"]) == (code, seed, per_run, list(victims))
        if same and not str(code).endswith("+"):
            done[row["number"]] = row
    if done:
        say(f"{len(done)} runs of this commit are in {out}")
    expected = references(configs, work, say)
    number, names = 0, list(configs)
    while sum(per_run - row["missed"] for row in done.values()) < kills:
        if number not in done:
            name = names[number % len(names)]
            drawn = draw_all(seed, number, configs[name], victims, per_run)
            place = work / "failed" / f"{seed}-{number}"
            shutil.rmtree(place, ignore_errors=True)
            record = run(name, configs[name], place, drawn, seed=number)
            if (place / "storage" / RUN / "result.json").exists():
                record.failures += check(place / "storage", expected[name], configs[name])
            if not record.failures:
                shutil.rmtree(place)
            missed = sum(k.get("missed", False) for k in record.kills)
            head = {"number": number, "seed": seed, "per_run": per_run, "victims": list(victims), "commit": code}
            done[number] = {**head, "missed": missed, **vars(record)}
            with open(out, "a") as file:
                file.write(json.dumps(done[number]) + "\n")
            say(line_of(done[number]))
        number += 1
    say(table(list(done.values())))
    return not any(row["failures"] for row in done.values())


def line_of(row: dict[str, Any]) -> str:
    verdict = "; ".join(row["failures"]) or "ok"
    codes = [attempt["code"] for attempt in row["attempts"]]
    kills = ", ".join(
        f"{kill['victim']} {kill['moment']}{' (too late)' if kill.get('missed') else ''}" for kill in row["kills"]
    )
    return (
        f"{row['number']:3d} {row['config']:<7} {kills}: {row['seconds']:.0f} s, exit "
        f"{codes}, again {row['epochs_again']} epochs {row['steps_again']} steps: {verdict}"
    )


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every victim and moment, and what all runs came to."""
    lines = [f"{'killed':<12}{'kills':>6}{'in runs that failed':>21}"]
    kills = [(kill, bool(row["failures"])) for row in rows for kill in row["kills"] if not kill.get("missed")]
    for key, values in (("victim", VICTIMS), ("moment", MOMENTS)):
        for value in values:
            mine = [failed for kill, failed in kills if kill[key] == value]
            lines += [f"{value:<12}{len(mine):>6}{sum(mine):>21}"] if mine else []
    total = {name: sum(row[name] for row in rows) for name in ("seconds", "epochs_again", "steps_again")}
    lines.append(
        f"{len(kills)} kills in {len(rows)} runs, {sum(bool(row['failures']) for row in rows)} of them failed; "
        f"{total['epochs_again']} epochs and {total['steps_again']} steps were trained again; {total['seconds']:.0f} s"
    )
    return "\n".join(["", *lines])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--per-run", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/soak.jsonl"))
    parser.add_argument("--work", type=Path, default=Path("runs/soak"))
    parser.add_argument("--victims", nargs="+", choices=VICTIMS, default=list(VICTIMS))
    arguments = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception: the run under way is cleaned up
    done = soak(
        arguments.kills,
        arguments.per_run,
        arguments.seed,
        arguments.out,
        arguments.work,
        arguments.victims,
        lambda s: print(s, flush=True),
    )
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
