"""What --explain tells is what is done: pasted into a shell, the commands make the same network and cgroup.

A container is started in a network and a /run of its own, and looked at; then the commands that were told are run
in another such place, and that is looked at. The same for what undoes it all at the end.
"""

import contextlib
import glob
import json
import os
import re
import subprocess
import sys

import host
import pytest
from containers import free_port

pytestmark = [pytest.mark.cgroup, pytest.mark.usefixtures("host_as_before_all")]

BEFORE, INSIDE = ("Cgroup", "Network"), ("Join the cgroup", "Join the network")
LIMITS = "*.max", "*limit_in_bytes", "cpu.cfs_quota_us", "cgroup.subtree_control"
SETTINGS = "ping_group_range", "ip_unprivileged_port_start", "conf/all/disable_ipv6", "conf/default/disable_ipv6"


def look(id):
    """Of where we are: the network, and the groups of a container."""
    kinds = "link", "address", "route", "rule", "nftables", "iptables", "named netns", "cgroup", "sysctl"
    seen = {kind: sorted(name for name in host.KINDS[kind]() if "fe80" not in name) for kind in kinds}
    seen["route"] = sorted(name for name, family in host.routes().items() if family == "-4")
    seen["cgroup"] = [name for name in seen["cgroup"] if id in name]
    for group in [*seen["cgroup"], "/sys/fs/cgroup/mocker"]:
        for path in [path for pattern in LIMITS for path in glob.glob(f"{group}/{pattern}")]:
            seen[path] = host.content(path)
        seen[group] = bool(host.content(f"{group}/cgroup.procs").split())
    for name in SETTINGS:
        seen[name] = [host.content(f"/proc/sys/net/{family}/{name}") for family in ("ipv4", "ipv6")]
    return seen


class Place:
    """A network and a /run of its own."""

    def __init__(self):
        script = "mount -t tmpfs run /run && ip link set lo up && echo ready && exec cat"
        command = ["unshare", "--net", "--mount", "sh", "-c", script]
        self.holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.holder.stdout.readline() == "ready\n"
        self.enter = ["nsenter", f"--net=/proc/{self.holder.pid}/ns/net", f"--mount=/proc/{self.holder.pid}/ns/mnt"]

    def look(self, *where, id="none"):
        command = [*self.enter, *where, sys.executable, __file__, id]
        return json.loads(subprocess.check_output(command, text=True))

    def shell(self, lines):
        subprocess.run([*self.enter, "sh", "-e"], input="\n".join(lines), text=True, check=True)


@pytest.fixture
def places():
    with contextlib.ExitStack() as stack:
        places = Place(), Place()
        for place in places:
            stack.callback(place.holder.communicate)
        yield places


def told(text):
    """{heading of a step: its commands}; those of the end are under "Finalizing"."""
    steps, heading = {}, None
    for line in text.splitlines():
        if line.startswith("■ ") or line == "Finalizing":
            heading = line.lstrip("■ ")
        if line.startswith("  $ "):
            steps.setdefault(heading, []).append(line[4:])
    return steps


def of_steps(steps, begins):
    return [line for heading, lines in steps.items() for line in lines if heading and heading.startswith(begins)]


def enter_by_hand(place, lines):
    """What a container's first process does, which then waits. → it"""
    [at] = [number for number, line in enumerate(lines) if line.startswith(("nsenter", "unshare"))]
    inner = "\n".join([*lines[at + 1 :], "echo ready", "exec cat"])
    script = "\n".join([*lines[:at], f'exec {lines[at]} sh -ec "$0"'])
    command = [*place.enter, "sh", "-ec", script, inner]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


LIMITED = "-m", "64m", "--pids-limit", "99", "--cpus", "0.5"


@pytest.mark.parametrize("options", [[], [*LIMITED, "-p", "PORT:80"], ["--network=none", "-m", "64m"]])
def test_what_is_told_is_what_is_done(store, places, options, tmp_path):
    one, other = places
    options = [option.replace("PORT", str(free_port())) for option in options]
    before = one.look()
    with open(tmp_path / "said", "w+") as said:
        command = [*one.enter, *store.command(["run", "--explain", *options, "busybox", "cat"])]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said, "text": True}
        mocker = subprocess.Popen(command, env=store.env, **pipes)
        mocker.stdin.write("ready\n")
        mocker.stdin.flush()
        assert mocker.stdout.readline() == "ready\n"
        [id] = os.listdir(store.home / "containers")
        name = f"/run/netns/mocker_{id}"
        inside = ["nsenter", f"--net={name}"] if "--network=none" not in options else []
        seen, seen_inside = one.look(id=id), one.look(*inside, id=id)
        mocker.communicate()
        assert mocker.returncode == 0 and one.look(id=id) == before
    steps = told((tmp_path / "said").read_text())

    other.shell(of_steps(steps, BEFORE))
    container = enter_by_hand(other, of_steps(steps, INSIDE))
    try:
        assert other.look(id=id) == seen
        assert other.look(*inside, id=id) == seen_inside
    finally:
        container.communicate()
        other.shell(steps["Finalizing"])
    assert other.look(id=id) == before


def test_each_line_names_what_there_is(store):
    """None was tried in vain, and none is told twice."""
    done = store("run", "--explain", "-p", f"{free_port()}:80", "busybox", "true")
    lines = of_steps(told(done.stderr), (*BEFORE, "Finalizing"))
    assert lines and len(lines) == len(set(lines))
    assert not [line for line in lines if re.search(r"<<<|…| -S | list ", line)]


if __name__ == "__main__":
    print(json.dumps(look(sys.argv[1])))
