"""Ways out of a container. Each is tried twice: from a plain chroot, where it works, and from mocker.

The programs are in tests/programs; none of them does harm where it works.
"""

import os
import platform
import re
import shutil
import socket
import struct
import subprocess
import sys
from pathlib import Path

import host
import images
import pytest
from containers import free_port

pytestmark = pytest.mark.usefixtures("host_as_before_all")

PROGRAMS = Path(__file__).parent / "programs"
SECRET = "known only outside\n"


@pytest.fixture(scope="module")
def escape(tmp_path_factory):
    program = tmp_path_factory.mktemp("escape") / "escape"
    subprocess.run(["cc", "-static", "-O1", "-o", program, PROGRAMS / "escape.c"], check=True)
    return program


@pytest.fixture(scope="module")
def root(pulled, escape, tmp_path_factory):
    """busybox's files, to chroot to, with the program."""
    layers = (pulled / "layers").iterdir()
    layer = next(path for path in layers if (path / "bin/busybox").exists() and not (path / "x").exists())
    root = tmp_path_factory.mktemp("chroot") / "root"
    shutil.copytree(layer, root, symlinks=True)
    for name in "proc", "sys", "data", "run":
        (root / name).mkdir()
    shutil.copy(escape, root / "escape")
    return root


@pytest.fixture
def secret(tmp_path):
    (tmp_path / "secret").write_text(SECRET)
    return tmp_path / "secret"


@pytest.fixture
def victim():
    """A process of the host."""
    process = subprocess.Popen(["sleep", "1000"])
    yield process.pid
    process.kill()
    process.wait()


# Begins a command that runs in a mount namespace, with ./proc
WITH_PROC = ["unshare", "--mount", "sh", "-c", 'mount -t proc proc proc && exec "$@"', "sh"]


def in_chroot(root, *arguments, **options):
    """As people do it by hand: /proc, /sys and a /dev in it. Its mounts vanish with it."""
    script = 'mount -t sysfs sysfs sys && mount -t tmpfs dev dev && exec chroot . /escape "$@"'
    command = [*WITH_PROC, "sh", "-c", script, "sh", *map(str, arguments)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60, **options)


@pytest.fixture
def only_chroot_fails(root, escape, run):
    """only_chroot_fails("way", argument, …): out of the chroot, but not out of mocker."""

    def check(*arguments, options=(), **more):
        done = in_chroot(root, *arguments, **more)
        if (done.stdout, done.returncode) != ("out\n", 0):
            pytest.skip(f"this machine allows it not even from a chroot: {done.stdout}")
        done = run("-v", f"{escape}:/escape:ro", *options, "busybox", "/escape", *arguments, timeout=60, **more)
        assert done.returncode == 1 and done.stdout.startswith(f"{arguments[0]}: "), done
        return done.stdout

    return check


# ---- by system calls -----------------------------------------------------------------------------


def test_the_chroot_breakout(only_chroot_fails, secret):
    only_chroot_fails("breakout", secret)


def test_the_root_of_process_one(only_chroot_fails, secret):
    only_chroot_fails("first-root", secret)


@pytest.mark.parametrize("way", ["mount", "unmount", "unshare", "setns", "kernel-log", "host-name", "module", "key"])
def test_what_only_the_host_s_root_may(only_chroot_fails, way):
    assert "not permitted" in only_chroot_fails(way)


@pytest.mark.parametrize("device", ["b 7 0", "c 1 11"])  # a disk (/dev/loop0), and the kernel's log
@pytest.mark.parametrize("options", [[], ["-v", "/tmp:/data"]])
def test_a_device_that_it_makes(only_chroot_fails, device, options, tmp_path):
    options = [option.replace("/tmp:", f"{tmp_path}:") for option in options]
    assert "denied" in only_chroot_fails("device", *device.split(), options=options)
    assert not (tmp_path / "escape-device").exists()


def test_a_device_of_the_image(root, run, image):
    entries = [images.device("disk", 7, 0, kind=b"4", mode=0o666)]
    os.mknod(root / "disk", 0o060666, os.makedev(7, 0))
    try:
        assert in_chroot(root, "open", "/disk").returncode == 0
    finally:
        (root / "disk").unlink()
    done = run(image({}, entries), "dd", "if=/disk", "of=/dev/null", "count=1")
    assert done.returncode == 1 and "Permission denied" in done.stderr


