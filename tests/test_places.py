"""Where people run mocker: in docker, beside it, without nftables, by sudo, by cron, on other Pythons, under systemd.

Each place has a network, a process table and a /run of its own, which end with it, however it ends. A place
with another root is a Debian of another age, made once by images.py; what is changed there is in memory.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import images
import machine
import oracle
import pytest
import test_layers
from conftest import MOCKER, Mocker

pytestmark = pytest.mark.usefixtures("host_as_before_all")

APART = """set -e
mount -t tmpfs run /run
mkdir /run/cgroup
mount --rbind /sys/fs/cgroup /run/cgroup
mount -t sysfs sysfs /sys
mount --move /run/cgroup /sys/fs/cgroup
ip link set lo up
"""
# mocker lies in /mocker there, and a store to serve from in /served.
OTHER_ROOT = """
cd /run; mkdir upper work root
mount -t overlay -o lowerdir={root},upperdir=upper,workdir=work overlay root
cd root; mkdir mocker served
for directory in proc sys dev; do mount --rbind /$directory $directory; done
for directory in run tmp root home; do mount -t tmpfs mine $directory; done
mount --bind {mocker} mocker
mount --bind {served} served
exec env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root chroot . sh -c {script}
"""


def apart(script, *where):
    """The command that runs a shell script apart; `where` is one that leads to a network, if not to a new one."""
    namespaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    where = where or ("unshare", "--net")
    return ["setpriv", "--pdeathsig", "KILL", *where, *namespaces, "sh", "-c", APART + script]


def in_root(name, script, served, mocker=MOCKER.parent):
    """The same, in another root."""
    names = {"root": images.image(name) / "root", "mocker": mocker, "served": served, "script": script}
    return apart(OTHER_ROOT.format(**{key: shlex.quote(str(value)) for key, value in names.items()}))


def said(command, **options):
    """stdout and stderr of a command that ends well."""
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, **options)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done.stdout, done.stderr


SERVED = """set -e
mocker() { /mocker/mocker.py "$@"; }
MOCKER_HOME=/served mocker serve 2>/tmp/serve &
until grep -q Serving /tmp/serve; do sleep 0.1; done
export MOCKER_HUB=http://127.0.0.1:5000
"""
LIMITED = """
limits='memory.max pids.max memory/memory.limit_in_bytes pids/pids.max'
look="cd /sys/fs/cgroup; echo $((6 * 7)) within \\$(cat $limits 2>/dev/null)"
mocker run --rm -m 20m --pids-limit 9 busybox sh -c "$look" 2>/tmp/said || { cat /tmp/said; exit 1; }
"""
WITHIN_LIMITS = "42 within 20971520 9\n"
WHAT_IS_LEFT = """
{ set +e; ls /sys/class/net /run/netns /run/mocker; nft list tables; } 2>&1 |
grep -E 'mocker0|veth0|mocker_|ip mocker|before|json' || echo nothing is left
"""

# ---- other Pythons -------------------------------------------------------------------------------

EVERY_COMMAND = """
mocker --help | head -1
mocker pull -q hello-world
mocker images | grep -o 'library/[^ ]*'
mocker run hello-world 2>/dev/null | sed -n 2p
mocker run -q --rm -p 8080:80 -v /tmp:/data --explain busybox sh -c 'echo hi >/data/hi' 2>/dev/null
cat /tmp/hi
mocker run -itq busybox true || echo $?
mocker verify
mocker clean --containers
mocker nonsense || echo $?
"""
WHAT_THEY_SAY = """Usage:
library/hello-world
Hello from Docker!
hi
125
ok       library/busybox:latest
ok       library/hello-world:latest
125
"""


@pytest.mark.parametrize("root", ["bullseye", "trixie"])
def test_every_command_on_another_python(root, pulled):
    out, _ = said(in_root(root, SERVED + EVERY_COMMAND + LIMITED + WHAT_IS_LEFT, pulled))
    assert out == WHAT_THEY_SAY + WITHIN_LIMITS + "nothing is left\n"


# Its times are a file's or a link's own: a folder that no layer has an entry for is from now.
LISTED = """
import hashlib, os, stat, sys
os.chdir(sys.argv[1])
for folder, *names in sorted(os.walk(".")):
    for path in [os.path.join(folder, name) for name in sorted(sum(names, []))]:
        seen = os.lstat(path)
        what = [path, oct(seen.st_mode), seen.st_uid, seen.st_gid, seen.st_rdev]
        what += [(name, os.getxattr(path, name, follow_symlinks=False))
                 for name in sorted(os.listxattr(path, follow_symlinks=False))
                 if name.startswith(("user.", "security.capability", "trusted.overlay.opaque"))]
        if stat.S_ISLNK(seen.st_mode):
            what += [seen.st_mtime_ns, os.readlink(path)]
        if stat.S_ISREG(seen.st_mode):
            what += [seen.st_mtime_ns, seen.st_nlink, hashlib.sha256(open(path, "rb").read()).hexdigest()]
        print(ascii(what))
