"""run --without and --only: what each part of a container is for, seen from inside."""

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from containers import one_line

pytestmark = pytest.mark.usefixtures("host_as_before_all")
KINDS = {"net": "net", "pid": "pid", "mount": "mnt", "uts": "uts", "ipc": "ipc", "cgroup": "cgroup"}


def namespaces(run, *options):
    script = f"for kind in {' '.join(KINDS.values())}; do readlink /proc/self/ns/$kind; done"
    return dict(zip(KINDS, run("--rm", *options, "busybox", "sh", "-c", script).stdout.split()))


HOST = {part: os.readlink(f"/proc/self/ns/{kind}") for part, kind in KINDS.items()}


@pytest.mark.parametrize("part", KINDS)
def test_a_namespace_left_out_is_the_host_s(run, part):
    seen = namespaces(run, f"--without={part}")
    assert {other for other in KINDS if seen[other] == HOST[other]} == {part}


def test_only_these(run):
    seen = namespaces(run, "--only=uts,ipc")
    assert {part for part in KINDS if seen[part] != HOST[part]} == {"uts", "ipc"}


@pytest.mark.parametrize("parts", ["--only=chroot", "--only=cgroup", "--without=pid"])
@pytest.mark.parametrize("output", ["", ">/dev/null 2>&1"])
def test_without_a_pid_namespace_nothing_is_left_either(run, parts, output):
    """Not even what keeps mocker's pipe open, or has put itself into a session of its own."""
    script = f"(setsid sleep 1234567 & sleep 1234567 &) {output}; echo done"
    assert run("--rm", parts, "busybox", "sh", "-c", script, timeout=30).stdout == "done\n"
    assert subprocess.run(["pgrep", "-f", "sleep 1234567"], stdout=subprocess.DEVNULL).returncode == 1


@pytest.mark.parametrize("only", ["chroot", "cgroup"])
def test_just_that_isolates_nothing(run, only):
    """Docker is just chroot, or just cgroups: it sees the host's processes and name, and may mount."""
    seen = namespaces(run, f"--only={only}")
    assert {part for part in KINDS if seen[part] != HOST[part]} == {only} & {"cgroup"}
    script = f"hostname; ls -d /proc/{os.getpid()}; mount -t tmpfs none /tmp && echo mounted"
    done = run("--rm", f"--only={only}", "busybox", "sh", "-c", script)
    assert done.stdout == f"{socket.gethostname()}\n/proc/{os.getpid()}\nmounted\n"


LOOKS = {
    "cgroup": ("ls -A /sys/fs/cgroup | head -1", ""),
    "seccomp": ("grep -c 'Seccomp:.0' /proc/self/status", "1\n"),
    "mask": ("grep -q . /proc/timer_list && echo shown", "shown\n"),
    "user": ("id -u", "0\n"),
}


@pytest.mark.parametrize("part", LOOKS)
def test_from_inside(run, part):
    script, without = LOOKS[part]
    user = ["-u", "1000"] if part == "user" else []
    whole = run("--rm", *user, "busybox", "sh", "-c", script)
    done = run("--rm", *user, f"--without={part}", "busybox", "sh", "-c", script)
    if part == "mask" and not os.access("/proc/timer_list", os.R_OK):
        pytest.skip("no /proc/timer_list here")
    assert done.stdout == without != whole.stdout


def test_without_caps_all_are_left(run):
    [own] = re.findall(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())
    assert run("--rm", "--without=caps", "busybox", "grep", "CapEff", "/proc/self/status").stdout.split()[1] == own


def test_without_overlay_the_image_stays_clean_too(run, store):
    """It is a copy then."""
    script = "rm /bin/ls; grep -c ' / overlay' /proc/self/mounts"
    assert run("--rm", "--without=overlay", "busybox", "sh", "-c", script).stdout == "0\n"
    assert run("--rm", "busybox", "ls", "/bin/ls").stdout == "/bin/ls\n"


@pytest.mark.parametrize("options", [["--without=mount"], ["--only=pivot_root"], ["--without=mount,pid,cgroup,uts"]])
def test_without_a_mount_namespace_the_host_s_root_stays(store, options):
    """pivot_root would move it: chroot instead, and mocker says so; no mount is left."""
    before = Path("/proc/self/mounts").read_text()
    done = store("run", "--rm", *options, "busybox", "ls", "/")
    assert done.returncode == 0 and "proc\n" in done.stdout
    assert "chroot instead" in done.stderr
    assert Path("/proc/self/mounts").read_text() == before


def test_a_volume_outlives_a_container_without_a_mount_namespace(run, tmp_path):
    (tmp_path / "kept").write_text("kept")
    volume = ["-v", f"{tmp_path}:/volume"]
    assert run("--rm", "--without=mount", *volume, "busybox", "cat", "/volume/kept").stdout == "kept"
    assert (tmp_path / "kept").read_text() == "kept"


def test_without_a_pid_namespace_its_children_end_too(run):
    done = run("--rm", "--without=pid", "busybox", "sh", "-c", "sleep 987654 & echo $!")
    status = Path(f"/proc/{int(done.stdout)}/status")
    assert not status.exists() or "zombie" in status.read_text()  # whom the host's init has still to bury


@pytest.mark.parametrize("part", [*KINDS, "overlay", "pivot_root", "caps", "seccomp", "mask", "user"])
def test_each_is_told_as_left_out_or_shown_by_its_absence(store, part):
    done = store("run", "--rm", "--explain", f"--without={part}", "busybox", "true")
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stderr.count("(left out)") == {"net": 2, "cgroup": 2, "caps": 1, "seccomp": 1, "mask": 1}.get(part, 0)


@pytest.mark.parametrize("options", [["--without=nonsense"], ["--only=net,nonsense"]])
def test_a_part_that_is_none(run, options):
    one_line(run(*options, "busybox", "true"), "nonsense", "pivot_root")


@pytest.mark.parametrize("both", [["--without=net", "--only=pid"], ["--only=", "--without="]])
def test_both_are_too_much(run, both):
    one_line(run(*both, "busybox", "true"), "--only", "--without")
