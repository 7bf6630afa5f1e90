"""mocker run: the image's program, as the image says, alone in its world; what is left of it."""

import json
import os
import re
import shlex
import signal
import struct
import subprocess

import host
import images
import pytest
from containers import one_line, until

pytestmark = pytest.mark.usefixtures("host_as_before_all")

HELLO = images.HELLO.decode()


# ---- the seed's demo -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hello-world", "library/hello-world", "hello-world:latest"])
def test_hello_world_and_what_mocker_says_to_it(store, name):
    done = store("run", name)
    assert (done.returncode, done.stdout) == (0, HELLO)
    lines = done.stderr.splitlines()
    assert lines[0] == 'Running "/hello"'
    assert lines[1] == f"Setting ENV {images.PATH}"
    assert lines[-2:] == ["Finalizing", "done"]


@pytest.mark.parametrize("option", ["-q", "--quiet"])
def test_quiet(store, option):
    done = store("run", option, "hello-world")
    assert (done.returncode, done.stdout, done.stderr) == (0, HELLO, "")


def test_an_image_that_is_not_there_is_pulled_first(mocker, registry):
    done = mocker("run", "hello-world")
    assert (done.returncode, done.stdout) == (0, HELLO)
    assert "Fetching manifest for hello-world:latest..." in done.stderr
    before = len(registry.requests)
    assert mocker("run", "hello-world").stdout == HELLO
    assert len(registry.requests) == before


def test_an_image_that_is_nowhere(mocker):
    one_line(mocker("run", "-q", "no/such-image"), "no such image", "no/such-image")
    assert os.listdir(mocker.home / "containers") == []


# ---- Entrypoint and Cmd --------------------------------------------------------------------------

E, C = {"Entrypoint": ["echo", "entry"]}, {"Cmd": ["echo", "cmd"]}


@pytest.mark.parametrize(
    ("config", "options", "command", "said"),
    [
        (C, [], [], "cmd"),
        (C, [], ["echo", "given"], "given"),
        (E, [], [], "entry"),
        (E, [], ["given"], "entry given"),
        ({**E, **C}, [], [], "entry echo cmd"),
        ({**E, **C}, [], ["given"], "entry given"),
        ({**E, **C}, ["--entrypoint=echo"], [], ""),  # a new entrypoint drops the Cmd
        ({**E, **C}, ["--entrypoint=echo"], ["given"], "given"),
        ({**E, **C}, ["--entrypoint", "/bin/echo"], ["given"], "given"),
        ({**E, **C}, ["--entrypoint="], ["echo", "given"], "given"),
        ({"Cmd": ["sh", "-c", "echo $0 $HOME", "x"], "Entrypoint": None}, [], [], "x /root"),
    ],
)
def test_entrypoint_and_command(run, image, config, options, command, said):
    done = run(*options, image(config), *command)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{said}\n", "")


@pytest.mark.parametrize("options", [[], ["--entrypoint="]])
def test_no_command_at_all(run, image, options):
    one_line(run(*options, image(E if options else {})), "no command")


def test_arguments_reach_the_program_as_they_are(store):
    arguments = ["", "a b", "$HOME", "*", "'", '"', "\\", "a\nb", "é\u2028", "--rm", "-q", "--", "-x=1"]
    done = store("run", "busybox", "printf", "[%s]", *arguments)
    assert done.stderr.startswith('Running "printf [%s]')
    assert done.stdout == "".join(f"[{argument}]" for argument in arguments)


def test_no_shell_is_added(run):
    assert run("busybox", "cat", "/proc/1/cmdline").stdout == "cat\0/proc/1/cmdline\0"


# ---- Env, WorkingDir, User -----------------------------------------------------------------------


def environment(done):
    return dict(line.split("=", 1) for line in done.stdout.splitlines())


def test_environment_is_the_image_s_and_nothing_of_ours(run, image):
    name = image({"Env": ["A=1", "B=x=y z", "EMPTY="]})
    found = environment(run(name, "env", env={"SECRET": "of the host"}))
    assert re.fullmatch("[0-9a-f]{8,64}", found.pop("HOSTNAME"))
    assert found == {"A": "1", "B": "x=y z", "EMPTY": "", "PATH": images.PATH[5:], "HOME": "/root"}


