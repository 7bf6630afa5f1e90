"""The real thing to compare with: Debian's Docker Engine and podman, each with a store of its own.

    with oracle.Docker() as docker:
        docker.load_layout(layout, "busybox")
        print(docker.run("run", "--rm", "busybox", "echo", "hi").stdout)
        with docker.rootfs("busybox") as directory:
            entries = oracle.rootfs_listing(directory)

Both put everything they need under one temporary directory and one cgroup. Leaving the `with`
block ends their containers and daemons (found by that directory and cgroup, ended by process id)
and takes back what they change elsewhere: bridges, firewall rules, forwarding, folders in /run.

Docker(private_network=True) starts the daemon in a network namespace of its own. Then nothing at
all changes in the host's network (a dockerd there sets the FORWARD policy to DROP, for everyone),
but it can't reach a registry on the host's loopback: use load_layout() with it, not pull().
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from typing import NamedTuple, Optional

import host

DOCKER, DOCKERD = "/usr/bin/docker", "/usr/sbin/dockerd"  # Debian's, whatever else is in the PATH
MISSING = [program for program in (DOCKER, DOCKERD, "podman", "runc", "skopeo") if not shutil.which(program)]

# A machine may lack CAP_SYS_RESOURCE even for root: raising a limit, podman's default, then fails.
LOW_LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]

LEFT_BEHIND = [  # the deepest first
    "/run/docker/plugins",
    "/run/docker",
    "/run/containerd/s",
    "/run/containerd",
    "/run/containers/networks/ipam.db",
    "/run/containers/networks",
    "/run/containers",
    "/run/runc",
    "/var/lib/containers/cache/blob-info-cache-v1.boltdb",
    "/var/lib/containers/cache",
    "/var/lib/containers",
]


# ---- the two engines -----------------------------------------------------------------------------


class Engine:
    """What Docker and podman share: a directory, a cgroup, a command line, an undo stack."""

    command = []  # how to call it, e.g. for hyperfine

    def __enter__(self):
        with contextlib.ExitStack() as undo:
            self.directory = pathlib.Path(tempfile.mkdtemp(prefix="mocker-oracle-"))
            undo.callback(remove_tree, self.directory)
            self.cgroup = self.directory.name
            undo.enter_context(left_behind_removed())
            undo.callback(remove_cgroups, self.cgroup)
            undo.callback(end_processes, self.directory, self.cgroup)
            self.start(undo)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *exception):
        self.undo.close()

    def run(self, *arguments, check=False, **options):
        """Runs `docker ARGUMENTS...`: stdout and stderr as text, and the status."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        done = subprocess.run([*self.command, *map(str, arguments)], **options)
        if check and done.returncode:
            said = f"status {done.returncode}\n{done.stdout}{done.stderr}"
            raise RuntimeError(f"{' '.join(done.args)}: {said}")
        return done

    def load_layout(self, layout, name):
        """Bring what an OCI image layout has as `latest` into the store, for this platform."""
        archive = self.directory / "image.tar"
        copy = [
            "skopeo",
            "--insecure-policy",
            "copy",
            "--quiet",
            f"oci:{layout}:latest",
            f"docker-archive:{archive}:{tagged(name)}",
        ]
        subprocess.run(copy, check=True, env={**os.environ, "TMPDIR": str(self.directory)})
        try:
            self.run("load", "--quiet", "--input", archive, check=True)
        finally:
            archive.unlink()

    def inspect(self, name):
        """The engine's description of an image or container."""
        return json.loads(self.run("inspect", name, check=True).stdout)[0]


