"""What a test must leave as it was on the host: a snapshot before and after, and the difference.

A snapshot maps each kind of thing (links, mounts, processes, ...) to a dictionary from a line that
names one thing to a detail for the reader. Only the names are compared.

What it does not see: a namespace held only by an open file descriptor, mounts inside other mount
namespaces (the namespace itself is seen), and counters, on purpose. Rules made with iptables-nft
are part of nft's list; a table of iptables-legacy that holds nothing (those can't be removed
again, and looking at them may create them) counts as nothing.

MOCKER_TEST_BESIDE=1 is for tests that tests/all runs beside the others, in namespaces of their own:
what namespaces don't part, since the others make some, is not compared.

Set MOCKER_TEST_SHARED=1 on a machine where others work too: then only what is plainly a test's
own is compared: names with "mocker" or "veth" in them, and processes that a test started.

As a fixture:  pytestmark = pytest.mark.usefixtures("host_as_before")
"""

import fnmatch
import glob
import json
import os
import re
import shutil
import subprocess
import time

import pytest

SETTLING_TIME = 20.0  # the kernel frees namespaces, and the veths in them, a little after their last user ends

BESIDE = "MOCKER_TEST_BESIDE" in os.environ and "MOCKER_TEST_INSIDE" not in os.environ  # of another kernel
SHARED_BESIDE = ["cgroup", "sysctl", "file"]
SYSCTLS = [
    "net/ipv4/ip_forward",
    "net/ipv4/conf/*/forwarding",
    "net/ipv4/conf/*/route_localnet",
    "net/ipv6/conf/*/forwarding",
    "net/bridge/bridge-nf-call-*",
    "user/max_*_namespaces",
    "vm/overcommit_memory",
]
EXPECTED_IN_TMP = [
    "stdout",  # where mocker writes a container's output, as the seed says
    "pytest-of-*",
]
KERNEL_THREAD = 0x00200000  # PF_KTHREAD, a process flag


# ---- one function for each kind of thing ---------------------------------------------------------


def links():
    found = {}
    for link in ip("-details", "link"):
        kind = link.get("linkinfo", {}).get("info_kind", "")
        up = "up" if "UP" in link["flags"] else "down"
        words = [link["ifname"], kind, up, f"mtu {link['mtu']}", f"master {link.get('master')}"]
        found[" ".join(words)] = link.get("address", "")
    return found


def addresses():
    return {
        f"{link['ifname']} {address['local']}/{address['prefixlen']}": ""
        for link in ip("addr")
        for address in link["addr_info"]
        if "local" in address
    }


def routes():
    found = {}
    for family in "-4", "-6":
        for line in output("ip", family, "route", "show", "table", "all").splitlines():
            found[re.sub(r" (expires \S+|linkdown|dead|pref \S+)", "", line).strip()] = family
    return found


def rules():
    return {line: family for family in ("-4", "-6") for line in output("ip", family, "rule").splitlines()}


def nftables():
    """Each line with its table and chain before it, for the same rule may stand in two of them."""
    found, path = {}, []
    for line in output("nft", "--stateless", "list", "ruleset").splitlines():
        depth = len(line) - len(line.lstrip("\t"))
        if line.strip() in ("", "}"):
            continue
        path[depth:] = [line.strip(" \t{")]
        found[" / ".join(path)] = ""
    return found


def iptables_legacy():
    found = {}
    for command in "iptables-legacy-save", "ip6tables-legacy-save":
        for line in output(command).splitlines():
            if line.startswith("*"):
                table = line[1:]
            elif line.startswith("-A") or line.startswith(":") and " ACCEPT " not in line:
                found[f"{table} {line.split(' [')[0]}"] = command
    return found


def mounts():
    found = {}
    for mount in mountinfo():
        shared = "shared" if "shared:" in mount["propagation"] else ""
        words = [
            mount["target"],
            mount["type"],
            mount["source"],
            mount["root"],
            mount["flags"],
            shared,
        ]
        found[" ".join(words)] = mount["options"]
    return found


def named_netns():
    return dict.fromkeys(names_in("/run/netns"), "")


def namespaces():
    """Those of all processes, and those that a bind mount keeps alive."""
    found = {}
    for mount in mountinfo():
        if mount["type"] == "nsfs":
            found[mount["root"]] = mount["target"]
    own = own_processes()
    for pid in pids():
        for link in glob.glob(f"/proc/{pid}/ns/*"):
            try:
                name = os.readlink(link)
            except OSError:
                continue  # it has ended meanwhile
            if pid not in own:
                found.setdefault(name, describe_process(pid))
    return found


def cgroups():
    found = {}
    for mount in mountinfo():
        if mount["type"] in ("cgroup", "cgroup2"):
            for directory, children, _ in os.walk(mount["target"]):
                found.update({os.path.join(directory, child): "" for child in children})
    return found


def sysctls():
    found = {}
    for pattern in SYSCTLS:
        for path in glob.glob("/proc/sys/" + pattern):
            found[f"{path[len('/proc/sys/') :]} = {content(path).strip()}"] = ""
    return found