def test_environment_given(run, image):
    name = image({"Env": ["A=1", "PATH=/bin"]})
    options = ["-e", "A=2", "--env=B=a=b", "-e", "C", "-e", "NOWHERE", "-e", "HOME=/x", "-e", "E="]
    found = environment(run(*options, name, "env", env={"C": "from here"}))
    del found["HOSTNAME"]
    assert found == {"A": "2", "B": "a=b", "C": "from here", "HOME": "/x", "E": "", "PATH": "/bin"}


@pytest.mark.parametrize(
    ("config", "options", "expected"),
    [
        ({}, [], "/"),
        ({"WorkingDir": "/etc"}, [], "/etc"),
        ({"WorkingDir": "/not/there"}, [], "/not/there"),
        ({"WorkingDir": "/etc"}, ["-w", "/a/b c"], "/a/b c"),
        ({}, ["--workdir=/tmp/../var"], "/var"),
    ],
)
def test_working_directory(run, image, config, options, expected):
    assert run(*options, image(config), "pwd").stdout == f"{expected}\n"


def test_working_directory_is_made_though_the_user_may_not(run):
    done = run("-u", "daemon", "-w", "/new/dir", "busybox", "pwd")
    assert (done.returncode, done.stdout, done.stderr) == (0, "/new/dir\n", "")


@pytest.mark.parametrize("path", ["/etc/passwd", "/etc/passwd/x"])
def test_a_working_directory_that_cannot_be(run, path):
    one_line(run("-w", path, "busybox", "pwd"), path)


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "0 0 0 /root"),
        ("root", "0 0 0 /root"),
        ("daemon", "1 1 1 8 /usr/sbin"),  # mail's members are: daemon
        ("1", "1 1 1 8 /usr/sbin"),
        ("www-data:mail", "33 8 8 /var/www"),
        ("daemon:33", "1 33 33 /usr/sbin"),
        ("4242", "4242 0 0 /"),
        ("4242:4343", "4242 4343 4343 /"),
        ("0:8", "0 8 8 /root"),
    ],
)
def test_user(run, image, user, expected):
    look = ["sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME"]
    assert run("-u", user, "busybox", *look).stdout == f"{expected}\n"
    assert run(image({"User": user}), *look).stdout == f"{expected}\n"


ACCOUNTS = b"short:x:1001:1002\n  blanks:x:1003:1004::/b \nnone:x:1005\nodd:x:1006:x::/o\n\nbad\nalias:x:1003:9::/a\n"


@pytest.mark.parametrize(
    ("user", "expected"),
    [("short", "1001 1002 1002 3001"), ("1001", "1001 1002 1002 3001"), ("blanks", "1003 1004 1004 /b"),
     ("none", "1005 0 0"), ("odd", "1006 0 0 /o"), ("alias", "1003 9 9 /b")],
)  # fmt: skip
def test_users_of_odd_lines(run, image, user, expected):
    """As runc reads them: fields may be missing, and blanks around a line; HOME is that of the first of that number."""
    entries = [images.file("etc/passwd", ACCOUNTS), images.file("etc/group", b"g1:x:3001:short\nnobody\n")]
    look = ["sh", "-c", "echo $(id -u) $(id -g) $(id -G) $HOME"]
    assert run("-u", user, image({}, entries), *look).stdout == f"{expected}\n"


def test_user_given_counts_more_than_the_image_s(run, image):
    assert run("--user=daemon", image({"User": "www-data"}), "id", "-un").stdout == "daemon\n"


def test_another_user_has_no_capabilities_and_can_write_to_its_streams(run):
    script = "grep -E 'Cap(Inh|Prm|Eff|Amb)' /proc/self/status; echo out >/dev/stdout; echo err >/dev/stderr"
    done = run("-u", "daemon", "busybox", "sh", "-c", script)
    assert re.findall(r"\t(\w+)", done.stdout) == ["0" * 16] * 4
    assert (done.stdout.splitlines()[-1], done.stderr) == ("out", "err\n")


@pytest.mark.parametrize("user", ["nobody-of-that-name", "root:no-such-group", "4294967296", "-1", "1:-1"])
def test_unknown_user(run, user):
    one_line(run(f"--user={user}", "busybox", "id"))


# ---- exit status ---------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 2, 77, 124, 125, 126, 127, 128, 255])
def test_exit_status_is_the_program_s(run, status):
    done = run("busybox", "sh", "-c", f"exit {status}")
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_exit_status_when_a_signal_ended_it(run, start, image):
    code = {62: b"\x0f\x0b", 183: struct.pack("<I", 0)}  # an instruction that is undefined
    machine = {"x86_64": 62, "aarch64": 183}[os.uname().machine]
    program = images.file("crash", images.elf(machine, code[machine]), 0o755)
    assert run(image({"Cmd": ["/crash"]}, [program])).returncode == 128 + signal.SIGILL

    container = start("busybox", "sleep", "1000")
    container.kill()
    assert container.process.wait(60) == 128 + signal.SIGKILL


