"""run --by-hand: the script that it prints makes the same container. (test_probe.py compares more of it.)"""

import os
import re
import shlex
import signal
import subprocess

import host
import pytest
from containers import free_port, one_line
from images import folder, symlink

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.usefixtures("ip_netns", "host_as_before_all"),
]
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")


@pytest.fixture
def by_hand(run, tmp_path):
    """by_hand(options, image, command...): what the script's container says, and its status."""

    def by_hand(*words):
        script = run("--by-hand", *words)
        assert (script.returncode, script.stderr) == (0, "")
        (tmp_path / "by-hand").write_text(script.stdout)
        return perform(tmp_path / "by-hand")

    return by_hand


def perform(script, **options):
    return subprocess.run(["sh", script], capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
                          env={"PATH": os.environ["PATH"]}, preexec_fn=heed_signals, **options)


def heed_signals():
    """What a shell started in the background has made us ignore, a script would ignore, too."""
    for number in signal.SIGINT, signal.SIGQUIT:
        signal.signal(number, signal.SIG_DFL)


LOOK = """
tr '\\0' '\\n' </proc/$$/cmdline | head -3; env | sort; pwd; id; umask; hostname; echo pid $$
cat /etc/hosts /etc/hostname /etc/resolv.conf
ip address | grep -v "link/ether\\|^[0-9]"; ip route
cut -d' ' -f4-6,8- /proc/self/mountinfo; grep Cap /proc/self/status; cat /proc/self/cgroup
ls -ln /dev /proc/self/fd/ | cut -c1-60; stat -c '%a %u:%g' /; touch /x; mount -t tmpfs none /tmp
for kind in mnt uts ipc pid net cgroup user; do readlink /proc/self/ns/$kind; done; exit 3
"""


def comparable(done):
    """Without what is another one each time: id, times, numbers of namespaces, and where a pipe comes from."""
    text = re.sub(r"\b[0-9a-f]{8}\b|(?<=pid )\d{3,}", "ID", done.stdout + done.stderr)
    text = re.sub(r"\w+ +\d+ \d\d:\d\d|:\[\d+\]|lowerdir=\S+|(pipe|@if)\S+| -> \S*(null|by-hand).*", "", text)
    return sorted(text.splitlines())  # the three mounts in /etc come earlier where they are moved, not bound


LEFT_OUT = ["net", "pid", "mount", "uts", "ipc", "cgroup", "overlay", "pivot_root", "caps", "mask", "user",
            "caps,seccomp,user"]
