"""Other kernels for the tests: one with cgroup v2, whatever this machine has.

    done = machine.uml("cat /sys/fs/cgroup/cgroup.controllers")
    done.returncode, done.stdout, done.stderr

uml() boots Debian's `user-mode-linux`, a Linux 6.1 that runs as an ordinary process, in two to
three seconds. Its root is this machine's own tree (hostfs), so what the command writes outside
/tmp, /run, /dev and /dev/shm it writes on this machine. The host's /tmp is not there, but for the
directory that the command stands in, these tests, and the Python that runs them.

vm() boots a stock Debian kernel in QEMU by `../shared/tools/vmrun`, where that is at hand, in
20 s, with systemd. Its changes vanish; of the host's /tmp it has only the directory it stands in.

Tried in uml():
  works      cgroup v2 with cpu, io, memory and pids (limits, OOM kill, refused forks, cpu.max,
             cgroup.kill, no controllers below a cgroup with processes), all namespaces but time,
             overlay with whiteouts (upper layer on the tmpfs /tmp; lower ones on hostfs too),
             pivot_root, open_tree, seccomp filters, file capabilities, setuid, terminals, veth,
             bridge, routes, forwarding, iptables-legacy with MASQUERADE and DNAT
  works not  nftables (neither its `ip` nor its `inet` family), so neither iptables-nft, which is
             Debian's `iptables`; user.* xattrs on its tmpfs; time namespaces; cpuset, hugetlb;
             an overlay's upper layer on hostfs; any network but lo
  takes      5 to 8 times what it takes outside: /bin/true 0.06 s, `python -c pass` 0.2 s,
             `import requests` 0.8 s, `import pyroute2` 1.1 s; and there is one CPU
"""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

import host
import pytest

LINUX = "linux.uml"
MODULES = "/usr/lib/uml/modules"
# What the first iptables on a kernel starts and leaves (a lock, a helper process) is not mocker's doing.
WARM_UP = "for tool in iptables iptables-legacy; do $tool -w -t nat -S >/dev/null 2>&1; done"
VMRUN = pathlib.Path(__file__).resolve().parents[2] / "shared/tools/vmrun"
MISSING = [] if shutil.which(LINUX) and os.path.isdir(MODULES) else ["user-mode-linux"]

INIT = """#!/bin/sh
# pid 1 of the user-mode-linux. Its root is the host's own tree: it must write to memory only.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
exchange=EXCHANGE
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/pts /dev/shm /dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777,nosuid,nodev shm /dev/shm
mount -t mqueue mqueue /dev/mqueue
ln -sf /proc/self/fd /dev/fd
ln -sf fd/0 /dev/stdin; ln -sf fd/1 /dev/stdout; ln -sf fd/2 /dev/stderr

# /run and /tmp are empty and in memory, but for the directories that the command needs
mount -t tmpfs -o mode=755 run /run
mkdir -p /run/machine /run/host-tmp /run/lock
mount --bind "$exchange" /run/machine
mount --bind /tmp /run/host-tmp
mount -t tmpfs -o mode=1777 tmp /tmp
for directory in KEEP; do
    mkdir -p "$directory"
    mount --bind "/run/host-tmp/${directory#/tmp/}" "$directory"
done

# modules: the kernel itself asks for them, through this
echo /run/machine/modprobe >/proc/sys/kernel/modprobe
for module in overlay veth bridge iptable_nat iptable_filter xt_MASQUERADE xt_conntrack; do
    /run/machine/modprobe $module
done

CGROUPS

ip link set lo up
hostname uml
cd /run/machine
(   echo 0 >$leaf/cgroup.procs
    exec setsid -w env -i /bin/sh ./command </dev/null >stdout 2>stderr )
echo $? >status
sync
echo o >/proc/sysrq-trigger
while :; do sleep 1; done
"""

