"""What mocker leaves on the host: nothing. After success, failure, SIGTERM and kill -9; and when many run at once."""

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import host
import images
import pytest
from conftest import MOCKER
from containers import free_port, one_line, until

pytestmark = pytest.mark.usefixtures("pulled", "host_as_before")  # in this order
host_as_before = host.host_as_before

RUNS = int(os.environ.get("MOCKER_TEST_RUNS", 40))  # in a row
AT_ONCE = int(os.environ.get("MOCKER_TEST_AT_ONCE", 50))
BATCH = 400 // AT_ONCE  # pairs that talk at a time: the kernel knows 1,024 neighbours, in all namespaces together


def children(process):
    return [pid for pid in host.pids() if (host.process_status(pid) or {}).get("parent") == process.pid]


def ended(pid):
    status = host.process_status(pid)
    return not status or status["state"] == "Z"


# ---- runs that end, one way or the other ---------------------------------------------------------


@pytest.mark.parametrize("option", [None, "--rm", "--network=none", "--network=host", "--memory=64m", "--read-only"])
def test_success(run, option):
    assert run(*filter(None, [option]), "busybox", "true").returncode == 0


def test_a_failing_program(run):
    assert run("busybox", "false").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["no/such/image"], 125),
        (["busybox", "no-such-program"], 127),
        (["busybox", "/etc/passwd"], 126),
        (["-u", "no-such-user", "busybox", "true"], 125),
        (["-w", "/etc/passwd", "busybox", "true"], 125),
        (["-v", "/etc/passwd:/etc", "busybox", "true"], 125),
        (["-v", "/etc:/etc/passwd", "busybox", "true"], 125),
        (["-v", "/etc:/bin/sh/x", "busybox", "true"], 125),
        (["-e", "=x", "busybox", "true"], 125),
        (["-p", "203.0.113.9:80:80", "busybox", "true"], 125),
        (["--hostname", "x" * 300, "busybox", "true"], 125),
        (["--cap-add", "NONSENSE", "busybox", "true"], 125),
    ],
)
def test_failure(run, store, arguments, status):
    one_line(run(*arguments), status=status)


@pytest.mark.parametrize(
    ("config", "entries", "status"),
    [
        ({}, [], 125),  # no command
        ({"Cmd": ["/gone"]}, [], 127),
        ({"Cmd": ["true"], "User": "stranger"}, [], 125),
        ({"Cmd": ["true"], "WorkingDir": "relative"}, [], 125),
        ({"Cmd": ["true"], "WorkingDir": "/bin/sh"}, [], 125),
        ({"Cmd": ["true"]}, [images.file("proc", b"")], 125),
        ({"Cmd": ["true"]}, [images.file("dev", b"")], 125),
        ({"Cmd": ["true"]}, [images.file("etc", b"")], 125),
        ({"Cmd": ["true"]}, [images.symlink("sys", "/etc")], 125),
    ],
)
def test_failure_by_an_image(run, image, config, entries, status):
    one_line(run(image(config, entries)), status=status)


def test_a_container_that_was_removed_meanwhile(store, start):
    """Somebody deletes its directory while it runs."""
    container = start("busybox", "cat")
    subprocess.run(["rm", "-rf", store.home / "containers" / container.id], check=True)
    container.close_stdin()
    assert container.process.wait(60) in (0, 125)


# ---- SIGTERM, SIGINT and kill -9 at any moment ---------------------------------------------------

MOMENTS = [0.02, 0.05, 0.08, 0.11, 0.14, 0.17, 0.2, 0.25, 0.3, 0.4]  # seconds: a run takes about 0.2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_at_any_moment_of_a_start(store, number):
    """The program ends at the first one that reaches it; mocker itself at once, and nothing is left."""
    script = "trap 'exit 9' HUP INT TERM; while :; do sleep 0.01; done"
    for moment in MOMENTS:
        process = store.popen("run", "--rm", "busybox", "sh", "-c", script)
        time.sleep(moment)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(number)  # again: pid 1 may not have set its trap yet
            time.sleep(0.1)
        out, err = process.communicate(timeout=1)
        # SIGINT while Python begins: it says so, or at a second one, while it ends for the first, what it has lost.
        python_began = err.rstrip().endswith(("KeyboardInterrupt", "lost sys.stderr"))
        assert python_began or process.returncode in (9, 128 + number, -number, 137), (moment, err)
        assert python_began or "Traceback" not in err, (moment, err)
        assert not list(store.home.glob("containers/*"))


