"""Fixtures to run containers with.

store    mocker(...), with busybox and hello-world pulled already; its containers are the test's own
run      run("busybox", "id") is `mocker run -q busybox id`, to its end
start    start("busybox", "cat") is the same in the background: a Running; ended with the test
tools    tools("nft") is an environment with a PATH in which that is the only tool
host_as_before_all  as host.host_as_before, for a whole file
image    image({"Cmd": ["id"]}, [file("etc/x")]) makes an image of busybox and puts it in the store; → its name
"""

import contextlib
import functools
import json
import os
import shutil
import socket
import subprocess
import time

import host
import images
import oracle
import pytest
from conftest import Mocker


class Running:
    """`mocker run` in the background.

    process  mocker's own Popen, with pipes, as text
    pid      the container's first process, as the host numbers it; it is the image's program already
    id       the container's
    """

    def __init__(self, process, home):
        self.process, self.home = process, home
        until(self.looks_started, lambda: f"mocker run goes on: {process.args}")

    def looks_started(self):
        if self.process.poll() is not None:
            pytest.fail(f"mocker ended with {self.process.returncode}:\n{self.process.stderr.read()}")
        for path in self.home.glob("containers/*/config.json"):
            try:
                config = json.loads(path.read_text())
            except FileNotFoundError:  # of another one, with --rm
                continue
            pid, self.id = config.get("pid") or 0, config["id"]
            status = host.process_status(pid)
            if status and status["parent"] == self.process.pid and is_of_image(pid, self.process.pid):
                self.pid = pid
                return True
        return False

    def ip(self, *arguments):
        """What `ip -json ARGUMENTS` says in the container's network namespace."""
        return json.loads(host.output("nsenter", f"--net=/proc/{self.pid}/ns/net", "ip", "-json", *arguments) or "[]")

    @functools.cached_property
    def address(self):
        [address] = [a["local"] for link in self.ip("addr") for a in link["addr_info"] if link["ifname"] == "veth1"]
        return address

    def close_stdin(self):
        self.process.stdin.close()
        self.process.stdin = None

    def kill(self):
        os.kill(self.pid, 9)

    def end(self):
        """End the container, and let mocker clear up."""
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and mocker is clearing up
                self.kill()
        self.process.communicate(timeout=60)


def free_port(kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def is_of_image(pid, mocker):
    """Does a container's first process run the image's program by now: not mocker's Python, nor the exec_stub?"""
    try:
        program, python = (os.stat(f"/proc/{process}/exe") for process in (pid, mocker))
        return not os.path.samestat(program, python) and not os.readlink(f"/proc/{pid}/exe").startswith("/memfd:")
    except OSError:  # it has ended
        return False


def until(condition, what="what was waited for did not happen", seconds=60):
    """Wait for it; → what it gave."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, what() if callable(what) else what
        time.sleep(0.01)


def one_line(done, *words, status=125):
    """mocker refused, in one line that has these words; nothing else was said."""
    assert (done.stdout, done.returncode) == ("", status), done
    assert done.stderr.startswith("mocker: ") and done.stderr.count("\n") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr
    return True


@pytest.fixture(scope="module")
def host_as_before_all(pulled):
    """After all tests of a file the host is as it was before them."""
    before = host.snapshot()
    yield
    lines = host.settled_difference(before)
    assert not lines, "the host is not as it was before these tests:\n" + "\n".join(lines)


@pytest.fixture(scope="session")
def ip_netns():
    """Where ip-netns(8), unlike mocker, mounts /run/netns and leaves it: scripts made by --by-hand use it."""
    there, mounted = os.path.isdir("/run/netns"), os.path.ismount("/run/netns")
    subprocess.run("ip netns add mocker-test && ip netns delete mocker-test", shell=True, check=True)
    yield
    if not mounted:
        subprocess.run(["umount", "/run/netns"], check=True)
    if not there:
        os.rmdir("/run/netns")


@pytest.fixture(scope="session")
def pulled(registry, tmp_path_factory):
    """A store with the two small images, pulled once for all tests."""
    home = tmp_path_factory.mktemp("store")
    if "MOCKER_TEST_INSIDE" in os.environ:  # of another kernel, without a registry: see test_cgroup.py
        subprocess.run(["cp", "-a", f"{os.environ['MOCKER_TEST_INSIDE']}/.", home], check=True)
        return home
    for name in "hello-world", "busybox":
        Mocker(home, registry.url, home)("pull", name, check=True)
    return home


def share_store(pulled, home):
    """Make `home` a store with the images of another: layers and blobs shared, containers its own."""
    home.mkdir(exist_ok=True)
    for path in pulled.iterdir():
        if path.is_file():
            shutil.copy(path, home)
        elif path.name in ("blobs", "layers") and not (home / path.name).exists():
            (home / path.name).symlink_to(path)


@pytest.fixture
def store(pulled, mocker, home):
    if os.geteuid():
        pytest.skip("containers need root")
    share_store(pulled, home)
    return mocker


@pytest.fixture
def run(store):
    return functools.partial(store, "run", "-q")


@pytest.fixture
def start(store):
    started = []

    def start(*arguments, **options):
        process = store.popen("run", "-q", *arguments, **options)
        try:
            started.append(Running(process, store.home))
        except BaseException:
            process.kill()
            raise
        return started[-1]

    yield start
    for container in started:
        container.end()


@pytest.fixture
def tools(tmp_path):
    """tools("nft") → an environment with a PATH in which that is the only tool."""
    directory = tmp_path / "tools"
    directory.mkdir()
    before = oracle.firewall_tables()

    def tools(*names):
        for name in names:
            for program in filter(shutil.which, (name, f"{name}-restore")):
                (directory / program).symlink_to(shutil.which(program))
        return {"PATH": str(directory)}

    yield tools
    after = oracle.firewall_tables()
    assert not [text for text in after.values() if "mocker" in text]
    oracle.restore_firewall(before)  # iptables can't remove the tables that it makes


@pytest.fixture(scope="session")
def make_image(registry, pulled, tmp_path_factory):
    """make_image(config, entries): pushed and pulled once for all tests that want the same."""
    made = {}

    def make(config, entries):
        layers = [images.layer(entries)] if entries else []
        key = json.dumps(config, sort_keys=True), *layers
        if key not in made:
            made[key] = f"tests/image-{len(made)}"
            layout, base = images.Layout(tmp_path_factory.mktemp("image") / "layout"), images.image("busybox")
            shutil.copytree(base / "blobs", layout.path / "blobs", dirs_exist_ok=True)
            manifest = images.read_blob(base, json.loads((base / "index.json").read_text())["manifests"][0])
            diff_ids = images.read_blob(base, manifest["config"])["rootfs"]["diff_ids"]
            layout.tag(layout.image([*zip(manifest["layers"], diff_ids), *layers], config))
            registry.push(layout.path, f"{made[key]}:latest")
            Mocker(pulled, registry.url, pulled)("pull", made[key], check=True)
        return made[key]

    return make


@pytest.fixture
def image(make_image, store, pulled):
    def image(config, entries=()):
        name = make_image(config, entries)
        share_store(pulled, store.home)
        return name

    return image
