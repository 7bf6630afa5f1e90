"""Real registries for the tests: CNCF distribution (Debian's docker-registry) on loopback.

plain() asks for no login. hub() behaves as Docker Hub does: it wants a token from a token
service, and redirects each blob to a "CDN" at another address.

    with registry.hub() as hub:
        hub.push(images.image("hello-world"), "library/hello-world:latest")
        ... f"{hub.url}/v2/library/hello-world/manifests/latest"
        hub.requests == [("GET", "/v2/library/hello-world/manifests/latest", 401), ...]
"""

import base64
import contextlib
import http.client
import http.server
import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path

# ---------------------------------------------------------------------------
# Pushing an image
# ---------------------------------------------------------------------------


class Registry:
    """A registry that runs: .url, .host, .push(layout, reference), .requests"""

    def __init__(self, directory, host):
        self.directory = Path(directory)
        self.host, self.url = host, f"http://{host}"

    @property
    def requests(self):
        """What was asked of it so far: [(method, path, status), …]"""
        log = (self.directory / "log").read_text(errors="replace")
        lines = re.findall(r'"([A-Z]+) (\S+) HTTP/[\d.]+" (\d+) ', log)
        return [(method, path, int(status)) for method, path, status in lines]

    def push(self, layout, reference):
        """Store the image that is tagged `latest` in an OCI layout, every byte as it is there."""
        name, _, tag = reference.partition(":")
        [latest] = [one for one in layout_tags(layout) if one_tag(one) == "latest"]
        with contextlib.closing(http.client.HTTPConnection(self.host, timeout=60)) as connection:
            Push(connection, Path(layout), name, self.login(name)).manifest(latest, tag or "latest")

    def login(self, name):
        """The headers with which one may push to repository `name`."""
        return {}


def layout_tags(layout):
    return json.loads((Path(layout) / "index.json").read_text())["manifests"]


def one_tag(descriptor):
    return descriptor.get("annotations", {}).get("org.opencontainers.image.ref.name")


class Push:
    """One push over one connection: what is pointed to goes before what points to it."""

    def __init__(self, connection, layout, name, login):
        self.connection, self.layout, self.name, self.login = connection, layout, name, login

    def manifest(self, descriptor, tag):
        data = self.read(descriptor)
        document = json.loads(data)
        for child in document.get("manifests", []):
            self.manifest(child, child["digest"])
        for child in document.get("layers", []):
            self.blob(child)
        if "config" in document:
            self.blob(document["config"])
        kind = {"Content-Type": descriptor["mediaType"]}
        self.ask("PUT", f"/v2/{self.name}/manifests/{tag}", 201, data, kind)

    def blob(self, descriptor):
        if self.ask("HEAD", f"/v2/{self.name}/blobs/{descriptor['digest']}", None).status == 200:
            return
        begun = self.ask("POST", f"/v2/{self.name}/blobs/uploads/", 202)
        where = begun.headers["Location"]
        path = where[where.index("/v2/") :]
        kind = {"Content-Type": "application/octet-stream"}
        data = self.read(descriptor)
        self.ask("PUT", f"{path}&digest={descriptor['digest']}", 201, data, kind)

    def read(self, descriptor):
        return (self.layout / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes()

    def ask(self, method, path, expected, body=None, headers=None):
        self.connection.request(method, path, body, {**self.login, **(headers or {})})
        answer = self.connection.getresponse()
        text = answer.read()
        if expected and answer.status != expected:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:500]!r}")
        return answer


# ---------------------------------------------------------------------------
# Running docker-registry
# ---------------------------------------------------------------------------

CONFIG = {
    "version": "0.1",
    "log": {"level": "info"},
    "http": {"addr": "127.0.0.1:0"},  # any free port; the log says which
}


@contextlib.contextmanager
def plain():
    """A registry over http that asks for no login."""
    with distribution({}) as registry:
        yield registry


