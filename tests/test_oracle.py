"""The real things that the other tests compare with, and that those leave nothing behind."""

import os

import host
import images
import machine
import oracle
import pytest

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="Docker and namespaces need root"),
    pytest.mark.usefixtures("ip_netns", "host_as_before"),  # podman mounts /run/netns, too
]
host_as_before = host.host_as_before

ENGINES = {
    "docker": oracle.Docker,
    "docker in a network of its own": lambda: oracle.Docker(private_network=True),
    "podman": oracle.Podman,
}
needs_engines = pytest.mark.skipif(oracle.MISSING, reason=f"not installed: {oracle.MISSING}")
needs_uml = pytest.mark.skipif(machine.MISSING, reason=f"not installed: {machine.MISSING}")


@needs_engines
@pytest.mark.parametrize("start", ENGINES.values(), ids=ENGINES)
def test_an_engine_runs_busybox_and_takes_a_running_container_along(start):
    with start() as engine:
        engine.load_layout(images.image("busybox"), "busybox")
        done = engine.run("run", "--rm", "busybox", "sh", "-c", "echo hi; echo no >&2; exit 7")
        assert (done.returncode, done.stdout, done.stderr) == (7, "hi\n", "no\n")
        engine.run("run", "--detach", "busybox", "sleep", "1000", check=True)


@needs_engines
def test_docker_pulls_from_a_registry_on_loopback(registry):
    name = f"{registry.host}/library/busybox"
    with oracle.Docker() as docker:
        docker.pull(name)
        assert docker.inspect(name)["RepoTags"] == [f"{name}:latest"]


@needs_engines
def test_docker_and_podman_unpack_the_same_files():
    listings = []
    for engine in oracle.Docker(private_network=True), oracle.Podman():
        with engine:
            engine.load_layout(images.image("busybox"), "busybox")
            with engine.rootfs("busybox") as directory:
                listings.append(oracle.rootfs_listing(directory))
    # the root itself is in no layer, and podman makes it 0555
    docker, podman = ([item for item in listing if item.path != "."] for listing in listings)
    assert oracle.listing_difference(docker, podman) == []
    found = {item.path: item for item in docker}
    assert (found["tmp"].type, found["tmp"].mode) == ("d", "1777")
    assert found["usr/bin/env"].target == "../../bin/env"
    assert {"bin/busybox", "bin/sh"} <= set(found["bin/sh"].links)
    assert found["bin/sh"].sha256 == oracle.sha256_of("/bin/busybox")


@pytest.mark.beside
@needs_uml
def test_user_mode_linux_has_cgroup_v2():
    done = machine.uml("cat /sys/fs/cgroup/cgroup.controllers; echo no >&2; exit 7")
    assert (done.returncode, done.stderr) == (7, "no\n")
    assert {"cpu", "memory", "pids"} <= set(done.stdout.split())


@pytest.mark.beside
@needs_uml
def test_user_mode_linux_ends_when_the_time_is_up():
    with pytest.raises(RuntimeError, match="within 6 s"):
        machine.uml("sleep 100 & sleep 100", timeout=6)


def test_what_a_test_leaves_is_seen():
    before = host.snapshot()
    host.output("ip", "link", "add", "mockdummy0", "type", "bridge")
    try:
        lines = host.difference(before, host.snapshot())
    finally:
        host.output("ip", "link", "delete", "mockdummy0")
    assert any(line.startswith("+ link: mockdummy0 bridge down") for line in lines)
