"""Images for the tests, built from nothing as OCI image layouts.

    python tests/images.py NAME        build NAME (once) and print the path of its layout
    python tests/images.py NAME DIR    build NAME into the new directory DIR
    python tests/images.py             list the names

Layouts are kept in $MOCKER_TEST_CACHE (~/.cache/mocker-tests) under a hash of the code that
builds them, so a recipe that changes is built anew. They appear by rename, when complete.

hello-world, busybox and the file-heavy images need no more than Python. The Debian ones are
put together with mmdebstrap, apt-get in a chroot and umoci, as root, on Debian.

Any other image, a hostile one too, is made from the same parts:

    layout = Layout(directory)
    lower = layer([folder("etc"), file("etc/motd", b"hi"), symlink("motd", "etc/motd")])
    upper = layer([whiteout("motd")])
    layout.tag(layout.image([lower, layout.layer(upper, "zstd")], {"Cmd": ["/hello"]}))
"""

import contextlib
import fcntl
import gzip
import hashlib
import inspect
import io
import json
import os
import platform
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

CREATED = "2016-10-18T08:00:00Z"
MTIME = 1476777600  # the same moment; a fixed time makes fixed digests
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MACHINE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())

OCI = {
    "index": "application/vnd.oci.image.index.v1+json",
    "manifest": "application/vnd.oci.image.manifest.v1+json",
    "config": "application/vnd.oci.image.config.v1+json",
    "plain": "application/vnd.oci.image.layer.v1.tar",
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
}
DOCKER = {
    "index": "application/vnd.docker.distribution.manifest.list.v2+json",
    "manifest": "application/vnd.docker.distribution.manifest.v2+json",
    "config": "application/vnd.docker.container.image.v1+json",
    "plain": "application/vnd.docker.image.rootfs.diff.tar",
    "gzip": "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "zstd": "application/vnd.docker.image.rootfs.diff.tar.zstd",
}

# ---------------------------------------------------------------------------
# Layers: a tar is a list of entries, an entry is (TarInfo, content)
# ---------------------------------------------------------------------------


def entry(name, kind, mode, content=b"", **fields):
    """A tar entry. `fields` are TarInfo's: uid, gid, mtime, pax_headers, ..."""
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime, info.size = kind, mode, MTIME, len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def file(name, content=b"", mode=0o644, **fields):
    return entry(name, tarfile.REGTYPE, mode, content, **fields)


def folder(name, mode=0o755, **fields):
    return entry(name, tarfile.DIRTYPE, mode, **fields)


def symlink(name, target, **fields):
    return entry(name, tarfile.SYMTYPE, 0o777, linkname=target, **fields)


def hardlink(name, target, mode=0o644, **fields):
    return entry(name, tarfile.LNKTYPE, mode, linkname=target, **fields)


def device(name, major, minor, kind=tarfile.CHRTYPE, mode=0o666, **fields):
    return entry(name, kind, mode, devmajor=major, devminor=minor, **fields)


def whiteout(name):
    """Delete `name` of the layers below."""
    return file(os.path.join(os.path.dirname(name), ".wh." + os.path.basename(name)), mode=0)


def opaque(name):
    """Hide all that the layers below have in folder `name`."""
    return file(f"{name}/.wh..wh..opq", mode=0)