SCRIPTS = [
    images.file("plain", b"echo hi\n"),
    images.file("garbage", b"\x7fELF, but not really", 0o755),
    images.file("orphan", b"#!/no/such/interpreter\n", 0o755),
    images.file("bin/orphan", b"#!/no/such/interpreter\n", 0o755),
    images.symlink("dangling", "/nowhere"),
]


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["./no-such-program"], 127),
        (["/etc/passwd/x"], 127),
        (["/dangling"], 127),
        (["/orphan"], 127),
        (["orphan"], 127),
        ([""], 127),
        (["/plain"], 126),
        (["/etc"], 126),
        (["/garbage"], 126),
    ],
)
def test_programs_that_cannot_run(run, image, command, status):
    one_line(run(image({}, SCRIPTS), *command), status=status)


def test_path_is_the_container_s(run):
    one_line(run("-e", "PATH=/nowhere", "busybox", "ls"), '"ls"', status=127)
    assert run("-e", "PATH=/nowhere", "busybox", "/bin/ls", "/etc/passwd").returncode == 0


# ---- what stays ----------------------------------------------------------------------------------


def test_the_image_stays_clean(run, store):
    spoil = "echo spoilt >/etc/passwd; rm /etc/group; mkdir /new; chmod 700 /; chown 5 /tmp"
    look = ["ls", "-lan", "/etc", "/tmp", "/etc/passwd"]
    before = run("busybox", *look).stdout
    assert run("busybox", "sh", "-c", spoil).returncode == 0
    assert without_times(run("busybox", *look).stdout) == without_times(before)


def without_times(listing):
    return re.sub(r"\w{3} +\d+ +[\d:]+", "", listing)


def test_the_container_s_directory_stays(store):
    assert store("run", "-q", "busybox", "sh", "-c", "echo out; echo err >&2; echo kept >/file; exit 3").returncode == 3
    [directory] = (store.home / "containers").iterdir()
    assert (directory / "upper/file").read_text() == "kept\n"
    assert sorted((directory / "log").read_text().split()) == ["err", "out"]
    config = json.loads((directory / "config.json").read_text())
    assert (config["status"], config["exit_code"], config["arguments"][0]) == ("exited", 3, "sh")


def test_rm_leaves_no_directory(store):
    assert store("run", "-q", "--rm", "busybox", "sh", "-c", "mkdir -p /a/b; exit 4").returncode == 4
    assert not list(store.home.glob("containers/*"))
    assert (store.home / "containers").stat().st_mode & 0o777 == 0o700  # the next one may be about to use it


# ---- /tmp/stdout, where anyone may have planted something ----------------------------------------

STDOUT = "/tmp/stdout"
NOBODY = 65534


@pytest.fixture
def no_stdout():
    def remove():
        if os.path.isdir(STDOUT) and not os.path.islink(STDOUT):
            os.rmdir(STDOUT)
        elif os.path.lexists(STDOUT):
            os.unlink(STDOUT)

    remove()
    yield
    remove()


def test_output_is_in_tmp_stdout_too(run, no_stdout):
    run("busybox", "sh", "-c", "echo out; echo err >&2")
    with open(STDOUT) as file:
        assert sorted(file.read().split()) == ["err", "out"]
    run("hello-world")
    with open(STDOUT) as file:
        assert file.read() == HELLO


@pytest.mark.parametrize("plant", [os.symlink, os.link])
def test_a_link_that_another_user_planted_there_is_not_followed(run, no_stdout, tmp_path, plant):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    plant(victim, STDOUT)
    os.chown(STDOUT, NOBODY, NOBODY, follow_symlinks=False)
    done = run("busybox", "echo", "hi")
    assert (done.returncode, done.stdout, victim.read_text()) == (0, "hi\n", "precious")
    assert (os.path.islink(STDOUT), os.stat(STDOUT).st_uid) == (False, 0)


def test_a_link_to_nowhere_planted_there_makes_no_file(run, no_stdout, tmp_path):
    os.symlink(tmp_path / "new", STDOUT)
    os.chown(STDOUT, NOBODY, NOBODY, follow_symlinks=False)
    assert run("busybox", "echo", "hi").stdout == "hi\n"
    assert not (tmp_path / "new").exists()


