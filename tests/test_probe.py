"""What a process sees, and how it starts and ends: under Docker and under mocker the same, but for
what the README's table "Against Docker, measured" names. And on cgroup v2, in another kernel."""

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import fake
import images
import machine
import oracle
import pytest
from conftest import MOCKER, Mocker
from images import file, folder, symlink
from test_by_hand import perform

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(bool(oracle.MISSING), reason=f"not installed: {oracle.MISSING}"),
]
TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"

# The probe runs with each of these options.
SETTINGS = {
    "default": [],
    "-t": ["-t"],
    "-u name": ["-u", "nobody"],
    "-u uid:gid": ["-u", "1234:5678"],
    "--read-only": ["--read-only"],
    "--network=none": ["--network=none"],
    "--cap-drop": ["--cap-drop=ALL", "--cap-add=NET_ADMIN"],
    "--cap-add": [f"--cap-add={name}" for name in ["SYS_ADMIN", "SYS_PTRACE", "SYS_NICE", "DAC_READ_SEARCH", "SYSLOG"]],
    "-e -w --hostname": ["-e", "HOME=/x", "-w", "/new/place", "--hostname", "box"],
}
# A new network namespace has the host's, which others may change between two runs.
LEFT_OUT = {"sysctl.net/ipv4/ip_forward", "sysctl.net/ipv4/conf/all/forwarding"}

# ---- images that start in all ways ---------------------------------------------------------------

SHOW = b"""#!/bin/busybox sh
b=/bin/busybox
$b tr '\\0' '\\n' </proc/$$/cmdline
$b tr '\\0' '\\n' </proc/$$/environ | $b sort  # the order of several -e is chance in Docker
$b pwd; $b stat -c '%a %u:%g' .; $b id; echo "pid $$"
exit ${STATUS:-0}
"""
# Two programs of a few machine instructions: ud2 or udf, and a read at address 0
MACHINE, ILLEGAL, FAULT = {
    "x86_64": (62, b"\x0f\x0b", b"\x31\xc0\x8b\x00"),
    "aarch64": (183, bytes(4), b"\x00\x00\x80\xd2\x01\x00\x40\xf9"),
}[platform.machine()]
FILES = [
    file("show", SHOW, 0o755),
    folder("opt/bin"),
    file("opt/bin/show", SHOW, 0o755),
    file("a-file", b"echo"),
    file("unknown-format", b"echo", 0o755),
    file("missing-interpreter", b"#!/none\n", 0o755),
    file("sigill", images.elf(MACHINE, ILLEGAL), 0o755),
    file("sigsegv", images.elf(MACHINE, FAULT), 0o755),
    symlink("to-tmp", "tmp"),
    folder("of-33", 0o700, uid=33, gid=33),
]
S = {"Entrypoint": ["/show"]}
BOTH = {"Entrypoint": ["/show", "x"], "Cmd": ["y z", "*"]}
OPT = {"Cmd": ["show"], "WorkingDir": "/opt/bin"}