"""


@pytest.fixture(scope="module")
def all_cases(registry, tmp_path_factory):
    """A store with an image of all layers that test_layers.py compares with umoci's, and of two empty ones."""
    layout = images.Layout(tmp_path_factory.mktemp("cases") / "layout")
    stacks = [layers for name, layers in test_layers.CASES.items() if name != "127 layers"]
    layers = [images.layer(entries) for entries in sum(stacks, [[]])]
    layout.tag(layout.image([b"", *layers]))
    registry.push(layout.path, "tests/cases:latest")
    mocker = Mocker(tmp_path_factory.mktemp("cases") / "store", registry.url, tmp_path_factory.mktemp("user"))
    mocker("pull", "tests/cases", check=True)
    return mocker.home


@pytest.mark.parametrize("root", ["bullseye", "trixie"])
def test_layers_unpack_alike_on_another_python(root, all_cases):
    listing = ["python3", "-c", LISTED]
    ours, _ = said([*listing, all_cases / "layers"])
    script = f"{SERVED}mocker pull tests/cases; {shlex.join(listing)} ~/mocker/layers"
    theirs, _ = said(in_root(root, script, all_cases))
    assert theirs.splitlines() == ours.splitlines()


# ---- sudo and cron -------------------------------------------------------------------------------

STUDENT = """
useradd --create-home student
echo 'student ALL=(ALL) NOPASSWD: ALL' >/etc/sudoers.d/student
as_student() { setpriv --reuid student --regid student --init-groups env HOME=/home/student "$@"; }
cd /home/student
as_student /mocker/mocker.py run hello-world || echo $?
as_student sudo -n MOCKER_HUB=$MOCKER_HUB /mocker/mocker.py run hello-world 2>/tmp/said | sed -n 2p
as_student sudo -n --preserve-env=HOME MOCKER_HUB=$MOCKER_HUB /mocker/mocker.py run --rm busybox id -u
ls /root/mocker/*box.json /root/mocker/*world.json /home/student/mocker/*.json 2>/dev/null || true
as_student /mocker/mocker.py images | grep -o 'library/[^ ]*'
"""


def test_sudo_of_a_user(pulled):
    """By itself sudo takes root's HOME; with the user's own HOME, the user sees the images."""
    out, err = said(in_root("trixie", SERVED + STUDENT + WHAT_IS_LEFT, pulled))
    assert "mocker: run needs root" in err and "sudo /usr/bin/python3 /mocker/mocker.py" in err
    stored = "/home/student/mocker/index.json\n/home/student/mocker/library_busybox.json\n"
    stored += "/root/mocker/library_hello-world.json\nlibrary/busybox\nnothing is left\n"
    assert out == "125\nHello from Docker!\n0\n" + stored


@pytest.mark.parametrize("variables", ["PATH=/usr/bin:/bin HOME=/root LOGNAME=root SHELL=/bin/sh", ""])
def test_a_job_of_cron_s(pulled, variables):
    """It has no terminal, not even a stdin, and a short PATH, in which nft is not."""
    python = f"setsid env -i MOCKER_HUB=$MOCKER_HUB {variables} /usr/bin/python3"
    script = f"{python} /mocker/mocker.py run --rm busybox echo hi <&-; ls /root/mocker/*box.json"
    out, err = said(in_root("trixie", SERVED + script + WHAT_IS_LEFT, pulled))
    assert out == "hi\n/root/mocker/library_busybox.json\nnothing is left\n"
    assert "no NAT" not in err


# ---- firewalls -----------------------------------------------------------------------------------

