"""doctor and compare: each check of doctor made to fail; compare's table against what is known to be so."""

import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MOCKER

pytestmark = pytest.mark.usefixtures("host_as_before_all")
CHECKS = ["kernel", "root", "packages", "namespaces", "overlay", "firewall", "cgroup", "subnet", "leftovers", "hub"]


def verdicts(done):
    """{check: (verdict, text)}; each is a line."""
    lines = [re.fullmatch(r"(ok|warn|LACKS) +(\w+): (.+)", line) for line in done.stdout.splitlines()]
    assert [line[2] for line in lines] == CHECKS and not done.stderr
    found = {line[2]: (line[1], line[3]) for line in lines}
    assert done.returncode == int("LACKS" in [verdict for verdict, _ in found.values()])
    return found


def in_namespaces(mocker, script):
    """doctor, after a script in a network and mounts of its own."""
    whole = f'{script}\nexec "$@"'
    return subprocess.run(
        ["unshare", "--net", "--mount", "sh", "-ec", whole, "sh", *mocker.command(["doctor"])],
        env=mocker.env, capture_output=True, text=True, check=False, timeout=120,
    )


def test_a_machine_that_has_all(store):
    found = verdicts(store("doctor"))
    assert {verdict for verdict, _ in found.values()} == {"ok"}
    assert store.env["MOCKER_HUB"] in found["hub"][1]


@pytest.mark.parametrize(("options", "remedy"), [
    (["--reuid=65534", "--regid=65534", "--clear-groups"], "sudo"), (["--bounding-set=-sys_admin"], "--privileged"),
])  # fmt: skip
def test_without_root(mocker, options, remedy):
    """Nor with a root that may not mount; then nothing else can be tried."""
    command = ["setpriv", *options, *mocker.command(["doctor"])]
    done = subprocess.run(command, env=mocker.env, capture_output=True, text=True, check=False, timeout=120)
    kernel, root = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (1, "")
    assert kernel.startswith("ok     kernel: ") and root.startswith("LACKS  root: ") and remedy in root


@pytest.mark.parametrize(("script", "verdict", "text"), [
    ("ip link add x type bridge; ip address add 10.0.0.77/24 dev x; ip link set x up", "warn",
     "10.0.0.0/24 is in use here: run takes 10.0.1.0/24"),
    ("ip link add x type bridge; ip link set x up; for net in 10.0.0.0/8 172.16.0.0/12 192.168.0.0/16; "
     "do ip route add $net dev x; done", "LACKS", "no free subnet"),
])  # fmt: skip
def test_a_subnet_in_use(mocker, script, verdict, text):
    found = verdicts(in_namespaces(mocker, script))
    assert found["subnet"][0] == verdict and found["subnet"][1].startswith(text)
    assert found["hub"][0] == "LACKS" and "can't be reached" in found["hub"][1]  # there is no network


def test_no_cgroup(mocker):
    found = verdicts(in_namespaces(mocker, "mount --move /sys/fs/cgroup /mnt"))
    assert found["cgroup"][0] == "LACKS" and "mount -t cgroup2" in found["cgroup"][1]


def test_no_firewall(mocker):
    hide = 'for tool in nft iptables iptables-legacy; do at=$(readlink -f "$(command -v $tool)") || continue; ' \
           'if [ -e "$at" ]; then mount --bind /dev/null "$at"; fi; done'
    found = verdicts(in_namespaces(mocker, hide))
    assert found["firewall"][0] == "warn" and "apt install nftables" in found["firewall"][1]


def doctor_by(mocker, code, env=()):
    """doctor, after that was done to it as a module."""
    program = f"import importlib.util, sys, mocker\n{code}\nmocker.main()"
    command = [sys.executable, "-c", program, str(MOCKER), "doctor"]
    env = {**mocker.env, **dict(env)}
    return subprocess.run(command, env=env, cwd=MOCKER.parent, capture_output=True, text=True, check=False, timeout=120)


