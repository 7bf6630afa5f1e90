"""mocker run's network: the bridge, the addresses, the way out, published ports."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import urllib.request

import host
import pytest
from containers import free_port, one_line, until

pytestmark = pytest.mark.usefixtures("host_as_before_all")

SLEEP = ("busybox", "sleep", "1000")
WEB = ("busybox", "sh", "-c", "echo served by $HOSTNAME >/index.html; exec httpd -f -p 80")


def link(name):
    [found] = [link for link in host.ip("addr") if link["ifname"] == name] or [None]
    return found


def get(address, port=80):
    def ask():
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}:{port}/", timeout=5) as answer:
            return answer.read().decode()

    return until(ask, f"no answer from {address}:{port}")


# ---- the bridge, and who is on it ----------------------------------------------------------------


def test_addresses_routes_and_the_bridge(start):
    container = start(*SLEEP)
    interfaces = {one["ifname"]: one for one in container.ip("addr")}
    assert set(interfaces) == {"lo", "veth1"}
    assert "UP" in interfaces["lo"]["flags"] and "UP" in interfaces["veth1"]["flags"]
    [address] = [one for one in interfaces["veth1"]["addr_info"] if one["family"] == "inet"]
    assert (address["local"], address["prefixlen"]) == ("10.0.0.3", 24)
    [default] = [route for route in container.ip("route") if route["dst"] == "default"]
    assert (default["gateway"], default["dev"]) == ("10.0.0.1", "veth1")

    [address] = [one for one in link("mocker0")["addr_info"] if one["family"] == "inet"]
    assert (address["local"], address["prefixlen"]) == ("10.0.0.1", 24)
    assert link(f"veth0_{container.id}")["master"] == "mocker0"
    name = f"mocker_{container.id}"
    assert name in host.output("ip", "netns").split()
    inside = subprocess.run(["ip", "netns", "exec", name, "ip", "-brief", "addr"], capture_output=True, text=True)
    assert "10.0.0.3/24" in inside.stdout
    assert name in host.output("ip", "netns", "identify", str(container.pid))


def test_the_next_container_takes_the_next_free_address(start):
    one, two, three = start(*SLEEP), start(*SLEEP), start(*SLEEP)
    assert [c.address for c in (one, two, three)] == ["10.0.0.3", "10.0.0.4", "10.0.0.5"]
    two.end()
    assert link(f"veth0_{two.id}") is None
    assert start(*SLEEP).address == "10.0.0.4"


def test_host_and_container_reach_each_other(start, run):
    web = start(*WEB)
    assert get(web.address) == f"served by {web.id}\n"
    with socket.create_server(("10.0.0.1", 0)) as server:
        threading.Thread(target=lambda: server.accept()[0].sendall(b"the host\n"), daemon=True).start()
        assert run("busybox", "nc", "10.0.0.1", server.getsockname()[1], timeout=60).stdout == "the host\n"


def test_two_containers_reach_each_other(start, run):
    web = start(*WEB)
    assert run("busybox", "wget", "-qO-", f"http://{web.address}/").stdout == f"served by {web.id}\n"
    assert run("busybox", "ping", "-c1", "-W5", web.address).returncode == 0


def test_loopback_is_its_own(run):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = f"ping -c1 -W5 127.0.0.1 >/dev/null && echo up; nc 127.0.0.1 {port}"
        done = run("busybox", "sh", "-c", script, timeout=60)
    assert (done.stdout, done.returncode) == ("up\n", 1)


def test_its_own_name_leads_to_itself(run):
    done = run("--hostname", "pebble", "busybox", "ping", "-c1", "-W5", "pebble")
    assert "(10.0.0." in done.stdout and done.returncode == 0


# ---- networks of the host ------------------------------------------------------------------------


LOOK = """ip addr show veth1 | sed -n 's/.*inet \\([0-9.]*\\).*/\\1/p'
gateway=$(ip route | sed -n 's/default via \\([0-9.]*\\).*/\\1/p')
echo $gateway
ping -c1 -W5 $gateway >/dev/null && echo reached"""


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("10.0.0.77/24", "10.0.1."),
        ("10.0.0.200/30", "10.0.1."),  # a part of it
        ("10.99.0.1/8", "172.30."),  # all around it
    ],
)
def test_a_subnet_that_is_in_use_is_left_alone(store, address, expected):
    ip("link", "add", "mockdummy0", "type", "bridge")
    try:
        ip("addr", "add", address, "dev", "mockdummy0")
        ip("link", "set", "mockdummy0", "up")
        done = store("run", "busybox", "sh", "-c", LOOK)
    finally:
        ip("link", "delete", "mockdummy0")
    assert done.returncode == 0, done
    own, gateway, reached = done.stdout.splitlines()
    subnet = own.rpartition(".")[0]
    assert own.startswith(expected) and own.endswith(".3")
    assert (gateway, reached) == (f"{subnet}.1", "reached")
    assert any("10.0.0.0/24 is in use" in line and f"{subnet}.0/24" in line for line in done.stderr.splitlines())


def test_network_none(start):
    container = start("--network=none", *SLEEP)
    assert [(one["ifname"], "UP" in one["flags"]) for one in container.ip("addr")] == [("lo", True)]
    assert container.ip("route") == []
    assert link("mocker0") is None


def test_network_host(start):
    container = start("--network", "host", *SLEEP)
    assert os.readlink(f"/proc/{container.pid}/ns/net") == os.readlink("/proc/self/ns/net")
    assert link("mocker0") is None


def test_network_host_has_its_name_and_its_ports(store):
    look = "hostname; cat /etc/hostname; echo $HOSTNAME"
    done = store("run", "--network=host", "-p", "8080:80", "busybox", "sh", "-c", look)
    assert done.stdout.split() == [os.uname().nodename] * 3
    assert "published ports are discarded" in done.stderr


def test_a_bridge_of_that_name_which_is_somebody_else_s(run):
    ip("link", "add", "mocker0", "type", "bridge")
    try:
        one_line(run("busybox", "true"), "mocker0", "not mocker's")
        assert link("mocker0") is not None
    finally:
        ip("link", "delete", "mocker0")


# ---- the way out ---------------------------------------------------------------------------------

WAN, INTERNET = "198.51.100.1", "198.51.100.2"
ANSWERS = """
import socket
with socket.create_server(("", 7)) as server:
    print("ready", flush=True)
    while True:
        connection, peer = server.accept()
        connection.sendall(f"you are {peer[0]}\\n".encode())
        connection.close()