# label: the image's config, then the options and the command of `run`
STARTS = {
    "Cmd": [{"Cmd": ["/show", "a b", "", "$HOME"]}],
    "Entrypoint": [{"Entrypoint": ["/show", "x"]}],
    "both": [BOTH],
    "a command replaces Cmd": [BOTH, [], ["new", "--flag", ""]],
    "--entrypoint drops Cmd": [BOTH, ["--entrypoint", "/show"]],
    "--entrypoint and a command": [BOTH, ["--entrypoint", "/opt/bin/show"], ["new"]],
    "--entrypoint of nothing": [BOTH, ["--entrypoint", ""]],
    "--entrypoint of nothing, and a command": [BOTH, ["--entrypoint", ""], ["/show", "new"]],
    "shell form": [{"Cmd": ["/bin/sh", "-c", 'exec /show "$0" $HOME *']}],
    "shell form of both": [{"Entrypoint": ["/bin/sh", "-c", "/show $0"], "Cmd": ["a", "b"]}],
    "neither": [{}],
    "empty lists": [{"Entrypoint": [], "Cmd": []}],
    "null": [{"Entrypoint": None, "Cmd": None, "Env": None, "User": "", "WorkingDir": ""}, [], ["/show"]],
    "in PATH": [{"Cmd": ["show"], "Env": ["PATH=/none:/opt/bin"]}],
    "in PATH of -e": [{"Cmd": ["show"], "Env": ["PATH=/none"]}, ["-e", "PATH=/opt/bin"]],
    "not in PATH, but here": [OPT],
    "with an empty PATH": [{**OPT, "Env": ["PATH="]}],
    "without PATH": [{**OPT, "Env": ["PATH"]}],
    "relative": [OPT, [], ["./show"]],
    **{
        f"WorkingDir {path}": [{**S, "WorkingDir": path, "User": "33", "Env": ["HOME=/home"]}]
        for path in ["/to/be/made", "/opt/./bin/../", "/to-tmp/x", "no/slash", "/a-file", "/x/$HOME", "/root", "/of-33"]
    },
    "-w": [{**S, "WorkingDir": "/opt"}, ["-w", "/opt/bin/new"]],
    **{
        f"Env {variables}": [{**S, "Env": variables}]
        for variables in [["A=B=C", "D==", "E= f "], ["A=", "PATH=", "HOME="], ["A", "B=1"], ["A=1", "B=2", "A=3"],
                          ["a.b=1", "ü=ö", "N=1\n2", "HOSTNAME=no", "TERM=dumb"], ["HOME=/elsewhere"]]
    },
    "-e": [{**S, "Env": ["A=1", "B=2", "Z=9"]}, ["-e", "B=3", "-e", "C=", "-e", "GIVEN", "-e", "UNSET", "-e", "A"]],
    "-e HOME, HOSTNAME": [S, ["-e", "HOME=/h", "-e", "HOSTNAME=other"]],
    **{
        f"User {user}": [{**S, "User": user}]
        for user in ["nobody", "33", "33:8", "nobody:mail", "daemon", "daemon:root", "1234", "1234:5678", ":8",
                     "www-data:", "none", "nobody:none", "-1", "4294967295", "0"]
    },
    "-u": [{**S, "User": "33"}, ["-u", "daemon"]],
    **{
        f"Cmd {program}": [{"Cmd": [program], "User": "nobody"}]
        for program in ["", "none", "/none/none", "/a-file", "/a-file/x", "/of-33/x", "/opt",
                        "/unknown-format", "/missing-interpreter", "/sigill", "/sigsegv"]
    },
    **{
        f"sh -c {script}": [{"Cmd": ["sh", "-c", script]}]
        for script in ["exit 3", "exit 255", "sh -c 'kill -TERM $$'; exit $?", "kill -KILL $$; exit 4",
                       "trap 'exit 5' TERM; kill -TERM $$"]
    },
}  # fmt: skip


def name_of(label):
    return f"library/start-{list(STARTS).index(label)}"


def put_images(registry):
    """python, and for each of STARTS busybox with FILES and its config."""
    layout, bases = registry.layout, {}
    for name in "python", "busybox":
        path = images.image(name)
        for blob in (path / "blobs/sha256").iterdir():
            with contextlib.suppress(FileExistsError):
                (layout.path / "blobs/sha256" / blob.name).symlink_to(blob)
        bases[name] = json.loads((path / "index.json").read_text())["manifests"][0]
    registry.put("library/python", bases["python"])
    busybox = images.read_blob(layout.path, bases["busybox"])
    diff_ids = images.read_blob(layout.path, busybox["config"])["rootfs"]["diff_ids"]
    layers = [*zip(busybox["layers"], diff_ids), layout.layer(images.layer(FILES))]
    for label, (config, *_) in STARTS.items():
        registry.put(name_of(label), layout.image(layers, config))


def archive(registry):
    """All of them in one tar, as `docker save` writes it."""
    blobs, manifest = {}, []
    for name, descriptor in registry.names.items():
        image = images.read_blob(registry.layout.path, descriptor)
        config, *layers = [part["digest"] for part in [image["config"], *image["layers"]]]
        blobs.update({digest: registry.path(digest).read_bytes() for digest in [config, *layers]})
        manifest.append({"Config": config, "RepoTags": [name.partition("/")[2]], "Layers": layers})
    entries = [file(name, content) for name, content in blobs.items()]
    return images.layer([*entries, file("manifest.json", json.dumps(manifest).encode())])