def layer(entries, format=tarfile.PAX_FORMAT):
    """The uncompressed tar of the entries. A content that is a Path is read from there."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, encoding="utf-8") as archive:
        for info, content in entries:
            read = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
            with read:
                archive.addfile(info, read)
    return out.getvalue()


def compress(data, kind="gzip"):
    if kind == "gzip":
        return gzip.compress(data, compresslevel=6, mtime=0)
    if kind == "zstd":
        return zstd().compress(data)
    return data


def zstd():
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        from backports import zstd
    return zstd


# ---------------------------------------------------------------------------
# Layouts: blobs, images and indexes in a directory
# ---------------------------------------------------------------------------


def digest(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


class Layout:
    """An OCI image layout: oci-layout, index.json, blobs/sha256/…

    What is written returns its descriptor, a plain dict; a test that wants an image with a
    lie in it changes the descriptor before it goes on.
    """

    def __init__(self, path):
        self.path = Path(path)
        (self.path / "blobs/sha256").mkdir(parents=True)
        (self.path / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._write_index([])

    def blob(self, data, media_type):
        name = digest(data)
        (self.path / "blobs" / name.replace(":", "/")).write_bytes(data)
        return {"mediaType": media_type, "digest": name, "size": len(data)}

    def json(self, document, media_type):
        return self.blob(json.dumps(document, indent=1).encode(), media_type)

    def layer(self, tar, kind="gzip", style=OCI):
        """Store a layer; returns (descriptor, diff_id), as image() takes them."""
        return self.blob(compress(tar, kind), style[kind]), digest(tar)

    def image(self, layers, config=None, *, style=OCI, arch=MACHINE, variant=None, **more):
        """Store a manifest and its config; `more` are further fields of the config.

        A layer is an uncompressed tar, to be stored with gzip, or what layer() returned.
        """
        pairs = [self.layer(one, style=style) if isinstance(one, bytes) else one for one in layers]
        where = {"architecture": arch, "os": "linux", **({"variant": variant} if variant else {})}
        document = {"created": CREATED, **where, "config": config or {}}
        document["rootfs"] = {"type": "layers", "diff_ids": [diff_id for _, diff_id in pairs]}
        manifest = {
            "schemaVersion": 2,
            "mediaType": style["manifest"],
            "config": self.json({**document, **more}, style["config"]),
            "layers": [descriptor for descriptor, _ in pairs],
        }
        return {**self.json(manifest, style["manifest"]), "platform": where}

    def index(self, manifests, style=OCI):
        document = {"schemaVersion": 2, "mediaType": style["index"], "manifests": manifests}
        return self.json(document, style["index"])

    def tag(self, descriptor, name="latest"):
        """Let `name` stand for the image or index in this layout."""
        named = {**descriptor, "annotations": {"org.opencontainers.image.ref.name": name}}
        self._write_index([*self.tags(), named])
        return self

    def tags(self):
        return json.loads((self.path / "index.json").read_text())["manifests"]

    def _write_index(self, manifests):
        document = {"schemaVersion": 2, "mediaType": OCI["index"], "manifests": manifests}
        (self.path / "index.json").write_text(json.dumps(document, indent=1))


# ---------------------------------------------------------------------------
# Building each image once
# ---------------------------------------------------------------------------

RECIPES = {}


def recipe(name):
    """Mark a function that fills a Layout as the recipe of the image `name`."""

    def mark(function):
        RECIPES[name] = function
        return function

    return mark


def image(name):
    """The path of the named image's layout, which is built if it is not there."""
    cache = Path(os.environ.get("MOCKER_TEST_CACHE") or Path.home() / ".cache/mocker-tests")
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{name}-{recipe_hash(RECIPES[name])}"
    with open(cache / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = cache / f"{name}.unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            RECIPES[name](Layout(unfinished))
            unfinished.rename(path)
    return path


def recipe_hash(function):
    """A hash of the function's source and of all in this file that it names, directly or not."""
    seen, queue = {}, ["Layout", function.__name__]
    while queue:
        name = queue.pop()
        if name not in seen and name not in ("image", "RECIPES"):
            seen[name] = source(globals()[name])
            words = re.findall(r"\w+", seen[name])
            queue += [word for word in words if word in globals() and word[0] != "_"]
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()[:12]


def source(value):
    """What defines a function or class of this file, or a constant; nothing for a module's."""
    if isinstance(value, (str, int, dict)):
        return repr(value)
    ours = getattr(value, "__module__", None) == __name__
    return inspect.getsource(value) if ours else ""


# ---------------------------------------------------------------------------
# hello-world: a program of a few machine instructions, alone in its image
# ---------------------------------------------------------------------------

HELLO = b"""
Hello from Docker!
This message shows that your installation appears to be working correctly.

To generate this message, mocker took the following steps:
 1. It asked the registry for the image "hello-world": first the index, from
    that the manifest for this machine, from that the config and the layer.
 2. It checked that each of them has the digest it was asked for by, and
    unpacked the layer to a directory of its own.
 3. It made a cgroup and a network for the container, forked a process into
    them, and gave that process namespaces and a root directory of its own.
 4. That process became /hello, the only file in its world and number 1 in its
    process table, which wrote this text. It knows nothing of mocker.

Docker would have done the same, and about a hundred other things.

To try something more ambitious, you can run a shell in a container with:
 $ ./mocker.py run -it busybox sh

"""


def hello_amd64(message):
    """write(1, message, len(message)); exit(0)"""
    size = struct.pack("<i", len(message))
    code = (
        b"\xb8\x01\x00\x00\x00"  # mov eax, 1   (write)
        b"\xbf\x01\x00\x00\x00"  # mov edi, 1   (standard output)
        b"\x48\x8d\x35\x15\x00\x00\x00"  # lea rsi, [rip + 21]   (the message)
        b"\xba" + size + b"\x0f\x05"  # mov edx, size; syscall
        b"\xb8\x3c\x00\x00\x00"  # mov eax, 60  (exit)
        b"\x31\xff"  # xor edi, edi
        b"\x0f\x05"  # syscall
        b"\x90\x90\x90\x90\x90"  # nop, up to the message
    )
    return code + message


def hello_arm64(message):
    """write(1, message, len(message)); exit(0)"""

    def mov(register, number):
        return 0xD2800000 | number << 5 | register

    svc = 0xD4000001
    adr_x1 = 0x10000000 | (28 >> 2) << 5 | 1  # the message starts 28 bytes after it
    write = [mov(0, 1), adr_x1, mov(2, len(message)), mov(8, 64), svc]
    leave = [mov(0, 0), mov(8, 93), svc]
    return struct.pack("<8I", *write, *leave) + message


def elf(machine, code):
    """A static executable with one segment, which holds these headers and the code."""
    start, headers = 0x400000, 64 + 56
    size = headers + len(code)
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)  # 64 bits, little-endian, version 1
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(ident, 2, machine, 1),  # 2: an executable
        *(start + headers, 64, 0),  # entry point, program headers, no section headers
        *(0, 64, 56, 1, 64, 0, 0),  # flags, sizes and numbers of those headers
    )
    readable_executable = 5
    segment = struct.pack("<IIQQQQQQ", 1, readable_executable, 0, start, start, size, size, 0x10000)
    return header + segment + code


