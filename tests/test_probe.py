"""What a process sees, and how it starts and ends: under Docker and under mocker the same, but for
what the README's table "Against Docker, measured" names. And on cgroup v2, in another kernel."""

import contextlib
import functools
import gzip
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake
import images
import machine
import oracle
import pytest
from conftest import MOCKER, Mocker
from images import file, folder, symlink

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.skipif(bool(oracle.MISSING), reason=f"not installed: {oracle.MISSING}"),
]
TESTS = Path(__file__).resolve().parent
README = TESTS.parent / "README.md"
PROBE = (TESTS / "probe.py").read_text()

# ---- the two engines, with the same images -------------------------------------------------------

SHOW = b"""#!/bin/busybox sh
b=/bin/busybox
for file in cmdline environ; do $b tr '\\0' '\\n' </proc/$$/$file; echo --; done
$b pwd; $b stat -c '%a %u:%g' .; $b id; echo "pid $$"
exit ${STATUS:-0}
"""
X86 = platform.machine() == "x86_64"


def program(x86, arm):
    """A program of a few machine instructions."""
    return images.elf(62, x86) if X86 else images.elf(183, arm)


FILES = [
    file("show", SHOW, 0o755),
    folder("opt/bin"),
    file("opt/bin/show", SHOW, 0o755),
    file("plain", b"echo"),
    file("no-format", b"echo", 0o755),
    file("no-interpreter", b"#!/none\n", 0o755),
    file("illegal", program(b"\x0f\x0b", bytes(4)), 0o755),  # ud2, udf
    file("segfault", program(b"\x31\xc0\x89\x00", b"\x00\x00\x80\xd2\x01\x00\x40\xf9"), 0o755),  # *0
    symlink("to-tmp", "tmp"),
    folder("owned", 0o700, uid=33, gid=33),
]
BOTH = {"Entrypoint": ["/show", "x"], "Cmd": ["y z", "*"]}
S = {"Entrypoint": ["/show"]}


def sh(script):
    return {"Cmd": ["sh", "-c", script]}


# label: (the image's config, options, command)
STARTS = {
    "only a Cmd": ({"Cmd": ["/show", "a b", "", "$HOME"]}, [], []),
    "only an Entrypoint": ({"Entrypoint": ["/show", "x"]}, [], []),
    "both": (BOTH, [], []),
    "a command replaces Cmd": (BOTH, [], ["new", "--flag", ""]),
    "--entrypoint drops Cmd": (BOTH, ["--entrypoint", "/show"], []),
    "--entrypoint and a command": (BOTH, ["--entrypoint", "/opt/bin/show"], ["new"]),
    "--entrypoint of nothing": (BOTH, ["--entrypoint", ""], []),
    "--entrypoint of nothing, and a command": (BOTH, ["--entrypoint", ""], ["/show", "new"]),
    "shell form": ({"Cmd": ["/bin/sh", "-c", 'exec /show "$0" $HOME *']}, [], []),
    "shell form of both": ({"Entrypoint": ["/bin/sh", "-c", "/show $0"], "Cmd": ["a", "b"]}, [], []),
    "neither": ({}, [], []),
    "empty lists": ({"Entrypoint": [], "Cmd": []}, [], []),
    "null": ({"Entrypoint": None, "Cmd": None, "Env": None, "User": "", "WorkingDir": ""}, [], ["/show"]),
    "an empty word": ({"Cmd": [""]}, [], []),
    "found in PATH": ({"Cmd": ["show"], "Env": ["PATH=/none:/opt/bin"]}, [], []),
    "found in PATH of -e": ({"Cmd": ["show"], "Env": ["PATH=/none"]}, ["-e", "PATH=/opt/bin"], []),
    "relative": ({"Cmd": ["./show"], "WorkingDir": "/opt/bin"}, [], []),
    "relative, below": ({"Cmd": ["bin/show"], "WorkingDir": "/opt"}, [], []),
    "WorkingDir to be made": ({**S, "WorkingDir": "/to/be/made", "User": "33"}, [], []),
    "WorkingDir with dots": ({**S, "WorkingDir": "/opt/./bin/../"}, [], []),
    "WorkingDir through a link": ({**S, "WorkingDir": "/to-tmp/x"}, [], []),
    "WorkingDir relative": ({**S, "WorkingDir": "some/where"}, [], []),
    "WorkingDir a file": ({**S, "WorkingDir": "/plain"}, [], []),
    "WorkingDir with a variable": ({**S, "WorkingDir": "/x/$HOME", "Env": ["HOME=/y"]}, [], []),
    "WorkingDir closed to User": ({**S, "WorkingDir": "/root", "User": "nobody"}, [], []),
    "WorkingDir only User's": ({**S, "WorkingDir": "/owned", "User": "33"}, [], []),
    "-w": ({**S, "WorkingDir": "/opt"}, ["-w", "/opt/bin/new"], []),
    "Env with =": ({**S, "Env": ["A=B=C", "D==", "E= f "]}, [], []),
    "Env empty": ({**S, "Env": ["A=", "PATH=", "HOME="]}, [], []),
    "Env without =": ({**S, "Env": ["A", "B=1"]}, [], []),
    "Env twice": ({**S, "Env": ["A=1", "B=2", "A=3"]}, [], []),
    "Env odd": ({**S, "Env": ["a.b=1", "ü=ö", "N=1\n2", "HOSTNAME=no", "TERM=dumb"]}, [], []),
    "Env sets HOME": ({**S, "Env": ["HOME=/elsewhere"], "User": "33"}, [], []),
    "-e": ({**S, "Env": ["A=1", "B=2"]}, ["-e", "B=3", "-e", "C=", "-e", "GIVEN", "-e", "UNSET", "-e", "A"], []),
    "-e of HOME and HOSTNAME": (S, ["-e", "HOME=/h", "-e", "HOSTNAME=other"], []),
    **{
        f"User {user}": ({**S, "User": user}, [], [])
        for user in ["nobody", "33", "33:8", "nobody:mail", "daemon", "daemon:root", "1234", "1234:5678", ":8",
                     "www-data:", "none", "nobody:none", "-1", "4294967295", "0", "0:0"]
    },
    "-u": ({**S, "User": "33"}, ["-u", "daemon"], []),
    "status 3": ({**S, "Env": ["STATUS=3"]}, [], []),
    "status 255": (sh("exit 255"), [], []),
    "status 256": (sh("exit 256"), [], []),
    "no such command": ({"Cmd": ["none"]}, [], []),
    "no such path": ({"Cmd": ["/none/none"]}, [], []),
    "not executable": ({"Cmd": ["/plain"]}, [], []),
    "not executable for User": ({"Cmd": ["/owned/x"], "User": "nobody"}, [], []),
    "a directory": ({"Cmd": ["/opt"]}, [], []),
    "a file as a directory": ({"Cmd": ["/plain/x"]}, [], []),
    "no format": ({"Cmd": ["/no-format"]}, [], []),
    "no interpreter": ({"Cmd": ["/no-interpreter"]}, [], []),
    "SIGILL": ({"Cmd": ["/illegal"]}, [], []),
    "SIGSEGV": ({"Cmd": ["/segfault"]}, [], []),
    "a child's SIGTERM": (sh('sh -c "kill -TERM \\$\\$"; exit $?'), [], []),
    "SIGKILL to itself": (sh("kill -KILL $$; exit 4"), [], []),
    "SIGTERM to itself": (sh("trap 'exit 5' TERM; kill -TERM $$; exit 4"), [], []),
}  # fmt: skip


