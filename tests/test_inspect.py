"""inspect and diff: compared with what the kernel, ip, nft, the registry and Docker say."""

import json
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import host
import images
import oracle
import pytest
from containers import free_port, one_line, until

pytestmark = pytest.mark.usefixtures("host_as_before_all")
TESTS = Path(__file__).resolve().parent
IN_UML = "MOCKER_TEST_INSIDE" in os.environ
V2 = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
SLEEP = ("busybox", "sleep", "1000")
ESCAPES = "\x1b[31mred\x07\x9b2J\u202e\nnew line\r"


@pytest.fixture
def inspect(store):
    return lambda *words: json.loads(store("inspect", "--json", *words, check=True).stdout)


@pytest.fixture
def tree(store):
    """The tree's lines; each is legible, and no wider than a screen."""

    def tree(name):
        output = store("inspect", name, check=True).stdout
        assert output.endswith("\n") and all(line.isprintable() and len(line) <= 80 for line in output.split("\n"))
        return output.splitlines()

    return tree


def words(lines):
    """What a tree says, without its branches and its line breaks."""
    return re.sub(r"[│├└─\s]+", " ", " ".join(lines))


def contains(lines, text):
    """A long word is broken, so blanks don't count."""
    return text.replace(" ", "") in words(lines).replace(" ", "")


def leaves(document):
    if isinstance(document, (dict, list)):
        inner = document.values() if isinstance(document, dict) else document
        return [leaf for value in inner for leaf in leaves(value)]
    return [document]


def shown(leaf):
    """How a leaf of the document begins in the tree."""
    text = f"{leaf:,} bytes" if isinstance(leaf, int) and leaf > 1023 else str(leaf)
    return re.sub(r"([0-9a-f]{12})[0-9a-f]{52}", r"\1…", text)


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hello-world", "busybox"])
def test_an_image_from_index_to_layers(name, inspect, tree):
    layout = images.image(name)
    top = json.loads((layout / "index.json").read_text())["manifests"][0]
    index, manifest = None, top
    if "index" in top["mediaType"]:
        index = top
        entries = images.read_blob(layout, top)["manifests"]
        [manifest] = [one for one in entries if one["platform"]["architecture"] == images.MACHINE]
    found, content = inspect(name), images.read_blob(layout, manifest)
    assert list(found) == ["image", "index", "manifest", "config", "layers"]
    assert found["image"] == {"name": f"library/{name}", "version": "latest", "file": f"library_{name}.json"}
    for descriptor, described in (index, found["index"]), (manifest, found["manifest"]):
        keys = ("digest", "size", "mediaType")
        assert {key: described.get(key) for key in keys} == {key: (descriptor or {}).get(key) for key in keys}
    config = images.read_blob(layout, content["config"])
    assert (found["config"]["digest"], found["config"]["Cmd"]) == (content["config"]["digest"], config["config"]["Cmd"])
    [layer, empty] = found["layers"]
    assert {key: layer[key] for key in ("digest", "size")}.items() <= content["layers"][0].items()
    assert [layer["history"], empty["history"]] == [line["created_by"] for line in config["history"]]
    assert "digest" not in empty

    lines = tree(name)
    assert lines[0] == name and len(lines) <= 24
    for leaf in leaves(found):
        assert contains(lines, shown(leaf)[:20])


def test_an_image_pulled_before_the_index_was_noted(store, inspect, tree):
    path = store.home / "library_hello-world.json"
    stored = json.loads(path.read_text())
    assert inspect("hello-world")["index"] == {key: stored["index"][key] for key in stored["index"]}
    del stored["index"]
    path.write_text(json.dumps(stored))
    assert inspect("hello-world")["index"] == {}
    assert "├── index:" in tree("hello-world")


def pulled_from(fake, store, descriptor):
    reference = fake.put("image", descriptor)
    store("pull", "-q", reference, check=True)
    return reference


def test_a_history_that_is_hostile(fake, store, inspect, tree):
    history = [
        {"created_by": ESCAPES * 100},
        {"created_by": "x" * 5000, "empty_layer": True},
        "not an object",
        {"created_by": {"not": ["text"]}},
        {},
        {"created_by": "one too many"},
    ]
    layers = [images.layer([images.file(f"{ESCAPES}{n}".replace("\n", ""))]) for n in range(2)]
    config = {"Cmd": [ESCAPES], "Env": [f"A={ESCAPES}"], "User": ESCAPES, "Entrypoint": ["│   └── fake"]}
    name = pulled_from(fake, store, fake.layout.image(layers, config, history=history))
    assert [line["history"] for line in inspect(name)["layers"]][:2] == [ESCAPES * 100, "x" * 5000]
    assert ["digest" in line for line in inspect(name)["layers"]] == [True, False, True, False, False]
    assert r"Cmd \x1b[31mred\x07\x9b2J\u202e\nnew line\r" in words(tree(name))
    raw = store("inspect", "--json", name).stdout
    assert "\x1b" not in raw and "\x9b" not in raw and "\u202e" not in raw