class Docker(Engine):
    def __init__(self, *daemon_options, private_network=False):
        self.daemon_options = daemon_options
        self.private_network = private_network

    def start(self, undo):
        (self.directory / "daemon.json").write_text("{}")  # not the host's
        self.command = [
            DOCKER,
            "--config",
            f"{self.directory}/client",
            "--host",
            f"unix://{self.directory}/socket",
        ]
        if self.private_network:
            # its mounts and its network vanish with the namespaces
            unshare = [
                "unshare",
                "--mount",
                "--net",
                "sh",
                "-c",
                # (Docker sets the FORWARD policy only where nothing was forwarded yet.)
                'ip link set lo up; echo 0 >/proc/sys/net/ipv4/ip_forward; exec "$@"',
                "sh",
            ]
            bridge = []
        else:
            unshare = ["unshare", "--mount", "--propagation", "slave"]
            undo.enter_context(network_restored())
            bridge = ["--bridge", undo.enter_context(bridge_for_docker())]
        with open(self.directory / "log", "wb") as log:
            self.daemon = subprocess.Popen(
                [
                    *unshare,
                    DOCKERD,
                    "--config-file",
                    f"{self.directory}/daemon.json",
                    "--data-root",
                    f"{self.directory}/data",
                    "--exec-root",
                    f"{self.directory}/exec",
                    "--pidfile",
                    f"{self.directory}/pid",
                    "--host",
                    f"unix://{self.directory}/socket",
                    "--cgroup-parent",
                    f"/{self.cgroup}",
                    *bridge,
                    *self.daemon_options,
                ],
                env={**os.environ, "TMPDIR": str(self.directory)},  # containerd, if it is slow, writes its stacks there
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        undo.callback(self.stop)
        self.wait_until_ready()

    def wait_until_ready(self, seconds=60):
        deadline = time.monotonic() + seconds
        while self.run("version").returncode:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("dockerd does not start:\n" + self.log()[-3000:])
            time.sleep(0.1)

    def stop(self):
        containers = self.run("ps", "--all", "--quiet").stdout.split()
        if containers:
            self.run("rm", "--force", "--volumes", *containers)
        self.daemon.terminate()
        try:
            self.daemon.wait(60)
        except subprocess.TimeoutExpired:
            self.daemon.kill()
            self.daemon.wait()

    def log(self):
        return (self.directory / "log").read_text(errors="replace")

    def pull(self, reference):
        return self.run("pull", reference, check=True)

    @contextlib.contextmanager
    def rootfs(self, name):
        """The root of an image or a container as the kernel shows it: its layers, read-only.

        (Not by `docker export`, which goes through a tar once more.)
        """
        layers = self.inspect(name)["GraphDriver"]["Data"]
        paths = [layers["UpperDir"]] + layers.get("LowerDir", "").split(":")
        # Docker's short names for them, as the mount's options must fit in a page.
        short = ["l/" + (pathlib.Path(path).parent / "link").read_text() for path in paths if path]
        target = tempfile.mkdtemp(prefix="rootfs-", dir=self.directory)
        empty = tempfile.mkdtemp(prefix="empty-", dir=self.directory)  # at the bottom: one layer alone is refused
        os.chmod(empty, 0o755)
        subprocess.run(
            [
                "mount",
                "-t",
                "overlay",
                "-o",
                f"ro,lowerdir={':'.join(short)}:{empty}",
                "overlay",
                target,
            ],
            cwd=self.directory / "data/overlay2",
            check=True,
        )
        try:
            yield pathlib.Path(target)
        finally:
            subprocess.run(["umount", target], check=True)


class Podman(Engine):
    """Podman has no daemon: each call brings all its places along."""

    def start(self, undo):
        undo.enter_context(network_restored())
        undo.callback(unmount_below, self.directory)
        self.command = [
            "podman",
            "--root",
            f"{self.directory}/root",
            "--runroot",
            f"{self.directory}/run",
            "--tmpdir",
            f"{self.directory}/tmp",
            "--network-config-dir",
            f"{self.directory}/networks",
            "--runtime",
            "runc",
            "--cgroup-manager",
            "cgroupfs",
        ]
        # for `podman run`, after the word run
        self.run_options = ["--cgroup-parent", f"/{self.cgroup}", *LOW_LIMITS]
        undo.callback(self.run, "rm", "--all", "--force", "--time", "0")

    def run(self, *arguments, **options):
        if arguments[0] in ("run", "create"):
            arguments = (arguments[0], *self.run_options, *arguments[1:])
        return super().run(*arguments, **options)

    def pull(self, reference):
        return self.run("pull", "--quiet", "--tls-verify=false", reference, check=True)

    @contextlib.contextmanager
    def rootfs(self, name):
        yield pathlib.Path(self.run("image", "mount", name, check=True).stdout.strip())
        self.run("image", "unmount", "--force", name, check=True)


def tagged(name):
    return name if ":" in name.rpartition("/")[2] else name + ":latest"


# ---- a root file system, listed ------------------------------------------------------------------


class Entry(NamedTuple):
    path: str  # "." is the root itself
    type: str  # as `find -printf %y`: f d l c b p s
    mode: str  # 0755, with the setuid, setgid and sticky bits: 4755
    uid: int
    gid: int
    size: int  # of files, else 0
    sha256: Optional[str]
    target: Optional[str]  # of a symlink; of a device "major:minor"
    xattrs: tuple[tuple[str, bytes], ...]
    mtime: int  # whole seconds
    links: tuple[str, ...]  # all names of the file, when it has more than one


TYPES = {
    stat.S_IFREG: "f",
    stat.S_IFDIR: "d",
    stat.S_IFLNK: "l",
    stat.S_IFCHR: "c",
    stat.S_IFBLK: "b",
    stat.S_IFIFO: "p",
    stat.S_IFSOCK: "s",
}


@contextlib.contextmanager
def unpacked(layout):
    """The bundle that umoci makes of an image. In memory: on a disk that takes thrice as long, and removing it, too."""
    with tempfile.TemporaryDirectory(prefix="mocker-umoci-", dir="/dev/shm") as directory:
        bundle = pathlib.Path(directory, "bundle")
        subprocess.run(["umoci", "unpack", "--image", f"{layout}:latest", bundle], check=True, capture_output=True)
        yield bundle


def rootfs_listing(directory):
    """Every entry below a directory, and itself, sorted by path."""
    directory = str(directory)
    paths, names_of = ["."], {}
    for parent, directories, files in os.walk(directory):
        paths += [os.path.relpath(os.path.join(parent, name), directory) for name in directories + files]
    statuses = {path: os.lstat(os.path.join(directory, path)) for path in paths}
    for path in sorted(paths):
        names_of.setdefault((statuses[path].st_dev, statuses[path].st_ino), []).append(path)
    return [entry(directory, path, statuses[path], names_of) for path in sorted(paths)]


def entry(directory, path, status, names_of):
    full = os.path.join(directory, path)
    kind = TYPES[stat.S_IFMT(status.st_mode)]
    names = names_of[status.st_dev, status.st_ino]
    target = None
    if kind == "l":
        target = os.readlink(full)
    elif kind in "cb":
        target = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return Entry(
        path,
        kind,
        f"{stat.S_IMODE(status.st_mode):04o}",
        status.st_uid,
        status.st_gid,
        status.st_size if kind == "f" else 0,
        sha256_of(full) if kind == "f" else None,
        target,
        xattrs_of(full),
        int(status.st_mtime_ns // 10**9),
        tuple(names) if len(names) > 1 else (),
    )


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def xattrs_of(path):
    """Those that belong to the file; trusted.overlay.* belong to the file system that shows it."""
    names = sorted(
        name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(("security.", "user."))
    )
    return tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names)


def listing_difference(one, other, without=()):
    """Readable lines, `-` for entries only in the first and `+` for those only in the second."""

    def stripped(listing):
        return {item._replace(**dict.fromkeys(without)) for item in listing}

    one, other = stripped(one), stripped(other)
    return [f"{'-' if item in one else '+'} {item}" for item in sorted(one ^ other, key=lambda item: item.path)]


# ---- the host as it was --------------------------------------------------------------------------


@contextlib.contextmanager
def bridge_for_docker():
    """A bridge under a name of our own: docker0 may belong to the host's own Docker."""
    number = os.getpid()
    name = f"mockdk{number}"
    address = f"10.{200 + number % 50}.{number // 50 % 256}.1/24"
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "address", "add", address, "dev", name], check=True)
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        yield name
    finally:
        subprocess.run(["ip", "link", "delete", name], check=True)


