"""pull, on registries and images that mean ill or are broken: one line, status 125, nothing stored."""

import base64
import contextlib
import email.utils
import gzip
import json
import os
import re
import socket
import ssl
import struct
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import images
import oracle
import pytest
import store
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images import OCI, device, entry, file, folder, hardlink, layer, opaque, symlink, whiteout

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="pull needs root"), pytest.mark.beside]

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # all but newline


def refused(done, home, about=""):
    """What every failure has to be (of `pull -q`); gives the line."""
    assert re.fullmatch("mocker: [^\n]+\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (125, "")
    assert not CONTROL.search(done.stderr) and len(done.stderr) < 1000
    assert re.search(about, done.stderr), done.stderr
    assert (store.stored(home), store.faults(home)) == ([], [])
    return done.stderr


def fine_or_refused(done, home):
    if done.returncode == 0:
        assert (done.stderr, store.faults(home)) == ("", [])
        return True
    refused(done, home)
    return False


@pytest.fixture
def pull(quick, fake):
    """pull(*options, env=) → library/x from the fake, as its Docker Hub"""
    return lambda *options, env=(): quick("pull", "-q", *options, "x", env={"MOCKER_HUB": fake.url, **dict(env)})


def good(layout):
    return layout.image([layer([file("f", b"x")])], {"Cmd": ["/f"]})


# ---------------------------------------------------------------------------
# Answers
# ---------------------------------------------------------------------------


def answers(status, body=b"", where="/manifests/", **headers):
    headers = {name.replace("_", "-"): value for name, value in headers.items()}
    return lambda handler: where in handler.path and [handler.answer(status, body, headers)]


def sends(raw, where="/manifests/", then=None):
    """Bytes in place of an HTTP answer; then hang up, or what `then` does."""

    def intercept(handler):
        if where in handler.path:
            with contextlib.suppress(OSError):
                handler.wfile.write(raw)
                if then:
                    then(handler)
            handler.close_connection = True
        return where in handler.path

    return intercept


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def stalls(handler):
    time.sleep(2.5)  # MOCKER_TIMEOUT is 1 here


def chatters(handler):
    for _ in range(100_000):
        handler.wfile.write(b"X-More: and more\r\n")


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
NINES = "9" * 5000
IN_AN_HOUR = email.utils.formatdate(time.time() + 3600, usegmt=True)

ANSWERS = {
    "401": (answers(401), "docker login"),
    "401 for good": (answers(401, WWW_Authenticate='Basic realm="x"'), "docker login"),
    "403": (answers(403), "403"),
    "404": (answers(404, b'{"errors": [{"code": "MANIFEST_UNKNOWN"}]}'), "no such image: library/x:latest"),
    "404 for a blob": (answers(404, where="/blobs/"), ""),
    "410": (answers(410), "410"),
    "418 with escape codes": (sends(b"HTTP/1.1 418 \x1b[31mred\x9b31m\r\nContent-Length: 0\r\n\r\n"), "418"),
    "429": (answers(429), "429"),
    "429 of Docker Hub": (
        answers(429, Retry_After="3600", ratelimit_limit="100;w=21600", ratelimit_remaining="0;w=21600"),
        r"429.*100.*6 hours.*3600 s",
    ),
    "429 with a date": (answers(429, Retry_After=IN_AN_HOUR), "429"),
    "429 with a date that is none": (answers(429, Retry_After="tomorrow\x9b31m"), "429"),
    "429 with an odd number": (answers(429, Retry_After="\xb2"), "429"),
    "429 with a negative number": (answers(429, Retry_After="-1"), "429"),
    "429 with a long number": (answers(429, Retry_After=NINES, ratelimit_limit=f"{NINES};w={NINES}"), "429"),
    "500": (answers(500), "500"),
    "503": (answers(503), "503"),
    "999": (answers(999), "999"),
    "204": (answers(204), ""),
    "304": (answers(304), "304"),
    "307 to nowhere": (answers(307), "307"),
    "206 unasked": (answers(206, b"{}", where="/manifests/"), ""),
    "416 for a blob": (answers(416, where="/blobs/"), "416"),
    "206 of the wrong part": (answers(206, b"wrong", where="/blobs/", Content_Range="bytes 7-11/12"), ""),
    "a captive portal": (answers(200, b"<html>Log in to the Wi-Fi</html>", Content_Type="text/html"), "JSON"),
    "compressed, unasked": (answers(200, gzip.compress(b"{}"), Content_Encoding="gzip"), ""),
    "no answer": (sends(b""), ""),
    "a reset": (sends(b"", then=reset), ""),
    "no HTTP": (sends(b"SSH-2.0-OpenSSH_9.2\r\n"), ""),
    "escape codes": (sends(b"\x1b]0;title\x07\x1b[31m\r\n\r\n"), ""),
    "half a head": (sends(HEAD), ""),
    "head after head": (sends(HEAD, then=chatters), ""),
    "a long line": (sends(HEAD + b"X: " + b"x" * 200_000 + b"\r\n\r\n"), ""),
    "half a manifest": (sends(HEAD + b"Content-Length: 100\r\n\r\n{"), ""),
    "half a manifest, and a reset": (sends(HEAD + b"Content-Length: 100\r\n\r\n{", then=reset), ""),
    "half a blob, always": (sends(HEAD + b"Content-Length: 100\r\n\r\nx", "/blobs/"), ""),
    "a blob without length": (sends(HEAD + b"\r\nx", "/blobs/"), ""),
    "a length that is none": (sends(HEAD + b"Content-Length: many\r\n\r\n{}"), ""),
    "chunks that are none": (sends(HEAD + b"Transfer-Encoding: chunked\r\n\r\nnone\r\n{}"), ""),
    "chunks that end": (sends(HEAD + b"Transfer-Encoding: chunked\r\n\r\n50\r\n{}"), ""),
    "silence": (sends(b"", then=stalls), ""),
    "silence after the head": (sends(HEAD + b"Content-Length: 100\r\n\r\n{", then=stalls), ""),
    "silence in a blob": (sends(HEAD + b"Content-Length: 100\r\n\r\nx", "/blobs/", then=stalls), ""),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer, pull, home, fake):
    fake.put("library/x", good(fake.layout))
    fake.intercept, about = ANSWERS[answer]
    refused(pull(), home, about)


PLACES = [
    "file:///etc/passwd",
    "FILE:///etc/passwd",
    "ftp://127.0.0.1/x",
    "data:application/json,{}",
    "javascript:x",
    "unix:/run/docker.sock",
    "http+unix://x/y",
    "http://[::1",
    "http://",
    "https://",
    "http:///x",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:port/",
    "http://127.0.0.1:1/",
    f"http://{'a' * 64}.invalid/",
    "http://a..b/",
    "http://\xff/",
    "http://user:secret@127.0.0.1:1/",
    "//",
    "\x1b[31m",
    "",
]


@pytest.mark.parametrize("place", PLACES)
def test_redirects_to_what_is_no_registry(place, pull, home, fake):
    """At the manifest, at a blob, and from the token service."""
    fake.put("library/x", good(fake.layout))
    challenge = answers(401, WWW_Authenticate=f'Bearer realm="{fake.url}/token"')
    redirect = {"Location": place}
    for intercept in (
        lambda handler: [handler.answer(307, headers=redirect)],
        lambda handler: "/blobs/" in handler.path and [handler.answer(307, headers=redirect)],
        lambda handler: challenge(handler) or [handler.answer(302, headers=redirect)],
    ):
        fake.intercept = intercept
        assert "secret" not in refused(pull(), home)


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/"])
def test_redirects_without_end(where, pull, home, fake):
    fake.put("library/x", good(fake.layout))
    fake.intercept = lambda handler: (
        where in handler.path and [handler.answer(307, headers={"Location": f"{handler.path}?{len(fake.requests)}"})]
    )
    refused(pull(), home, "redirects")
    assert len(fake.requests) < 40


@pytest.mark.parametrize("status", [307, 401])
def test_an_answer_without_end_is_not_read_to_its_end(status, pull, home, fake):
    """If all that counts is its head."""
    sent = []

    def endless(handler):
        if "/manifests/" not in handler.path:
            return [handler.answer(404)]
        handler.send_response(status)
        handler.send_header("Location", "/elsewhere")
        handler.send_header("WWW-Authenticate", f'Bearer realm="{fake.url}/token"')
        handler.send_header("Content-Length", str(1 << 40))
        handler.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(300):  # MiB
                handler.wfile.write(bytes(1 << 20))
                sent.append(1)
        handler.close_connection = True
        return True

    fake.intercept = endless
    refused(pull(), home, "404")
    assert len(sent) < 30


REALMS = [*PLACES, f"ftp://{'x' * 9000}", "/token", "URL/\x9b31m"]
BROKEN = ["", "Bearer", "Bearer realm=", 'Bearer realm="', 'Bearer realm="x', "Bearer ,,,===", "\x9b31m red"]
BROKEN += ['Bearer realm="URL/token",service=",scope="', "Negotiate", "Basic", 'Digest realm="x", nonce="y"']


@pytest.mark.parametrize("challenge", [*(f'Bearer realm="{realm}"' for realm in REALMS), *BROKEN])
def test_broken_challenges(challenge, pull, home, fake):
    fake.intercept = lambda handler: [
        handler.answer(401, b"{}", {"WWW-Authenticate": challenge.replace("URL", fake.url)})
    ]
    assert "secret" not in refused(pull(), home)
    assert len(fake.requests) < 20


def claims(text):
    return f"x.{base64.urlsafe_b64encode(text).decode()}.y"


TOKENS = [
    b"",
    b"no JSON",
    b"[]",
    b"null",
    b"{}",
    b'{"token": null}',
    b'{"token": 5}',
    b'{"token": ""}',
    b'{"token": ["x"]}',
    b'{"token": "a\\r\\nX-Injected: yes"}',
    b'{"token": "\\u001b[31m"}',
    b'{"token": "\\u65e5\\u672c"}',
    b'{"token": "\\ud800"}',
    b'{"token": "x", "access_token": 5}',
    json.dumps({"token": claims(b"\x1b[31m")}).encode(),
    json.dumps({"token": claims(b"[" * 100_000)}).encode(),
    json.dumps({"token": claims(b"\xff")}).encode(),
    json.dumps({"token": "x" * 100_000}).encode(),
    b'{"token": "' + b"x" * (20 << 20) + b'"}',
]


@pytest.mark.parametrize("body", TOKENS, ids=lambda body: body[:40].decode())
@pytest.mark.parametrize("options", [[], ["--explain"]], ids=" ".join)
def test_broken_tokens(body, options, quick, home, fake):
    def intercept(handler):
        injected.append(handler.headers.get("X-Injected"))
        if handler.path.startswith("/token"):
            return [handler.answer(200, body)]
        return [handler.answer(401, b"", {"WWW-Authenticate": f'Bearer realm="{fake.url}/token"'})]

    injected, fake.intercept = [], intercept
    done = quick("pull", *options, "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 125 and "Traceback" not in done.stderr and not CONTROL.search(done.stderr)
    assert done.stderr.splitlines()[-1].startswith("mocker: ")
    assert set(injected) == {None}


# ---------------------------------------------------------------------------
# TLS, proxies, no network
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """For 127.0.0.1, signed by itself: the certificate's and the key's file."""
    names = [tmp_path_factory.mktemp("tls") / name for name in ("certificate.pem", "key.pem")]
    make = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext subjectAltName=IP:127.0.0.1"
    subprocess.run([*make.split(), "-out", names[0], "-keyout", names[1]], check=True, capture_output=True)
    return names


@pytest.fixture
def tls(fake, certificate):
    """A door with TLS before the fake: its address."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def copy(source, target):
            with contextlib.suppress(OSError):
                while data := source.recv(1 << 16):
                    target.sendall(data)
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)

        def serve():
            while True:
                try:
                    plain, _ = listening.accept()
                    outer = context.wrap_socket(plain, server_side=True)
                except ssl.SSLError:
                    continue
                except OSError:
                    return
                inner = socket.create_connection(("127.0.0.1", int(fake.host.partition(":")[2])))
                for pair in (outer, inner), (inner, outer):
                    threading.Thread(target=copy, args=pair, daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listening.getsockname()[1]}"
        with contextlib.suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)


def test_an_unknown_ca(pull, home, fake, tls):
    fake.put("library/x", good(fake.layout))
    refused(pull(env={"MOCKER_HUB": f"https://{tls}"}), home, "certificate.*REQUESTS_CA_BUNDLE")


@pytest.mark.parametrize("name", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_ca(name, pull, fake, tls, certificate):
    fake.put("library/x", good(fake.layout))
    done = pull(env={"MOCKER_HUB": f"https://{tls}", "REQUESTS_CA_BUNDLE": "", name: str(certificate[0])})
    assert done.returncode == 0, done.stderr


def test_a_certificate_for_another_name(pull, home, fake, tls, certificate):
    env = {"MOCKER_HUB": f"https://{tls.replace('127.0.0.1', 'localhost')}", "REQUESTS_CA_BUNDLE": str(certificate[0])}
    refused(pull(env=env), home, "certificate")


def test_a_ca_file_that_is_missing(pull, home, fake, tls):
    refused(pull(env={"MOCKER_HUB": f"https://{tls}", "REQUESTS_CA_BUNDLE": "/no/such/file"}), home)


def test_https_to_what_speaks_none(pull, home, fake):
    refused(pull(env={"MOCKER_HUB": fake.url.replace("http", "https")}), home)


def test_no_way_back_from_https_to_http(pull, home, fake, tls, certificate):
    """A redirect off https would show the world what is pulled. 192.0.2.1 is nobody's address."""
    fake.put("library/x", good(fake.layout))
    fake.intercept = lambda handler: [handler.answer(307, headers={"Location": "http://192.0.2.1/x"})]
    refused(pull(env={"MOCKER_HUB": f"https://{tls}", "REQUESTS_CA_BUNDLE": str(certificate[0])}), home, "only https")


def test_no_token_realm_in_the_clear_from_https(pull, home, fake, tls, certificate):
    fake.intercept = answers(401, WWW_Authenticate=f'Bearer realm="{fake.url}/token"')
    refused(pull(env={"MOCKER_HUB": f"https://{tls}", "REQUESTS_CA_BUNDLE": str(certificate[0])}), home, "only https")


@pytest.mark.parametrize(
    "hub", ["http://127.0.0.1:1", "https://127.0.0.1:1", "http://127.0.0.1:99999", "nonsense", "ftp://127.0.0.1"]
)
def test_a_hub_that_is_not_there(hub, pull, home):
    refused(pull(env={"MOCKER_HUB": hub}), home, "127.0.0.1|MOCKER_HUB")


def test_a_login_in_the_address_of_a_hub_is_not_shown(pull, home, fake):
    line = refused(pull(env={"MOCKER_HUB": fake.url.replace("//", "//me:secret@")}), home, "docker login")
    assert "secret" not in line


def test_a_signature_is_not_shown_in_an_error(pull, home, fake):
    fake.put("library/x", good(fake.layout))
    fake.intercept = answers(307, where="/blobs/", Location="http://127.0.0.1:99999/x?Signature=secret")
    assert "secret" not in refused(pull(), home, "can't be reached")


def test_who_refuses_is_named(pull, home, fake):
    """What a CDN refuses does not say that there is no such image."""
    fake.put("library/x", good(fake.layout))
    other = fake.url.replace("127.0.0.1", "localhost")
    fake.intercept = lambda handler: (
        [handler.answer(403)]
        if "/cdn/" in handler.path
        else "/blobs/" in handler.path and [handler.answer(307, headers={"Location": f"{other}/cdn/x"})]
    )
    assert "no such image" not in refused(pull(), home, f"{other} answers 403")


def test_a_fault_without_end_is_not_read(pull, home, fake):
    sent = []

    def pours(handler):
        for _ in range(500):
            sent.append(handler.wfile.write(bytes(1 << 20)))

    fake.intercept = sends(b"HTTP/1.1 503 No\r\nContent-Length: 9999999999\r\n\r\n", then=pours)
    refused(pull(), home, "503")
    assert len(sent) < 100


@pytest.mark.parametrize("config", [{"Env": ["A=\ud800"]}, {"Cmd": ["\udcff"]}, {"WorkingDir": "/\ud800"}])
def test_half_a_character_is_no_text(config, pull, home, fake):
    fake.put("library/x", fake.layout.image([layer([file("f", b"x")])], config))
    refused(pull(), home, "valid text")


def test_a_global_header_that_renames(pull, home, fake):
    """docker ignores it, and so would who scans the image."""
    header = tarfile.TarInfo.create_pax_global_header({"path": "evil"})
    fake.put("library/x", fake.layout.image([header + layer([file("good", b"x")])]))
    refused(pull(), home, "global header")


def test_a_home_that_is_a_file(quick, tmp_path):
    (tmp_path / "file").write_text("")
    done = quick("pull", "-q", "x", env={"MOCKER_HOME": str(tmp_path / "file")})
    assert done.returncode == 125 and re.fullmatch("mocker: .*choose another MOCKER_HOME\n", done.stderr), done.stderr


@pytest.fixture
def proxy():
    """A proxy that refuses everything: its address, and the first line of each request."""
    seen = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        seen.append(connection.recv(1000).decode().partition("\r\n")[0])
                        connection.sendall(b"HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}", seen
        listening.shutdown(socket.SHUT_RDWR)


SECURE = ["registry.invalid/x", "127.evil.invalid/x", "127.0.0.1.invalid:5000/x", "localhost.invalid/x"]
SECURE += ["Upper/x", "0x7f.1/x", "[::2]/x"]


@pytest.mark.parametrize("name", SECURE)
def test_every_other_host_is_asked_by_https_through_the_proxy(name, quick, home, proxy):
    env = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy[0])
    refused(quick("pull", "-q", name, env=env), home)
    assert proxy[1] and all(re.fullmatch(r"CONNECT \S+:(443|5000) HTTP/1\.[01]", line) for line in proxy[1]), proxy[1]


@pytest.mark.parametrize("name", ["registry.invalid/x", "registry.invalid:5000/x"])
def test_where_http_is_allowed(name, quick, home, proxy):
    env = {"http_proxy": proxy[0], "https_proxy": proxy[0], "MOCKER_INSECURE": "other,registry.invalid:5000"}
    quick("pull", "-q", name, env=env)
    assert {line.startswith("CONNECT") for line in proxy[1]} == {":5000" not in name}


def test_the_proxy_is_not_asked_for_this_machine(pull, fake, proxy):
    """As with docker: or a school's proxy would be asked for the teacher's laptop."""
    fake.put("library/x", good(fake.layout))
    env = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), proxy[0])
    done = pull(env=env)
    assert (done.returncode, proxy[1]) == (0, []), done.stderr


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
def test_hosts_that_the_proxy_is_not_for(name, quick, home, proxy):
    env = {"HTTPS_PROXY": proxy[0], name: "other.invalid,registry.invalid"}
    refused(quick("pull", "-q", "registry.invalid/x", env=env), home)
    assert proxy[1] == []