def test_a_fifo_planted_there_keeps_nobody_waiting(run, no_stdout):
    os.mkfifo(STDOUT)
    assert run("busybox", "echo", "hi", timeout=60).stdout == "hi\n"


def test_a_directory_planted_there_is_survived(store, no_stdout):
    os.mkdir(STDOUT)
    done = store("run", "busybox", "echo", "hi")
    assert (done.returncode, done.stdout) == (0, "hi\n")
    assert STDOUT in done.stderr
    assert os.listdir(STDOUT) == []


# ---- namespaces, and what is seen in them --------------------------------------------------------


def test_all_namespaces_are_its_own_but_user(start):
    container = start("busybox", "sleep", "1000")
    inside = {kind: os.readlink(f"/proc/{container.pid}/ns/{kind}") for kind in os.listdir("/proc/self/ns")}
    outside = {kind: os.readlink(f"/proc/self/ns/{kind}") for kind in inside}
    same = {kind for kind in inside if inside[kind] == outside[kind]}
    assert same == {"user", "time", "time_for_children"} & set(inside)


def test_two_containers_share_no_namespace(start):
    one, other = start("busybox", "sleep", "1000"), start("busybox", "sleep", "1000")
    kinds = ["mnt", "uts", "ipc", "pid", "net", "cgroup"]
    assert all(os.readlink(f"/proc/{one.pid}/ns/{k}") != os.readlink(f"/proc/{other.pid}/ns/{k}") for k in kinds)


def test_it_is_process_number_one_and_sees_no_other(run):
    assert run("busybox", "sh", "-c", "echo $$; echo /proc/[0-9]*").stdout == "1\n/proc/1\n"


def test_its_host_name_is_its_own(run, start):
    mine = os.uname().nodename
    assert re.fullmatch("[0-9a-f]{8,64}\n", run("busybox", "hostname").stdout)
    assert run("--hostname", "pebble", "busybox", "hostname").stdout == "pebble\n"
    assert os.uname().nodename == mine
    container = start("busybox", "sh", "-c", "hostname; cat")
    assert container.process.stdout.readline() == f"{container.id}\n"


def test_the_root_directory_is_root_s_whatever_the_layers_say(run, image):
    """As docker has it: a layer packed from a private directory must not lock its users out."""
    name = image({"User": "nobody"}, [images.folder(".", 0o700, uid=5)])
    assert run(name, "stat", "-c", "%a %u", "/").stdout == "755 0\n"


def test_mtab_leads_to_the_mounts(run, image, tmp_path):
    assert run("busybox", "readlink", "/etc/mtab").stdout == "/proc/mounts\n"
    assert run(image({}, [images.file("etc/mtab", b"mine\n")]), "cat", "/etc/mtab").stdout == "mine\n"
    assert run(image({}, [images.symlink("etc/mtab", "/no/where")]), "readlink", "/etc/mtab").stdout == "/no/where\n"
    (tmp_path / "etc").mkdir()
    assert run("-v", f"{tmp_path}/etc:/etc", "busybox", "ls", "/etc").returncode == 0
    assert "mtab" not in os.listdir(tmp_path / "etc")


def test_an_empty_variable_of_the_image_is_none(run, image):
    assert run(image({"Env": ["", "A=1"]}), "sh", "-c", "echo $A").stdout == "1\n"


def test_a_name_with_dots_is_known_by_its_first_part_too(run):
    said = run("--hostname", "pebble.example.com", "busybox", "cat", "/etc/hosts").stdout
    assert said.splitlines()[-1].split()[1:] == ["pebble.example.com", "pebble"]


def test_files_of_etc(run):
    done = run("--hostname", "pebble", "busybox", "sh", "-c", "cat /etc/hostname; cat /etc/hosts; cat /etc/resolv.conf")
    name, *lines = [re.split(r"\s+", line.strip()) for line in done.stdout.splitlines()]
    assert name == ["pebble"]
    assert ["127.0.0.1", "localhost"] in lines
    assert any(line[0].startswith("10.") and line[1:] == ["pebble"] for line in lines)
    servers = [line[1] for line in lines if line[0] == "nameserver"]
    assert servers and not any(server.startswith("127.") for server in servers)


RESOLVERS = {
    "only by IPv6": ("nameserver 2001:db8::1\n", "8.8.8.8 8.8.4.4"),
    "one of each": ("nameserver 2001:db8::1\nnameserver 192.0.2.1\n", "192.0.2.1"),
    "a comment": ("# nameserver 192.0.2.1\nnameserver 127.0.0.1\n", "8.8.8.8 8.8.4.4"),
}


