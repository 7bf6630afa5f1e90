"""Limits: read back from inside, and felt. On this machine's cgroups, and on v2 in user-mode-linux."""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import machine
import pytest

pytestmark = pytest.mark.cgroup
TESTS = Path(__file__).resolve().parent
IN_UML = "MOCKER_TEST_INSIDE" in os.environ
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")


def limit(run, options, v2, v1):
    """What the container's own cgroup says."""
    return run("--rm", *options, "busybox", "cat", f"/sys/fs/cgroup/{v2 if V2 else v1}", check=True).stdout.strip()


def test_limits_are_read_back(run):
    assert limit(run, ["-m", "20m"], "memory.max", "memory/memory.limit_in_bytes") == str(20 << 20)
    assert limit(run, ["--pids-limit", "10"], "pids.max", "pids/pids.max") == "10"
    assert limit(run, ["--cpus", "0.5"], "cpu.max", "cpu/cpu.cfs_quota_us") == ("50000 100000" if V2 else "50000")


def test_without_limits_there_are_none(run):
    assert limit(run, [], "pids.max", "pids/pids.max") == "max"


def test_too_much_memory_is_death(run):
    assert run("--rm", "-m", "20m", "busybox", "tail", "/dev/zero").returncode == 137
    assert run("--rm", "-m", "20m", "busybox", "true").returncode == 0


def test_too_many_processes_are_refused(run):
    script = "for i in 1 2 3 4 5 6 7 8; do sleep 1 & done; wait"
    assert "can't fork" in run("--rm", "--pids-limit", "5", "busybox", "sh", "-c", script).stderr
    assert "can't fork" not in run("--rm", "--pids-limit", "20", "busybox", "sh", "-c", script).stderr


def test_its_own_group_looks_like_the_root_and_cant_be_written(run):
    lines = run("--rm", "busybox", "cat", "/proc/self/cgroup").stdout.splitlines()
    assert {line.rpartition(":")[2] for line in lines if "cpuset" not in line} == {"/"}
    path = "/sys/fs/cgroup/pids.max" if V2 else "/sys/fs/cgroup/pids/pids.max"
    assert "Read-only" in run("--rm", "busybox", "sh", "-c", f"echo max > {path}").stderr


def test_the_groups_go_with_the_container(run, store):
    run("-m", "20m", "busybox", "true", check=True)
    run("-m", "20m", "busybox", "nosuch")
    ids = os.listdir(store.home / "containers")
    assert len(ids) == 2
    assert not [path for path in Path("/sys/fs/cgroup").glob("**/*") if any(id in path.name for id in ids)]


def test_groups_that_a_privileged_container_made_go_too(run):
    folder = "/sys/fs/cgroup/deep/er" if V2 else "/sys/fs/cgroup/pids/deep/er"
    script = f"mkdir -p {folder} && echo $$ >{folder}/cgroup.procs; exit 7"
    done = run("--rm", "--privileged", "busybox", "sh", "-c", script)
    assert (done.returncode, done.stderr) == (7, "")
    assert not list(Path("/sys/fs/cgroup").glob("**/deep"))


@pytest.mark.beside
@pytest.mark.skipif(IN_UML, reason="this is the inside")
@pytest.mark.skipif(bool(machine.MISSING), reason="no user-mode-linux")
def test_all_of_it_on_other_cgroups(pulled):
    """These tests again, and some of others, in kernels with others; each has a copy of the store in memory."""
    by_hand = ["test_by_hand.py::test_limits", "'test_by_hand.py::test_the_same_container[--read-only]'"]
    more = ["test_inspect.py::test_a_container_beside_what_the_kernel_says", "test_inspect.py::test_limits_and_use",
            "test_doctor.py::test_compare"]
    pytest = f"{sys.executable} -m pytest -q -p no:cacheprovider -c pytest.ini test_cgroup.py {' '.join(by_hand)}"
    command = f"{machine.WARM_UP}; cd {TESTS} && {pytest}"
    with tempfile.TemporaryDirectory(dir="/var/tmp") as shared, ThreadPoolExecutor() as pool:  # its /tmp is its own
        subprocess.run(["cp", "-a", f"{pulled}/.", shared], check=True)  # not copytree: some files are sparse
        env = {**os.environ, "MOCKER_TEST_INSIDE": shared}
        v2 = pool.submit(machine.uml, f"{command} {' '.join(more)}", timeout=500, env=env)
        v1 = pool.submit(machine.uml, command, timeout=500, env=env, cgroups=machine.V1)
        for done in v2.result(), v1.result():  # the latter with a tree of two controllers
            assert done.returncode == 0, done.stdout + done.stderr
            assert " passed" in done.stdout and "failed" not in done.stdout