# ---- both engines --------------------------------------------------------------------------------


class Engines:
    """Docker and mocker with these images, and the differences that were seen."""

    def __init__(self, docker, mocker, pool):
        self.docker, self.mocker, self.pool, self.found = docker, mocker, pool, {}

    def run(self, name, *command, options=()):
        """`run` under both at the same time → what Docker and mocker answer."""
        words, env = ["run", "--rm", *options, name, *command], {**os.environ, "GIVEN": "given"}
        docker = self.pool.submit(self.docker.run, *words, stdin=subprocess.DEVNULL, env=env)
        return self.mocker(words[0], "-q", *words[1:], env=env), docker.result()

    def differences(self, test):
        """{what: (Docker's, mocker's)} of a setting's probe, or of a start; asked once."""
        if test not in self.found:
            if test in SETTINGS:
                mocker, docker = map(seen, self.run("python", *PROBE, options=SETTINGS[test]))
            else:
                _, options, command = [*STARTS[test], [], []][:3]
                options = ["--network=none", "--hostname=box", *options]
                answers = self.run(name_of(test).partition("/")[2], *command, options=options)
                mocker, docker = ({f"start.{test}": f"{done.returncode} {done.stdout}"} for done in answers)
            self.found[test] = differing(docker, mocker)
        return self.found[test]


PROBE = ["python3", "-c", (TESTS / "probe.py").read_text()]


def seen(done):
    """What the probe says, as text."""
    assert done.returncode == 0, done.stderr
    return {key: str(value) for key, value in json.loads(done.stdout)["compare"].items() if key not in LEFT_OUT}