@contextlib.contextmanager
def distribution(more):
    """Run docker-registry with its own storage; `more` is added to its configuration."""
    if not shutil.which("docker-registry"):
        raise RuntimeError("docker-registry is not installed: see tests/install")
    with tempfile.TemporaryDirectory(prefix="mocker-registry-") as directory:
        storage = {"filesystem": {"rootdirectory": directory}, "delete": {"enabled": True}}
        config, log = Path(directory, "config.yml"), Path(directory, "log")
        config.write_text(json.dumps({**CONFIG, "storage": storage, **more}))  # JSON is YAML
        with running(["docker-registry", "serve", config], log) as process:
            yield Registry(directory, listening(process, log))


@contextlib.contextmanager
def running(command, log):
    """Run a server, its output in the file `log`, as long as the block and this thread live."""
    with open(log, "wb") as output:
        command = ["setpriv", "--pdeathsig", "KILL", *command]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def listening(process, log, seconds=20):
    """Wait until the server says where it listens; returns host:port."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < deadline:
        found = re.search(r"listening on ([\d.]+:\d+)", log.read_text())
        if found:
            return found[1]
        time.sleep(0.02)
    raise RuntimeError(f"docker-registry does not start:\n{log.read_text()}")


# ---------------------------------------------------------------------------
# A Docker Hub: a front, a token service and a CDN around docker-registry
# ---------------------------------------------------------------------------

ISSUER = "mocker-tests"
SERVICE = "registry.docker.io"
LEEWAY = 60  # docker-registry takes a token for so many seconds after it has expired


class Hub(Registry):
    """What a test may look at, and what it may set, while the hub runs.

    requests    all requests so far, to front, token service and CDN, in order of their end
    tokens      the tokens handed out, and `signature`, that of each CDN address: both secret
    leaks       the paths for which someone sent the CDN an Authorization header
    private     repositories that only USER with PASSWORD may pull
    token_field, token_seconds    how a token is called in the answer, and how long it lives
    intercept   a function(handler) that is called before each answer; if it returns true
                then it has answered, and nothing else happens. handler.service is "front",
                "token" or "cdn"; handler.answer(status, body, headers) answers
    """

    USER, PASSWORD = "speaker", "meetup"

    def __init__(self, directory):
        self.directory = Path(directory)
        self.tokens, self.leaks, self.seen, self.signature = [], [], [], secrets.token_urlsafe(30)
        self.public, self.private = set(), set()
        self.token_field, self.token_seconds, self.intercept = "token", 300, None
        self.key, self.certificate = key_and_certificate(self.directory)

    @property
    def requests(self):
        return list(self.seen)

    def push(self, layout, reference):
        """Into docker-registry behind the front, which then lets it be pulled."""
        name = reference.partition(":")[0]
        self.backend.login = lambda name: {"Authorization": f"Bearer {self.token(name, PUSH)}"}
        self.backend.push(layout, reference)
        self.public.add(name)

    def token(self, name, actions):
        """A token that allows `actions` on repository `name`, which docker-registry believes."""
        import jwt

        now = int(time.time())
        claims = {"iss": ISSUER, "aud": SERVICE, "sub": "", "jti": secrets.token_hex(8)}
        claims |= {"iat": now, "nbf": now - LEEWAY, "exp": now + self.token_seconds - LEEWAY}
        claims["access"] = [{"type": "repository", "name": name, "actions": actions}]
        return jwt.encode(claims, self.key, "RS256", headers={"x5c": [self.certificate]})


PULL, PUSH = ["pull"], ["pull", "push"]


def key_and_certificate(directory):
    """Make both; returns the key as PEM and the certificate as a JWT's x5c wants it."""
    key, certificate = directory / "key.pem", directory / "certificate.pem"
    make = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={ISSUER}"
    command = [*make.split(), "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    lines = certificate.read_text().splitlines()
    return key.read_text(), "".join(line for line in lines if not line.startswith("-"))


@contextlib.contextmanager
def hub():
    """A registry that wants a token, and redirects blobs to another address."""
    with (
        tempfile.TemporaryDirectory(prefix="mocker-hub-") as directory,
        contextlib.ExitStack() as stack,
    ):
        hub = Hub(directory)
        hub.host = stack.enter_context(serving(Front, "127.0.0.1", hub))
        hub.cdn_host = stack.enter_context(serving(Cdn, "127.0.0.2", hub))
        hub.token_host = stack.enter_context(serving(TokenService, "127.0.0.3", hub))
        hub.url = f"http://{hub.host}"
        token = {"realm": f"http://{hub.token_host}/token", "service": SERVICE, "issuer": ISSUER}
        token["rootcertbundle"] = f"{directory}/certificate.pem"
        redirect = {"name": "redirect", "options": {"baseurl": f"http://{hub.cdn_host}"}}
        more = {"auth": {"token": token}, "middleware": {"storage": [redirect]}}
        hub.backend = stack.enter_context(distribution(more))
        yield hub


@contextlib.contextmanager
def serving(handler, address, hub):
    """Answer at a free port of the address as long as the block."""
    with Server((address, 0), handler) as server:
        server.hub = hub
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield f"{address}:{server.server_address[1]}"
        finally:
            server.shutdown()


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client may hang up
            super().handle_error(request, client_address)


class Handler(http.server.BaseHTTPRequestHandler):
    """What the three services share: an answer in one call, a record of it, the intercept."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.hub = self.server.hub
        if not (self.hub.intercept and self.hub.intercept(self)):
            self.reply()

    do_HEAD = do_GET

    def answer(self, status, body=b"", headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_request(self, code="-", size="-"):
        if self.command:  # else it was no HTTP, but a client that tries TLS first
            self.server.hub.seen.append((self.command, self.path, int(code)))

    def log_message(self, *_):
        pass


class Front(Handler):
    """Passes on what docker-registry says; signs the redirects."""

    service = "front"

    def reply(self):
        with contextlib.closing(http.client.HTTPConnection(self.hub.backend.host)) as connection:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():  # Accept may come several times
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            body, headers = answer.read(), dict(answer.headers)
        headers.pop("Date", None)
        if answer.status == 307:
            headers["Location"] += (
                f"?Expires={int(time.time()) + 60}&Signature={self.hub.signature}"
            )
        self.answer(answer.status, body, headers)


class TokenService(Handler):
    """Hands out tokens for what was pushed: to anyone, or to USER with PASSWORD."""

    service = "token"

    def reply(self):
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        login = self.headers.get("Authorization")
        if query.get("service") != [SERVICE]:
            return self.answer(400, b'{"details": "unknown service"}')
        if login not in (None, basic(self.hub.USER, self.hub.PASSWORD)):
            return self.answer(401, b'{"details": "incorrect username or password"}')
        kind, name, _ = query.get("scope", ["repository::"])[0].split(":")
        allowed = self.hub.public - (set() if login else self.hub.private)
        token = self.hub.token(name, PULL if kind == "repository" and name in allowed else [])
        self.hub.tokens.append(token)
        said = {self.hub.token_field: token, "expires_in": self.hub.token_seconds}
        return self.answer(200, json.dumps(said).encode(), {"Content-Type": "application/json"})


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


class Cdn(Handler):
    """Serves the files of docker-registry's storage, from a Range on, to signed requests only."""

    service = "cdn"

    def reply(self):
        url = urllib.parse.urlsplit(self.path)
        if "Authorization" in self.headers:
            self.hub.leaks.append(self.path)
            return self.answer(400, b"Only one auth mechanism allowed")
        if urllib.parse.parse_qs(url.query).get("Signature") != [self.hub.signature]:
            return self.answer(403, b"The signature does not match")
        data = (self.hub.backend.directory / url.path.lstrip("/")).read_bytes()
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not start:
            return self.answer(200, data, {"Accept-Ranges": "bytes"})
        first = int(start[1])
        if first >= len(data):
            return self.answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
        rest = {"Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}
        return self.answer(206, data[first:], rest)