@recipe("hello-world")
def hello_world(layout):
    programs = {
        ("amd64", None): elf(62, hello_amd64(HELLO)),
        ("arm64", "v8"): elf(183, hello_arm64(HELLO)),
    }
    manifests = []
    for (arch, variant), program in programs.items():
        config = {"Env": [PATH], "Cmd": ["/hello"], "WorkingDir": "/"}
        layers = [layer([file("hello", program, 0o755)])]
        history = [
            {"created": CREATED, "created_by": "COPY hello / # buildkit"},
            {"created": CREATED, "created_by": 'CMD ["/hello"]', "empty_layer": True},
        ]
        made = layout.image(layers, config, arch=arch, variant=variant, history=history)
        manifests += [made]
    manifests += [attestation(layout, manifests[0])]
    layout.tag(layout.index(manifests))


def attestation(layout, subject):
    """The index entry with which BuildKit adds provenance; no machine can run it."""
    statement = {"_type": "https://in-toto.io/Statement/v0.1", "subject": []}
    provenance = layout.json(statement, "application/vnd.in-toto+json")
    made = layout.image([(provenance, provenance["digest"])], arch="unknown")
    made["platform"] = {"architecture": "unknown", "os": "unknown"}
    made["annotations"] = {
        "vnd.docker.reference.digest": subject["digest"],
        "vnd.docker.reference.type": "attestation-manifest",
    }
    return made