@pytest.mark.parametrize("name", ["tabulate", "docopt", "requests", "pyroute2"])
def test_a_package_is_missing(mocker, name):
    """The rest is looked at all the same; but for `requests`, which the hub takes."""
    hide = f"""
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {name!r} else find(name, *rest)
sys.modules[{name!r}] = None"""
    found = verdicts(doctor_by(mocker, hide))
    assert found["packages"] == ("LACKS", f"{name} missing: pip install -r requirements.txt")
    assert found["hub"][0] == ("LACKS" if name == "requests" else "ok")


def test_a_package_is_missing_for_another_command(mocker):
    """docopt, without which no command can be read."""
    program = "import sys, mocker; sys.modules['docopt'] = None; mocker.main()"
    command = [sys.executable, "-c", program, str(MOCKER), "images"]
    done = subprocess.run(command, env=mocker.env, cwd=MOCKER.parent, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (125, "")
    assert re.fullmatch("mocker: the Python package 'docopt' is missing: pip install .*\n", done.stderr)


@pytest.mark.parametrize("change", ["sys.platform = 'darwin'", "mocker.LINUX = [4, 19]"])
def test_another_kernel(mocker, change):
    """Then the rest doesn't matter."""
    done = doctor_by(mocker, change)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (1, "", 1)
    assert done.stdout.startswith("LACKS  kernel: ")


def test_a_store_that_can_t_be(mocker):
    found = verdicts(doctor_by(mocker, "", {"MOCKER_HOME": "/proc/nowhere"}))
    assert found["overlay"][0] == "LACKS" and found["leftovers"][0] == "ok"


def test_after_a_killed_mocker(store, start):
    """What it left was cleared away by netlink, for which the package pyroute2 is there in part only."""
    container = start("busybox", "sleep", "1000")
    container.process.kill()
    container.process.wait()
    done = store("doctor")
    assert done.stderr == f"clearing away container {container.id}, whose mocker was killed\n"
    assert (done.returncode, done.stdout.count("ok ")) == (0, len(CHECKS))


def test_a_hub_that_never_answers_is_not_waited_for(store):
    """No images are here, or some are: at the same time, since each takes its ten seconds."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"MOCKER_HUB": f"http://127.0.0.1:{server.getsockname()[1]}"}
        homes = f"{store.home}/none", str(store.home)
        both = [store.popen("doctor", env={**env, "MOCKER_HOME": home}) for home in homes]
        outputs = [process.communicate(timeout=60) for process in both]
    for process, output, verdict in zip(both, outputs, ["LACKS", "warn"]):
        found = verdicts(subprocess.CompletedProcess("doctor", process.returncode, *output))
        assert found["hub"][0] == verdict and found["hub"][1].startswith("TimeoutError: network")


def test_ctrl_c_is_no_finding(mocker):
    with socket.create_server(("127.0.0.1", 0)) as server:
        process = mocker.popen("doctor", env={"MOCKER_HUB": f"http://127.0.0.1:{server.getsockname()[1]}"})
        with server.accept()[0]:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT and "hub" not in output
    assert errors == "mocker: stopped by SIGINT; what was done is undone\n"


def test_pulls_that_are_left(mocker, fake):
    """As Docker Hub says it; and the question is a HEAD, which is no pull."""
    left = "76"

    def answer(handler):
        handler.answer(200, b"{}", {"ratelimit-limit": "100;w=21600", "ratelimit-remaining": f"{left};w=21600"})
        return True

    fake.intercept = answer
    found = verdicts(mocker("doctor", env={"MOCKER_HUB": fake.url}))
    assert found["hub"] == ("ok", f"{fake.url} answers, 76 pulls are left")
    assert fake.requests == [("HEAD", "/v2/library/hello-world/manifests/latest", 200)]
    left = "0"
    assert verdicts(mocker("doctor", env={"MOCKER_HUB": fake.url}))["hub"][0] == "LACKS"


def test_a_hub_out_of_reach_is_no_end_if_there_are_images(store):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        hub = {"MOCKER_HUB": f"http://127.0.0.1:{nobody.getsockname()[1]}"}
        verdict, text = verdicts(store("doctor", env=hub))["hub"]
    assert verdict == "warn" and "can't be reached" in text and re.search(r"[1-9]\d* images are here", text)


def test_containers_are_counted(store):
    store("run", "-q", "busybox", "true", check=True)
    text = verdicts(store("doctor"))["leftovers"][1]
    assert text == "0 containers run, 1 that have ended are kept (mocker clean --containers)"


def table(done):
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= 24 and all(len(line) <= 80 for line in lines)
    heads = re.split(r"\s{2,}", lines[0].strip())
    rows = {cells[0]: dict(zip(heads, cells[1:])) for cells in (re.split(r"\s{2,}", line) for line in lines[2:])}
    return heads, rows


def test_compare(store):
    heads, rows = table(store("compare", env={"PATH": f"{MOCKER.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}))
    assert heads[:4] == ["host", "chroot", "cgroup", "mocker"]
    assert int(rows["processes it sees"]["chroot"]) > int(rows["processes it sees"]["mocker"])
    assert rows["its own number"]["mocker"] == "1" != rows["its own number"]["cgroup"]
    assert rows["host name"]["host"] == rows["host name"]["chroot"] == rows["host name"]["cgroup"]
    assert rows["host name"]["mocker"] != rows["host name"]["host"]
    assert [rows["may take 200 MB of memory"][world] for world in heads[:4]] == ["yes", "yes", "no", "no"]
    doors = [row for row in rows if row.startswith("may ") and "memory" not in row]
    assert len(doors) == 5
    for row in doors:
        assert [rows[row][world] for world in heads[:4]] == ["yes", "yes", "yes", "no"], row
    assert rows["capabilities"]["mocker"] == "14" and int(rows["capabilities"]["cgroup"]) > 14
    assert [rows["has a filter of system calls"][world] for world in heads[:4]] == ["no", "no", "no", "yes"]


def test_compare_with_docker(store, tmp_path):
    """A `docker` that is mocker under another name: what is tested is that its column is asked for, and shown."""
    docker = tmp_path / "bin/docker"
    docker.parent.mkdir()
    docker.write_text(f'#!/bin/sh\nshift; case "$2" in --pull=never) shift 2;; esac\n'
                      f'exec {sys.executable} {MOCKER} run -q --rm "$@"\n')
    docker.chmod(0o755)
    heads, rows = table(store("compare", env={"PATH": f"{docker.parent}:/usr/sbin:/usr/bin:/sbin:/bin"}))
    assert heads == ["host", "chroot", "cgroup", "mocker", "docker"]
    assert all(cells["docker"] == cells["mocker"] for row, cells in rows.items() if row != "host name"
               and row != "processes it sees")


def test_the_probe_does_nothing_to_the_host(store):
    """It is asked as `compare` does; all that is mounted is the probe's own, what could be set is only opened."""
    name, mounts = Path("/proc/sys/kernel/hostname"), Path("/proc/self/mounts").read_text()
    store("compare", check=True)
    assert name.read_text().strip() == socket.gethostname()
    assert Path("/proc/self/mounts").read_text() == mounts


def test_another_process_of_that_number_is_not_the_host_s(store):
    """1 is in the container, too."""
    program = "import mocker; print(mocker.PROBE)"
    probe = subprocess.run([sys.executable, "-c", program], cwd=MOCKER.parent, capture_output=True, text=True).stdout
    done = store("run", "-q", "--rm", "busybox", "sh", "-c", probe, str(MOCKER), "1", check=True)
    assert "may signal the host's|no\n" in done.stdout


def test_compare_an_image_without_a_shell(store):
    done = store("compare", "hello-world")
    assert done.returncode == 125 and not done.stdout
    [*_, last] = done.stderr.splitlines()
    assert last == "mocker: the probe can't run in hello-world: it takes a shell, as busybox has one"