def differing(one, other):
    pairs = {key: (one.get(key, "-"), other.get(key, "-")) for key in {**one, **other}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


@pytest.fixture(scope="module")
def engines(ip_netns, host_as_before_all, forks, tmp_path_factory):
    """Docker with a cgroup namespace, its default on v2; a store where user-mode-linux can see it."""
    with contextlib.ExitStack() as stack:
        docker = stack.enter_context(oracle.Docker("--default-cgroupns-mode=private", private_network=True))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mocker-probe-", dir="/var/tmp")))
        registry = stack.enter_context(fake.serving(tmp_path_factory.mktemp("probe") / "layout"))
        pool = stack.enter_context(ThreadPoolExecutor())
        put_images(registry)
        loaded = pool.submit(docker.run, "load", input=archive(registry), text=False, check=True)
        mocker = Mocker(home, registry.url, home)
        for name in registry.names:
            done = forks("pull", "-q", name.partition("/")[2], env=mocker.env)
            assert done.returncode == 0, done.stderr
        loaded.result()
        yield Engines(docker, mocker, pool)


# ---- the table -----------------------------------------------------------------------------------


class Row(NamedTuple):
    """What differs, and how: patterns, in which * is anything."""

    what: list
    one: list
    other: list
    why: str

    def names(self, key, pair):
        return like(key, self.what) and like(pair[0], self.one) and like(pair[1], self.other)


def like(text, patterns):
    return any(re.fullmatch(re.escape(pattern).replace(r"\*", ".*"), text, re.DOTALL) for pattern in patterns)


def table(text):
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return [Row(*(re.findall("`(.*?)`", cell) for cell in cells), why.strip()) for *cells, why in lines]


DOCKER = table(README.read_text().partition("## Against Docker, measured\n")[2].partition("\n## ")[0])


def unnamed(differences, rows):
    return {key: pair for key, pair in differences.items() if not any(row.names(key, pair) for row in rows)}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_process_sees_what_it_sees_under_docker(engines, setting):
    assert unnamed(engines.differences(setting), DOCKER) == {}


@pytest.mark.parametrize("start", STARTS)
def test_a_container_starts_and_ends_as_under_docker(engines, start):
    assert unnamed(engines.differences(start), DOCKER) == {}


def test_what_the_table_names_does_differ(engines):
    here = {"x86_64": platform.machine() == "x86_64", "cgroup v1": os.path.exists("/sys/fs/cgroup/pids/tasks")}
    found = [item for test in [*SETTINGS, *STARTS] for item in engines.differences(test).items()]
    rows = [row for row in DOCKER if here.get(row.why.partition(":")[0], True)]
    single = [row._replace(what=[pattern]) for row in rows for pattern in row.what]
    assert len(rows) > 10
    assert [row for row in single if not any(row.names(*item) for item in found)] == []


BY_HAND = table("""
| `status.Seccomp*` | `1`, `2` | `0` | no command installs a filter
| `sid`, `pgrp` | `1` | `0` | it stays in the session of the script, and so keeps its terminal
| `mount order` | `*/etc/hosts*/dev*` | `*/dev*/etc/hosts*` | it binds where mocker moves what it picked up before
""")
ALL_BUT_SECCOMP = ["process", "mounts", "devices", "kernel_files", "cgroups", "network"]


@pytest.mark.parametrize("setting", [setting for setting in SETTINGS if setting not in ("-t", "--cap-drop")])
def test_a_process_sees_the_same_in_a_container_made_by_hand(engines, setting, tmp_path):
    words = [*["--hostname=box"] * ("hostname" not in setting), *SETTINGS[setting], "python", *PROBE, *ALL_BUT_SECCOMP]
    script = engines.mocker("run", "-q", "--by-hand", *words, check=True).stdout
    (tmp_path / "by-hand").write_text(script)
    done = perform(tmp_path / "by-hand")
    assert unnamed(differing(seen(engines.mocker("run", "-q", "--rm", *words)), seen(done)), BY_HAND) == {}


def test_its_devices_are_its_own(engines):
    """What a container does to them, chmod or chown, happens to nobody else."""
    words = ["stat", "-L", "-c", "%d", "/dev/null", "/dev/stdin"]
    for done in engines.run("python", *words, options=["--network=none"]):
        assert len(done.stdout.split()) == 2 and str(os.stat("/dev/null").st_dev) not in done.stdout.split()


# ---- another kernel ------------------------------------------------------------------------------

UML = table("""
| `rlimit.*`, `sysctl.user/*` | `*` | `*` | a machine of 2 GiB
| `status.Cpus*`, `status.Mems*`, `status.Spec*`, `status.THP*` | `*` | `*` | one CPU, without huge pages
| `self.coredump_filter`, `self.attr/current` | `*` | `*` | another configuration, another LSM
| `kernel.*`, `mount./proc/*` | `absent`, `-` | `*` | what one kernel has and the other has not
| `kernel.*`, `mount./proc/*` | `*` | `absent`, `-` | the other way round
| `kernel./proc/io*`, `kernel./sys/power/state`, `kernel./sys/block` | `*` | `*` | another hardware
| `writable in /proc`, `mount order` | `*` | `*` | from all that
| `mount./`, `mount./etc/*` | `*` | `*nodev*`, `/mocker/containers/*` | the store is in memory
| `case.do user xattr` | `ok` | `ENOTSUP` | as a tmpfs before Linux 6.6
| `mount./sys/fs/cgroup` | `tmpfs tmpfs ro,*` | `cgroup2 cgroup ro,*` | cgroup v2 is one tree
| `cgroup` | `*:/*` | `['N::/']` | of which the container's own group is the root
| `cgroup./sys/fs/cgroup.*`, `cgroup./sys/fs/cgroup/*` | `-` | `[]`, `0`, `EROFS` | and nothing in it can be written
| `mount./sys/fs/cgroup/*`, `cgroup./sys/fs/cgroup/*` | `*` | `-` | cgroup v1 has a tree for each controller
""")
PARTS = ["process", "mounts", "devices", "kernel_files", "cgroups", "network", "actions"]  # the others take a minute


@pytest.mark.skipif(bool(machine.MISSING), reason="no user-mode-linux")
def test_a_process_sees_the_same_on_linux_6_1_with_cgroup_v2(engines):
    words = ["run", "-q", "--rm", "--hostname=box", "python", *PROBE, *PARTS]
    here, home = seen(engines.mocker(*words)), engines.mocker.home
    share = f"mkdir /tmp/mocker && cd /tmp/mocker && cp {home}/*.json . && ln -s {home}/blobs {home}/layers ."
    done = machine.uml(f"{share}; {shlex.join([sys.executable, str(MOCKER), *words])}")
    assert unnamed(differing(here, seen(done)), UML) == {}
