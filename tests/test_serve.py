"""serve: what was pulled, for others to pull."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import struct
import subprocess
import urllib.parse

import images
import oracle
import pytest
import store
from conftest import Mocker
from images import DOCKER, OCI, file, layer

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="pull needs root"), pytest.mark.beside]


class Served:
    """`mocker serve` over the store of `mocker`: .host, .url, .process, .said() once it has ended."""

    def __init__(self, mocker, *options):
        self.process = mocker.popen("serve", "--port=0", *options)
        line = self.process.stderr.readline()
        self.url = re.search(r"http://[\w.:]+\d", line)[0]
        self.host = self.url.partition("//")[2]

    def ask(self, path, method="GET", **headers):
        """One request, redirects not followed → (status, headers, body)"""
        host, _, rest = path[len("http://") :].partition("/") if path.startswith("http") else (self.host, "", path[1:])
        with contextlib.closing(http.client.HTTPConnection(host, timeout=60)) as connection:
            connection.request(method, f"/{rest}", headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def token(self, name):
        _, _, body = self.ask(f"/token?service=mocker&scope=repository:{name}:pull")
        return "Bearer " + json.loads(body)["token"]

    def get(self, path, method="GET", **headers):
        """The same with a token: path is NAME/manifests/… or NAME/blobs/…"""
        name = re.match("(.*)/(manifests|blobs)/", path)[1]
        return self.ask(f"/v2/{path}", method, Authorization=self.token(name), **headers)

    def end(self, number=signal.SIGINT):
        """→ (status, what it said meanwhile)"""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


@contextlib.contextmanager
def ended(served):
    try:
        yield served
    finally:
        served.process.kill()
        served.process.communicate()


@pytest.fixture
def serve(mocker):
    """serve(*options) → Served, over this test's own store"""
    with contextlib.ExitStack() as stack:
        yield lambda *options: stack.enter_context(ended(Served(mocker, *options)))


@pytest.fixture(scope="module")
def served(registry, forks, tmp_path_factory):
    """With hello-world, busybox, and team/app:1.2 of another registry; for all tests that only ask."""
    registry.push(images.image("hello-world"), "team/app:1.2")
    place = tmp_path_factory.mktemp("served")
    mocker = Mocker(place / "mocker", registry.url, place)
    for name in "hello-world", "busybox", f"{registry.host}/team/app:1.2":
        assert forks("pull", name, env=mocker.env).returncode == 0
    with ended(Served(mocker)) as served:
        yield served


@pytest.fixture
def own(quick, serve):
    """With hello-world; for a test that does more than to ask."""
    assert quick("pull", "hello-world").returncode == 0
    return serve()


def other_store(mocker, tmp_path, url):
    """Another student's laptop."""
    return {"MOCKER_HOME": str(tmp_path / "other"), "MOCKER_HUB": url}


# ---------------------------------------------------------------------------
# Who pulls from it
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["hello-world", "library/busybox:latest", "HOST/library/hello-world", "HOST/team/app:1.2", "team/app:1.2"]
)
def test_mocker_pulls_from_it(name, mocker, quick, served, tmp_path):
    env = other_store(mocker, tmp_path, served.url)
    done = quick("pull", name.replace("HOST", served.host), env=env)
    assert done.returncode == 0, done.stderr
    assert quick("verify", env=env).returncode == 0
    assert store.faults(tmp_path / "other") == []
    [one] = store.stored(tmp_path / "other")
    assert len(store.layers(tmp_path / "other", one)) == 1


@pytest.mark.parametrize("kind", ["index", "manifest"])
def test_mocker_pulls_by_digest_from_it(kind, quick, mocker, fake, serve, tmp_path):
    """Also by the digest of the index, which is what `docker pull` shows and a teacher writes down."""
    made = fake.layout.image([layer([file("f")])])
    index = fake.layout.index([made])
    name = f"library/x@{(index if kind == 'index' else made)['digest']}"
    assert quick("pull", name, env={"MOCKER_HUB": fake.url}).returncode == 0
    done = quick("pull", name, env=other_store(mocker, tmp_path, serve().url))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["library/hello-world:latest", "library/busybox", "team/app:1.2"])