V2 = """# cgroup v2 as systemd lays it out: all controllers on, the command in a leaf of its own
cgroup=/sys/fs/cgroup
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate cgroup2 $cgroup
leaf=$cgroup/system.slice/tests.service
all=$(sed 's/[a-z]*/+&/g' $cgroup/cgroup.controllers)
mkdir -p $cgroup/init.scope $cgroup/system.slice
echo $$ >$cgroup/init.scope/cgroup.procs
echo $all >$cgroup/cgroup.subtree_control
echo $all >$cgroup/system.slice/cgroup.subtree_control
mkdir $leaf"""
V1 = """# cgroup v1 as systemd lays it out: cpu and cpuacct are one tree, with links to it
leaf=/sys/fs/cgroup/systemd
mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup
for tree in cpu,cpuacct memory pids systemd; do mkdir /sys/fs/cgroup/$tree; done
for tree in cpu,cpuacct memory pids; do mount -t cgroup -o $tree cgroup /sys/fs/cgroup/$tree; done
mount -t cgroup -o none,name=systemd cgroup $leaf
ln -s cpu,cpuacct /sys/fs/cgroup/cpu
ln -s cpu,cpuacct /sys/fs/cgroup/cpuacct"""


def uml(command, timeout=300, memory="2G", env=None, cgroups=V2):
    """Runs a shell command under cgroup v2 (or V1), as root, in this directory and environment.

    `env` comes on top of the environment. Raises RuntimeError when the time is up.
    """
    exchange = pathlib.Path(tempfile.mkdtemp(prefix="mocker-uml-"))
    try:
        write_exchange(exchange, command, {"TMPDIR": "/tmp", "MOCKER_HOME": "/tmp/mocker", **(env or {})}, cgroups)
        log = boot(exchange, timeout, memory)
        status = exchange / "status"
        if not status.exists():
            raise RuntimeError(
                f"user-mode-linux ended without a status, or did not within {timeout} s:\n"
                + log[-3000:]
                + read(exchange / "stdout")[-3000:]
                + read(exchange / "stderr")[-3000:]
            )
        return subprocess.CompletedProcess(
            command, int(status.read_text()), read(exchange / "stdout"), read(exchange / "stderr")
        )
    finally:
        shutil.rmtree(exchange)


def write_exchange(exchange, command, env, cgroups):
    """The files that the machine reads: its init, the command, a modprobe that finds its modules."""
    keep = " ".join(map(shlex.quote, kept_directories()))
    exports = [
        f"export {name}={shlex.quote(value)}" for name, value in {**os.environ, **env}.items() if name.isidentifier()
    ]
    files = {
        "init": INIT.replace("EXCHANGE", shlex.quote(str(exchange))).replace("KEEP", keep).replace("CGROUPS", cgroups),
        "modprobe": '#!/bin/sh\nexec /sbin/modprobe -d /run/machine/modules "$@"\n',
        "command": "\n".join([*exports, f"cd {shlex.quote(os.getcwd())} || exit 126", command, ""]),
    }
    for name, text in files.items():
        (exchange / name).write_text(text)
        (exchange / name).chmod(0o755)
    (exchange / "modules/lib").mkdir(parents=True)
    (exchange / "modules/lib/modules").symlink_to(MODULES)


def kept_directories():
    """What the command needs of the host's /tmp: where it stands, its Python, these tests."""
    wanted = {os.getcwd(), sys.prefix, str(pathlib.Path(__file__).resolve().parents[1])}
    return sorted(path for path in wanted if path.startswith("/tmp/"))


def boot(exchange, timeout, memory):
    """Boots, waits for the end; returns what the kernel said."""
    arguments = [
        LINUX,
        f"mem={memory}",
        f"uml_dir={exchange}/uml",
        "umid=machine",
        "rootfstype=hostfs",
        "rw",
        f"init={exchange}/init",
        "con=null",
        "con0=null,fd:1",
        "ssl=null",
        "quiet",
    ]
    with open(exchange / "console", "wb") as console:
        machine = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
            start_new_session=True,
        )
    try:
        machine.wait(timeout)
    except subprocess.TimeoutExpired:
        pass
    finally:
        end_session(machine)
    return read(exchange / "console")


def end_session(machine):
    """On the host it is many processes, one for each address space inside, in one session."""
    for pid in host.pids():
        try:
            if os.getsid(pid) == machine.pid:
                os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    machine.wait()


def vm(command, timeout):
    """The same in QEMU, under systemd; stderr comes with stdout."""
    if not VMRUN.exists():
        pytest.skip("no vmrun beside this checkout")
    settings = {
        "VMRUN_INIT": "systemd",
        "VMRUN_TIMEOUT": str(timeout),
        "TMPDIR": tempfile.gettempdir(),
        "MOCKER_HOME": "/tmp/mocker",
    }
    return subprocess.run(
        [str(VMRUN), command],
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""