def processes():
    found = {}
    own = own_processes()
    for pid in pids():
        status = process_status(pid)
        if not status or pid in own or status["flags"] & KERNEL_THREAD:
            continue
        if (status["state"], status["parent"]) != (
            "Z",
            1,
        ):  # ended, and now it is for init to see that
            found[f"{pid} started at {status['start']}"] = describe_process(pid)
    return found


def temporary_files():
    return {
        f"/tmp/{name}": ""
        for name in names_in("/tmp")
        if not any(fnmatch.fnmatch(name, pattern) for pattern in EXPECTED_IN_TMP)
    }


def runtime_files():
    return {f"/run/{name}": "" for name in names_in("/run") if name != "mocker"}  # it stays, empty: see README.md


KINDS = {
    "link": links,
    "address": addresses,
    "route": routes,
    "rule": rules,
    "nftables": nftables,
    "iptables": iptables_legacy,
    "mount": mounts,
    "named netns": named_netns,
    "cgroup": cgroups,
    "sysctl": sysctls,
    "file": temporary_files,
    "runtime file": runtime_files,
    "process": processes,  # last, when what the others started has ended
    "namespace": namespaces,
}


# ---- before and after ----------------------------------------------------------------------------


def snapshot():
    return {kind: look() for kind, look in KINDS.items() if not (BESIDE and kind in SHARED_BESIDE)}


def difference(before, after, ignore=lambda kind, name, detail: False):
    """A readable line for each thing that appeared or is gone, but for those `ignore` names."""
    lines = []
    for kind in before:
        for sign, one, other in ("+", after, before), ("-", before, after):
            lines += [
                f"{sign} {kind}: {name}" + (f"   ({detail})" if detail else "")
                for name, detail in one[kind].items()
                if name not in other[kind] and not ignore(kind, name, detail)
            ]
    return lines


def of_others(kind, name, detail):
    """On a shared machine: is this plainly not a test's own?"""
    if kind in ("process", "namespace"):
        return not re.search("of this test|in a mocker cgroup|/run/netns/.*mocker", detail)
    text = re.sub("mocker-(build|registry|hub|oracle|uml)-", "", f"{name} {detail}")
    return not re.search("mocker|veth", text)


def settled_difference(before, ignore=None, seconds=SETTLING_TIME):
    """The difference to now, once there is none or the time is up."""
    shared = os.environ.get("MOCKER_TEST_SHARED") == "1"
    ignore = ignore or (of_others if shared else lambda kind, name, detail: False)
    deadline = time.monotonic() + seconds
    while True:
        lines = difference(before, snapshot(), ignore)
        if shared:  # what has gone was there before the test: someone else's
            lines = [line for line in lines if line.startswith("+")]
        if not lines or time.monotonic() > deadline:
            return lines
        time.sleep(0.1)


@pytest.fixture
def host_as_before():
    before = snapshot()
    yield
    lines = settled_difference(before)
    assert not lines, "the host is not as it was before the test:\n" + "\n".join(lines)


# ---- reading ------------------------------------------------------------------------------------


def output(*command):
    """What a command prints; nothing where it isn't installed or its kernel part is missing."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout


def ip(*arguments):
    return json.loads(output("ip", "-json", *arguments) or "[]")


def content(path):
    """A file's text; nothing where it has vanished or may not be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def names_in(directory):
    return os.listdir(directory) if os.path.isdir(directory) else []


def mountinfo():
    """The lines of /proc/self/mountinfo (man 5 proc):

    36 35 98:0 /root /target rw,noatime shared:1 - ext3 /dev/root rw,errors=continue
    """
    for line in content("/proc/self/mountinfo").splitlines():
        before, after = line.split(" - ", 1)
        _, _, _, root, target, flags, *propagation = before.split(" ")
        kind, source, options = after.split(" ", 2)
        yield {
            "root": root,
            "target": target,
            "flags": flags,
            "propagation": " ".join(propagation),
            "type": kind,
            "source": source,
            "options": options,
        }


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def process_status(pid):
    """Parent, flags and start time, from /proc/PID/stat; none where the process has ended."""
    text = content(f"/proc/{pid}/stat")
    if not text:
        return None
    fields = text.rpartition(")")[2].split()  # the name before may hold blanks
    return {"state": fields[0], "parent": int(fields[1]), "flags": int(fields[6]), "start": int(fields[19])}


def own_processes():
    """This process and its ancestors."""
    own, pid = set(), os.getpid()
    while pid > 0:
        own.add(pid)
        status = process_status(pid)
        pid = status["parent"] if status else 0
    return own


def describe_process(pid):
    """Its command line, and how one can tell that a test started it."""
    command = content(f"/proc/{pid}/cmdline").replace("\0", " ").strip() or content(f"/proc/{pid}/comm").strip()
    signs = []
    test = os.environ.get("PYTEST_CURRENT_TEST", "no test").split(" (")[0]  # "file::name (call)"
    if f"PYTEST_CURRENT_TEST={test} " in content(f"/proc/{pid}/environ"):
        signs.append("of this test")
    if "mocker" in content(f"/proc/{pid}/cgroup"):
        signs.append("in a mocker cgroup")
    return ", ".join([command[:120], *signs])