# Beyond the host is somebody who knows no way to 10.0.0.0/24, and answers who asks.
WAY_OUT = """
ip netns add far
ip link add wan type veth peer name wan netns far
ip address add 198.51.100.1/24 dev wan; ip link set wan up
ip -n far address add 198.51.100.2/24 dev wan; ip -n far link set wan up
ip netns exec far busybox nc -ll -p 7 -e busybox echo here is the internet &
until busybox nc -w 1 198.51.100.2 7; do sleep 0.1; done >/dev/null 2>&1
PATH=$TOOLS $MOCKER run -q --rm -p 8080:80 busybox nc -w 20 198.51.100.2 7
ip link delete wan
{ set +e; iptables-save; iptables-legacy-save; nft list ruleset; } 2>&1 | grep mocker || echo no rule is left
"""
REACHED = "here is the internet\nno rule is left\n"
RUN = f"{sys.executable} {MOCKER}"


@pytest.fixture
def tools(tmp_path, store):
    """tools(nft="nft") → an environment whose TOOLS is a PATH with that tool only."""
    (tmp_path / "tools").mkdir()

    def tools(**names):
        for name, program in names.items():
            for part in "", "-restore":
                if found := shutil.which(f"{program}{part}"):
                    (tmp_path / "tools" / f"{name}{part}").symlink_to(found)
        return {**store.env, "TOOLS": str(tmp_path / "tools"), "MOCKER": RUN}

    return tools


@pytest.mark.parametrize("names", [{"nft": "nft", "iptables": "iptables"}, {"iptables": "iptables"}])
def test_beside_docker_a_container_reaches_the_internet(docker, tools, names):
    where = "nsenter", f"--net=/proc/{docker.daemon.pid}/ns/net"
    assert "-P FORWARD DROP" in said([*where, "iptables", "-S", "FORWARD"])[0]
    assert said(apart(WAY_OUT, *where), env=tools(**names))[0] == REACHED


# Where it is, it lets nothing through from an interface that is in no zone. Without the rules of its bus all may speak.
FIREWALLD = """
mkdir /run/dbus
echo '<busconfig><type>system</type><listen>unix:path=/run/dbus/system_bus_socket</listen>
    <policy context="default"><allow own="*"/><allow send_destination="*" eavesdrop="true"/>
    <allow eavesdrop="true"/></policy></busconfig>' >/tmp/bus
dbus-daemon --config-file=/tmp/bus --fork
firewalld --nofork --nopid >/tmp/firewalld 2>&1 &
for try in $(seq 100); do firewall-cmd --state && break; sleep 0.2; done >/dev/null 2>&1
"""


def test_beside_firewalld_a_container_reaches_the_internet(pulled):
    script = f"{SERVED}{FIREWALLD}TOOLS=$PATH MOCKER=mocker{WAY_OUT}firewall-cmd --zone=trusted --list-interfaces"
    out, _ = said(in_root("trixie", script, pulled))
    assert out == f"{REACHED}\n"


def test_by_the_older_iptables_which_forwards_nothing(tools):
    script = "iptables-legacy -P FORWARD DROP\n" + WAY_OUT
    assert said(apart(script), env=tools(iptables="iptables-legacy"))[0] == REACHED


# As in docker: the root of the tree, as far as one can see, has processes, and so can't pass controllers on.
NESTED = """
unshare --mount --cgroup sh -ec 'umount /sys/fs/cgroup; mount -t cgroup2 cgroup2 /sys/fs/cgroup; cd /sys/fs/cgroup
grep -qx $$ cgroup.procs
$MOCKER run -q --rm -m 20m --pids-limit 9 busybox sh -c "cd /sys/fs/cgroup; cat memory.max pids.max"
cat cgroup.subtree_control; find . -name "*mocker*"; grep -qx $$ cgroup.procs'
"""


@pytest.mark.beside
@pytest.mark.skipif(bool(machine.MISSING), reason="no user-mode-linux")
def test_a_kernel_without_nftables_and_nested_cgroups_v2(pulled, monkeypatch):
    """Debian's `iptables` is for nftables: only iptables-legacy works there."""
    monkeypatch.chdir(pulled)  # all that is there of /tmp
    script = "set -e; cp -a . /tmp/mocker; ! iptables -t nat -A POSTROUTING -j MASQUERADE" + WAY_OUT + NESTED
    done = machine.uml(script, env={"TOOLS": "/usr/sbin:/usr/bin", "MOCKER": RUN})
    assert (done.returncode, done.stdout) == (0, REACHED + "20971520\n9\n"), done


# ---- inside docker -------------------------------------------------------------------------------

# Root may lack this capability, and can't give it to a container then.
RUNC = """#!/bin/sh
for argument do
    [ "$last" != --bundle ] || sed -i 's/"CAP_SYS_RESOURCE",//g' "$argument/config.json"
    last=$argument
done
exec runc "$@"
"""


