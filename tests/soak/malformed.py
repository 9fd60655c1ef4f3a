"""Gives the commands inputs that nobody should have, and looks whether each is answered as a mistake should be.

python tests/soak/malformed.py --inputs 500 --seed 0 [--workers 2] [--only N] [--keep DIR]

All inputs of a worker go through one process. Each must end with exit code 0, 2 or 3, a mistake with one sentence on
standard error, no traceback, within 20 seconds and 1 GB above what the process had; nothing may be started, connected
to, or written outside of the input's folder. Prints every input that was answered otherwise, then the counts, and
exits 1 where there was one.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).absolute().parent.parent
SECONDS, KILL_SECONDS = 20, 40
BYTES = 1 << 30
ALLOWED_CODES = (0, 2, 3)
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "pty.spawn")
CONNECTS = ("socket.connect", "socket.bind", "socket.sendto", "urllib.Request")
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What is below standard error of a command: names of runtimes at the beginning of a line of their own logs.
SENTENCE = re.compile(r"flowgen: (?!(warning|error): )")


class Hang(BaseException):
    """An input that is not answered in time."""


class Watch:
    """What the interpreter is asked to start, connect to and write, while it is on."""

    def __init__(self, *places):
        self.places, self.on, self.found = [os.path.realpath(place) for place in places], False, []
        sys.addaudithook(self._hook)

    def _hook(self, event, arguments):
        if not self.on:
            return
        self.on = False  # What is done here is not looked at.
        try:
            if event in (*STARTS, *CONNECTS):
                self.found.append(f"{event}{arguments!r:.200}")
            elif (event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES) or event in CHANGES:
                self._look(event, arguments[0])
        finally:
            self.on = True

    def _look(self, event, path):
        if isinstance(path, str | bytes | os.PathLike) and os.fspath(path):
            place = os.path.realpath(os.fsdecode(path))
            inside = any(place == known or place.startswith(known + os.sep) for known in self.places)
            if not inside and place != os.devnull:
                self.found.append(f"{event} {place!r:.200}")


def check(index, options, folder, watch, main):
    """Returns what an input is, and what is wrong with the answer to it."""
    from soak import inputs

    rng, seconds_allowed = random.Random(f"{options.seed}/{index}"), options.seconds
    kind = inputs.KINDS[index % len(inputs.KINDS)]
    folder.mkdir()
    words = kind(rng, options.base, folder)
    os.chdir(folder)
    watch.places[0], watch.found = os.path.realpath(folder), []
    Path("/proc/self/clear_refs").write_text("5")
    before, began = _memory("VmRSS"), time.perf_counter()
    with _captured(folder.parent / "shown") as shown:
        watch.on = True
        faulthandler.dump_traceback_later(seconds_allowed + KILL_SECONDS, exit=True, file=sys.__stderr__)
        signal.alarm(seconds_allowed)
        try:
            code = main(words)
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = f"{type(error).__name__} {traceback.format_exc()[-1500:]}"
        finally:
            signal.alarm(0)
            faulthandler.cancel_dump_traceback_later()
            watch.on = False
    seconds, peak = time.perf_counter() - began, _memory("VmHWM") - before
    faults = [f"{fault}" for fault in watch.found]
    if code not in ALLOWED_CODES:
        faults.append(f"exit code {code}")
    if seconds > seconds_allowed:
        faults.append(f"{seconds:.0f} seconds")
    if peak > BYTES:
        faults.append(f"{peak >> 20} MB")
    faults += _faults_of(code, shown())
    return {"kind": kind.__name__, "words": words, "code": code, "seconds": seconds, "peak": peak, "faults": faults}


def _faults_of(code, shown):
    lines = shown.splitlines()
    sentences = [line for line in lines if SENTENCE.match(line)]
    others = [line for line in lines if not line.startswith("flowgen: ")]
    if "Traceback (most recent" in shown:
        yield f"traceback: {shown[-1500:]}"
    elif others and code != 0:  # Damage may be where nothing is read: the input is then taken, and progress shown.
        yield f"{len(others)} lines beside sentences: {' | '.join(others)[:500]}"
    if code in (2, 3) and len(sentences) != 1:
        yield f"{len(sentences)} sentences: {shown[:500]}"
    if re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown):
        yield f"control characters: {shown[:300]!r}"


def _memory(name):
    """Bytes, of what the kernel says of this process."""
    return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


@contextlib.contextmanager
def _captured(path):
    """Both outputs in a file, below Python too; gives the function that reads standard error from it."""
    kept = [os.dup(1), os.dup(2)]
    error = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    out = os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1), os.dup2(error, 2)
    os.close(out), os.close(error)
    try:
        yield lambda: path.read_bytes().decode("utf-8", "backslashreplace")
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        os.close(kept[0]), os.close(kept[1])


def work(options):
    """Goes through the inputs of one worker in this process, with one line of JSON for each."""
    from flowgen.cli import main

    def on_alarm(number, frame):
        raise Hang

    signal.signal(signal.SIGALRM, on_alarm)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 30, 4 << 30))
    # Above what is a fault, for what the runtime maps; so that a fault does not take the machine.
    resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", options.base)
    watch = Watch("", tempfile.gettempdir() + "/none", cache)
    with open(options.report, "a", buffering=1) as report:
        for index in options.indices:
            report.write(json.dumps({"begun": index}) + "\n")
            with tempfile.TemporaryDirectory(dir=options.base.parent) as folder:
                found = check(index, options, Path(folder) / "in", watch, main)
                os.chdir("/")
            report.write(json.dumps({"index": index, **found}) + "\n")
            gc.collect()


def supervise(options, indices, report):
    """Runs a worker over inputs, again after one that ended it; returns what it says of each."""
    found, waiting = [], list(indices)
    while waiting:
        report.write_text("")
        words = [sys.executable, __file__, "--worker", "--seed", str(options.seed), "--seconds", str(options.seconds)]
        words += ["--base", str(options.base), "--report", str(report), "--indices", *map(str, waiting)]
        ended = subprocess.run(words, capture_output=True, text=True)
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        done = [line for line in lines if "index" in line]
        found += done
        waiting = waiting[len(done) :]
        if waiting:
            begun = lines and "begun" in lines[-1]
            fault = f"the process ended with {ended.returncode}: {ended.stderr[-1500:]}"
            if not begun:
                raise RuntimeError(fault)
            found.append({"index": waiting.pop(0), "kind": "?", "words": [], "code": None, "faults": [fault]})
    return found


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=SECONDS, help="for one input; more if others use the machine")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of inputs to look at alone")
    parser.add_argument("--log", type=Path, help="file for a line of JSON per input")
    parser.add_argument("--base", type=Path, help="folder of good files, made where there is none (default: for once)")
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--indices", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    sys.path.insert(0, str(TESTS))
    if options.prepare:
        from soak.inputs import write_base

        from flowgen.cli import main as commands

        write_base(options.base, commands)
        return 0
    if options.worker:
        work(options)
        return 0
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    with tempfile.TemporaryDirectory(prefix="malformed-") as place:
        options.base = (options.base or Path(place) / "base").absolute()
        if not options.base.is_dir():
            words = [sys.executable, __file__, "--prepare", "--base", str(options.base)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        indices = options.only if options.only else range(options.inputs)
        shares = [list(indices)[first :: options.workers] for first in range(options.workers)]
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(options.workers) as pool:
            reports = [Path(place) / f"report{number}" for number in range(options.workers)]
            found = [row for rows in pool.map(supervise, [options] * options.workers, shares, reports) for row in rows]
    if options.log:
        options.log.write_text("".join(json.dumps(row) + "\n" for row in found))
    bad = [row for row in sorted(found, key=lambda row: row["index"]) if row["faults"]]
    for row in bad:
        sys.stdout.write(f"input {row['index']} ({row['kind']}): {' '.join(row['words'])!r:.300}" + "\n")
        for fault in row["faults"]:
            sys.stdout.write(f"    {fault}" + "\n")
    codes = Counter(str(row["code"])[:20] for row in found)
    slowest = max(row.get("seconds", 0) for row in found)
    largest = max(row.get("peak", 0) for row in found) >> 20
    sys.stdout.write(
        f"{len(found)} inputs, {len(bad)} answered otherwise; exit codes {dict(codes)}; {slowest:.1f} s; {largest} MB\n"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