OPTIONS = [
    [], ["--network=none"], ["--network=host"], ["-u", "nobody"], ["-u", "1234:5678"], ["--read-only"],
    ["--privileged"], ["-e", "A=a 'b' $HOME\n\\n", "-w", "/new/a b", "--hostname=box"],
    ["--cap-drop=MKNOD", "--cap-add=NET_ADMIN"], ["--entrypoint=/bin/sh"], ["--only=chroot"], ["--only=cgroup"],
    *([f"--without={part}"] for part in LEFT_OUT),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_the_same_container(options, run, by_hand):
    words = [*options, "busybox", *([] if "--entrypoint=/bin/sh" in options else ["sh"]), "-c", LOOK]
    ours, theirs = run("--rm", *words), by_hand(*words)
    assert comparable(theirs) == comparable(ours)
    assert theirs.returncode == ours.returncode == 3
    assert len(theirs.stdout.splitlines()) > 50


def test_limits(run, by_hand):
    files = "memory/memory.limit_in_bytes pids/pids.max cpu/cpu.cfs_quota_us"
    look = f"cd /sys/fs/cgroup; cat {'memory.max pids.max cpu.max' if V2 else files}"
    words = ["-m", "64m", "--pids-limit=20", "--cpus=0.5", "busybox", "sh", "-c", look]
    assert by_hand(*words).stdout == run("--rm", *words).stdout != ""


def test_volumes(by_hand, tmp_path):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/file").write_text("of the host\n")
    command = "cat /v/w/file /etc/motd; echo here >/v/w/new; echo no >/etc/motd"
    volumes = f"{tmp_path}/a b:/v/w", f"{tmp_path}/a b/file:/etc/motd:ro"
    done = by_hand("-v", volumes[0], "-v", volumes[1], "busybox", "sh", "-c", command)
    assert done.stdout == "of the host\n" * 2
    assert "Read-only" in done.stderr
    assert (tmp_path / "a b/new").read_text() == "here\n"


def test_a_published_port(run, tmp_path):
    port = free_port()
    script = run("--by-hand", "-p", f"{port}:80", "busybox", "sh", "-c", "echo hello | timeout 20 nc -l -p 80")
    (tmp_path / "by-hand").write_text(script.stdout)
    process = subprocess.Popen(["sh", tmp_path / "by-hand"], stdin=subprocess.DEVNULL)
    ask = f"for n in $(seq 100); do nc -w 5 127.0.0.1 {port} && break; sleep 0.1; done"
    assert subprocess.run(["busybox", "sh", "-c", ask], capture_output=True, text=True, timeout=60).stdout == "hello\n"
    assert process.wait(30) == 0


def test_its_parts_are_undone_whatever_it_says(by_hand):
    before = host.snapshot()
    assert by_hand("busybox", "sh", "-c", "exit 7").returncode == 7
    assert host.settled_difference(before) == []


def test_it_only_rehearses(run, store, tmp_path):
    """The program is not run, and nothing is left: no container, no output."""
    stamp = os.stat("/tmp/stdout").st_ino if os.path.exists("/tmp/stdout") else None
    before = host.snapshot()
    done = run("--by-hand", "-v", f"{tmp_path}:/v", "busybox", "touch", "/v/it-ran")
    assert done.returncode == 0 and not (tmp_path / "it-ran").exists()
    assert not list(store.home.glob("containers/*"))
    assert (os.stat("/tmp/stdout").st_ino if stamp else None) == stamp
    assert host.settled_difference(before) == []


def test_every_step_has_its_heading_and_is_told_as_explained(run, store):
    script = run("--by-hand", "--hostname=box", "busybox", "true").stdout
    story = store("run", "--explain", "--rm", "--hostname=box", "busybox", "true").stderr
    headings = re.findall("^■ .*", story, re.MULTILINE)
    assert len(headings) > 12
    assert [line[2:] for line in script.splitlines() if line[2:] in headings] == headings
    told = {re.sub(r"[0-9a-f]{8}\b|^exec ", "", line) for line in script.splitlines()}
    missing = [line for line in re.findall(r"^  \$ (.*)", re.sub(r"[0-9a-f]{8}\b", "", story), re.MULTILINE)
               if not any(line in other for other in told)]
    assert [line.split()[0] for line in missing] == ["pivot_root", "setpriv", "execve(a"]  # a script does otherwise


def test_what_the_image_says_is_no_shell(image, run, by_hand):
    """Whatever stands in its config, or in its names, is quoted."""
    touch = "touch /tmp/mocker-was-here"
    name = image({"Env": [f"A=$({touch})`{touch}`", f"B=x\n {touch}", f"C=';{touch};'",
                          f"D=\nINSIDE_0\n{touch}\nINSIDE_1\n{touch}"],
                  "Cmd": ["sh", "-c", "env | grep -A1 '^[ABC]'"], "WorkingDir": f"/$({touch})"})
    assert by_hand(name).stdout == run("--rm", name).stdout
    assert not os.path.exists("/tmp/mocker-was-here")


def test_a_terminal_gets_nothing_that_it_would_obey(image, store, tmp_path):
    name = image({"Env": ["A=\033[2J"], "Cmd": ["env"]})
    command = shlex.join(store.command(["run", "--by-hand", name]))
    for options, there in ["-ec", False], ["-ec", True]:
        shown = subprocess.run(["script", "-q", options, command + " | cat" * there, "/dev/null"], env=store.env,
                               capture_output=True, stdin=subprocess.DEVNULL, timeout=60).stdout
        assert b"#!/bin/sh" in shown and (b"\033" in shown) == there


def test_what_a_shell_needs_to_the_last(run):
    one_line(run("--by-hand", "--cap-drop=ALL", "busybox", "true"), "--by-hand", "SETUID", "SYS_CHROOT")


def test_what_the_rehearsal_finds_out(run):
    """What run would refuse, it refuses, and prints no half of a script."""
    one_line(run("--by-hand", "busybox", "none"), "none", status=127)
    one_line(run("--by-hand", "--network=nothing", "busybox", "true"), "--network")


MARK = "/tmp/mocker-was-here"


@pytest.mark.parametrize("config", [
    {"Env": ["PATH", "HOSTNAME", f"-S/bin/sh -c 'touch {MARK}' ="]},
    {"Env": [f"A=\nINSIDE_0\ntouch {MARK}\nINSIDE_0_00000000\ntouch {MARK}"]},
    {"WorkingDir": f"/y\nINSIDE_0\ntouch {MARK}"},
    {"WorkingDir": "/-m777/x"},
    {"WorkingDir": "/to-tmp/mocker-was-here"},
    {"Entrypoint": ["/bin/ls", "-x", f"\nINSIDE_1\ntouch {MARK}"]},
], ids=str)  # fmt: skip
def test_an_image_runs_nothing_on_the_host(config, image, run, by_hand):
    name = image({"Cmd": ["/bin/sh", "-c", "env; pwd; ls -d /to-tmp/"], **config},
                 [symlink("to-tmp", "/tmp"), symlink("etc/hosts", f"/x\nINSIDE_0\ntouch {MARK}"), folder("-m777")])
    options = ["--hostname=box", "--network=none"]
    ours, theirs = run("--rm", *options, name), by_hand(*options, name)
    assert (theirs.stdout, theirs.returncode) == (ours.stdout, ours.returncode)
    assert not os.path.exists(MARK)


def test_what_the_host_s_loader_would_obey_is_refused(image, run):
    name = image({"Env": ["LD_PRELOAD=./evil.so"], "Cmd": ["true"]})
    one_line(run("--by-hand", name), "LD_PRELOAD", "-e LD_PRELOAD")
    assert run("--by-hand", "-e", "LD_PRELOAD", name).returncode == 0


def test_it_may_come_by_stdin(store):
    """Nothing of it is out before all is undone; and the program gets none of it, wherever a block of it ends."""
    for padding in range(0, 8192, 2000):
        mocker = store.command(["run", "-q", "--by-hand", "-e", f"A={'x' * padding}", "busybox", "cat"])
        done = subprocess.run(f"{shlex.join(mocker)} | sh", shell=True, capture_output=True, text=True, env=store.env,
                              stdin=subprocess.DEVNULL, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_store_with_an_odd_name(mocker, registry, tmp_path):
    volume = tmp_path / "volume"
    volume.mkdir()
    (volume / "file").write_text("kept")
    env = {"MOCKER_HOME": str(tmp_path / "a b'c")}
    words = ["--by-hand", "--only=chroot", "-v", f"{volume}:/v", "busybox", "cat", "/v/file"]
    (tmp_path / "by-hand").write_text(mocker("run", "-q", *words, env=env, check=True).stdout)
    done = perform(tmp_path / "by-hand")
    assert (done.stdout, done.stderr, done.returncode) == ("kept", "", 0)
    assert (volume / "file").read_text() == "kept"


@pytest.mark.parametrize("left", ["sleep 77 & sleep 77 &", "dd if=/dev/zero of=/dev/null bs=1G & sleep 1"],
                         ids=["at-once", "while-its-memory-goes"])
def test_what_it_leaves_running_is_ended(by_hand, left):
    """The kernel takes a moment to end a process of 1 GiB, and its cgroup can't go before."""
    before = host.snapshot()
    done = by_hand("--without=pid", "busybox", "sh", "-c", left)
    assert (done.returncode, done.stderr) == (0, "")
    assert host.settled_difference(before) == []


def test_a_script_that_is_stopped_undoes_all(run, tmp_path):
    before = host.snapshot()
    (tmp_path / "by-hand").write_text(run("--by-hand", "busybox", "sh", "-c", "echo ready; sleep 1; exit 3").stdout)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(["sh", tmp_path / "by-hand"], **pipes)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.wait(30) == 3
    process.stdout.close()
    assert host.settled_difference(before) == []