def test_a_host_name_that_can_not_be(quick, home):
    """Its label is too long for the DNS, so that is never asked."""
    refused(quick("pull", "-q", f"{'a' * 64}.invalid/x"), home)


# ---------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------

NOT_JSON = {
    "nothing": b"",
    "half": b'{"schemaVersion": 2, ',
    "no text": b"\xff\xfe\x00",
    "null": b"null",
    "a number": b"5",
    "a list": b"[]",
    "text": b'"x"',
    "deep": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "a long number": b'{"schemaVersion": ' + b"9" * 10_000 + b"}",
    "infinity": b'{"schemaVersion": 2, "layers": Infinity}',
    "escape codes": b'{"schemaVersion": 2, "mediaType": "\\u001b[31m\\u009b31m\\u202e", "layers": []}',
}


@pytest.mark.parametrize("what", NOT_JSON)
def test_documents_that_are_none(what, pull, home, fake):
    """As the manifest, as the index's manifest, and as the config."""
    raw = NOT_JSON[what]
    bad = fake.layout.blob(raw, OCI["manifest"])
    fake.put("library/x", bad)
    refused(pull(), home)
    fake.put("library/x", fake.layout.index([{**bad, "platform": {"os": "linux", "architecture": images.MACHINE}}]))
    refused(pull(), home)
    config = fake.layout.blob(raw, OCI["config"])
    fake.put("library/x", fake.layout.json({"schemaVersion": 2, "config": config, "layers": []}, OCI["manifest"]))
    refused(pull(), home)