"""


@contextlib.contextmanager
def serving(program, *where):
    """Run a Python program that says when it is ready, by a command that leads to a network namespace."""
    server = subprocess.Popen([*where, sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout.readline() == "ready\n"
        yield server.pid
    finally:
        server.kill()
        server.communicate()


@pytest.fixture
def internet():
    """A network namespace beyond the host, which knows no way to 10.0.0.0/24, and answers who asks.

    → the command that leads into it
    """
    with serving(ANSWERS, "unshare", "--net") as pid:
        enter = ["nsenter", f"--net=/proc/{pid}/ns/net"]
        ip("link", "add", "mockwan0", "type", "veth", "peer", "name", "wan", "netns", pid)
        try:
            for where, end, address in ([], "mockwan0", WAN), (enter, "wan", INTERNET):
                ip("addr", "add", f"{address}/24", "dev", end, where=where)
                ip("link", "set", end, "up", where=where)
            yield enter
        finally:
            ip("link", "delete", "mockwan0")


def ip(*arguments, where=()):
    subprocess.run([*where, "ip", *map(str, arguments)], check=True)


def fetch(where, address, port):
    """What a web server answers to one who asks from a network namespace."""
    script = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=9).read().decode(), end='')"
    command = [*where, sys.executable, "-c", script, f"http://{address}:{port}/"]
    return subprocess.run(command, capture_output=True, text=True).stdout


def test_what_it_sends_leaves_under_the_host_s_address(run, internet):
    assert run("busybox", "nc", INTERNET, 7, timeout=60).stdout == f"you are {WAN}\n"


def test_the_way_out_by_iptables(tools, run, internet):
    assert run("busybox", "nc", INTERNET, 7, timeout=60, env=tools("iptables")).stdout == f"you are {WAN}\n"


def test_without_firewall_tools_it_says_that_there_is_no_way_out(tools, store):
    done = store("run", "busybox", "ping", "-c1", "-W5", "10.0.0.1", env=tools())
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "no NAT" in line]
    assert "Traceback" not in done.stderr


# ---- published ports -----------------------------------------------------------------------------


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_a_published_port(tools, start, internet, tool):
    port = free_port()
    web = start("-p", f"{port}:80", *WEB, env=tools(tool))
    expected = f"served by {web.id}\n"
    assert get("127.0.0.1", port) == expected
    assert get(WAN, port) == expected
    assert fetch(internet, WAN, port) == expected
    web.end()
    with socket.create_server(("", port)):
        pass


def test_a_published_port_is_open_to_other_containers(start, run):
    port = free_port()
    web = start("-p", f"{port}:80", *WEB)
    get(web.address)
    assert run("busybox", "wget", "-qO-", f"http://10.0.0.1:{port}/", timeout=60).stdout == f"served by {web.id}\n"


def test_a_published_port_is_open_to_the_container_itself(start):
    """Also where iptables sees what a bridge passes on (net.bridge.bridge-nf-call-iptables), as on Docker's hosts."""
    port = free_port()
    web = start("-p", f"{port}:80", *WEB)
    get(web.address)
    inside = ["nsenter", f"--net=/proc/{web.pid}/ns/net"]
    assert fetch(inside, "10.0.0.1", port) == f"served by {web.id}\n"