@contextlib.contextmanager
def network_restored():
    """Takes back what the engines do to links, named namespaces, firewall and forwarding."""
    links, firewall, forwarding = (
        link_names(),
        firewall_tables(),
        read("/proc/sys/net/ipv4/ip_forward"),
    )
    namespaces, mounted = set(host.named_netns()), os.path.ismount("/run/netns")
    try:
        yield
    finally:
        for name in set(host.named_netns()) - namespaces:
            if name.startswith("netns-"):  # podman's; mocker's have other names
                subprocess.run(["ip", "netns", "delete", name])
        if not mounted and os.path.ismount("/run/netns"):
            subprocess.run(["umount", "/run/netns"])
        for name in link_names() - links:
            if name.startswith("podman"):
                subprocess.run(["ip", "link", "delete", name])
        restore_firewall(firewall)
        pathlib.Path("/proc/sys/net/ipv4/ip_forward").write_text(forwarding)


def link_names():
    return {link["ifname"] for link in host.ip("link")}


def firewall_tables():
    """The tables there are, as iptables-restore reads them: {("iptables", "nat"): "*nat …", …}"""
    tables = {}
    for command in "iptables", "ip6tables":
        for text in re.findall(r"^\*.*?^COMMIT$", host.output(command + "-save"), re.MULTILINE | re.DOTALL):
            tables[command, text.split()[0][1:]] = re.sub(r"\[\d+:\d+\]", "[0:0]", text) + "\n"
    return tables