@pytest.mark.parametrize("kind", ["manifest", "config"])
@pytest.mark.parametrize("size", [4 << 20, (4 << 20) + 1])
def test_documents_are_not_larger_than_4_mib(kind, size, pull, home, fake):
    """Docker's limit: more would have to fit in memory."""
    document = json.dumps(DOCUMENTS[kind](fake.layout)).encode()
    blob = fake.layout.blob(document[:-1] + b" " * (size - len(document)) + b"}", OCI[kind])
    if kind == "config":
        blob = fake.layout.json({**DOCUMENTS["manifest"](fake.layout), "config": blob}, OCI["manifest"])
    fake.put("library/x", blob)
    done = pull()
    if size > 4 << 20:
        refused(done, home, "4 MiB")
    assert done.returncode == (125 if size > 4 << 20 else 0)


def paths(document, below=()):
    """Each place in a JSON document: the keys that lead to it."""
    pairs = enumerate(document) if isinstance(document, list) else getattr(document, "items", list)()
    for key, value in pairs:
        yield (*below, key)
        yield from paths(value, (*below, key))


def changed(document, path, value):
    """A copy with another value at the path; GONE takes it away."""
    document = json.loads(json.dumps(document))
    place = document
    for key in path[:-1]:
        place = place[key]
    if value is GONE:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return document