def test_a_port_published_on_one_address_only(start, internet):
    port = free_port()
    web = start("-p", f"127.0.0.1:{port}:80", *WEB)
    assert get("127.0.0.1", port) == f"served by {web.id}\n"
    assert fetch(internet, WAN, port) == ""
    with pytest.raises(OSError):
        socket.create_connection((WAN, port), 2)


ECHO = """
import socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("", 7))
    print("ready", flush=True)
    while True:
        server.sendto(*server.recvfrom(100))
"""


@pytest.mark.parametrize("tool", ["nft", "iptables"])
def test_a_published_udp_port(tools, start, internet, tool):
    port = free_port(socket.SOCK_DGRAM)
    container = start("-p", f"{port}:7/udp", *SLEEP, env=tools(tool))
    where = ["ip", "netns", "exec", f"mocker_{container.id}"]
    with serving(ECHO, *where), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        for address in "127.0.0.1", WAN, "127.0.0.1":
            client.sendto(address.encode(), (address, port))
            assert client.recvfrom(100) == (address.encode(), (address, port))


def test_several_ports(start):
    ports = [free_port(), free_port()]
    web = start("-p", f"{ports[0]}:80", "--publish", f"{ports[1]}:80/tcp", *WEB)
    assert {get("127.0.0.1", port) for port in ports} == {f"served by {web.id}\n"}


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_port_that_is_taken(run, kind):
    protocol = {socket.SOCK_STREAM: "tcp", socket.SOCK_DGRAM: "udp"}[kind]
    with socket.socket(socket.AF_INET, kind) as holder:
        holder.bind(("127.0.0.1", 0))
        if kind == socket.SOCK_STREAM:
            holder.listen()
        port = holder.getsockname()[1]
        one_line(run("-p", f"{port}:80/{protocol}", "busybox", "true"), str(port))


def test_a_port_whose_old_connections_wait_for_their_end(start):
    """TIME_WAIT: of a server that has just been stopped."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        connection, _ = server.accept()
        connection.close()  # who closes first has to wait
        client.recv(1)
        port = server.getsockname()[1]
    web = start("-p", f"{port}:80", *WEB)
    assert get("127.0.0.1", port) == f"served by {web.id}\n"


def test_a_port_that_another_container_has(start, run):
    port = free_port()
    start("-p", f"{port}:80", *SLEEP)
    one_line(run("-p", f"{port}:80", "busybox", "true"), str(port))


def test_an_address_that_is_not_the_host_s(run):
    one_line(run("-p", "203.0.113.9:8080:80", "busybox", "true"), "203.0.113.9")