def test_tracing_a_process_of_the_host(only_chroot_fails, victim):
    assert "No such process" in only_chroot_fails("trace", victim)
    # and even with the capability and the number: there is no such process in here
    assert "No such process" in only_chroot_fails("trace", victim, options=["--cap-add=SYS_PTRACE"])


def test_signals_to_a_process_of_the_host(only_chroot_fails, victim):
    assert "No such process" in only_chroot_fails("kill", victim)


SETTINGS = [
    "/proc/sys/kernel/core_pattern",
    "/proc/sys/kernel/modprobe",
    "/proc/sysrq-trigger",
    "/proc/irq/default_smp_affinity",
    "/sys/kernel/uevent_helper",
    "/sys/kernel/mm/ksm/run",
]


@pytest.mark.parametrize("path", SETTINGS)
def test_settings_of_the_whole_machine(only_chroot_fails, path):
    if not os.path.exists(path):
        pytest.skip(f"no {path} here")
    assert "Read-only file system" in only_chroot_fails("write", path)


def test_the_release_agent(only_chroot_fails):
    v1 = [mount["options"] for mount in host.mountinfo() if mount["type"] == "cgroup"]
    v1 = [options for options in v1 if "name=" not in options]
    if not v1:
        pytest.skip("only cgroup v1 has one")
    assert "not permitted" in only_chroot_fails("release-agent", v1[0].rpartition(",")[2])


def test_a_file_by_its_handle(only_chroot_fails, escape, secret):
    """From any file of the same file system: in Docker /etc/hosts was one."""
    kind, handle = subprocess.check_output([escape, "print-handle", secret], text=True).split()
    directory = secret.parent / "shared"
    directory.mkdir()
    volume = ["-v", f"{directory}:/data"]
    assert "not permitted" in only_chroot_fails("by-handle", kind, handle, "/escape", options=volume)


def test_a_socket_without_a_path(only_chroot_fails):
    name = f"mocker-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(f"\0{name}")
        server.listen(10)
        assert "refused" in only_chroot_fails("abstract-socket", name)


ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("", 0))
    print(server.getsockname()[1], flush=True)
    while True:
        server.sendto(*server.recvfrom(100))
"""


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_a_service_on_the_host_s_loopback(tools, escape, start, run, tool):
    """A published port is reached from 127.0.0.1, too. That must not open the way back to all containers."""
    start("-p", f"{free_port()}:80", "busybox", "sleep", "1000", env=tools(tool))
    server = subprocess.Popen([sys.executable, "-c", ECHO], stdout=subprocess.PIPE, text=True)
    try:
        port = server.stdout.readline().strip()
        for address, reached in ("10.0.0.1", True), ("127.0.0.1", False), ("127.1.2.3", False):
            ask = ["/escape", "loopback", "veth1", "02:42:0a:00:00:01", address, port]
            done = run("-v", f"{escape}:/escape:ro", "busybox", *ask, timeout=60)
            assert (done.stdout == "out\n") == reached, (address, done)
    finally:
        server.kill()
        server.communicate()


# ---- by what the host leaves open ----------------------------------------------------------------


@pytest.fixture
def open_directory():
    """The host's root directory, open in the process that starts mocker: → the descriptor"""
    descriptor = os.open("/", os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_open_descriptors(only_chroot_fails, open_directory, run):
    only_chroot_fails("descriptors", pass_fds=[open_directory])
    assert run("busybox", "sh", "-c", "echo /proc/self/fd/*", pass_fds=[open_directory]).stdout.split() == [
        f"/proc/self/fd/{number}" for number in (0, 1, 2, 3)
    ]  # 3 is the shell's, that of the directory which it lists


def test_a_working_directory_that_is_an_open_descriptor(run, root, secret, open_directory):
    """CVE-2024-21626: chdir to /proc/self/fd/N, and there is the host."""
    script = f"cat ../../../../../../../../..{secret}"
    enter = "import os, sys; os.chroot('.'); os.chdir(sys.argv[1]); os.execv('/bin/sh', ['sh', '-c', sys.argv[2]])"
    chroot = [*WITH_PROC, sys.executable, "-c", enter, f"/proc/self/fd/{open_directory}", script]
    done = subprocess.run(chroot, cwd=root, pass_fds=[open_directory], capture_output=True, text=True)
    assert done.stdout == SECRET
    descriptors = [f"/proc/self/fd/{number}" for number in (3, 5, 6, 7, 8, 9, 10, open_directory)]
    for place in [*descriptors, "/proc/1/cwd", "/proc/self/root/.."]:
        done = run("-w", place, "busybox", "/bin/sh", "-c", script, pass_fds=[open_directory])
        assert done.returncode and SECRET not in done.stdout, place
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["etc", "data", "etc/hosts"])
def test_a_symlink_of_the_image_to_an_open_descriptor(run, image, tmp_path, name):
    """What mocker makes in the container, a place to mount on, must not be made on the host."""
    (tmp_path / "outside").mkdir()
    descriptor = os.open(tmp_path / "outside", os.O_RDONLY)
    try:
        link = images.symlink(name, f"/proc/self/fd/{descriptor}/planted")
        run("-v", "/etc:/data/x", "-w", "/data/y", image({}, [link]), "true", pass_fds=[descriptor])
    finally:
        os.close(descriptor)
    assert os.listdir(tmp_path / "outside") == []