# ---------------------------------------------------------------------------
# busybox, and layers of many files
# ---------------------------------------------------------------------------

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
"""
GROUP = b"root:x:0:\ndaemon:x:1:\nmail:x:8:daemon\nwww-data:x:33:\nnobody:x:65534:\n"


@recipe("busybox")
def busybox(layout):
    """Debian's busybox-static, with a hard link for each of its commands."""
    program = Path("/bin/busybox").read_bytes()
    listed = subprocess.check_output(["/bin/busybox", "--list"], text=True)
    commands = [name for name in listed.split() if name != "busybox"]
    folders = ["bin", "dev", "etc", "home", "usr", "usr/bin", "var", "var/spool"]
    entries = [
        *[folder(name) for name in folders],
        folder("root", 0o700),
        folder("tmp", 0o1777),
        folder("var/www", 0o755, uid=33, gid=33),
        file("etc/passwd", PASSWD),
        file("etc/group", GROUP),
        file("etc/shadow", b"root:*:::::::\n", 0o640, gid=8),
        file("bin/busybox", program, 0o755),
        *[hardlink(f"bin/{name}", "bin/busybox", 0o755) for name in commands],
        symlink("usr/bin/env", "../../bin/env"),
    ]
    history = [
        {"created": CREATED, "created_by": "ADD busybox.tar.gz / # buildkit"},
        {"created": CREATED, "created_by": 'CMD ["sh"]', "empty_layer": True},
    ]
    layout.tag(layout.image([layer(entries)], {"Env": [PATH], "Cmd": ["sh"]}, history=history))


@recipe("many-files")
def many_files(layout):
    """One layer of 20,000 files of up to 3 KiB, forty to a folder, no two alike."""
    entries = [folder("data")]
    for count in range(20_000):
        where = f"data/{count // 40:04}"
        if count % 40 == 0:
            entries += [folder(where)]
        line = digest(str(count).encode()) + "\n"
        entries += [file(f"{where}/{count:06}.txt", line.encode() * (count % 40 + 1))]
    layout.tag(layout.image([layer(entries)], {"Cmd": ["/none"]}))


# ---------------------------------------------------------------------------
# Building on Debian: scripts change a root directory, each change is a layer
# ---------------------------------------------------------------------------


class Build:
    """A root directory, and the layers and history that led to it."""

    def __init__(self, layout, root):
        self.layout, self.root = layout, Path(root)
        self.layers, self.history, self.before = [], [], {}

    def run(self, script):
        """As RUN in a Dockerfile."""
        in_chroot(self.root, script)
        self.commit(f"RUN /bin/sh -c {script} # buildkit")

    def copy(self, name, text, mode=0o644):
        """As COPY in a Dockerfile, of a file with this text."""
        path = self.root / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(mode)
        self.commit(f"COPY {path.name} {name} # buildkit")

    def commit(self, created_by):
        """Make a layer of what is new, changed and gone since the last one."""
        after = snapshot(self.root)
        self.layers += [self.layout.layer(layer(changes(self.root, self.before, after)))]
        self.history += [{"created": CREATED, "created_by": created_by}]
        self.before = after

    def finish(self, config):
        for key, value in config.items():
            said = f"{key.upper()} {json.dumps(value)}"
            self.history += [{"created": CREATED, "created_by": said, "empty_layer": True}]
        config = {"Env": [PATH], **config}
        self.layout.tag(self.layout.image(self.layers, config, history=self.history))


@contextlib.contextmanager
def based_on(base, layout):
    """A Build that starts with the files and layers of the image with the layout `base`."""
    with tempfile.TemporaryDirectory(prefix="mocker-build-") as scratch:
        bundle = f"{scratch}/bundle"
        subprocess.run(["umoci", "unpack", "--image", f"{base}:latest", bundle], check=True)
        build = Build(layout, f"{bundle}/rootfs")
        build.before = snapshot(build.root)
        shutil.copytree(base / "blobs", layout.path / "blobs", dirs_exist_ok=True)
        manifest = read_blob(base, json.loads((base / "index.json").read_text())["manifests"][0])
        config = read_blob(base, manifest["config"])
        build.layers = list(zip(manifest["layers"], config["rootfs"]["diff_ids"]))
        build.history = config["history"]
        yield build


def read_blob(path, descriptor):
    return json.loads((path / "blobs" / descriptor["digest"].replace(":", "/")).read_text())


def snapshot(root):
    """What identifies each file's present state: any change to it changes its ctime."""
    found = {}
    for where, folders, files in os.walk(root):
        for name in folders + files:
            status = os.lstat(os.path.join(where, name))
            if stat.S_IFMT(status.st_mode) in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
                path = os.path.relpath(os.path.join(where, name), root)
                found[path] = (status.st_ino, status.st_ctime_ns)
    return found