@pytest.mark.parametrize("options", [["--rm"], ["-u", "daemon"], ["--network=host", "-v", "/etc:/x"]])
def test_kill_9_at_any_moment(store, options):
    """The container dies with mocker; the next command clears away the rest."""
    before = host.snapshot()
    for moment in MOMENTS:
        process = store.popen("run", *options, "busybox", "sleep", "1000")
        time.sleep(moment)
        inside = children(process)
        process.kill()
        process.communicate()
        with contextlib.suppress(AssertionError):
            until(lambda pids=inside: all(map(ended, pids)), seconds=20)
        alive = [host.describe_process(pid) for pid in inside if not ended(pid)]
        assert store("images").returncode == 0
        assert not alive, f"killed after {moment} s, its container lives on"
        lines = host.settled_difference(before)
        assert not lines, f"killed after {moment} s:\n" + "\n".join(lines)


def test_after_kill_9_the_next_command_says_what_it_does(store, start):
    container = start("--rm", "-p", f"127.0.0.1:{free_port()}:80", "busybox", "sleep", "1000")
    container.process.kill()
    container.process.wait()
    done = store("images")
    assert done.returncode == 0 and "hello-world" in done.stdout
    assert container.id in done.stderr and "killed" in done.stderr
    assert not (store.home / "containers" / container.id).exists()
    assert store("images").stderr == ""


def test_kill_9_leaves_the_other_containers_alone(store, start, run):
    other, killed = start("busybox", "cat"), start("busybox", "cat")
    address = killed.address
    killed.process.kill()
    killed.process.wait()
    assert store("images").returncode == 0
    assert run("busybox", "ping", "-c1", "-W5", other.address).returncode == 0
    assert start("busybox", "cat").address == address
    other.process.stdin.write("still here\n")
    other.close_stdin()
    assert other.process.stdout.read() == "still here\n"


def test_another_s_leftovers_are_no_hindrance(store, run):
    """Killed between two system calls: an empty file in /run/mocker, which nobody holds."""
    os.makedirs("/run/mocker", exist_ok=True)
    with open("/run/mocker/0badcafe.json", "w"):
        pass
    assert run("busybox", "true").returncode == 0
    assert not os.path.exists("/run/mocker/0badcafe.json")