class Engines:
    def __init__(self, docker, mocker, pool):
        self.docker, self.mocker, self.pool = docker, mocker, pool

    def run(self, *arguments, options=(), env=()):
        """`run` under both at the same time → Docker's answer and mocker's."""
        env = {**os.environ, "LC_ALL": "C.UTF-8", **dict(env)}
        docker = self.pool.submit(self.docker.run, "run", "--rm", *arguments, stdin=subprocess.DEVNULL, env=env)
        mocker = self.mocker("run", "-q", "--rm", *arguments, env=env)
        return docker.result(), mocker


def name_of(label):
    return f"library/case-{list(STARTS).index(label)}:latest"


@pytest.fixture(scope="module")
def engines(host_as_before_all, forks, tmp_path_factory):
    """Docker as newer ones are, with a cgroup namespace; the store is where user-mode-linux can see it."""
    with contextlib.ExitStack() as stack:
        docker = stack.enter_context(oracle.Docker("--default-cgroupns-mode=private", private_network=True))
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mocker-probe-", dir="/var/tmp")))
        registry = stack.enter_context(fake.serving(tmp_path_factory.mktemp("probe") / "layout"))
        pool = stack.enter_context(ThreadPoolExecutor())
        mocker = Mocker(home, registry.url, home)
        put_images(registry)
        loaded = pool.submit(docker.run, "load", input=archive(registry), text=False, check=True)
        for name in registry.names:
            done = forks("pull", "-q", name.partition("/")[2], env=mocker.env)
            assert done.returncode == 0, done.stderr
        loaded.result()
        yield Engines(docker, mocker, pool)


def put_images(registry):
    """python, and for each of STARTS busybox with FILES and its config."""
    layout = registry.layout
    bases = {}
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
    for label, (config, _, _) in STARTS.items():
        registry.put(name_of(label), layout.image(layers, config))


def archive(registry):
    """All of them in one tar, as `docker save` writes it."""
    blobs, manifest = {}, []
    for name, descriptor in registry.names.items():
        image = images.read_blob(registry.layout.path, descriptor)
        parts = [image["config"], *image["layers"]]
        blobs.update({part["digest"]: registry.path(part["digest"]).read_bytes() for part in parts})
        config, *layers = [part["digest"] for part in parts]
        manifest.append({"Config": config, "RepoTags": [name.partition("/")[2]], "Layers": layers})
    entries = [file(name, content) for name, content in blobs.items()]
    return images.layer([*entries, file("manifest.json", json.dumps(manifest).encode())])


# ---- how it starts and ends ----------------------------------------------------------------------


@pytest.mark.parametrize("label", STARTS)
def test_a_start_is_as_under_docker(engines, label):
    _, options, command = STARTS[label]
    name = name_of(label).partition("/")[2]
    docker, mocker = engines.run("--network=none", "--hostname=box", *options, name, *command, env={"GIVEN": "g"})
    assert (mocker.returncode, mocker.stdout) == (docker.returncode, docker.stdout), docker.stderr + mocker.stderr