def test_skopeo_copies_from_it(name, served, tmp_path):
    copy = ["skopeo", "--insecure-policy", "copy", "-q", "--src-tls-verify=false", f"docker://{served.host}/{name}"]
    subprocess.run([*copy, f"oci:{tmp_path}/copy:latest"], check=True)
    subprocess.run(["umoci", "unpack", "--image", f"{tmp_path}/copy:latest", tmp_path / "bundle"], check=True)


def test_an_image_in_dockers_formats_comes_out_as_it_went_in(quick, fake, serve, tmp_path):
    made = fake.layout.image([layer([file("f")])], style=DOCKER)
    fake.put("library/x", made)
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    status, headers, body = serve().get("library/x/manifests/latest")
    assert (status, headers["Content-Type"], images.digest(body)) == (200, DOCKER["manifest"], made["digest"])


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(oracle.MISSING, reason=f"not installed: {oracle.MISSING}")
def test_docker_and_podman_pull_from_it(served):
    name = f"{served.host}/library/busybox"
    for engine in oracle.Docker, oracle.Podman:
        with engine() as started:
            started.pull(name)
            assert started.run("run", "--rm", "--network=none", name, "echo", "hi", check=True).stdout == "hi\n"


@pytest.mark.slow
@pytest.mark.skipif(oracle.MISSING, reason=f"not installed: {oracle.MISSING}")
def test_docker_takes_it_for_docker_hub(served):
    with oracle.Docker(f"--registry-mirror={served.url}") as docker:
        docker.pull("busybox")
        assert docker.inspect("busybox:latest")["RepoTags"] == ["busybox:latest"]


def test_a_class_at_once(mocker, served, tmp_path):
    pulls = [
        mocker.popen(
            "pull", "-q", "busybox", env={"MOCKER_HOME": str(tmp_path / str(number)), "MOCKER_HUB": served.url}
        )
        for number in range(8)
    ]
    said = [process.communicate(timeout=60)[1] for process in pulls]
    assert (set(said), {process.returncode for process in pulls}) == ({""}, {0})


# ---------------------------------------------------------------------------
# The protocol
# ---------------------------------------------------------------------------


def test_the_dance(served):
    path = "/v2/library/hello-world/manifests/latest"
    status, headers, _ = served.ask(path)
    challenge = headers["WWW-Authenticate"]
    assert status == 401 and re.fullmatch(r'Bearer realm="http://[^"]*/token",service="[^"]*",scope="[^"]*"', challenge)
    realm, service, scope = re.findall('"([^"]*)"', challenge)
    assert scope == "repository:library/hello-world:pull"
    status, _, body = served.ask(f"{realm}?{urllib.parse.urlencode({'service': service, 'scope': scope})}")
    token = json.loads(body)["token"]
    assert status == 200
    status, headers, body = served.ask(path, Authorization=f"Bearer {token}")
    assert (status, headers["Docker-Content-Digest"], headers["Content-Type"]) == (
        200,
        images.digest(body),
        OCI["manifest"],
    )

    blob = json.loads(body)["layers"][0]
    status, headers, _ = served.ask(f"/v2/library/hello-world/blobs/{blob['digest']}", Authorization=f"Bearer {token}")
    assert status == 307
    place = headers["Location"]
    assert urllib.parse.urlsplit(place).netloc != served.host
    status, headers, data = served.ask(place)
    assert (status, images.digest(data), int(headers["Content-Length"])) == (200, blob["digest"], blob["size"])


REFUSED = {
    "no token": (None, 401),
    "nonsense": ("Bearer nonsense", 401),
    "basic": ("Basic bWU6c2VjcmV0", 401),
    "latin": ("Bearer \xe9", 401),
    "another repository's": ("library/busybox", 401),
}