def restore_firewall(before):
    for (command, table), text in firewall_tables().items():
        if (command, table) in before:
            if text != before[command, table]:
                subprocess.run(
                    [command + "-restore", "-T", table],
                    input=before[command, table],
                    text=True,
                    check=True,
                )
        elif "nf_tables" in host.output(command, "--version"):
            subprocess.run(
                ["nft", "delete", "table", "ip6" if command == "ip6tables" else "ip", table],
                check=True,
            )
        else:
            empty_legacy_table(command, table)


def empty_legacy_table(command, table):
    """A table of the older iptables can't be removed, only emptied."""
    subprocess.run([command, "-t", table, "-F"], check=True)
    subprocess.run([command, "-t", table, "-X"], check=True)
    for chain in re.findall(r"^-P (\S+) DROP", host.output(command, "-t", table, "-S"), re.MULTILINE):
        subprocess.run([command, "-t", table, "-P", chain, "ACCEPT"], check=True)


@contextlib.contextmanager
def left_behind_removed():
    """Removes what the engines leave where they don't let us choose, if it wasn't there before."""
    new = [path for path in LEFT_BEHIND if not os.path.lexists(path)]
    try:
        yield
    finally:
        for path in new:
            with contextlib.suppress(OSError):  # not there, or in use by someone else
                os.rmdir(path) if os.path.isdir(path) else os.unlink(path)


def end_processes(directory, cgroup):
    """Shims and monitors have our directory in their command line, containers our cgroup."""

    def ours():
        own = host.own_processes()
        return [
            pid
            for pid in host.pids()
            if pid not in own
            and (
                str(directory) in host.content(f"/proc/{pid}/cmdline")
                or f"/{cgroup}/" in host.content(f"/proc/{pid}/cgroup")
            )
        ]

    for _ in range(100):
        found = ours()
        if not found:
            return
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    raise RuntimeError(f"processes that don't end: {found}")


def remove_cgroups(name):
    for mount in host.mountinfo():
        if mount["type"] in ("cgroup", "cgroup2"):
            for directory, _, _ in os.walk(os.path.join(mount["target"], name), topdown=False):
                remove_cgroup(directory)


def remove_cgroup(directory, seconds=2):
    """The kernel may need a moment to see that its last process has gone."""
    deadline = time.monotonic() + seconds
    while os.path.isdir(directory):
        try:
            os.rmdir(directory)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def unmount_below(directory):
    for mount in reversed(list(host.mountinfo())):
        if mount["target"].startswith(f"{directory}/"):
            subprocess.run(["umount", "--lazy", mount["target"]], check=True)


def remove_tree(directory):
    unmount_below(directory)
    shutil.rmtree(directory)


def read(path):
    return pathlib.Path(path).read_text()