def changes(root, before, after):
    """The entries of a layer that leads from the one snapshot to the other; folders on the way, as docker has them."""
    gone = {path for path in before if is_gone(root, path)}
    new = {path for path in after if after[path] != before.get(path)}
    above = {str(folder) for path in gone | new for folder in Path(path).parents[:-1]}
    entries = []
    with tarfile.open(fileobj=io.BytesIO(), mode="w") as reader:  # remembers the hard links
        for path in sorted(gone | new | above):
            if path in gone:
                entries += [whiteout(path)]
            else:
                info = reader.gettarinfo(root / path, path)
                info.uname, info.gname, info.mtime = "", "", int(info.mtime)
                info.pax_headers = xattrs(root / path)
                entries += [(info, root / path if info.isreg() else b"")]
    return entries


def is_gone(root, path):
    """Not there any more, while the folder that it was in still is."""
    parent = (root / path).parent
    return not os.path.lexists(root / path) and parent.is_dir() and not parent.is_symlink()


def xattrs(path):
    names = os.listxattr(path, follow_symlinks=False)
    return {
        f"SCHILY.xattr.{name}": os.getxattr(path, name, follow_symlinks=False).decode(
            errors="surrogateescape"
        )
        for name in names
        if name == "security.capability" or name.startswith("user.")
    }


ENTER = """
mount -t proc proc "$1/proc"
mount -t tmpfs -o mode=755 dev "$1/dev"
cp -a /dev/null /dev/zero /dev/full /dev/random /dev/urandom "$1/dev"
ln -s /proc/self/fd "$1/dev/fd"
for file in resolv.conf hosts; do mount --bind "/etc/$file" "$1/etc/$file"; done
cd "$1"
exec chroot . /bin/sh -ec "$2"
"""


def in_chroot(root, script):
    """Run a shell script in the root; its mounts and processes end with it."""
    command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", ENTER, "sh"]
    proxies = {name: value for name, value in os.environ.items() if name.endswith("_proxy")}
    env = {"PATH": PATH[5:], "HOME": "/root", "LC_ALL": "C.UTF-8", **proxies}
    subprocess.run([*command, root, script], check=True, env=env, stdout=sys.stderr)


def apt(packages):
    """A script that installs packages, starts no server, and leaves no lists and caches."""
    return f"""export DEBIAN_FRONTEND=noninteractive
printf '#!/bin/sh\\nexit 101\\n' > /usr/sbin/policy-rc.d && chmod +x /usr/sbin/policy-rc.d
apt-get -q update
apt-get -qy -o Dpkg::Use-Pty=0 install --no-install-recommends {packages}
rm -rf /usr/sbin/policy-rc.d {LEFTOVERS}"""


LEFTOVERS = "/var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/apt /var/log/*.log"

# ---------------------------------------------------------------------------
# Debian, and Python on it
# ---------------------------------------------------------------------------


@recipe("debian")
def debian(layout):
    with tempfile.TemporaryDirectory(prefix="mocker-build-") as root:
        strap = ["mmdebstrap", "--mode=root", "--variant=minbase", "bookworm", root]
        subprocess.run(strap, check=True, stdout=sys.stderr)
        for name in ("hostname", "hosts", "resolv.conf"):  # mmdebstrap has copied this machine's
            Path(root, "etc", name).write_text("")
            Path(root, "etc", name).chmod(0o644)
        build = Build(layout, root)
        build.commit("debootstrap bookworm minbase")
        build.finish({"Cmd": ["bash"]})


@recipe("python")
def python(layout):
    with based_on(image("debian"), layout) as build:
        build.run(apt("python3-minimal libpython3-stdlib"))
        build.finish({"Cmd": ["python3"]})


# ---------------------------------------------------------------------------
# Servers, with the configs of Docker Hub's official images
# ---------------------------------------------------------------------------

ENTRYPOINT = """#!/bin/sh
# Begin as root: give {folder} to {user}, and go on as {user}.
set -e
if [ "$1" = {server} ] && [ "$(id -u)" = 0 ]; then
    mkdir -p {folder}
    find {folder} ! -user {user} -exec chown {user} '{{}}' +
    exec setpriv --reuid={user} --regid={user} --init-groups "$0" "$@"
fi
{more}exec "$@"
"""