@pytest.mark.parametrize("token, status", REFUSED.values(), ids=REFUSED)
def test_tokens_that_are_refused(token, status, served):
    token = served.token(token) if token == "library/busybox" else token
    headers = {"Authorization": token} if token else {}
    for path in "/v2/library/hello-world/manifests/latest", "/v2/":
        assert served.ask(path, **headers)[0] == status
    assert served.token("library/busybox") != served.token("library/hello-world")


def test_a_blob_needs_the_signature_that_was_given_out_for_it(served):
    manifest = json.loads(served.get("library/hello-world/manifests/latest")[2])
    place = served.get(f"library/hello-world/blobs/{manifest['config']['digest']}")[1]["Location"]
    other = place.replace(manifest["config"]["digest"], manifest["layers"][0]["digest"])
    for wrong in place.partition("?")[0], place[:-1], other, place.replace("Signature", "signature"):
        assert served.ask(wrong)[0] == 403


def test_a_token_opens_no_file(served):
    """Neither is it a signature, nor is a path a digest."""
    manifest = json.loads(served.get("library/hello-world/manifests/latest")[2])
    config = manifest["config"]["digest"]
    cdn = served.get(f"library/hello-world/blobs/{config}")[1]["Location"].rpartition("/")[0]
    for path in config, "sha256:/etc/hostname", "sha256:../../library_hello-world.json":
        token = json.loads(served.ask(f"/token?scope={path}")[2])["token"]
        assert served.ask(f"{cdn}/{path}?Signature={token}")[0] == 403


@pytest.mark.parametrize("first", [0, 1, 500, -1, 0])
def test_a_blob_from_some_byte_on(first, served):
    layer = json.loads(served.get("library/hello-world/manifests/latest")[2])["layers"][0]
    place = served.get(f"library/hello-world/blobs/{layer['digest']}")[1]["Location"]
    whole, first = served.ask(place)[2], first % layer["size"]
    status, headers, rest = served.ask(place, Range=f"bytes={first}-")
    assert (status, rest) == (206, whole[first:])
    assert headers["Content-Range"] == f"bytes {first}-{layer['size'] - 1}/{layer['size']}"


def test_head_is_get_without_the_body(served):
    manifest = served.get("library/hello-world/manifests/latest")
    blob = f"library/hello-world/blobs/{json.loads(manifest[2])['config']['digest']}"
    place = served.get(blob)[1]["Location"]
    for get, head in [
        (manifest, served.get("library/hello-world/manifests/latest", "HEAD")),
        (served.get(blob), served.get(blob, "HEAD")),
        (served.ask(place), served.ask(place, "HEAD")),
    ]:
        assert (head[0], head[2]) == (get[0], b"")
        for name in "Content-Length", "Content-Type", "Docker-Content-Digest":
            assert head[1][name] == get[1][name]


DIGEST = "sha256:" + "a" * 64
MISSING = [
    "library/hello-world/manifests/no-such-tag",
    "library/no-such-name/manifests/latest",
    f"library/hello-world/manifests/{DIGEST}",
    f"library/hello-world/blobs/{DIGEST}",
    "library/hello-world/blobs/sha256:..",
    "library/hello-world/blobs/..",
    "../../etc/manifests/passwd",
    "library/hello-world/blobs/%2e%2e%2f",
]


@pytest.mark.parametrize("path", MISSING)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_not_there_is_404(path, method, served):
    status, headers, body = served.get(path, method)
    assert (status, headers["Content-Type"]) == (404, "application/json")
    if method == "GET":
        assert re.fullmatch("[A-Z_]+_UNKNOWN", json.loads(body)["errors"][0]["code"])
        assert len(body) == int(headers["Content-Length"])


def test_a_layer_of_another_image_is_not_given_out(served):
    """A token is for one repository, whatever else is in the store."""
    manifest = json.loads(served.get("library/busybox/manifests/latest")[2])
    assert served.get(f"library/hello-world/blobs/{manifest['layers'][0]['digest']}")[0] == 404


def test_the_version_check_of_docker(served):
    assert served.ask("/v2/", Authorization=served.token(""))[0] in (200, 401)
    assert served.ask("/v2/")[0] == 401