def test_a_damaged_entry_stops_no_command(store):
    """In a /run of its own, or other mockers here would see it, too. Somebody holds it: nothing is cleared away."""
    plant = "mount -t tmpfs run /run && mkdir /run/mocker && echo '!}' >/run/mocker/0badcafe.json"
    script = f'{plant} && exec 9</run/mocker/0badcafe.json && flock 9 && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, "sh", *store.command(["images"])]
    done = subprocess.run(command, env=store.env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_signal_in_the_middle_of_an_import(store):
    """It may leave the lock of all imports with the main thread; the end of the run must not wait for that."""
    code = (f"import _imp, sys; sys.path[0] = {str(MOCKER.parent)!r}; import mocker\n"
            "_imp.acquire_lock(); mocker.delete_bridge()")
    script = 'ip link add mocker0 group 10003 type bridge && "$@" && ! ip link show mocker0 2>/dev/null'
    command = ["unshare", "--net", "sh", "-c", script, "sh", sys.executable, "-c", code]
    done = subprocess.run(command, env=store.env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_store_at_a_relative_path(store, tmp_path):
    relative = {"MOCKER_HOME": os.path.relpath(store.home, tmp_path)}
    done = store("run", "-q", "--rm", "busybox", "echo", "hi", env=relative, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "hi\n", "")


def test_a_setting_that_is_no_number(store):
    one_line(store("pull", "-q", "127.0.0.1:1/x", env={"MOCKER_TIMEOUT": "1m"}), "MOCKER_TIMEOUT", "1m")


# ---- in a row, and at once -----------------------------------------------------------------------


def kernel_objects():
    """What would grow by a leak, though no name is left: mounts, cgroups that can't die, open files."""
    found = {line.split()[0]: int(line.split()[2]) for line in host.content("/proc/cgroups").splitlines()[1:]}
    found["mounts"] = len(list(host.mountinfo()))
    found["hundreds of open files"] = int(host.content("/proc/sys/fs/file-nr").split()[0]) // 100
    return found


def drop_page_cache():
    """A dead v1 memory group stays for as long as a page of the page cache is charged to it, which may be a
    library's that the host goes on using. What the kernel frees when it is asked to is no leak."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("1")


def test_many_runs_in_a_row_leak_nothing(run):
    run("--rm", "busybox", "true", check=True)
    drop_page_cache()
    before = kernel_objects()
    for _ in range(RUNS):
        run("--rm", "busybox", "true", check=True)
    few = RUNS / 4
    drop_page_cache()

    def grown():
        return [kind for kind, number in kernel_objects().items() if number - before[kind] > few]

    until(lambda: not grown(), lambda: f"after {RUNS} runs there are more: {grown()}", 10)


def test_many_containers_at_once_reach_each_other_and_end_clean(start):
    """Each is told the addresses of all by its stdin, and says whom it has reached."""
    script = "while read address; do ping -c1 -W20 $address >/dev/null && echo $address || echo lost; done"

    def meet(container, everyone):
        container.process.stdin.write("".join(f"{address}\n" for address in everyone))
        container.process.stdin.flush()
        return [container.process.stdout.readline().strip() for _ in everyone]

    with concurrent.futures.ThreadPoolExecutor(AT_ONCE) as threads:
        containers = list(threads.map(lambda _: start("--rm", "busybox", "sh", "-c", script), range(AT_ONCE)))
        addresses = sorted(container.address for container in containers)
        assert len(set(addresses)) == AT_ONCE
        for first in range(0, AT_ONCE, BATCH):
            batch = containers[first : first + BATCH]
            assert list(threads.map(meet, batch, [addresses] * AT_ONCE)) == [addresses] * len(batch)
            for container in containers:
                container.ip("neigh", "flush", "all")
        for container in containers:
            container.close_stdin()
        assert list(threads.map(lambda container: container.process.wait(60), containers)) == [0] * AT_ONCE


def test_other_commands_meanwhile_disturb_nothing(store, run):
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        runs = [threads.submit(run, "--rm", "busybox", "echo", number) for number in range(16)]
        looks = [threads.submit(store, "images") for _ in range(16)]
        assert [one.result().stdout for one in runs] == [f"{number}\n" for number in range(16)]
        assert {(one.result().returncode, one.result().stderr) for one in looks} == {(0, "")}


def test_three_runs_at_once_of_an_image_that_is_not_there(mocker):
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        done = list(threads.map(lambda _: mocker("run", "-q", "hello-world"), range(3)))
    assert [one.stdout for one in done] == [images.HELLO.decode()] * 3


# ---- a poor host ---------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(store, pulled, size):
    """MOCKER_HOME on a disk of its own, with busybox in it."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "mocker-small", store.home], check=True)
    try:
        for name in "blobs", "layers":
            (store.home / name).symlink_to(pulled / name)
        (store.home / "library_busybox.json").write_bytes((pulled / "library_busybox.json").read_bytes())
        yield
    finally:
        subprocess.run(["umount", store.home], check=True)


def test_a_full_disk(store, pulled):
    """Nothing fits any more."""
    with small_disk(store, pulled, "64k"):
        with contextlib.suppress(OSError), open(store.home / "filler", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        one_line(store("run", "-q", "busybox", "true"), "No space left")


def test_a_log_that_does_not_fit_does_not_stop_the_container(store, pulled):
    with small_disk(store, pulled, "300k"):
        assert store("run", "-q", "busybox", "seq", 200_000).stdout.count("\n") == 200_000


@pytest.mark.parametrize("command", [["run", "busybox", "true"], ["pull", "busybox"]])
def test_not_root(store, command):
    # may read everything, or a checkout in root's home could not even be started
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=+dac_read_search",
                 "--ambient-caps=+dac_read_search"]  # fmt: skip
    done = subprocess.run([*as_nobody, *store.command(command)], env=store.env, capture_output=True, text=True)
    one_line(done, "root", "sudo")


def test_a_root_without_cap_sys_admin(store):
    plain = ["setpriv", "--bounding-set=-sys_admin"]
    command = [*plain, *store.command(["run", "busybox", "true"])]
    done = subprocess.run(command, env=store.env, capture_output=True, text=True)
    one_line(done, "CAP_SYS_ADMIN", "privileged")


@pytest.mark.skipif(not os.path.exists("/sys/fs/cgroup/memory/tasks"), reason="cgroup v1 has the trees apart")
def test_a_tree_of_cgroups_that_is_missing(store):
    """As with cgroup_disable=memory. Hidden in a mount table of its own."""
    hidden = ["unshare", "--mount", "sh", "-ec", 'mount -t tmpfs none /sys/fs/cgroup/memory; exec "$@"', "sh"]

    def run(*options):
        command = [*hidden, *store.command(["run", "-q", *options, "busybox", "echo", "ok"])]
        return subprocess.run(command, env=store.env, capture_output=True, text=True)

    assert run("--pids-limit=20").stdout == "ok\n"
    one_line(run("-m", "64m"), "no memory.limit_in_bytes")


def test_images_of_a_store_that_is_none(store, tmp_path):
    (tmp_path / "file").touch()
    one_line(store("images", env={"MOCKER_HOME": str(tmp_path / "file")}), "MOCKER_HOME")


def test_not_linux(store):
    program = "import runpy, sys; sys.platform = 'darwin'; sys.argv = sys.argv[1:]; "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", program, str(MOCKER), "run", "busybox", "true"]
    one_line(subprocess.run(command, env=store.env, capture_output=True, text=True), "Linux")