SERVER_XML = """<?xml version="1.0" encoding="UTF-8"?>
<Server port="8005" shutdown="SHUTDOWN">
  <Service name="Catalina">
    <Connector port="8080" protocol="HTTP/1.1" connectionTimeout="20000"/>
    <Engine name="Catalina" defaultHost="localhost">
      <Host name="localhost" appBase="webapps" unpackWARs="true" autoDeploy="true"/>
    </Engine>
  </Service>
</Server>
"""

PAGE = """<!DOCTYPE html>
<title>tomcat</title>
<h1>It works: Apache Tomcat, from an image of ten layers</h1>
"""

JAVA = """
ln -s "$(dirname "$(dirname "$(readlink -f /usr/bin/java)")")" /opt/java"""

ASSEMBLE = """cd /usr/local/tomcat
cp -rL /usr/share/tomcat10/bin /usr/share/tomcat10/lib .
cp -rL /usr/share/tomcat10/skel/conf conf
mkdir logs temp work webapps"""


@recipe("tomcat")
def tomcat(layout):
    """Ten layers: the base, four of packages and programs, four small ones, one of deletions."""
    home = "/usr/local/tomcat"
    with based_on(image("debian"), layout) as build:
        build.run(f"mkdir -p {home}")
        build.run(apt("ca-certificates fontconfig-config libfreetype6 libharfbuzz0b"))
        build.run(apt("openjdk-17-jre-headless") + JAVA)
        build.run(apt("tomcat10-user"))
        build.run(ASSEMBLE)
        build.copy(f"{home}/conf/server.xml", SERVER_XML)
        build.copy(f"{home}/webapps/ROOT/index.html", PAGE)
        build.run("rm -rf /usr/share/doc/* /usr/share/man/* /var/cache/debconf/*-old")
        build.run(f"chmod 1777 {home}/logs {home}/temp {home}/work")
        env = [f"PATH={home}/bin:/opt/java/bin:{PATH[5:]}", "JAVA_HOME=/opt/java"]
        build.finish(
            {
                "Env": [*env, "LANG=C.UTF-8", f"CATALINA_HOME={home}"],
                "WorkingDir": home,
                "ExposedPorts": {"8080/tcp": {}},
                "Cmd": ["catalina.sh", "run"],
            }
        )


@recipe("rabbitmq")
def rabbitmq(layout):
    home = "/var/lib/rabbitmq"
    script = ENTRYPOINT.format(server="rabbitmq-server", user="rabbitmq", folder=home, more="")
    with based_on(image("debian"), layout) as build:
        build.run(apt("rabbitmq-server"))
        build.run(f"rm -rf {home}/* {home}/.erlang.cookie /var/log/rabbitmq/*")
        build.copy("/etc/rabbitmq/rabbitmq.conf", "loopback_users = none\n")
        build.copy("/usr/local/bin/docker-entrypoint.sh", script, 0o755)
        env = [f"PATH=/usr/lib/rabbitmq/bin:{PATH[5:]}", f"RABBITMQ_DATA_DIR={home}"]
        build.finish(
            {
                "Env": [*env, "RABBITMQ_LOGS=-", f"HOME={home}", "LANG=C.UTF-8"],
                "Volumes": {home: {}},
                "ExposedPorts": {f"{port}/tcp": {} for port in (4369, 5671, 5672, 25672)},
                "Entrypoint": ["docker-entrypoint.sh"],
                "Cmd": ["rabbitmq-server"],
                "StopSignal": "SIGTERM",
            }
        )


SITE = """server {
    listen 80 default_server;
    root /var/www/html;
    index index.html index.nginx-debian.html;
}
"""


@recipe("nginx")
def nginx(layout):
    with based_on(image("debian"), layout) as build:
        build.run(apt("nginx-light"))
        build.copy("/etc/nginx/sites-available/default", SITE)
        build.run("cd /var/log/nginx; ln -sf /dev/stdout access.log; ln -sf /dev/stderr error.log")
        build.copy("/docker-entrypoint.sh", '#!/bin/sh\nset -e\nexec "$@"\n', 0o755)
        build.finish(
            {
                "ExposedPorts": {"80/tcp": {}},
                "Entrypoint": ["/docker-entrypoint.sh"],
                "Cmd": ["nginx", "-g", "daemon off;"],
                "StopSignal": "SIGQUIT",
            }
        )