@pytest.mark.parametrize("what", RESOLVERS)
def test_name_servers_that_can_be_reached(what, store, tmp_path):
    text, expected = RESOLVERS[what]
    (tmp_path / "resolv.conf").write_text(text)
    command = store.command(["run", "-q", "--rm", "busybox", "sed", "-n", "s/^nameserver //p", "/etc/resolv.conf"])
    script = f"mount --bind {tmp_path}/resolv.conf /etc/resolv.conf && exec {shlex.join(command)}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", script], env=store.env, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    assert done.stdout.split() == expected.split(), done


def test_names_that_are_no_utf8(run):
    done = run("--hostname", os.fsdecode(b"a\xff"), "busybox", "cat", "/etc/hostname", text=False)
    assert (done.stdout, done.stderr) == (b"a\xff\n", b"")


def test_its_mounts_are_its_own(start, store):
    container = start("busybox", "sh", "-c", "mount; cat")
    outside = host.output("cat", "/proc/self/mountinfo")
    assert str(store.home) not in outside
    table = [line.split(" ") for line in host.content(f"/proc/{container.pid}/mounts").splitlines()]
    kinds = {target: kind for _, target, kind, *_ in table}
    assert kinds["/"] == "overlay"
    assert {kinds[target] for target in kinds if target.count("/") == 1 and target != "/"} == {"proc", "sysfs", "tmpfs"}
    ours = {"/", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf"}
    assert {target for target in kinds if not target.startswith(("/proc", "/sys", "/dev"))} == ours


def test_the_overlay_is_gone_with_the_container(start):
    container = start("busybox", "cat")
    device = os.stat(f"/proc/{container.pid}/root").st_dev
    container.end()
    until(lambda: f"{os.major(device)}:{os.minor(device)} " not in host.content("/proc/self/mountinfo"))


@pytest.mark.parametrize(
    "path",
    ["/proc/sys/kernel/panic", "/proc/sysrq-trigger", "/proc/irq/default_smp_affinity", "/sys/kernel/mm/ksm/run"],
)
def test_kernel_settings_are_read_only(run, path):
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    done = run("busybox", "sh", "-c", f": >{path}")
    assert done.returncode and "Read-only file system" in done.stderr


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/acpi", "/sys/firmware"])
def test_what_tells_too_much_is_hidden(run, path):
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    assert run("busybox", "sh", "-c", f"[ -d {path} ] && ls -A {path} || head -c 9 {path}").stdout == ""


def test_dev(run):
    script = "ls /dev; echo x >/dev/null; head -c 2 /dev/zero | od -An -tx1; head -c 9 /dev/urandom | wc -c; "
    script += "echo x >/dev/full"
    done = run("busybox", "sh", "-c", script)
    *names, zeros, number = done.stdout.split("\n")[:-1]
    links = ["fd", "ptmx", "stderr", "stdin", "stdout"]
    assert names == sorted(["full", "mqueue", "null", "pts", "random", "shm", "tty", "urandom", "zero", *links])
    assert (zeros.split(), number) == (["00", "00"], "9")
    assert "No space left on device" in done.stderr


def test_shared_memory_and_tmp_can_be_written(run):
    script = "echo 1 >/dev/shm/x; echo 2 >/tmp/x; cat /dev/shm/x /tmp/x"
    assert run("-u", "daemon", "busybox", "sh", "-c", script).stdout == "1\n2\n"


def test_output_appears_as_it_comes(start):
    container = start("busybox", "sh", "-c", "echo first; read line; echo got $line")
    assert container.process.stdout.readline() == "first\n"
    container.process.stdin.write("word\n")
    container.process.stdin.flush()
    assert container.process.stdout.readline() == "got word\n"
    assert container.process.wait(60) == 0


def test_the_umask_of_the_user_is_not_the_container_s(store):
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", *store.command(["run", "-q", "--rm", "-u", "1000", "busybox"])]
    done = subprocess.run([*command, "sh", "-c", "umask; cat /etc/hostname >/dev/null && echo read"], env=store.env,
                          capture_output=True, text=True)
    assert done.stdout == "0022\nread\n", done.stderr


def test_what_images_bring_is_for_root_alone(run, store):
    run("-e", "SECRET=x", "busybox", "true")
    for part in "containers", "partial":
        assert (store.home / part).stat().st_mode & 0o777 == 0o700