def interpreter_of(program):
    """The loader that an ELF executable names."""
    data = Path(program).read_bytes()
    start, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<2H", data, 54)
    for number in range(count):
        kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", data, start + size * number)
        if kind == 3:  # PT_INTERP
            return data[offset : offset + length].rstrip(b"\0").decode()
    pytest.skip("this Python needs no loader")


@pytest.mark.parametrize("command", ["/script", "/link", "/proc/self/exe"])
def test_the_program_that_starts_the_container(run, image, root, tmp_path, command):
    """CVE-2019-5736: by /proc/self/exe into the file of the host's Python. (42 is the loader's "I could".)"""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the loader is not written for this machine")
    python = Path(sys.executable).resolve()
    loader = tmp_path / "loader"
    seen = python.stat()
    flags = f"-DMODE=0{seen.st_mode & 0o7777:o} -DDEVICE={seen.st_dev} -DINODE={seen.st_ino}".split()
    flags += "-nostdlib -static-pie -fPIE -ffreestanding -O1".split()
    subprocess.run(["cc", *flags, "-o", loader, PROGRAMS / "selfexe.c"], check=True)
    place = interpreter_of(python).lstrip("/")
    entries = [
        images.file("script", b"#!/proc/self/exe\n", 0o755),
        images.symlink("link", "/proc/self/exe"),
        *[images.folder(str(folder)) for folder in list(Path(place).parents)[-2::-1]],
        images.file(place, loader.read_bytes(), 0o755),
    ]
    copy = tmp_path / "root"
    shutil.copytree(root, copy, symlinks=True)
    for info, content in entries:
        path = copy / info.name
        if info.issym():
            path.symlink_to(info.linkname)
            continue
        path.mkdir(exist_ok=True) if info.isdir() else path.write_bytes(content)
        path.chmod(0o755)
    enter = "import os, sys; os.chroot('.'); os.execv(sys.argv[1], [sys.argv[1]])"
    chroot = [*WITH_PROC, sys.executable, "-c", enter, command]
    assert subprocess.run(chroot, cwd=copy, capture_output=True).returncode == 42
    before = python.stat()
    done = run(image({}, entries), command)
    assert done.returncode == {"x86_64": 3, "aarch64": 247}[platform.machine()], done  # it is exec_stub's, which ends
    assert python.stat().st_ctime_ns == before.st_ctime_ns


# ---- by an image whose own files lead out --------------------------------------------------------


def outside(tmp_path):
    """A directory of the host, looking like /etc, with what no container should see."""
    place = tmp_path / "outside"
    place.mkdir()
    for name in "hosts", "hostname", "resolv.conf", "group", "file":
        (place / name).write_text(SECRET)
    (place / "passwd").write_text("evil:x:0:0::/:/bin/sh\n")
    return place


def listing(directory):
    statuses = {str(path.relative_to(directory)): path.lstat() for path in directory.rglob("*")}
    return sorted((path, status.st_mode, status.st_mtime_ns) for path, status in statuses.items())