GONE = object()
OTHER_VALUES = [GONE, None, -1, "\x1b[31m\n", "\ud800", [None], {"x": {}}]
DOCUMENTS = {
    "manifest": lambda layout: read(layout, good(layout)),
    "config": lambda layout: read(layout, read(layout, good(layout))["config"]),
    "index": lambda layout: {
        "schemaVersion": 2,
        "mediaType": OCI["index"],
        "manifests": [{**good(layout), "annotations": {"x": "y"}}, images.attestation(layout, good(layout))],
    },
}


def read(layout, descriptor):
    return json.loads((layout.path / "blobs" / descriptor["digest"].replace(":", "/")).read_bytes())


def put_document(fake, kind, document):
    if kind == "config":
        manifest = DOCUMENTS["manifest"](fake.layout)
        manifest["config"] = fake.layout.json(document, OCI["config"])
        kind, document = "manifest", manifest
    fake.put("library/x", fake.layout.json(document, OCI[kind]))


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_another_value_in_any_place(kind, pull, home, fake):
    """It may not matter. If it does, it is refused; nothing else happens."""
    document = DOCUMENTS[kind](fake.layout)
    if kind == "config":
        document["history"] = [{"created_by": "x"}]
    outcomes = set()
    for path in paths(document):
        for value in OTHER_VALUES:
            put_document(fake, kind, changed(document, path, value))
            done = pull()
            assert "Traceback" not in done.stderr, (path, value, done.stderr)
            outcomes.add(fine_or_refused(done, home))
            for stored in home.glob("library*"):
                stored.unlink()
    assert outcomes == {True, False}


def with_layers(layout, **fields):
    manifest = DOCUMENTS["manifest"](layout)
    manifest["layers"][0].update(fields)
    return manifest