@pytest.fixture(scope="module")
def docker(tmp_path_factory):
    """Docker with an image `python` that, like Docker Hub's, has Python and neither nft nor iptables."""
    runtime = tmp_path_factory.mktemp("runtime") / "runc"
    runtime.write_text(RUNC)
    runtime.chmod(0o755)
    options = ["--add-runtime", f"lesser={runtime}", "--default-runtime", "lesser"]
    pack = ["tar", "-C", images.image("trixie") / "root", "--exclude=./usr/sbin/nft", "-c", "."]
    with oracle.Docker(*options, private_network=True) as docker:
        with subprocess.Popen(pack, stdout=subprocess.PIPE) as tar:
            docker.run("import", "-", "python", stdin=tar.stdout, check=True)
        yield docker


def in_docker(docker, served, script, *options):
    volumes = ["-v", f"{MOCKER.parent}:/mocker:ro", "-v", f"{served}:/served"]
    return said([*docker.command, "run", "--rm", *volumes, *options, "python", "sh", "-c", SERVED + script])


def test_inside_docker(docker, pulled):
    """Its root is an overlay, on which neither an upper layer nor a whiteout can lie."""
    script = LIMITED + "cat /tmp/said >&2; find /sys/fs/cgroup -name '*mocker*'" + WHAT_IS_LEFT
    out, err = in_docker(docker, pulled, script, "--privileged")
    assert out == WITHIN_LIMITS + "nothing is left\n"
    assert "gets a tmpfs" in err and "no NAT here" in err


def test_inside_docker_without_privileges(docker, pulled):
    out, err = in_docker(docker, pulled, "mocker pull -q busybox || echo $?; mocker run busybox true || echo $?")
    assert out == "125\n125\n"
    assert err.count("docker run --privileged") == 2


@pytest.fixture
def deleting(mocker, registry, tmp_path):
    """A store that has tests/deleting, whose upper layer deletes a file of the lower one."""
    layout = images.Layout(tmp_path / "layout")
    program = images.file("bin/ls", Path("/bin/busybox").read_bytes(), 0o755)
    lower = [images.folder("bin"), program, images.folder("etc"), images.file("etc/gone"), images.file("etc/kept")]
    layers = [images.layer(lower), images.layer([images.whiteout("etc/gone")])]
    layout.tag(layout.image(layers, {"Cmd": ["/bin/ls", "/etc"]}))
    registry.push(layout.path, "tests/deleting:latest")
    mocker("pull", "tests/deleting", check=True)
    return mocker.home


def test_inside_docker_an_image_that_deletes(docker, deleting):
    out, err = in_docker(docker, deleting, "mocker pull tests/deleting; mocker run -q tests/deleting", "--privileged")
    assert out == "hostname\nhosts\nkept\nmtab\nresolv.conf\n"
    assert err.count("-v mocker:/root/mocker keeps it") == 1  # it has been there since


def test_inside_docker_with_a_volume(docker, deleting):
    out, err = in_docker(docker, deleting, "mocker run --rm tests/deleting", "--privileged", "-v", "/root/mocker")
    assert out == "hostname\nhosts\nkept\nmtab\nresolv.conf\n"
    assert "tmpfs" not in err


# ---- systemd -------------------------------------------------------------------------------------

LOOK = """
find /sys/fs/cgroup -name '*mocker*'
cat /sys/fs/cgroup/cgroup.subtree_control /proc/self/cgroup /proc/sys/net/ipv4/ip_forward
"""


@pytest.mark.beside
@pytest.mark.slow
def test_cgroup_v2_under_systemd(pulled, tmp_path, monkeypatch):
    """In a stock kernel, emulated; the container has its limits, and all is as before then."""
    subprocess.run(["cp", "-a", pulled, tmp_path / "served"], check=True)
    shutil.copy(MOCKER, tmp_path)
    monkeypatch.chdir(tmp_path)  # all that is there of /tmp
    script = SERVED + LOOK + LIMITED + LOOK + WHAT_IS_LEFT
    done = machine.vm(shlex.join(in_root("trixie", script, tmp_path / "served", tmp_path)), timeout=300)
    before, limited, after = done.stdout.partition(WITHIN_LIMITS)
    assert limited and after == before + "nothing is left\n", done.stdout
    assert "0::/system.slice/vmrun.service\n" in before and "mocker" not in before