@pytest.mark.parametrize("up", ["", "../../../../../../../../../../.."])
@pytest.mark.parametrize("name", ["etc", "proc", "sys", "dev", "tmp", "root", "dev/shm", "sys/fs"])
def test_a_folder_of_the_image_that_is_a_symlink_to_the_host(run, image, tmp_path, name, up):
    place = outside(tmp_path)
    before = listing(place)
    link = images.symlink(name, f"{up}{place}")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "link").symlink_to(f"{up}{place}")
    assert SECRET in (copy / "link/file").read_text()  # that is how one falls for it
    folders = [images.folder("sys")] if name.startswith("sys/") else []
    options = ["-w", f"/{name}/new"]
    options += ["-v", f"{tmp_path}:/{name}/volume"] if name != "proc" else []  # which is refused, whatever the image is
    done = run(*options, image({}, [*folders, link]), "sh", "-c", f"cat /{name}/file")
    assert SECRET not in done.stdout and "Traceback" not in done.stderr
    assert listing(place) == before
    if name in ("proc", "sys", "dev"):
        assert done.returncode == 125 and "symlink" in done.stderr


@pytest.mark.parametrize("name", ["passwd", "group", "hosts", "hostname", "resolv.conf"])
def test_a_file_of_etc_that_is_a_symlink_to_the_host(run, image, tmp_path, name):
    place = outside(tmp_path)
    before = listing(place)
    tag = image({}, [images.symlink(f"etc/{name}", f"{place}/{name}")])
    assert run("-u", "evil", tag, "true").returncode == 125
    done = run(tag, "sh", "-c", f"cat /etc/{name}; id -u")
    assert (done.stdout.splitlines() or [""])[-1] == "0"
    assert SECRET not in done.stdout and "evil" not in done.stdout
    assert listing(place) == before


@pytest.mark.parametrize("name", ["etc/passwd", "etc/group"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "zero", "loop", "device", "binary", "huge", "log"])
def test_accounts_that_are_no_file_of_lines(run, image, name, kind):
    entries = {
        "fifo": images.entry(name, b"6", 0o644),
        "folder": images.folder(name),
        "zero": images.symlink(name, "/dev/zero"),
        "loop": images.symlink(name, f"/{name}"),
        "device": images.device(name, 1, 5),
        "binary": images.file(name, bytes(range(256)) * 100),
        "huge": images.file(name, b"x:x:" + b"9" * 3_000_000 + b":0::/:\n"),
        "log": images.symlink(name, "/proc/kmsg"),  # the kernel's, which a reader takes out of there
    }
    tag = image({}, [entries[kind]])
    done = run(tag, "sh", "-c", "grep Uid: /proc/self/status", timeout=30)
    assert done.stdout.split() == ["Uid:", "0", "0", "0", "0"], done
    done = run("-u", "daemon:mail", tag, "true", timeout=30)
    assert done.returncode == 125 and "Traceback" not in done.stderr


def test_rm_follows_no_link_out(run, tmp_path):
    place = outside(tmp_path)
    (place / "volume").mkdir()
    before = listing(place)
    script = f"ln -s {place} /link; ln -s /etc /tmp/etc; mkdir -p /a/b; chmod 0 /a/b"
    assert run("--rm", "-v", f"{place}:/mnt/data", "busybox", "sh", "-c", script).returncode == 0
    assert listing(place) == before


def test_terminal_codes_of_an_image_are_not_shown_raw(store, image):
    """A name that would clear the screen, or worse, in what mocker itself says."""
    nasty = "\033[2J\r\n\x9b31m"
    echo = store("run", image({"Env": [f"A={nasty}"], "Cmd": ["echo", nasty]}), text=False)
    assert echo.stdout == f"{nasty}\n".encode()
    for done in echo, store("run", image({"Env": [f"A={nasty}"], "Cmd": [nasty]}), text=False):
        said = done.stderr.decode()
        assert said and not re.search("[\033\x9b\r]", said) and "Traceback" not in said


def test_its_own_limits_cannot_be_lifted(run):
    """The files of its cgroup are there to be read."""
    script = """set -- $(find /sys/fs/cgroup -name '*max' -o -name '*limit_in_bytes' -o -name 'cgroup.procs')
        for file; do (true >$file) 2>/dev/null && echo $file; done; echo $#"""
    *written, count = run("-m", "64m", "busybox", "sh", "-c", script).stdout.splitlines()
    assert written == [] and int(count) > 0


