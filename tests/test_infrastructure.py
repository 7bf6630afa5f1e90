"""The images and registries that the other tests stand on."""

import json
import subprocess
import urllib.error
import urllib.request

import pytest

HELLO = "/v2/library/hello-world/manifests/latest"


def output(*command, **options):
    return subprocess.check_output([*map(str, command)], text=True, **options)


def skopeo_inspect(registry, *options):
    name = f"docker://{registry.host}/library/hello-world"
    return json.loads(output("skopeo", "inspect", *options, "--tls-verify=false", name))


def refusal(url, headers=None):
    """The HTTP error that a GET ends in."""
    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(urllib.request.Request(url, headers=headers or {}))
    return raised.value


@pytest.mark.parametrize("name", ["registry", "hub"])
def test_both_registries_serve_the_index(name, request):
    registry = request.getfixturevalue(name)
    platforms = [one["platform"] for one in skopeo_inspect(registry, "--raw")["manifests"]]
    assert [one["architecture"] for one in platforms] == ["amd64", "arm64", "unknown"]
    assert ("GET", HELLO, 200) in registry.requests


def test_the_hub_demands_a_token(hub):
    error = refusal(hub.url + HELLO)
    assert error.code == 401
    assert f'Bearer realm="http://{hub.token_host}/token"' in error.headers["WWW-Authenticate"]
    assert 'scope="repository:library/hello-world:pull"' in error.headers["WWW-Authenticate"]
    assert hub.requests[-1] == ("GET", HELLO, 401)


def test_the_hub_refuses_a_token_that_is_for_something_else_or_too_old(hub, monkeypatch):
    other = hub.token("library/busybox", ["pull"])
    assert refusal(hub.url + HELLO, {"Authorization": f"Bearer {other}"}).code == 401
    monkeypatch.setattr(hub, "token_seconds", -1)
    old = hub.token("library/hello-world", ["pull"])
    assert refusal(hub.url + HELLO, {"Authorization": f"Bearer {old}"}).code == 401


def test_the_hub_redirects_blobs_and_the_cdn_refuses_authorization(hub, tmp_path):
    source, before = f"docker://{hub.host}/library/hello-world", len(hub.requests)
    output("skopeo", "copy", "--src-tls-verify=false", source, f"dir:{tmp_path}/copy")
    at_the_cdn = [(path, status) for _, path, status in hub.requests[before:] if "Signature=" in path]
    assert at_the_cdn and {status for _, status in at_the_cdn} == {200}
    assert any("/blobs/" in path and status == 307 for _, path, status in hub.requests)
    assert not hub.leaks

    path = at_the_cdn[-1][0]
    assert refusal(f"http://{hub.cdn_host}{path}", {"Authorization": "Bearer x"}).code == 400
    assert hub.leaks == [path]
    hub.leaks.clear()
    assert refusal(f"http://{hub.cdn_host}{path.partition('?')[0]}").code == 403


def test_hello_world_runs(registry, tmp_path):
    """Unpacked by umoci and started by chroot, with nothing of mocker's."""
    source = f"docker://{registry.host}/library/hello-world"
    output("skopeo", "copy", "--src-tls-verify=false", source, f"oci:{tmp_path}/layout:latest")
    output("umoci", "unpack", "--image", f"{tmp_path}/layout:latest", tmp_path / "bundle")
    said = output("chroot", tmp_path / "bundle/rootfs", "/hello")
    assert said.startswith("\nHello from Docker!\nThis message shows that your installation ")


@pytest.mark.parametrize("name, layers", [("debian", 1), ("python", 2), ("tomcat", 10)])
def test_number_of_layers(registry, name, layers):
    registry.need(f"library/{name}")
    source = f"docker://{registry.host}/library/{name}"
    described = json.loads(output("skopeo", "inspect", "--tls-verify=false", source))
    assert len(described["Layers"]) == layers