def test_what_is_pulled_meanwhile_is_served_too(quick, own, fake):
    fake.put("library/late", fake.layout.image([layer([file("f")])]))
    assert own.get("library/late/manifests/latest")[0] == 404
    assert quick("pull", "late", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert own.get("library/late/manifests/latest")[0] == 200


# ---------------------------------------------------------------------------
# On a projector, in a room with thirty laptops
# ---------------------------------------------------------------------------


def connect(served):
    address, port = served.host.split(":")
    return socket.create_connection((address, int(port)), 10)


def tls(served):
    """Docker and podman try https first."""
    with contextlib.suppress(ssl.SSLError, OSError), connect(served) as plain:
        ssl._create_unverified_context().wrap_socket(plain)


def noise(served):
    with connect(served) as connection:
        connection.sendall(b"\x16\x03\x01 \x1b[31m garbage\r\n\r\n")
        connection.recv(100)


def nothing(served):
    connect(served).close()


def reset(served):
    """In the middle of a request."""
    with connect(served) as connection:
        connection.sendall(b"GET /v2/ HTTP/1.1\r\nHost: x\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hang_up(served):
    """In the middle of a layer, which is larger than what the sockets' buffers hold."""
    manifest = json.loads(served.get("library/large/manifests/latest")[2])
    place = served.get(f"library/large/blobs/{manifest['layers'][0]['digest']}")[1]["Location"]
    url = urllib.parse.urlsplit(place)
    with socket.create_connection((url.hostname, url.port), 10) as connection:
        connection.sendall(f"GET {url.path}?{url.query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.recv(100)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def old_http(served):
    with connect(served) as connection:
        connection.sendall(b"GET /\x1b[31m\r\n\r\n")
        connection.recv(100)


@pytest.mark.parametrize("rude", [tls, noise, nothing, reset, hang_up, old_http], ids=lambda rude: rude.__name__)
def test_rude_clients_are_no_news(rude, quick, own, fake):
    """No traceback on the screen, no escape codes, and the next one is own."""
    fake.put("library/large", fake.layout.image([layer([file("f", os.urandom(12 << 20))])]))
    assert quick("pull", "large", env={"MOCKER_HUB": fake.url}).returncode == 0
    rude(own)
    assert own.get("library/hello-world/manifests/latest")[0] == 200
    _, said = own.end()
    assert "Traceback" not in said and "Exception" not in said and "\x1b" not in said, said


def test_its_log_has_no_secrets(own):
    manifest = json.loads(own.get("library/hello-world/manifests/latest")[2])
    place = own.get(f"library/hello-world/blobs/{manifest['config']['digest']}")[1]["Location"]
    own.ask(place)
    token = own.token("library/hello-world").partition(" ")[2]
    _, said = own.end()
    assert "/v2/library/hello-world/manifests/latest" in said
    assert token not in said and place.partition("Signature=")[2] not in said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_with_one_line(number, serve):
    status, said = serve().end(number)
    assert (status, said.count("\n")) == (128 + number, 1)
    assert said.startswith("mocker: ")


def test_it_serves_nothing_when_there_is_nothing(serve):
    served = serve()
    assert served.get("library/hello-world/manifests/latest")[0] == 404


def test_a_port_in_use(mocker, serve):
    port = serve().host.partition(":")[2]
    done = mocker("serve", f"--port={port}")
    assert done.returncode == 125 and re.fullmatch(f"mocker: .*{port}.*--port.*\n", done.stderr)


@pytest.mark.parametrize("option", ["--port=abc", "--port=70000", "--port=-5", "--port=65535", "--listen=192.0.2.1"])
def test_bad_addresses(option, mocker):
    done = mocker("serve", option, timeout=60)
    assert done.returncode == 125 and re.fullmatch("mocker: .*\n", done.stderr), done.stderr
    assert "processes" not in done.stderr


def test_another_address(serve):
    served = serve("--listen=127.0.0.9")
    assert served.url.startswith("http://127.0.0.9:")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(served.host.partition(":")[2])), 5)