REFUSED = {
    "schema 1": (lambda layout: {"schemaVersion": 1, "name": "x", "fsLayers": [], "signatures": []}, "schema 1"),
    "signed schema 1": (
        lambda layout: {"mediaType": "application/vnd.docker.distribution.manifest.v1+prettyjws", "layers": []},
        "schema 1",
    ),
    "foreign": (
        lambda layout: with_layers(layout, mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
        "foreign",
    ),
    "nondistributable": (
        lambda layout: with_layers(layout, mediaType="application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"),
        "foreign",
    ),
    "a layer too few": (lambda layout: {**DOCUMENTS["manifest"](layout), "layers": []}, "layers"),
    "a layer too many": (lambda layout: {**(m := DOCUMENTS["manifest"](layout)), "layers": m["layers"] * 2}, "layers"),
    "index and manifest": (lambda layout: {**DOCUMENTS["manifest"](layout), "manifests": [good(layout)]}, ""),
    "md5": (lambda layout: with_layers(layout, digest="md5:" + "a" * 32), "digest"),
    "a path as digest": (lambda layout: with_layers(layout, digest="sha256:../../../../etc/passwd"), "digest"),
    "an upper-case digest": (lambda layout: with_layers(layout, digest="sha256:" + "A" * 64), "digest"),
    "a layer that is not there": (lambda layout: with_layers(layout, digest="sha256:" + "a" * 64), ""),
    "a byte too many": (lambda layout: with_layers(layout, size=with_layers(layout)["layers"][0]["size"] - 1), "bytes"),
    "a byte too few": (lambda layout: with_layers(layout, size=with_layers(layout)["layers"][0]["size"] + 1), "bytes"),
    "size 0": (lambda layout: with_layers(layout, size=0), ""),
    "a size without end": (lambda layout: with_layers(layout, size=2**63 - 1), "bytes"),
    "a size of 400 digits": (lambda layout: with_layers(layout, size=10**400), "a number"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_manifests_that_are_refused(what, pull, home, fake):
    make, about = REFUSED[what]
    put_document(fake, "manifest", make(fake.layout))
    refused(pull(), home, about)


def test_an_index_in_an_index_without_end(pull, home, fake):
    inner = good(fake.layout)
    for _ in range(20):
        inner = fake.layout.index([{**inner, "platform": {"os": "linux", "architecture": images.MACHINE}}])
    fake.put("library/x", inner)
    refused(pull(), home, "index")
    assert len(fake.requests) < 10


def test_a_manifest_by_digest_that_is_another(quick, home, fake):
    other, asked = good(fake.layout), fake.layout.image([])
    fake.path(asked["digest"]).write_bytes(fake.path(other["digest"]).read_bytes())
    refused(quick("pull", "-q", f"{fake.host}/x@{asked['digest']}"), home, "damaged")
    fake.put("library/x", fake.layout.index([asked]))
    refused(quick("pull", "-q", "x", env={"MOCKER_HUB": fake.url}), home, "damaged")


def test_a_layer_of_another_image_can_not_be_claimed(quick, home, fake):
    """Its diff_id is in the config, but the blob has something else in it."""
    secret = layer([file("f", b"of another image")])
    fake.put("library/one", fake.layout.image([secret]))
    forged = (fake.layout.blob(layer([file("f", b"forged")]), OCI["plain"]), images.digest(secret))
    fake.put("library/two", fake.layout.image([forged]))
    assert quick("pull", "one", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert quick("pull", "-q", "two", env={"MOCKER_HUB": fake.url}).returncode == 125
    assert store.stored(home) == ["library_one.json"]
    [directory] = store.layers(home, "library_one.json")
    assert (directory / "f").read_bytes() == b"of another image"


def test_a_large_layer_of_another_image_can_not_be_the_config(quick, pull, home, fake):
    """It is refused, and the other image keeps its layer."""
    fake.put("library/one", fake.layout.image([fake.layout.layer(layer([file("f", os.urandom(5 << 20))]), "plain")]))
    assert quick("pull", "one", env={"MOCKER_HUB": fake.url}).returncode == 0
    [large] = json.loads((home / "library_one.json").read_text())["manifest"]["layers"]
    put_document(fake, "manifest", {**with_layers(fake.layout), "config": {**large, "size": 100}})
    assert pull().returncode == 125
    assert quick("verify").returncode == 0


def test_a_wrong_size_of_what_is_there_already(pull, quick, home, fake):
    """Else the store would have a manifest that other programs refuse."""
    fake.put("library/one", good(fake.layout))
    assert quick("pull", "one", env={"MOCKER_HUB": fake.url}).returncode == 0
    put_document(fake, "manifest", with_layers(fake.layout, size=7))
    assert pull().returncode == 125
    assert store.stored(home) == ["library_one.json"]


# ---------------------------------------------------------------------------
# Blobs
# ---------------------------------------------------------------------------

TAR = layer([file("f", b"some content" * 1000), file("g", os.urandom(2000))])
GZ, ZSTD = gzip.compress(TAR, mtime=0), images.compress(TAR, "zstd")


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def with_header(**fields):
    """The second entry's header with other bytes in a field; its checksum is right again if `sum` is left out."""
    places = {"name": (0, 100), "size": (124, 12), "sum": (148, 8), "type": (156, 1), "magic": (257, 8)}
    start = TAR.index(b"g\0\0\0\0")
    header = bytearray(TAR[start : start + 512])
    for field, value in fields.items():
        place, length = places[field]
        header[place : place + length] = value.ljust(length, b"\0")
    if "sum" not in fields:
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
    return TAR[:start] + header + TAR[start + 512 :]


BLOBS = {
    "no tar": b"this is no tar at all" * 100,
    "a short text": b"hello",
    "zeros and then more": bytes(512) + b"x" * 512,
    "cut in the head": TAR[:300],
    "cut in a file": TAR[:1500],
    "cut in the second head": TAR[: TAR.index(b"g\0\0\0\0") + 100],
    "cut before the end": TAR[: TAR.index(b"g\0\0\0\0") + 512],
    "a wrong checksum in the middle": with_header(sum=b"000000"),
    "noise in the middle": with_header(name=b"\xff" * 100, sum=b"\xff" * 8),
    "a negative size": with_header(size=b"\xff" * 12),
    "a size without end": with_header(size=b"\x80" + b"\x7f" * 11),
    "a size that is no number": with_header(size=b"12x45"),
    "an unknown type": with_header(type=b"Z"),
    "xz": b"\xfd7zXZ\0" + bytes(100),
    "zip": b"PK\x03\x04" + bytes(100),
}
PACKED = {
    "gzip cut off": GZ[:-20],
    "gzip without its end": GZ[:-8],
    "gzip with a wrong checksum": flipped(GZ, len(GZ) - 6),
    "gzip with a wrong bit": flipped(GZ, len(GZ) // 2),
    "gzip with garbage after it": GZ + b"garbage",
    "gzip in gzip": gzip.compress(GZ),
    "gzip of nothing but a head": GZ[:10],
    "gzip with an odd head": GZ[:3] + b"\xff" + GZ[4:],
    "zstd cut off": ZSTD[:-20],
    "zstd with a wrong bit": flipped(ZSTD, len(ZSTD) // 2),
    "zstd with garbage after it": ZSTD + b"garbage",
    "zstd of nothing but a head": ZSTD[:6],
    "zstd in gzip": gzip.compress(ZSTD),
}


@pytest.mark.parametrize("what", [*BLOBS, *PACKED])
def test_broken_blobs(what, pull, home, fake):
    """Though all digests are right: someone built it so. (Of what is packed, the diff_id is that of the right tar.)"""
    data = BLOBS.get(what) or PACKED[what]
    diff_id = images.digest(TAR if what in PACKED else data)
    fake.put("library/x", fake.layout.image([layer([file("lower")]), (fake.layout.blob(data, OCI["plain"]), diff_id)]))
    refused(pull(), home)


@pytest.mark.parametrize("part", ["layer", "config"])
@pytest.mark.parametrize("harm", ["a bit", "its end", "more"])
def test_damage_on_the_way(part, harm, pull, home, fake):
    image = good(fake.layout)
    manifest = read(fake.layout, image)
    fake.put("library/x", image)
    path = fake.path((manifest["layers"][0] if part == "layer" else manifest["config"])["digest"])
    data = path.read_bytes()
    path.write_bytes({"a bit": flipped(data, len(data) // 2), "its end": data[:-1], "more": data + b"x"}[harm])
    refused(pull(), home, "damaged|bytes")


def test_a_wrong_diff_id(pull, home, fake):
    fake.put("library/x", fake.layout.image([(fake.layout.layer(TAR)[0], "sha256:" + "a" * 64)]))
    refused(pull(), home, "diff_id")


@pytest.mark.parametrize("kind", ["gzip", "zstd"])
def test_a_bomb(kind, pull, home, fake):
    fake.put("library/x", fake.layout.image([fake.layout.layer(layer([file("f", bytes(3 << 20))]), kind)]))
    refused(pull(env={"MOCKER_LAYER_LIMIT": str(1 << 20)}), home, "MOCKER_LAYER_LIMIT")
    assert pull(env={"MOCKER_LAYER_LIMIT": str(4 << 20)}).returncode == 0


PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stderr=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def peak_memory(mocker, *args):
    """→ status, bytes of its largest process. (By way of a small one: a fork begins with what its parent has.)"""
    command = [sys.executable, "-c", PEAK, *mocker.command(args)]
    said = subprocess.run(command, env=mocker.env, stdout=subprocess.PIPE, check=True).stdout
    return map(int, said.split())


HEADERS = {
    "pax": tarfile.XHDTYPE,
    "pax for all": tarfile.XGLTYPE,
    "GNU long name": tarfile.GNUTYPE_LONGNAME,
    "a file": tarfile.REGTYPE,
}


@pytest.mark.parametrize("kind", HEADERS)
def test_memory_stays_small_whatever_the_layer(kind, mocker, home, fake, tmp_path):
    """Zeros without end, in a file, or where a tar has the long name of one."""
    size, plain = (200 if kind == "a file" else 100) << 20, tmp_path / "tar"
    info = tarfile.TarInfo("large")
    info.type, info.size = HEADERS[kind], size
    with open(plain, "wb") as tar:
        tar.write(info.tobuf(tarfile.GNU_FORMAT))
        tar.truncate(512 + size)
        tar.seek(512 + size)
        tar.write(layer([file("f")]))
    packed = subprocess.run(["gzip", "-1", "-c", plain], stdout=subprocess.PIPE, check=True).stdout
    digest = subprocess.run(["sha256sum", plain], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[0]
    name = fake.put("x", fake.layout.image([(fake.layout.blob(packed, OCI["gzip"]), f"sha256:{digest}")]))
    plain.unlink()
    status, peak = peak_memory(mocker, "pull", name)
    assert peak < 150 << 20
    assert status == (0 if kind == "a file" else 125)


# ---------------------------------------------------------------------------
# Tars that want out
# ---------------------------------------------------------------------------

# V is a directory of the host, with a file `secret` and a folder `sub`; U leads there from anywhere
ESCAPES = {
    "dots": [[file("../../../../../../../../V/new", b"evil"), file("a/../../../../../../../V/secret", b"evil")]],
    "an absolute name": [[file("V/new", b"evil"), file("/V/secret", b"evil")]],
    "through a link": [[symlink("d", "V"), file("d/new", b"evil"), file("d/secret", b"evil"), folder("d/sub", 0o777)]],
    "through a link with dots": [[symlink("d", "U"), file("d/new", b"evil"), file("d/secret", b"evil")]],
    "through a link of a lower layer": [[symlink("d", "V")], [file("d/new", b"evil"), file("d/secret", b"evil")]],
    "through two links": [[symlink("a", "b"), symlink("b", "V"), file("a/new", b"evil")]],
    "through a link in the middle": [
        [folder("a"), symlink("a/b", "V"), file("a/b/sub/new", b"evil"), folder("a/b/deep/er")]
    ],
    "over a link": [[symlink("f", "V/secret"), file("f", b"evil")], [symlink("g", "V/new")], [file("g", b"evil")]],
    "a folder over a link": [[symlink("d", "V"), folder("d", 0o777, uid=5)], [symlink("e", "V")], [folder("e", 0o777)]],
    "a hard link out": [[hardlink("f", "V/secret"), file("f", b"evil")]],
    "a hard link out, with dots": [[folder("d"), hardlink("d/f", "U/secret", 0o777), file("d/f", b"evil")]],
    "a hard link through a link": [[symlink("d", "V"), hardlink("f", "d/secret", 0o777)]],
    "a hard link through a lower link": [[symlink("d", "V")], [hardlink("f", "d/secret", 0o777)]],
    "a hard link to a link": [[symlink("s", "V/secret"), hardlink("f", "s", 0o777, uid=5), file("f", b"evil")]],
    "a hard link to a lower link": [[symlink("s", "V/secret")], [hardlink("f", "s", 0o777, uid=5)]],
    "a hard link to a lower file, put behind a link": [
        [folder("etc"), file("etc/new", b"evil")],
        [folder("d"), hardlink("d/new", "etc/new"), symlink("d", "V")],
    ],
    "a hard link to a lower file, behind a link put later": [
        [folder("etc"), file("etc/new", b"evil")],
        [folder("a/d"), hardlink("a/d/new", "etc/new"), whiteout("a/d"), file("a", b""), symlink("a", "V/..")],
    ],
    "a hard link to a lower file, then a link in its place": [
        [folder("etc"), file("etc/new", b"evil")],
        [hardlink("d", "etc/new"), symlink("d", "V/new"), hardlink("e", "etc/new"), symlink("e", "V/secret")],
    ],
    "parents that become a link": [
        [folder("d", 0o777), folder("d/sub", 0o777)],
        [file("d/sub/x", b"x"), symlink("d", "V")],
    ],
    "parents in a lower link": [[symlink("d", "V")], [file("d/sub/x", b"x"), whiteout("d/secret")]],
    "a whiteout through a link": [[symlink("d", "V"), whiteout("d/secret"), whiteout("d/sub")]],
    "whiteouts with dots": [
        [file(".wh..", mode=0), file("a/.wh...", mode=0), file("../../../../../V/.wh.secret", mode=0)]
    ],
    "a whiteout of a whole": [[file(".wh.", mode=0)]],
    "opaque through a link": [[symlink("d", "V"), opaque("d"), opaque("d/sub")]],
    "opaque over dots": [[opaque("U"), opaque("..")]],
    "a mode through a link": [[symlink("d", "V"), folder("d/.", 0o777, uid=5), folder("d/sub/", 0o777)]],
    "xattrs of overlayfs": [
        [
            folder("d", pax_headers={"SCHILY.xattr.trusted.overlay.redirect": "/../../V"}),
            file(
                "f",
                pax_headers={"SCHILY.xattr.trusted.overlay.metacopy": "", "SCHILY.xattr.trusted.overlay.opaque": "y"},
            ),
        ]
    ],
    "a link as the root": [[symlink(".", "V"), file("new", b"evil")], [symlink("/", "V")]],
    "a link as a whiteout": [[symlink(".wh.d", "V"), hardlink(".wh.e", "V/secret"), folder(".wh.f")]],
}


@pytest.fixture
def victim(tmp_path):
    victim = tmp_path / "victim"
    (victim / "sub").mkdir(parents=True)
    (victim / "secret").write_bytes(b"secret")
    for path in victim / "secret", victim / "sub", victim:
        path.chmod(0o700)
        os.utime(path, (1000, 1000))
    return victim


def aimed(entries, victim):
    """The entries with V and U replaced."""
    for original, content in entries:
        info = original.replace(deep=True)
        for field in "name", "linkname":
            text = re.sub(r"\bU\b", "../" * 30 + str(victim)[1:], getattr(info, field))
            setattr(info, field, re.sub(r"\bV\b", str(victim), text))
        info.name = info.name.replace("//", "/")
        yield info, content


@pytest.mark.parametrize("escape", ESCAPES)
def test_nothing_gets_out(escape, quick, home, fake, victim, tmp_path):
    """Refused, or harmless and inside: as Docker does it. The victim has not even been read."""
    fake.put("library/x", fake.layout.image([layer(aimed(one, victim)) for one in ESCAPES[escape]]))
    before = oracle.rootfs_listing(victim)
    done = quick("pull", "-q", "x", env={"MOCKER_HUB": fake.url})
    assert oracle.listing_difference(before, oracle.rootfs_listing(victim)) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout", "mocker", "user", "victim"]
    if fine_or_refused(done, home):
        listing = store.rootfs(home, "library_x.json", tmp_path)
        assert not any(item.sha256 == before[1].sha256 for item in listing)
        assert not any("overlay.redirect" in name or "overlay.metacopy" in name for name in all_xattrs(home / "layers"))
        assert quick("verify").returncode == 0


def all_xattrs(directory):
    for where, folders, files in os.walk(directory):
        for name in folders + files:
            yield from os.listxattr(os.path.join(where, name), follow_symlinks=False)


def pax(name, headers, kind=tarfile.REGTYPE, content=b""):
    """An entry whose extended header says what tarfile would not write."""
    records = b""
    for key, value in headers.items():
        record = b" " + key.encode() + b"=" + value + b"\n"
        length = len(record)
        while len(str(length)) + len(record) != length:
            length = len(str(length)) + len(record)
        records += str(length).encode() + record
    extended = tarfile.TarInfo("pax")
    extended.type, extended.size = tarfile.XHDTYPE, len(records)
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(content)
    padded = [data + bytes(-len(data) % 512) for data in (records, content)]
    return extended.tobuf(tarfile.USTAR_FORMAT) + padded[0] + info.tobuf(tarfile.USTAR_FORMAT) + padded[1]


END = bytes(1024)
DEEP = ["/".join("d" * depth) for depth in range(1, 1500)]
LONG = "/".join(["\x1b" * 200] * 15)
ODD = {
    "an unknown type under a long name": layer([entry(LONG, b"Z", 0o644)]),
    "a hard link to itself under a long name": layer([hardlink(LONG, LONG)]),
    "a hard link to nowhere under a long name": layer([hardlink("f", LONG)]),
    "a hard link to itself": layer([hardlink("f", "f")]),
    "a hard link to itself, by another name": layer([file("f"), hardlink("f", "./f")]),
    "a hard link to a folder": layer([folder("d"), hardlink("f", "d")]),
    "a hard link to a lower file, then a folder": layer([hardlink("f", "lower"), folder("f")]),
    "a hard link to a lower file, then something in it": layer([hardlink("f", "lower"), file("f/x")]),
    "a hard link to a lower file, and its whiteout": layer([hardlink("f", "lower"), whiteout("f")]),
    "a hard link to a hard link to a lower file": layer([hardlink("f", "lower"), hardlink("g", "f")]),
    "hard links in a circle": layer([hardlink("a", "b"), hardlink("b", "a")]),
    "links in a circle": layer([symlink("a", "b"), symlink("b", "a"), file("a/f"), folder("b/d")]),
    "a link to itself": layer([symlink("a", "a"), file("a/f")]),
    "no link target": layer([symlink("a", "")]),
    "a long component": layer([file("n" * 256)]),
    "a long path": layer([file("/".join(["n" * 200] * 30))]),
    "a long link target": layer([symlink("a", "n" * 5000)]),
    "1,500 folders deep": layer([folder(name) for name in DEEP]),
    "1,500 folders deep, left out": layer([file(DEEP[-1] + "/f")]),
    "1,500 folders deep, then refused": layer([*map(folder, DEEP), hardlink("f", "f")]),
    "3,000 folders deep": layer([file("d/" * 3000 + "f")]),
    "a file as root": layer([file(".", b"x")]),
    "a file as root, by another name": layer([file("/", b"x")]),
    "no name": layer([file("", b"x")]),
    "a NUL in a name": pax("f", {"path": b"a\0b"}) + END,
    "a NUL in a link": pax("f", {"linkpath": b"a\0b"}, tarfile.SYMTYPE) + END,
    "bytes in a name": pax("f", {"path": b"\xff\xfe/\x80"}) + END,
    "a pax record that is too long": pax("f", {"x": b"y"}).replace(b"6 x=y", b"9 x=y") + END,
    "a pax record without number": pax("f", {"x": b"y"}).replace(b"6 x=y", b"x x=y") + END,
    "a pax size that is wrong": pax("f", {"size": b"-5"}) + END,
    "a pax size without end": pax("f", {"size": b"9" * 30}) + END,
    "a pax size that is no number": pax("f", {"size": b"x"}) + END,
    "an owner out of range": pax("f", {"uid": b"4294967295"}) + END,
    "an owner far out of range": pax("f", {"uid": b"99999999999999999999"}) + END,
    "a negative owner": pax("f", {"gid": b"-1"}) + END,
    "a time that is none": pax("f", {"mtime": b"nan"}) + END,
    "a time without end": pax("f", {"mtime": b"inf"}) + END,
    "a large time": pax("f", {"mtime": b"1e300"}) + END,
    "a negative time": pax("f", {"mtime": b"-99999999999"}) + END,
    "a sparse map that is none": pax("f", {"GNU.sparse.map": b"x", "GNU.sparse.size": b"5"}) + END,
    "a sparse map that is odd": pax("f", {"GNU.sparse.map": b"1,2,3", "GNU.sparse.size": b"5"}) + END,
    "a negative sparse map": pax("f", {"GNU.sparse.map": b"-9,5", "GNU.sparse.size": b"5"}, content=b"xxxxx") + END,
    "a far sparse map": pax(
        "f", {"GNU.sparse.map": b"4611686018427387904,5", "GNU.sparse.size": b"5"}, content=b"xxxxx"
    )
    + END,
    "a large sparse file": pax("f", {"GNU.sparse.map": b"0,5", "GNU.sparse.size": b"9" * 18}, content=b"xxxxx") + END,
    "a sparse size that is negative": pax("f", {"GNU.sparse.map": b"0,0", "GNU.sparse.size": b"-1"}) + END,
    "a sparse map without content": pax("f", {"GNU.sparse.map": b"0,99999", "GNU.sparse.size": b"99999"}) + END,
    "a sparse 1.0 without a map": pax(
        "f", {"GNU.sparse.major": b"1", "GNU.sparse.minor": b"0", "GNU.sparse.name": b"g"}, content=b"x"
    )
    + END,
    "a device out of range": layer([device("d", 0o7777777, 0o7777777)]),
    "a whiteout as a device": layer([device("d", 0, 0)]),
    "xattrs that can not be": pax(
        "f", {"SCHILY.xattr.": b"x", "SCHILY.xattr.none": b"x", "SCHILY.xattr.user.x\0y": b"z"}
    )
    + END,
    "an xattr too large": pax("f", {"SCHILY.xattr.user.x": b"x" * 100_000}) + END,
    "a multi-volume file": layer([entry("f", b"M", 0o644)]),
    "the same name a thousand times": layer([file("f", str(n).encode()) for n in range(1000)]),
    "a folder and a file in turn": layer(
        [one for n in range(50) for one in (folder("d"), file("d/f"), file("d"), symlink("d", "e"))]
    ),
    "whiteouts of everything": layer(
        [folder("d"), file("d/f"), whiteout("d"), whiteout("d/f"), opaque("d"), whiteout("d")]
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_odd_tars(what, quick, home, fake):
    """Unpacked, or refused; then nothing of it is left, and mocker still works."""
    hub = {"MOCKER_HUB": fake.url}
    fake.put("library/x", fake.layout.image([layer([file("lower")]), ODD[what]]))
    fake.put("library/good", good(fake.layout))
    try:
        if fine_or_refused(quick("pull", "-q", "x", env=hub), home):
            assert quick("verify").returncode == 0
        else:
            assert quick("pull", "-q", "good", env=hub).returncode == 0
            assert store.faults(home) == []
    finally:
        subprocess.run(["rm", "-rf", home], check=True)  # deeper than pytest can go


def test_deep_folders_are_no_fault(mocker, home, fake):
    fake.put("library/x", fake.layout.image([ODD["1,500 folders deep"]]))
    done = mocker("pull", "-q", "x", env={"MOCKER_HUB": fake.url})
    subprocess.run(["rm", "-rf", home / "layers"], check=True)
    assert done.returncode == 0, done.stderr


def test_names_are_never_raw_on_the_terminal(quick, fake):
    names = [
        "red\x1b[31m",
        "title\x1b]0;x\x07",
        "c1\x9b31m",
        "line\nmocker: fake",
        "back\r\x08",
        "rtl\u202egnp.exe",
        "\x7f",
        "caf\udce9",
    ]
    tar = layer([file(name) for name in names], tarfile.GNU_FORMAT)
    done = quick("pull", fake.put("x", fake.layout.image([tar])))
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stderr)
    assert len([line for line in done.stderr.splitlines() if line.startswith("- ")]) == len(names)
    done = quick("pull", fake.put("y", fake.layout.image([layer([hardlink("a", "nowhere\x1b[31m\nmocker: fake")])])))
    assert done.returncode == 125 and not CONTROL.search(done.stderr)
    assert len(re.findall("^mocker: ", done.stderr, re.MULTILINE)) == 1


@pytest.mark.host
@pytest.mark.parametrize("name", ["null", "disk", "mem"])
def test_devices_of_an_image_can_not_be_used(name, mocker, fake):
    """They are there, as with Docker, but what is mounted is mounted nodev."""
    root = os.stat("/").st_dev
    numbers = {"null": (1, 3), "disk": (os.major(root), os.minor(root), tarfile.BLKTYPE), "mem": (1, 1)}
    node = device("node", *numbers[name])
    busybox = file("bin/busybox", Path("/bin/busybox").read_bytes(), 0o755)
    reference = fake.put("x", fake.layout.image([layer([busybox, node])]))
    done = mocker("run", "-q", "--rm", "--network=none", reference, "/bin/busybox", "head", "-c1", "/node")
    assert done.returncode == 1 and "ermission denied" in done.stderr


# ---------------------------------------------------------------------------
# Whatever hypothesis thinks of
# ---------------------------------------------------------------------------

many = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mocker as program  # noqa: E402

WORDS = st.sampled_from(
    ["a", "b-c", "A", "1.2", "_", "localhost", "127.0.0.1", "docker.io", "sha256:" + "a" * 64, "[::1]", "é", "\n", ""]
)
REFERENCES = st.one_of(
    st.text(max_size=30),
    st.text("aZ0._-/:@[]", max_size=20),
    st.lists(st.one_of(WORDS, st.sampled_from("/:@")), max_size=8).map("".join),
    st.from_regex(
        r"\A([a-z0-9.]{1,8}(:[0-9]{1,5})?/)?[a-z]{1,5}([._-][a-z]{1,3})?(/[a-z0-9]{1,3})?(:\w[\w.-]{0,5})?(@sha256:[0-9a-f]{64})?\Z"
    ),
)


@settings(many, max_examples=600)
@given(REFERENCES, st.one_of(st.none(), st.text(max_size=5)))
def test_any_reference(text, tag):
    """It is refused, or it can be written down, read again, and kept as a file of one directory."""
    try:
        reference = program.Reference(text, tag)
    except program.MockerError as error:
        assert error.status == 125 and len(str(error).splitlines()) <= 1 + len(f"{text}:{tag}".splitlines())
        return
    again = program.Reference(str(reference))
    assert (again.host, again.repository, again.version) == (reference.host, reference.repository, reference.version)
    assert str(again) == str(reference)
    assert "/" not in reference.file and not reference.file.startswith(".") and reference.file.isprintable()
    assert reference.repository == reference.repository.lower() and ".." not in reference.repository


KEYS = st.sampled_from(
    [
        "schemaVersion",
        "mediaType",
        "config",
        "layers",
        "manifests",
        "digest",
        "size",
        "annotations",
        "Env",
        "Cmd",
        "User",
    ]
    + ["platform", "os", "architecture", "variant", "rootfs", "diff_ids", "history", "created_by", "Entrypoint"]
)
VALUES = st.recursive(
    st.one_of(
        st.sampled_from(
            [
                None,
                True,
                0,
                -1,
                2,
                2**80,
                1.5,
                "",
                "linux",
                images.MACHINE,
                "\x1b[31m",
                "sha256:" + "a" * 64,
                *OCI.values(),
            ]
        ),
        st.text(max_size=5),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=15,
)


@many
@given(kind=st.sampled_from(["manifest", "index", "config"]), document=st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_document(kind, document, pull, home, fake):
    put_document(fake, kind, document)
    fine_or_refused(pull(), home)
    for stored in home.glob("library*"):
        stored.unlink()


@many
@given(data=st.data())
def test_any_damage_to_a_tar(data, pull, home, fake):
    """Some bytes of a tar are other ones, with digests to match."""
    tar = bytearray(SMALL)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.sampled_from(HEADER_BYTES))
        tar[place] = data.draw(st.sampled_from([0, 1, 0x20, 0x2F, 0x30, 0x37, 0x41, 0x80, 0xFF]))
    if data.draw(st.booleans()):
        tar = bytearray(mended(tar))
    fake.put("library/x", fake.layout.image([bytes(tar)]))
    fine_or_refused(pull(), home)
    for stored in home.glob("library*"):
        stored.unlink()


SMALL = layer(
    [
        folder("d"),
        file("d/f", b"x" * 700, pax_headers={"SCHILY.xattr.user.a": "b"}),
        symlink("s", "d"),
        hardlink("h", "d/f"),
        device("n", 1, 3),
    ]
)
HEADS = [place for place in range(0, len(SMALL), 512) if SMALL[place + 257 : place + 262] == b"ustar"]
HEADER_BYTES = [place + offset for place in HEADS for offset in range(345)]


def mended(tar):
    """With right checksums again, so that the other fields count."""
    for place in HEADS:
        head = bytearray(tar[place : place + 512])
        head[148:156] = b" " * 8
        tar[place + 148 : place + 156] = b"%06o\0 " % sum(head)
    return tar


NAMES = st.sampled_from(["a/x", "a/y", "b/x", "a/x/deep", "b/x/deep"])
ENTRIES = st.lists(
    st.one_of(
        NAMES.map(folder),
        st.tuples(NAMES, st.binary(max_size=3)).map(lambda pair: file(*pair)),
        st.sampled_from(["a/y", "b/y"]).map(lambda name: symlink(name, "nowhere")),  # umoci makes what is below there
        st.sampled_from(["a/x", "a/y", "b/x"]).map(whiteout),
        st.sampled_from(["a", "b"]).map(opaque),
    ),
    max_size=6,
    unique_by=lambda pair: pair[0].name.replace(".wh.", ""),
).map(lambda entries: [folder("a"), folder("b"), *entries])  # umoci makes no folder for a whiteout, Docker does


@settings(many, max_examples=25)
@given(layers=st.lists(ENTRIES, min_size=2, max_size=3))
def test_any_layers_unpack_like_umocis(layers, pull, home, fake, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("any")
    descriptor = fake.layout.image([layer(entries) for entries in layers])
    fake.put("library/x", descriptor)
    assert fine_or_refused(pull(), home)
    fake.layout._write_index([])  # or there would be many that are called latest
    fake.layout.tag(descriptor)
    command = ["umoci", "unpack", "--image", f"{fake.layout.path}:latest", scratch / "bundle"]
    umoci = subprocess.run(command, capture_output=True, text=True)
    if umoci.returncode:  # it makes no folder in the place of a file of a lower layer
        assert "not a directory" in umoci.stderr
    else:
        listings = oracle.rootfs_listing(scratch / "bundle/rootfs"), store.rootfs(home, "library_x.json", scratch)
        assert oracle.listing_difference(*listings, without=["mtime"]) == []
    for stored in home.glob("library*"):
        stored.unlink()