@recipe("redis")
def redis(layout):
    script = ENTRYPOINT.format(server="redis-server", user="redis", folder="/data", more="")
    with based_on(image("debian"), layout) as build:
        build.run(apt("redis-server"))
        build.run("mkdir /data && chown redis:redis /data")
        build.copy("/usr/local/bin/docker-entrypoint.sh", script, 0o755)
        build.finish(
            {
                "Volumes": {"/data": {}},
                "WorkingDir": "/data",
                "ExposedPorts": {"6379/tcp": {}},
                "Entrypoint": ["docker-entrypoint.sh"],
                "Cmd": ["redis-server", "--protected-mode", "no"],
            }
        )


INITDB = """if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
    initdb --auth=trust
    echo "host all all all trust" >> "$PGDATA/pg_hba.conf"
fi
"""

NO_CLUSTER = """mkdir /etc/postgresql-common
echo create_main_cluster=false > /etc/postgresql-common/createcluster.conf
"""

LISTEN = """cd /usr/share/postgresql/15
sed -i "s/^#listen_addresses = 'localhost'/listen_addresses = '*'/" postgresql.conf.sample
install -d -o postgres -g postgres -m 3777 /var/run/postgresql"""


@recipe("postgres")
def postgres(layout):
    data = "/var/lib/postgresql/data"
    script = ENTRYPOINT.format(server="postgres", user="postgres", folder=data, more=INITDB)
    with based_on(image("debian"), layout) as build:
        build.run(NO_CLUSTER + apt("postgresql-15"))
        build.run(LISTEN)
        build.copy("/usr/local/bin/docker-entrypoint.sh", script, 0o755)
        env = [f"PATH={PATH[5:]}:/usr/lib/postgresql/15/bin", f"PGDATA={data}", "LANG=C.UTF-8"]
        build.finish(
            {
                "Env": env,
                "Volumes": {data: {}},
                "ExposedPorts": {"5432/tcp": {}},
                "Entrypoint": ["docker-entrypoint.sh"],
                "Cmd": ["postgres"],
                "StopSignal": "SIGINT",
            }
        )


# ---------------------------------------------------------------------------
# Other Debians, with other Pythons: no images, but roots to chroot into: image("trixie") / "root"
# ---------------------------------------------------------------------------

REQUIREMENTS = (Path(__file__).resolve().parent.parent / "requirements.txt").read_text()


@recipe("bullseye")
def bullseye(layout):
    debian_root(layout.path / "root", "bullseye", "3.9")


@recipe("trixie")
def trixie(layout):
    debian_root(layout.path / "root", "trixie", "3.13", "firewalld", "dbus", "iproute2", "busybox-static")


def debian_root(root, suite, python, *more):
    """With what mocker needs: nft, and the packages of requirements.txt for that Python; sudo, and more packages."""
    packages = ",".join(["python3", "nftables", "sudo", *more])
    strap = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={packages}"]
    slim = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("doc", "man", "locale")]
    subprocess.run([*strap, *slim, suite, root], check=True, stdout=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="mocker-build-") as wheels:
        requirements = Path(wheels, "requirements.txt")
        requirements.write_text(REQUIREMENTS)
        pip, wanted = [sys.executable, "-m", "pip", "-q"], ["--find-links", wheels, "-r", requirements]
        # Of `cgroups` there is no wheel to be had, so it is made here. (`pip install --target` would
        # take packages that are too new for that Python; `pip download` does not.)
        subprocess.run([*pip, "wheel", "--no-deps", "-w", wheels, *wanted], check=True)
        other = ["--python-version", python, "--only-binary=:all:"]
        subprocess.run([*pip, "download", "-d", f"{wheels}/{python}", *other, *wanted], check=True)
        for wheel in Path(wheels, python).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(root / f"usr/local/lib/python{python}/dist-packages")
    subprocess.run(["chroot", root, "python3", "-m", "compileall", "-q", "/usr/local/lib"], check=True)


# ---------------------------------------------------------------------------


def main(arguments):
    if len(arguments) not in (1, 2) or arguments[0] not in RECIPES:
        sys.exit(f"{__doc__}\nThe images: {', '.join(RECIPES)}")
    name, *directory = arguments
    if directory:
        RECIPES[name](Layout(directory[0]))
    print(directory[0] if directory else image(name))


if __name__ == "__main__":
    main(sys.argv[1:])