def test_an_image_without_history(fake, store, inspect, tree):
    layers = [images.layer([images.file(f"file{n}")]) for n in range(3)]
    name = pulled_from(fake, store, fake.layout.image(layers))
    found = inspect(name)
    assert [sorted(layer) for layer in found["layers"]] == [["digest", "size"]] * 3
    assert len([line for line in tree(name) if line.startswith("    ")]) == 3


@pytest.mark.parametrize("name", ["nosuch", "no such", "UPPER", "../../etc/passwd", "", ESCAPES, "0123456789" * 60])
def test_what_is_not_there(name, store):
    one_line(store("inspect", name), f"no such image or container: {name[:4] if name.isprintable() else ''}")
    one_line(store("diff", name), "no such container: ")
    assert len(store("inspect", name).stderr) < 400


def test_usage(store):
    for words in ["inspect"], ["inspect", "a", "b"], ["diff"], ["diff", "--json", "a"]:
        assert "Usage:" in store(*words).stderr
    assert "--json" in store("inspect", "--help").stdout


# ---- a container that runs -----------------------------------------------------------------------


def test_a_container_beside_what_the_kernel_says(store, start, inspect, tree):
    port = free_port()
    container = start("--name=web", "-p", f"{port}:80", "-m", "20m", "--pids-limit=10", "--cpus=0.5", *SLEEP)
    found = inspect("web")
    pid, id = container.pid, container.id
    assert found["container"] == {"id": id, "name": "web", "status": "running", "image": "library/busybox:latest",
                                  "command": "sleep 1000"}
    assert found["process"] == {"pid": pid, "inside": 1, "uid": 0}

    kinds = ["mnt", "uts", "ipc", "pid", "net", "cgroup", "user"]
    links = [(os.readlink(f"/proc/{pid}/ns/{kind}"), os.readlink(f"/proc/self/ns/{kind}")) for kind in kinds]
    assert [(kind, *pair.values()) for kind, pair in found["namespaces"].items()] == [
        (kind, *pair) for kind, pair in zip(kinds, links)
    ]
    assert [kind for kind, (inside, outside) in zip(kinds, links) if inside == outside] == ["user"]

    assert found["root"]["upper"] == str(store.home / f"containers/{id}/upper")
    assert found["root"]["mount"] == host.output("findmnt", "-N", str(pid), "-no", "FSTYPE,OPTIONS", "/").replace(
        "overlay  ", "overlay ").strip()
    assert [os.path.isfile(f"{layer}/bin/busybox") for layer in found["root"]["layers"]] == [True]

    network = found["network"]
    assert network["interfaces"] == [one["ifname"] for one in container.ip("addr")]
    assert network["addresses"] == sorted(one["addr_info"][0]["local"] for one in container.ip("addr"))
    routes = {}
    for route in container.ip("route"):
        to = f"route to {route['dst'].replace('default', '0.0.0.0/0')}"
        routes[to] = (f"via {route['gateway']} " if "gateway" in route else "") + f"dev {route['dev']}"
    assert {key: value for key, value in network.items() if key.startswith("route to ")} == routes
    [master] = [one["master"] for one in host.ip("link") if one["ifname"] == f"veth0_{id}"]
    assert network["wire"] == f"veth0_{id} on {master}"
    [wire] = [one for one in container.ip("link") if one["ifname"] == "veth1"]
    [other] = [one for one in host.ip("link") if one["ifname"] == f"veth0_{id}"]
    assert wire["link_index"] == other["ifindex"]
    rules = network["NAT"]
    if shutil.which("nft") and not IN_UML:
        listed = host.output("nft", "list", "table", "ip", "mocker")
        listed += host.output("nft", "list", "table", "ip", f"mocker_{id}")
        assert rules and all(f"\t{rule}\n" in listed for rule in rules)
        assert all(line.strip() in rules for line in listed.splitlines() if re.search("dnat to|masquerade$", line))
    assert any(f"{container.address}:80" in rule and str(port) in rule for rule in rules)

    bits = dict(re.findall(r"^(Cap\w+|Seccomp):\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M))
    decoded = host.output("capsh", f"--decode={bits['CapEff']}").strip().partition("=")[2]
    assert found["privileges"] == {
        "capabilities": decoded.replace("cap_", "").upper().split(","),
        "bounding": decoded.replace("cap_", "").upper().split(","),
        "seccomp": {"0": "none", "2": "filter"}[bits["Seccomp"]],
    }

    lines = tree("web")
    assert len(lines) <= 24
    text = words(lines)
    for key in found:
        assert f" {key}" in text
    for leaf in [f"pid {pid}, inside 1", *leaves(found["namespaces"]), *found["privileges"]["capabilities"]]:
        assert str(leaf) in text


def test_limits_and_use(start, inspect):
    container = start("-m", "20m", "--pids-limit=10", "--cpus=0.5", "busybox", "sh", "-c", "sleep 1000 & wait")
    until(lambda: len(Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()) == 1)
    files = inspect(container.id)["cgroup"]
    memory = "memory.current" if V2 else "memory.usage_in_bytes"
    assert 0 < int(files[memory]) <= 20 << 20
    assert files["memory.max" if V2 else "memory.limit_in_bytes"] == str(20 << 20)
    assert (files["pids.current"], files["pids.max"]) == ("2", "10")
    assert files["cpu.max" if V2 else "cpu.cfs_quota_us"] == ("50000 100000" if V2 else "50000")
    assert re.match(r"usage_usec [1-9]" if V2 else "[1-9]", files["cpu.stat" if V2 else "cpuacct.usage"])
    assert files["path"].endswith(f"mocker{'/' if V2 else '_'}{container.id}")
    directory = f"/sys/fs/cgroup/{'' if V2 else 'pids/'}{files['path']}"
    assert str(container.pid) in Path(f"{directory}/cgroup.procs").read_text().split()


def test_another_user_and_other_rights(start, inspect):
    container = start("-u", "33:33", "--read-only", "--cap-drop=ALL", "--cap-add=CHOWN", *SLEEP)
    found = inspect(container.id)
    assert found["process"]["uid"] == 33
    assert (found["privileges"]["capabilities"], found["privileges"]["bounding"]) == ([], ["CHOWN"])
    assert found["root"]["mount"].startswith("overlay ro,nodev")
    found = inspect(start("--privileged", *SLEEP).id)
    assert "SYS_ADMIN" in found["privileges"]["capabilities"] and found["privileges"]["seccomp"] == "none"


@pytest.mark.parametrize("network", ["none", "host"])
def test_other_networks(network, start, inspect, tree):
    container = start(f"--network={network}", *SLEEP)
    found = inspect(container.id)
    assert found["network"]["interfaces"] == [one["ifname"] for one in container.ip("link")]
    assert "wire" not in found["network"] and "NAT" not in found["network"]
    pair = found["namespaces"]["net"]
    assert (pair["inside"] == pair["host"]) == (network == "host")
    tree(container.id)


@pytest.mark.parametrize(
    ("part", "shared"),
    {
        "--without=overlay": [],
        "--without=mount": ["mnt"],
        "--without=pid": ["pid"],
        "--only=chroot": ["mnt", "uts", "ipc", "pid", "net", "cgroup"],
        "--only=cgroup,overlay": ["mnt", "uts", "ipc", "pid", "net"],
    }.items(),
)
def test_a_container_that_lacks_parts(part, shared, start, inspect, tree):
    container = start(part, *SLEEP)
    found = inspect(container.id)
    assert found["process"]["inside"] == (container.pid if "pid" in shared else 1)
    same = [kind for kind, pair in found["namespaces"].items() if pair["inside"] == pair["host"]]
    assert same == [*shared, "user"]
    assert found["root"]["mount"].startswith("overlay") == (part not in ("--without=overlay", "--only=chroot"))
    tree(container.id)


def test_a_process_that_lies_about_itself(start, inspect, tree):
    """Its name and its arguments are its own, and may be any bytes."""
    script = "printf '\\rCapEff:\t0\\377' >/proc/self/comm; read x"
    container = start("busybox", "sh", "-c", script, "", "\x1b[31m\udcff\n", "", stdin=subprocess.PIPE)
    until(lambda: b"CapEff" in Path(f"/proc/{container.pid}/comm").read_bytes())
    found = inspect(container.id)
    assert len(found["privileges"]["capabilities"]) == 14
    assert shlex.split(found["container"]["command"]) == ["sh", "-c", script, "", "\x1b[31m\udcff\n", ""]
    tree(container.id)


# ---- a container that has ended ------------------------------------------------------------------


def ids(store):
    return [path.name for path in (store.home / "containers").iterdir()]


def test_a_container_that_has_ended(store, run, inspect, tree):
    assert run("--name=gone", "busybox", "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=1; exit 3").returncode == 3
    [id] = ids(store)
    found = inspect("gone")
    assert list(found) == ["container", "root"] and found["container"].pop("command").startswith("sh -c 'dd if=")
    assert found["container"] == {"id": id, "name": "gone", "status": "exited", "exit_code": 3,
                                  "image": "library/busybox:latest"}
    lines = tree("gone")
    assert lines[1].startswith(f"├── container: id {id}, name gone, status exited, exit_code 3")
    for leaf in found["root"]["upper"], *found["root"]["layers"]:
        assert contains(lines, shown(leaf)[:60])


def test_a_container_whose_mocker_was_killed(start, inspect):
    container = start("--name=left", *SLEEP)
    container.process.kill()
    container.process.wait()
    assert inspect("left")["container"]["status"] == "killed"


def test_a_container_that_never_started(store, inspect, tree):
    assert store("run", "-q", "--name=never", "-m", "20m", "-p", "192.0.2.1:80:80", "busybox").returncode == 125
    found = inspect("never")
    assert (found["container"]["status"], len(found["root"]["layers"])) == ("created", 1)
    tree("never")
    one_line(store("diff", "never"), "can't be compared")


def test_names_and_ids(store, run, inspect):
    run("--name=busybox", "busybox", "true")
    [id] = ids(store)
    for name in id, id[:5], "busybox":
        assert inspect(name)["container"]["id"] == id
    assert inspect("library/busybox")["image"]["name"] == "library/busybox"
    twin = id[:4] + ("0000" if id[4:] != "0000" else "1111")
    shutil.copytree(store.home / "containers" / id, store.home / "containers" / twin, symlinks=True)
    config = json.loads((store.home / "containers" / twin / "config.json").read_text())
    (store.home / "containers" / twin / "config.json").write_text(json.dumps({**config, "id": twin, "name": "twin"}))
    one_line(store("inspect", id[:4]), "the ids of 2 containers begin with")
    assert inspect("twin")["container"]["id"] == twin


# ---- diff ----------------------------------------------------------------------------------------

# As docker has it: a name, options, a script.
DIFFS = {
    "nothing": ([], "true"),
    "added": ([], "mkdir -p /d/e; echo 1 >/d/e/f; mkdir /home/n; mkfifo /home/p; ln -s /etc /home/l"),
    "changed": ([], "echo x >>/etc/passwd; chmod 711 /home; chown 3 /bin/cat; echo 1 >/etc/new"),
    "deleted": ([], "rm /bin/ls /etc/shadow; rm -r /var/www"),
    "added and deleted": ([], "touch /tmp/t; rm /tmp/t; mkdir /home/d; rmdir /home/d"),
    "opened, not changed": ([], "exec 3>>/etc/passwd; chmod 755 /bin/cat; ln /bin/busybox /home/hard"),
    "renamed": ([], "mv /etc/passwd /etc/group; mv /var/spool /var/www/spool"),
    "a directory made anew": ([], "rm -r /var; mkdir -p /var/www; echo 1 >/var/new"),
    "one with the same in it": ([], "rm -r /var; mkdir -p /var/spool /var/www/x"),
    "a directory for a file": ([], "rm /etc/group; mkdir /etc/group; echo 1 >/etc/group/root"),
    "a file for a directory": ([], "rm -r /var; echo 1 >/var"),
    "a link for a directory": ([], "rm -r /var; ln -s /etc /var"),
    "a directory for a link": ([], "rm /usr/bin/env; mkdir /usr/bin/env; echo 1 >/usr/bin/env/passwd"),
    "in places of mounts": ([], "touch /dev/shm/x /etc/x; echo 1 >/etc/hosts"),
    "a working directory": (["-w", "/data/y"], "echo 1 >f"),
    "volumes": (["-v", f"{TESTS}:/etc/tests:ro", "-v", f"{__file__}:/new/file:ro"], "true"),
    "spaces": ([], "echo 1 >'/tmp/a  b '; echo 1 >/tmp/é"),
}


@pytest.fixture(scope="module")
def docker():
    if oracle.MISSING:
        pytest.skip(f"not installed: {oracle.MISSING}")
    with oracle.Docker(private_network=True) as docker:
        for name in "busybox", "hello-world":
            docker.load_layout(images.image(name), name)
        yield docker


def dockers_diff(docker, *words):
    id = docker.run("create", *words, check=True).stdout.strip()
    docker.run("start", "--attach", id)
    lines = docker.run("diff", id, check=True).stdout.splitlines()
    return sorted(lines, key=lambda line: line[2:])


@pytest.mark.parametrize("case", DIFFS)
def test_diff_as_docker(case, store, run, docker):
    options, script = DIFFS[case]
    done = run("--name=changed", *options, "busybox", "sh", "-c", script)
    lines = store("diff", "changed", check=True).stdout.splitlines()
    assert lines == dockers_diff(docker, *options, "busybox", "sh", "-c", script), done.stderr


def test_an_image_that_lacks_places_for_mounts(store, run, docker):
    """Docker makes them in a layer of their own; mocker in the container's."""
    run("--name=changed", "hello-world", check=True)
    assert store("diff", "changed", check=True).stdout.splitlines() == dockers_diff(docker, "hello-world") == []
    [id] = ids(store)
    (store.home / f"containers/{id}/upper/etc/mine").write_text("")
    assert store("diff", "changed").stdout == "C /etc\nA /etc/mine\n"


def test_capabilities_are_a_change(store, run):
    run("--name=changed", "-v", "/usr/sbin:/host", "-v", "/lib:/lib", "-v", "/lib64:/lib64", "busybox", "true")
    [id] = ids(store)
    upper = store.home / f"containers/{id}/upper"
    lower = Path(os.readlink(upper.parent / "lower/0"))
    (upper / "bin").mkdir()
    shutil.copy2(lower / "bin/cat", upper / "bin/cat")
    assert "/bin" not in store("diff", "changed").stdout
    os.setxattr(upper / "bin/cat", "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    assert "C /bin\nC /bin/cat\n" in store("diff", "changed").stdout


def test_of_layers_the_upper_ones_count(store, image, run):
    """What a layer of the image deleted is added, if the container makes it again."""
    name = image({}, [images.whiteout("etc/group"), images.file("etc/shadow", b"new"), images.opaque("var")])
    run("--name=changed", name, "sh", "-c", "echo 1 >/etc/group; echo 2 >/etc/shadow; mkdir /var/www; rm -r /home")
    assert store("diff", "changed", check=True).stdout == (
        "C /etc\nA /etc/group\nC /etc/shadow\nD /home\nC /var\nA /var/www\n"
    )


def test_a_running_container_and_odd_names(store, start):
    container = start("busybox", "sh", "-c", "mkdir \"$(printf '/tmp/\\033[31m\\377\\nD ')\"; exec sleep 1000")
    until(lambda: os.listdir(f"/proc/{container.pid}/root/tmp"))
    before = Path("/proc/self/mountinfo").read_text()
    done = store("diff", container.id, check=True)
    assert done.stdout == "C /tmp\nA /tmp/\\x1b[31m\\udcff\\nD \n" and done.stderr == ""
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.listdir(store.home / "partial") == []


def test_a_path_through_a_link_is_not_followed(store, run):
    """Where the layers have a link to a directory, the upper layer's directory is new, with all that is in it."""
    run("--name=changed", "busybox", "sh", "-c", "true")
    [id] = ids(store)
    lower = Path(os.readlink(store.home / f"containers/{id}/lower/0"))
    assert (lower / "usr/bin/env").is_symlink()
    (store.home / f"containers/{id}/upper/usr/bin/env").mkdir(parents=True)
    (store.home / f"containers/{id}/upper/usr/bin/env/x").write_text("")
    assert store("diff", "changed").stdout == "C /usr\nC /usr/bin\nC /usr/bin/env\nA /usr/bin/env/x\n"


def test_a_tree_deeper_than_a_path_may_be_long(store, run):
    script = "i=0; cd /tmp; while [ $i -lt 1500 ]; do mkdir ddd; cd ddd; i=$((i+1)); done"
    run("--name=deep", "busybox", "sh", "-c", script)
    done = store("diff", "deep")
    one_line(done, "can't be compared")
    assert os.listdir(store.home / "partial") == []
    assert json.loads(store("inspect", "--json", "deep").stdout)["container"]["status"] == "exited"
    subprocess.run(["rm", "-rf", store.home / "containers"], check=True)  # which pytest could not


def test_diff_writes_to_a_full_disk(store, run):
    run("--name=changed", "busybox", "touch", "/x")
    with open("/dev/full", "w") as full:
        done = store("diff", "changed", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode != 0
