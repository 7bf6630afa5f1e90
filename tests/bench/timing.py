"""What the benchmark scripts share: namespaces of their own, hyperfine, a table."""

import contextlib
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MOCKER = [str(TESTS.parent / "mocker.py")]  # as a user calls it: by its first line, with this Python
os.environ["PATH"] = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
ROUNDS = 3  # the commands take turns, so that a busy minute of the machine hits them all

sys.path.insert(0, str(TESTS))


# /sys/class/net shows the network namespace in which /sys was mounted, so it needs a new one,
# with the cgroups' mounts in it; and /run is where all of them keep what they know of the network.
ENTER = """
ip link set lo up
mount --move /sys/fs/cgroup /mnt
mount -t sysfs sysfs /sys
mount --move /mnt /sys/fs/cgroup
mount -t tmpfs -o mode=755 run /run
exec "$@"
"""


def in_namespaces_of_its_own():
    """Starts the script again where all bridges, rules and mounts vanish with its last process."""
    if os.geteuid() != 0:
        sys.exit("benchmarks run containers: please run this as root")
    if "MOCKER_BENCH" not in os.environ:
        os.environ["MOCKER_BENCH"] = "1"
        os.execvp("unshare", ["unshare", "--net", "--mount", "sh", "-ec", ENTER, "sh", sys.executable, *sys.argv])


@contextlib.contextmanager
def disk_of_its_own():
    """A fresh ext4 for all stores; it becomes the place of temporary files.

    An ext4 without a journal, as some virtual machines have, looks at each inode that was freed in
    the last minutes before it takes a new one: files made after an `rm -rf` of many take 20 times
    as long, and the runs would measure that.
    """
    folder = tempfile.mkdtemp(prefix="bench-")  # short: podman takes paths of 50 characters
    image = f"{folder}.ext4"
    subprocess.run(["truncate", "--size=32G", image], check=True)
    try:
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, folder], check=True)
    finally:
        os.unlink(image)  # it lasts as long as its mount
    tempfile.tempdir = folder
    try:
        yield Path(folder)
    finally:
        tempfile.tempdir = None
        subprocess.run(["umount", "--lazy", folder], check=True)
        os.rmdir(folder)


def measure(commands, runs, warmup=1):
    """{name: seconds of each run} for {name: command} or {name: (command, what goes before)}."""
    times = {name: [] for name in commands}
    for number in range(ROUNDS):
        for name, command in commands.items():
            say(f"round {number + 1} of {ROUNDS}: {name}")
            command, before = command if isinstance(command, tuple) else (command, None)
            times[name] += hyperfine(command, before, -(-runs // ROUNDS), warmup if number == 0 else 0)
    return times


def hyperfine(command, before, runs, warmup):
    options = ["-N", "--style", "none", "--warmup", str(warmup), "--runs", str(runs)]
    if before:
        options += ["--prepare", before]
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        call = ["hyperfine", *options, "--export-json", result.name, shlex.join(command)]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL)
        return json.load(result)["results"][0]["times"]


def print_table(title, times, mocker="mocker"):
    """Medians, and how the one called `mocker` compares with each of the others."""
    own = statistics.median(times[mocker])
    width = max(map(len, times))
    print(f"\n{title}\n{'':{width}}    median   fastest   slowest   mocker's ratio to it")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        columns = [f"{second:8.3f}s" for second in (middle, min(seconds), max(seconds))]
        ratio = "" if name == mocker else f"{own / middle:8.2f}"
        print(f"{name:{width}} {' '.join(columns)} {ratio}", flush=True)


def shell(*commands):
    """A command line that runs these in silence, whether they succeed or not."""
    lines = [shlex.join(map(str, command)) + " >/dev/null 2>&1" for command in commands]
    return shlex.join(["sh", "-c", "\n".join([*lines, "true"])])


def say(text):
    print(text, file=sys.stderr, flush=True)


def need(*programs):
    missing = [program for program in programs if not shutil.which(program)]
    if missing:
        sys.exit(f"not installed: {', '.join(missing)} (see tests/install)")
