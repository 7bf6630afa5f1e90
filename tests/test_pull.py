"""pull, images and verify, on registries and images that mean well."""

import base64
import contextlib
import email.utils
import json
import os
import pty
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import host
import images
import oracle
import pytest
import store
from conftest import MOCKER
from images import DOCKER, OCI, file, layer

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="pull needs root"), pytest.mark.beside]

HELLO = ["library_hello-world.json"]
OTHER = "s390x" if images.MACHINE != "s390x" else "amd64"


@pytest.fixture(scope="module", autouse=True)
def host_stays_as_it_was(registry, hub, forks):
    if os.environ.get("MOCKER_TEST_SHARED") == "1":  # where others run these tests at the same time
        yield
        return
    before = host.snapshot()
    yield
    lines = host.settled_difference(before)
    assert not lines, "\n".join(lines)


def simple(layout, content=b"x", config=None, **options):
    """An image of one layer with one file, `f`."""
    return layout.image([layer([file("f", content)])], config or {"Cmd": ["/f"]}, **options)


def blobs_asked(registry):
    """How many times each blob was asked for."""
    asked = [path.rpartition("/")[2] for _, path, _ in registry.requests if "/blobs/" in path]
    return {digest: asked.count(digest) for digest in asked}


# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

DIGEST = next(iter(json.loads((images.image("hello-world") / "index.json").read_text())["manifests"]))["digest"]
NAMES = {
    "hello-world": "library/hello-world latest library_hello-world.json",
    "hello-world:latest": "library/hello-world latest library_hello-world.json",
    "hello-world latest": "library/hello-world latest library_hello-world.json",
    "library/hello-world": "library/hello-world latest library_hello-world.json",
    "docker.io/hello-world": "library/hello-world latest library_hello-world.json",
    "docker.io/library/hello-world:latest": "library/hello-world latest library_hello-world.json",
    "index.docker.io/hello-world": "library/hello-world latest library_hello-world.json",
    "team/app:1.2": "team/app 1.2 team_app:1.2.json",
    "team/app 1.2": "team/app 1.2 team_app:1.2.json",
    "HOST/team/app:1.2": "HOST/team/app 1.2 HOST_team_app:1.2.json",
    "localhost:PORT/team/app:1.2": "localhost:PORT/team/app 1.2 localhost:PORT_team_app:1.2.json",
    "HOST/a_b/c__d/e---f.g:V_1.2-x": "HOST/a_b/c__d/e---f.g V_1.2-x HOST_a__b_c____d_e---f.g:V_1.2-x.json",
    f"hello-world@{DIGEST}": f"library/hello-world {DIGEST} library_hello-world@{DIGEST}.json",
    f"hello-world:no-such-tag@{DIGEST}": f"library/hello-world {DIGEST} library_hello-world@{DIGEST}.json",
    f"HOST/team/app@{DIGEST}": f"HOST/team/app {DIGEST} HOST_team_app@{DIGEST}.json",
}


@pytest.fixture(scope="module")
def named(registry):
    """The registry, with hello-world under more names."""
    for name in "team/app:1.2", "a_b/c__d/e---f.g:V_1.2-x":
        registry.push(images.image("hello-world"), name)
    return registry


@pytest.mark.parametrize("name", NAMES)
def test_names(name, quick, home, named):
    def here(text):
        return text.replace("HOST", named.host).replace("PORT", named.host.partition(":")[2])

    done = quick("pull", *here(name).split())
    assert done.returncode == 0, done.stderr
    listed = quick("images").stdout.splitlines()[3].strip("| ").split()
    name, version, file = here(NAMES[name]).split()
    assert [listed[0], listed[2], listed[6]] == [name, version, file]
    assert store.stored(home) == [file]


INVALID = [
    "",
    " ",
    "Hello",
    "library/Hello",
    "hello world:latest",
    "hello\nworld",
    "hello\x1b[31m",
    "héllo",
    "/hello",
    "hello/",
    "a//b",
    "a..b",
    "a___b",
    "a.-b",
    "a-",
    "_a",
    "../a",
    "a/../b",
    "./a",
    "http://127.0.0.1/a",
    "127.0.0.1:port/a",
    "127.0.0.1:/a",
    "a:",
    "a::b",
    "a:b:c",
    "a:-b",
    "a:b/c",
    f"a:{'b' * 129}",
    "a" * 256,
    "a@",
    "a@sha256",
    "a@sha256:abc",
    f"a@sha256:{'A' * 64}",
    f"a@md5:{'a' * 32}",
    f"a@{DIGEST}:latest",
    f"a@{DIGEST}@{DIGEST}",
    DIGEST.partition(":")[2],
]


@pytest.mark.parametrize("name", INVALID)
def test_invalid_names(name, quick, home, fake):
    done = quick("pull", name, env={"MOCKER_HUB": fake.url})
    assert (done.returncode, fake.requests) == (125, [])
    assert re.fullmatch("mocker: invalid [^\n\x1b]*\n", done.stderr)
    assert store.stored(home) == []


@pytest.mark.parametrize(
    "words", [["a:1", "2"], [f"a@{DIGEST}", "2"], ["a", ".2"], ["a", "b/c"], ["a", "é"], ["a", "b" * 129]]
)
def test_invalid_tags(words, quick, fake):
    done = quick("pull", *words, env={"MOCKER_HUB": fake.url})
    assert (done.returncode, fake.requests) == (125, [])
    assert done.stderr.startswith("mocker: invalid ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["x" * 250, "/".join(["x_y"] * 60), f"a:{'t' * 128}"], ids=["long", "underscores", "tag"]
)
def test_names_that_are_long_but_valid(name, quick, fake):
    fake.put(f"library/{name}" if "/" not in name else name, simple(fake.layout))
    assert quick("pull", name, env={"MOCKER_HUB": fake.url}).returncode == 0
    assert f" {name.partition(':')[0]} " in quick("images").stdout.replace("library/", "")


def test_two_names_never_share_a_file(quick, home, fake):
    names = ["a_b", "a__b", "a/b", "a/b_c", "a_b/c", "a/b/c", "a.b", "a-b", "a:b"]
    for name in names:
        fake.put(f"{'' if '/' in name else 'library/'}{name}", simple(fake.layout, name.encode()))
        assert quick("pull", name, env={"MOCKER_HUB": fake.url}).returncode == 0
    assert len(store.stored(home)) == len(names)
    assert quick("verify").returncode == 0


# ---------------------------------------------------------------------------
# What it says
# ---------------------------------------------------------------------------

TRANSCRIPT = r"""Fetching manifest for hello-world:latest...
"GET FRONT/v2/library/hello-world/manifests/latest HTTP/1.1" 401 \d+
"GET TOKENS/token\?\S* HTTP/1.1" 200 \d+
"GET FRONT/v2/library/hello-world/manifests/latest HTTP/1.1" 200 \d+
"GET FRONT/v2/library/hello-world/manifests/DIGEST HTTP/1.1" 200 \d+
"GET FRONT/v2/library/hello-world/blobs/DIGEST HTTP/1.1" 307 [\d-]+
"GET CDN/\S+ HTTP/1.1" 200 \d+
Fetching layer DIGEST..
"GET FRONT/v2/library/hello-world/blobs/DIGEST HTTP/1.1" 307 [\d-]+
"GET CDN/\S+ HTTP/1.1" 200 \d+
- hello
...
"""


def test_the_transcript_is_the_seeds(mocker, hub):
    done = mocker("pull", "hello-world", env={"MOCKER_HUB": hub.url}, check=True)
    places = {
        "FRONT": rf"(http://{hub.host})?",
        "CDN": rf"(http://{hub.cdn_host})?",
        "TOKENS": rf"(http://{hub.token_host})?",
    }
    expected = TRANSCRIPT.replace("..", r"\.\.").replace("DIGEST", "sha256:[0-9a-f]{64}")
    for place, pattern in places.items():
        expected = expected.replace(place, pattern)
    assert re.fullmatch(expected, done.stderr), done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("options", [[], ["--explain"]], ids=" ".join)
def test_no_secret_is_shown_and_none_goes_to_the_cdn(options, mocker, hub):
    hub.leaks.clear()
    done = mocker("pull", *options, "hello-world", env={"MOCKER_HUB": hub.url}, check=True)
    secrets = {part for token in hub.tokens for part in [token, token.rpartition(".")[2]]} | {hub.signature}
    assert [secret for secret in secrets if secret in done.stdout + done.stderr] == []
    assert any("Signature=" in path for _, path, _ in hub.requests)
    assert hub.leaks == []


@pytest.mark.parametrize("number", [9, 10, 11, 12])
def test_the_first_ten_names_of_a_layer(number, quick, fake):
    names = [f"file{count}" for count in range(number)]
    done = quick("pull", fake.put("x", fake.layout.image([layer(map(file, names))])))
    shown = done.stderr.splitlines()[-min(number, 10) - 1 :]
    assert shown == [f"- {name}" for name in names[:10]] + ["..."]


def test_quiet_says_nothing(quick):
    done = quick("pull", "--quiet", "hello-world")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_terminal_gets_a_progress_bar(mocker, fake):
    """Of a download that takes a while; at the end the line is empty, for the shell's prompt."""
    name = fake.put("x", simple(fake.layout, os.urandom(1 << 20)))

    def slowly(handler):
        time.sleep(0.6 * ("/blobs/" in handler.path))

    fake.intercept = slowly
    ours, its = pty.openpty()
    with mocker.popen("pull", name, stderr=its) as process, open(ours, "rb", closefd=True) as terminal:
        os.close(its)
        said = b""
        with contextlib.suppress(OSError):  # EIO: its last user has closed it
            while piece := terminal.read1():
                said += piece
        assert process.wait() == 0
    assert re.search(rb"\r\[[# ]+\] \d+\.\d of 1\.0 MiB", said)
    assert not re.search(rb"MiB \s*$", said)


def test_quiet_leaves_a_terminal_alone(mocker, fake):
    ours, its = pty.openpty()
    with mocker.popen("pull", "-q", fake.put("x", simple(fake.layout, b"x")), stderr=its) as process:
        os.close(its)
        assert process.wait() == 0
    with open(ours, "rb") as terminal, pytest.raises(OSError):  # EIO: nobody has it open, and nothing was written
        terminal.read1()


# ---------------------------------------------------------------------------
# Logging in
# ---------------------------------------------------------------------------

TOKEN = "token-of-the-test"
CHALLENGES = [
    'Bearer realm="URL/token",service="registry",scope="repository:library/x:pull"',
    'Bearer realm="URL/token",scope="repository:library/x:pull"',
    'Bearer realm="URL/token"',
    'bearer  realm="URL/token", service=registry, scope="repository:library/x:pull,push"',
    'Bearer service="a, b=c",realm="URL/token?account=me"',
    'BEARER Realm = "URL/token" , Service="registry"',
    'Bearer realm="URL/token",service="registry", Digest nonce="a", realm="URL/wrong"',
    'Basic realm="see, Bearer realm=URL/wrong", Bearer realm="URL/token"',
    'Negotiate, Basic realm="a \\"b\\"",charset="UTF-8",Bearer realm="URL/token"',
    'Bearer realm="URL/token",service="registry",scope="repository:library/x:pull",error="invalid_token"',
]


def wants_token(fake, challenge=CHALLENGES[0], answer=None, good_for=99):
    """Let the fake demand a token, each good for so many requests; → the addresses at which one was asked for."""
    asked, left = [], {TOKEN: good_for}

    def intercept(handler):
        token = handler.headers.get("Authorization", "").partition(" ")[2]
        if handler.path.startswith("/token"):
            asked.append(handler.path)
            another = f"{TOKEN}{len(asked)}"
            left[another] = good_for
            handler.answer(200, json.dumps(answer or {"token": another}).encode())
        elif left.get(token, 0) == 0:
            handler.answer(401, b"{}", {"WWW-Authenticate": challenge.replace("URL", fake.url)})
        else:
            left[token] -= 1
            return False
        return True

    fake.intercept = intercept
    return asked


def test_bearer_is_taken_even_if_basic_is_offered_first(quick, fake):
    fake.put("library/x", simple(fake.layout))
    asked = wants_token(fake, 'Basic realm="x", Bearer realm="URL/token",service="front"')
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert len(asked) == 1


@pytest.mark.parametrize("challenge", CHALLENGES)
def test_challenges(challenge, quick, fake):
    fake.put("library/x", simple(fake.layout))
    asked = wants_token(fake, challenge)
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert len(asked) == 1 and re.search(r"[?&]scope=repository(:|%3A)library(/|%2F)x(:|%3A)pull\b", asked[0])
    assert ("service=" in asked[0]) == ("service=" in challenge.lower())
    assert ("account=me" in asked[0]) == ("account=me" in challenge)


@pytest.mark.parametrize(
    "answer",
    [
        {"token": TOKEN},
        {"access_token": TOKEN},
        {"token": TOKEN, "access_token": "other", "expires_in": 5, "issued_at": "x"},
    ],
)
def test_token_and_access_token(answer, quick, fake):
    fake.put("library/x", simple(fake.layout))
    wants_token(fake, answer=answer)
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0


@pytest.mark.parametrize("field", ["token", "access_token"])
def test_the_hubs_token(field, quick, hub, monkeypatch):
    monkeypatch.setattr(hub, "token_field", field)
    assert quick("pull", "hello-world", env={"MOCKER_HUB": hub.url}).returncode == 0


def test_a_token_that_expires_in_mid_pull(quick, hub, monkeypatch):
    """The config takes longer than the token lives, so the layer needs another one."""
    monkeypatch.setattr(hub, "token_seconds", 4)
    late, before = [], len(hub.tokens)
    monkeypatch.setattr(
        hub, "intercept", lambda handler: handler.service == "cdn" and not late and late.append(time.sleep(4.1))
    )
    done = quick("pull", "hello-world", env={"MOCKER_HUB": hub.url, "MOCKER_TIMEOUT": "10"})
    assert done.returncode == 0, done.stderr
    assert len(hub.tokens) - before == 2


def test_a_token_that_is_refused_is_the_last(quick, fake):
    """As Docker Hub gives one to anybody for an image that is not there."""
    asked = wants_token(fake, good_for=0)
    done = quick("pull", "-q", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 125 and "401" in done.stderr
    assert len(asked) == 1 and len(fake.requests) == 3


@pytest.mark.parametrize("good_for", [1, 2, 3])
def test_a_token_for_a_few_requests_only(good_for, quick, fake):
    """Workers share no token: each gets another one when its own is used up."""
    fake.put("library/x", fake.layout.image([layer([file(str(number))]) for number in range(6)]))
    asked = wants_token(fake, good_for=good_for)
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert len(asked) > 1


def log_in(mocker, **config):
    folder = mocker.home.parent / "user/.docker"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def auth(user, password):
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


@pytest.fixture
def private(hub):
    """The name of an image that only the hub's USER may pull."""
    hub.push(images.image("hello-world"), "team/private:latest")
    hub.private.add("team/private")
    return f"{hub.host}/team/private"


def test_a_private_image_wants_a_login(quick, home, private):
    done = quick("pull", "-q", private)
    assert (done.returncode, store.stored(home)) == (125, [])
    assert re.fullmatch(r"mocker: .*docker login.*\n", done.stderr)


@pytest.mark.parametrize("key", ["HOST", "http://HOST", "https://HOST/v1/"])
def test_dockers_login(key, mocker, quick, hub, private):
    log_in(mocker, auths={key.replace("HOST", hub.host): auth(hub.USER, hub.PASSWORD), "other": auth("a", "b")})
    done = quick("pull", private)
    assert done.returncode == 0, done.stderr
    assert hub.PASSWORD not in done.stderr and auth(hub.USER, hub.PASSWORD)["auth"] not in done.stderr


def test_a_login_that_is_written_out(mocker, quick, hub, private):
    log_in(mocker, auths={hub.host: {"username": hub.USER, "password": hub.PASSWORD}}, credsStore="is-not-installed")
    assert quick("pull", private).returncode == 0


def test_a_wrong_login(mocker, quick, hub, private):
    log_in(mocker, auths={hub.host: auth(hub.USER, "guess")})
    done = quick("pull", "-q", private)
    assert done.returncode == 125 and re.fullmatch("mocker: .*\n", done.stderr)
    assert "guess" not in done.stderr


HELPER = """#!/bin/sh
[ "$1" = get ] && read -r server || [ "$server" ] || exit 1
[ "$server" = "$WANTED" ] || { echo credentials not found in native keychain; exit 1; }
echo '{"ServerURL": "'$server'", "Username": "speaker", "Secret": "meetup"}'
"""


@pytest.mark.parametrize("config", ["credsStore", "credHelpers"])
def test_a_credential_helper(config, mocker, quick, hub, private, tmp_path):
    configs = {"credsStore": "test", "credHelpers": {hub.host: "test"}}
    log_in(mocker, **{config: configs[config]}, auths={hub.host: {}})
    (tmp_path / "docker-credential-test").write_text(HELPER)
    (tmp_path / "docker-credential-test").chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANTED": hub.host}
    assert quick("pull", private, env=env).returncode == 0
    done = quick("pull", "-q", private, env={**env, "WANTED": "another"})
    assert done.returncode == 125 and re.fullmatch("mocker: .*\n", done.stderr)


@pytest.mark.parametrize("config", ["auths", "credsStore", "credHelpers"])
def test_docker_hub_s_login(config, mocker, tmp_path):
    """It goes by its first address. Asked of the function, since nothing but Docker Hub may ask for it."""
    server = "https://index.docker.io/v1/"
    configs = {"auths": {server: auth("speaker", "meetup")}, "credsStore": "test", "credHelpers": {server: "test"}}
    log_in(mocker, **{config: configs[config]})
    (tmp_path / "docker-credential-test").write_text(HELPER)
    (tmp_path / "docker-credential-test").chmod(0o755)
    env = {**mocker.env, "PATH": f"{tmp_path}:{os.environ['PATH']}", "WANTED": server}
    command = [sys.executable, "-c", "import mocker; print(mocker.find_login('index.docker.io'))"]
    said = subprocess.run(command, cwd=MOCKER.parent, env=env, check=True, capture_output=True, text=True).stdout
    assert said == f"Basic {auth('speaker', 'meetup')['auth']}\n"


def test_docker_config_names_another_folder(mocker, quick, hub, private, tmp_path):
    folder = log_in(mocker, auths={hub.host: auth(hub.USER, hub.PASSWORD)})
    folder.rename(tmp_path / "elsewhere")
    assert quick("pull", private).returncode == 125
    assert quick("pull", private, env={"DOCKER_CONFIG": str(tmp_path / "elsewhere")}).returncode == 0


BROKEN_LOGINS = [
    {"auths": []},
    {"auths": {"HOST": 5}},
    {"auths": {"HOST": {"auth": "no base64!"}}},
    {"auths": {"HOST": {"auth": 5}}},
    {"credHelpers": 5},
    {"credHelpers": {"HOST": "is-not-installed"}},
    {"credHelpers": {"HOST": ["x"]}},
    {"credsStore": "is-not-installed"},
    {"credsStore": "../../bin/true"},
]


@pytest.mark.parametrize("config", BROKEN_LOGINS, ids=json.dumps)
def test_broken_logins_are_said_or_not_needed(config, mocker, quick, hub, private):
    log_in(mocker, **json.loads(json.dumps(config).replace("HOST", hub.host)))
    done = quick("pull", "-q", private)
    assert done.returncode == 125 and re.fullmatch("mocker: .*\n", done.stderr), done.stderr


def test_basic_authentication(mocker, quick, fake):
    name, login = fake.put("x", simple(fake.layout)), auth("me", "pass:wörd")

    fake.intercept = lambda handler: (
        handler.headers.get("Authorization") != f"Basic {login['auth']}"
        and [handler.answer(401, b"", {"WWW-Authenticate": 'Basic realm="a registry"'})]
    )
    assert "docker login" in quick("pull", "-q", name).stderr
    log_in(mocker, auths={fake.host: login})
    done = quick("pull", name)
    assert done.returncode == 0 and "wörd" not in done.stderr


@pytest.mark.parametrize("challenge", ['Basic realm="mirror"', CHALLENGES[0]])
def test_a_mirror_never_gets_the_login_of_docker_hub(challenge, mocker, quick, fake):
    """MOCKER_HUB may be any laptop in the room, over plain http."""
    fake.put("library/x", simple(fake.layout))
    log_in(mocker, auths={"https://index.docker.io/v1/": auth("me", "secret")})
    sent = []
    fake.intercept = lambda handler: [
        sent.append(handler.headers.get("Authorization")),
        handler.answer(401, b"", {"WWW-Authenticate": challenge.replace("URL", fake.url)}),
    ]
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 125
    assert set(sent) == {None}


def test_another_host_that_we_are_sent_to_gets_no_login(mocker, quick, fake):
    """Whatever it asks for; by another name it is another host."""
    fake.put("library/x", simple(fake.layout))
    other, sent = fake.host.replace("127.0.0.1", "localhost"), []

    def intercept(handler):
        login = handler.headers.get("Authorization")
        if handler.headers["Host"] == other:
            sent.append(login)
            return [handler.answer(401, b"", {"WWW-Authenticate": f'Bearer realm="http://{other}/token"'})]
        if not login:
            return [handler.answer(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})]
        return "/blobs/" in handler.path and [handler.answer(307, b"", {"Location": f"http://{other}/x"})]

    fake.intercept = intercept
    log_in(mocker, auths={fake.host: auth("me", "secret"), other: auth("me", "secret")})
    done = quick("pull", "-q", f"{fake.host}/library/x")
    assert (done.returncode, sent) == (125, [None]), done.stderr


def test_a_wrong_password_is_sent_once_and_never_shown(mocker, quick, fake):
    """More often, and an account may be locked."""
    fake.intercept = lambda handler: [handler.answer(401, b"", {"WWW-Authenticate": 'Basic realm="x"'})]
    folder = log_in(mocker, auths={fake.host: auth("me", "guess")})
    done = quick("pull", "-q", f"{fake.host}/x")
    assert done.returncode == 125 and "docker login" in done.stderr and len(fake.requests) == 2
    for damaged in "secret\r\nX-Injected: yes", "secret\x00", "sécret":
        (folder / "config.json").write_text(json.dumps({"auths": {fake.host: {"auth": damaged}}}))
        done = quick("pull", "-q", f"{fake.host}/x")
        assert done.returncode == 125 and "docker login" in done.stderr and "cret" not in done.stderr


def test_netrc_is_left_alone(mocker, quick, hub):
    """requests would put its login in the place of the token, and send it to the CDN."""
    hub.leaks.clear()
    netrc = mocker.home.parent / "user/.netrc"
    netrc.write_text("default login me password secret\n")
    netrc.chmod(0o600)
    done = quick("pull", "hello-world", env={"MOCKER_HUB": hub.url})
    assert (done.returncode, hub.leaks) == (0, []), done.stderr


# ---------------------------------------------------------------------------
# Which machine's image, in which format
# ---------------------------------------------------------------------------


def two_platforms(layout, style=OCI, **where):
    made = [simple(layout, arch.encode(), style=style, arch=arch) for arch in (OTHER, images.MACHINE)]
    return layout.index([images.attestation(layout, made[0]), *made], style)


def content(home, name):
    return [(layer / "f").read_bytes() for layer in store.layers(home, name)]


@pytest.mark.parametrize("style", [OCI, DOCKER], ids=["OCI index", "Docker manifest list"])
def test_this_machines_image_is_taken_or_the_one_that_is_asked_for(style, quick, home, fake):
    fake.put("library/x", two_platforms(fake.layout, style))
    for options, arch in ([], images.MACHINE), ([f"--platform=linux/{OTHER}"], OTHER):
        done = quick("pull", *options, "x", env={"MOCKER_HUB": fake.url})
        assert done.returncode == 0, done.stderr
        assert content(home, "library_x.json") == [arch.encode()]
    assert store.faults(home) == []


VARIANTS = {  # asked for, of those: taken
    ("linux/arm/v7", "v5 v6 v7"): "v7",
    ("linux/arm/v6", "v5 v6 v7"): "v6",
    ("linux/arm/v7", "v5 v6"): "v6",
    ("linux/arm/v6", "v7"): None,
    ("linux/arm64", "v8"): "v8",
    ("linux/arm64", "v9 -"): "-",
    ("linux/arm64/v8", "-"): "-",
    ("linux/amd64", "v3 -"): "-",
    ("linux/amd64", "v3"): None,
}


@pytest.mark.parametrize("wanted, there", VARIANTS)
def test_variants(wanted, there, quick, home, fake):
    arch, taken = wanted.split("/")[1], VARIANTS[wanted, there]
    fake.put(
        "library/x",
        fake.layout.index(
            [simple(fake.layout, one.encode(), arch=arch, variant=one.strip("-")) for one in there.split()]
        ),
    )
    done = quick("pull", "-q", f"--platform={wanted}", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == (0 if taken else 125), done.stderr
    if taken:
        assert content(home, "library_x.json") == [taken.encode()]
    else:
        assert all(f"linux/{arch}/{one}" in done.stderr for one in there.split())


def test_an_index_without_this_platform_lists_what_it_has(quick, home, fake):
    fake.put("library/x", two_platforms(fake.layout))
    done = quick("pull", "-q", "--platform=windows/arm64", "x", env={"MOCKER_HUB": fake.url})
    assert (done.returncode, store.stored(home)) == (125, [])
    assert re.fullmatch("mocker: .*\n", done.stderr)
    assert (
        "windows/arm64" in done.stderr and f"linux/{OTHER}" in done.stderr and f"linux/{images.MACHINE}" in done.stderr
    )
    assert "unknown" not in done.stderr


SPELLINGS = {  # asked for: what an index calls it
    "linux/arm": [("arm", "v7"), ("arm", None), ("armhf", None)],
    "linux/armhf": [("arm", "v7")],
    "linux/aarch64": [("arm64", "v8"), ("arm64", None), ("aarch64", None)],
    "linux/x86-64": [("amd64", None), ("x86_64", None), ("amd64", "v1")],
    "LINUX/AMD64/v1": [("amd64", None)],
}


@pytest.mark.parametrize(("wanted", "there"), [(name, one) for name, several in SPELLINGS.items() for one in several])
def test_spellings(wanted, there, quick, home, fake):
    """As docker takes them, of whoever has made the index."""
    arch, variant = there
    fake.put("library/x", fake.layout.index([simple(fake.layout, b"it", arch=arch, variant=variant)]))
    done = quick("pull", "-q", f"--platform={wanted}", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert content(home, "library_x.json") == [b"it"]


@pytest.mark.parametrize("platform", ["linux", "linux/", "/amd64", "linux/arm/v7/x", "linux/amd64\x1b[31m"])
def test_invalid_platforms(platform, quick):
    done = quick("pull", "-q", f"--platform={platform}", "hello-world")
    assert done.returncode == 125 and re.fullmatch("mocker: [^\x1b]*platform[^\x1b]*\n", done.stderr), done.stderr


def test_an_index_in_an_index(quick, home, fake):
    """The inner one's descriptor names no platform, as builders write it."""
    fake.put(
        "library/x", fake.layout.index([fake.layout.index([simple(fake.layout, arch=OTHER), simple(fake.layout)])])
    )
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert store.stored(home) == ["library_x.json"]


@pytest.mark.parametrize("style", [OCI, DOCKER], ids=["OCI", "Docker schema 2"])
@pytest.mark.parametrize("content_type", [True, "; charset=utf-8", None])
def test_a_manifest_is_known_by_its_media_type_or_content_type(style, content_type, quick, home, fake):
    descriptor = simple(fake.layout, style=style)
    manifest = json.loads(fake.path(descriptor["digest"]).read_bytes())
    if content_type:  # else the document says it
        del manifest["mediaType"]
        suffix = content_type if isinstance(content_type, str) else ""
        descriptor = {**fake.layout.json(manifest, style["manifest"]), "mediaType": style["manifest"] + suffix}
    else:
        descriptor["mediaType"] = "application/json"
    fake.put("library/x", descriptor)
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert quick("verify").returncode == 0


def test_sha512(quick, home, fake, tmp_path):
    """The other registered algorithm, for every digest of an image."""
    import hashlib

    def renamed(descriptor):
        data = fake.path(descriptor["digest"]).read_bytes()
        digest = "sha512:" + hashlib.sha512(data).hexdigest()
        fake.path(digest).parent.mkdir(exist_ok=True)
        fake.path(digest).write_bytes(data)
        return {**descriptor, "digest": digest}

    tar = layer([file("f", b"x")])
    blob = renamed(fake.layout.blob(tar, OCI["plain"]))
    descriptor = fake.layout.image([(blob, "sha512:" + hashlib.sha512(tar).hexdigest())])
    manifest = json.loads(fake.path(descriptor["digest"]).read_bytes())
    manifest["config"] = renamed(manifest["config"])
    descriptor = renamed(fake.layout.json(manifest, OCI["manifest"]))
    done = quick("pull", fake.put("x", descriptor).replace(":latest", "") + f"@{descriptor['digest']}")
    assert done.returncode == 0, done.stderr
    assert quick("verify").returncode == 0
    assert store.faults(home) == []


# ---------------------------------------------------------------------------
# What is there already, and what comes in pieces
# ---------------------------------------------------------------------------


def test_what_is_there_is_not_fetched_again(quick, fake):
    lower, upper = fake.layout.layer(layer([file("low")])), layer([file("up")])
    fake.put("library/one", fake.layout.image([lower]))
    fake.put("library/two", fake.layout.image([lower, upper], {"Cmd": ["two"]}))
    for name in "one", "one", "two", "two":
        assert quick("pull", name, env={"MOCKER_HUB": fake.url}).returncode == 0
    asked = blobs_asked(fake)
    assert len(asked) == 4 and set(asked.values()) == {1}


def test_a_blob_that_comes_twice_in_an_image_is_fetched_once(quick, home, fake):
    twice = fake.layout.layer(layer([file("f", b"x")]))
    name = fake.put("x", fake.layout.image([twice, layer([images.whiteout("f")]), twice, twice]))
    done = quick("pull", name)
    assert done.returncode == 0, done.stderr
    assert set(blobs_asked(fake).values()) == {1}
    assert store.faults(home) == []


def test_the_same_layer_in_another_packing(quick, home, fake):
    """Nothing is unpacked anew, yet the store needs the other blob, too."""
    tar = layer([file("f", b"x")])
    for kind in "gzip", "zstd", "plain":
        name = fake.put(kind, fake.layout.image([fake.layout.layer(tar, kind)]))
        assert quick("pull", name).returncode == 0
    verified = quick("verify")
    assert verified.returncode == 0, verified.stdout
    assert len(list((home / "blobs/sha256").iterdir())) == 3 + 3 + 1  # layers, manifests; they share the config


def test_a_tag_that_moves(quick, home, fake):
    for text in b"old", b"new":
        fake.put("library/x", simple(fake.layout, text))
        assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
        assert content(home, "library_x.json") == [text]
    assert quick("images").stdout.count("library/x") == 1


def test_a_failed_pull_leaves_the_older_image_as_it_was(quick, home, fake):
    fake.put("library/x", simple(fake.layout, b"old"))
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    newer = simple(fake.layout, b"new")
    [lost] = json.loads(fake.path(newer["digest"]).read_bytes())["layers"]
    fake.path(lost["digest"]).unlink()
    fake.put("library/x", newer)
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 125
    assert content(home, "library_x.json") == [b"old"]
    assert (quick("verify").returncode, store.faults(home)) == (0, [])


def drops(handler, data, count):
    """Promise the data, send `count` bytes of it, hang up."""
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data[:count])
    handler.close_connection = True
    return True


def test_a_download_that_drops_goes_on_where_it_was(quick, home, hub, monkeypatch):
    asked = []

    def intercept(handler):
        path = hub.backend.directory / handler.path.partition("?")[0].lstrip("/")
        if handler.service != "cdn" or path.stat().st_size < 1 << 19:
            return False
        asked.append(handler.headers.get("Range"))
        return len(asked) == 1 and drops(handler, path.read_bytes(), 1 << 19)

    monkeypatch.setattr(hub, "intercept", intercept)
    assert quick("pull", "busybox", env={"MOCKER_HUB": hub.url}).returncode == 0
    assert asked[0] is None and len(asked) == 2
    assert 0 < int(re.fullmatch(r"bytes=(\d+)-", asked[1])[1]) <= 1 << 19
    assert store.faults(home) == []


def test_a_download_that_stalls_goes_on_where_it_was(quick, home, fake):
    """Nearly all that came counts, though the connection was never closed."""
    data = os.urandom(1 << 18)
    fake.put("library/x", simple(fake.layout, data))
    asked = []

    def intercept(handler):
        content = fake.path(handler.path.rpartition("/")[2]).read_bytes() if "/blobs/" in handler.path else b""
        if len(content) < 1 << 18:
            return False
        start = int(re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", "bytes=0-"))[1])
        asked.append(start)
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : start + 100_000])
        time.sleep(1.5)  # MOCKER_TIMEOUT is 1 here
        handler.close_connection = True
        return True

    fake.intercept = intercept
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert asked == sorted(set(asked)) and 80_000 < asked[1] <= 100_000


def test_a_server_that_knows_no_range_begins_again(quick, home, fake):
    data = os.urandom(1 << 20)
    name, dropped = fake.put("x", simple(fake.layout, data)), []
    fake.intercept = lambda handler: (
        "/blobs/" in handler.path
        and len(dropped) < 4
        and not dropped.append(1)
        and drops(handler, fake.path(handler.path.rpartition("/")[2]).read_bytes(), len(dropped) * 200)
    )
    assert quick("pull", name).returncode == 0
    assert content(home, store.stored(home)[0]) == [data]


STATUSES = [(500, {}), (502, {}), (503, {"Retry-After": "1"}), (429, {"Retry-After": "1"}), (429, {}), (520, {})]


@pytest.mark.parametrize(("status", "headers"), STATUSES)
@pytest.mark.parametrize("where", ["/manifests/", "/blobs/", "/token"])
def test_a_fault_that_passes(status, headers, where, quick, fake):
    fake.put("library/x", simple(fake.layout))
    wants_token(fake)
    well, times, faults = fake.intercept, [], 2
    fake.intercept = lambda handler: (
        [handler.answer(status, b"no", headers)]
        if where in handler.path and not times.append(time.monotonic()) and len(times) <= faults
        else well(handler)
    )
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr
    assert times[1] - times[0] >= int(headers.get("Retry-After", 0))


@pytest.mark.parametrize("where", ["/manifests/", "/blobs/", "/token"])
def test_connections_that_are_reset(where, quick, fake):
    fake.put("library/x", simple(fake.layout))
    wants_token(fake)
    well, resets = fake.intercept, []

    def intercept(handler):
        if where not in handler.path or len(resets) == 3:
            return well(handler)
        resets.append(handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)))
        handler.close_connection = True
        return True

    fake.intercept = intercept
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr


def test_a_wait_until_a_date(quick, fake):
    fake.put("library/x", simple(fake.layout))
    date, asked = email.utils.formatdate(time.time() + 4, usegmt=True), []
    fake.intercept = lambda handler: (
        "/manifests/" in handler.path
        and not asked.append(time.time())
        and len(asked) == 1
        and [handler.answer(503, b"", {"Retry-After": date})]
    )
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert asked[1] >= int(asked[0]) + 3


def test_a_rest_that_is_the_whole(quick, home, fake):
    """A part from another place than was asked for is taken for what it is."""
    data = os.urandom(1 << 20)
    name = fake.put("x", simple(fake.layout, data))

    def intercept(handler):
        if "/blobs/" not in handler.path:
            return False
        whole = fake.path(handler.path.rpartition("/")[2]).read_bytes()
        if not handler.headers.get("Range"):
            return drops(handler, whole, 200)
        return [handler.answer(206, whole, {"Content-Range": f"bytes 0-{len(whole) - 1}/{len(whole)}"})]

    fake.intercept = intercept
    assert quick("pull", name).returncode == 0
    assert content(home, store.stored(home)[0]) == [data]


# ---------------------------------------------------------------------------
# Interrupted, and at the same time
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def heavy(registry, tmp_path_factory):
    """Two images that share three of their six layers, of 150 files and 1 MiB each."""
    layout = images.Layout(tmp_path_factory.mktemp("heavy") / "layout")

    def made(name):
        small = [file(f"{name}/{count}", os.urandom(500)) for count in range(150)]
        return layout.layer(layer([*small, file(f"{name}/large", os.urandom(1 << 20))]))

    shared = [made(f"shared{number}") for number in range(3)]
    for name in "heavy1", "heavy2":
        layout.tag(layout.image([*shared, *(made(f"{name}-{number}") for number in range(3))]))
        registry.push(layout.path, f"library/{name}:latest")
        layout._write_index([])
    return ["heavy1", "heavy2"]


def left_running(home):
    """Processes that work on this store."""
    return [pid for pid in host.pids() if f"MOCKER_HOME={home}\0" in host.content(f"/proc/{pid}/environ")]


def test_killed_at_any_moment(mocker, home, heavy):
    """After each kill every image that is listed is whole; then a pull mends everything."""
    started = time.monotonic()
    mocker("pull", heavy[0], check=True)
    whole = time.monotonic() - started
    shutil.rmtree(home)
    for count in range(15):
        with mocker.popen("pull", heavy[count % 2]) as process:
            time.sleep(whole * (0.2 + 0.8 * count / 15))
            process.kill()
        assert [fault for fault in store.faults(home) if not fault.startswith("partial/")] == []
        done = mocker("verify")
        assert (done.returncode, "DAMAGED" in done.stdout) == (0, False)
        if count % 5 == 4:
            shutil.rmtree(home, ignore_errors=True)  # the first kill may come before there is one
    deadline = time.monotonic() + 60
    while left_running(home) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left_running(home) == []
    for name in heavy:
        mocker("pull", name, check=True)
    assert (mocker("verify").returncode, store.faults(home)) == (0, [])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(number, mocker, home, fake):
    """In the middle of a blob: one line, nothing left, no process either."""
    name, reached = fake.put("x", simple(fake.layout)), threading.Event()
    fake.intercept = lambda handler: "/blobs/" in handler.path and not reached.set() and time.sleep(3)
    with mocker.popen("pull", "-q", name, start_new_session=True) as process:
        assert reached.wait(60)
        os.killpg(process.pid, number)  # as a terminal does
        _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert re.fullmatch(f"mocker: .*{number.name}.*\n", said)
    assert (store.faults(home), left_running(home)) == ([], [])


def test_many_at_the_same_time(mocker, home, heavy):
    for _ in range(2):
        pulls = [mocker.popen("pull", name) for name in [*heavy, "busybox", *heavy]]
        said = [process.communicate(timeout=60)[1] for process in pulls]
        assert [process.returncode for process in pulls] == [0] * 5, "\n".join(said)
        assert (mocker("verify").returncode, store.faults(home)) == (0, [])
        assert len(store.stored(home)) == 3
        shutil.rmtree(home)


def test_a_pull_that_begins_while_another_clears_up(mocker):
    """What killed pulls left is removed by the next one: not what another has just begun and not yet locked."""
    slowly = ["strace", "-f", "-qq", "-o/dev/null", "-etrace=flock", "-einject=flock:delay_enter=300000"]
    command = [*slowly, *mocker.command(["pull", "-q", "busybox"])]
    with subprocess.Popen(command, env=mocker.env, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            mocker("pull", "-q", "hello-world", check=True)
        assert (process.returncode, process.stderr.read()) == (0, "")


@pytest.mark.host
def test_a_pull_while_a_container_runs(mocker, home):
    mocker("pull", "busybox", check=True)
    with mocker.popen(
        "run", "-q", "--rm", "--network=none", "busybox", "sh", "-c", "echo up; read x; exec ls /bin/sh"
    ) as process:
        assert process.stdout.readline() == "up\n"
        mocker("pull", "busybox", check=True)
        said, _ = process.communicate("go\n", timeout=30)
    assert (process.returncode, said) == (0, "/bin/sh\n")


FULL = """
import json, os, pathlib, subprocess, sys
home, tests, outputs = sys.argv[1:]
sys.path.append(tests)
from quick import Quick
quick = Quick(pathlib.Path(outputs))

def pull():
    return quick("pull", "-q", "x", env=dict(os.environ))

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", home], check=True)

def room():
    there = os.statvfs(home)
    return (there.f_blocks - there.f_bfree) * there.f_frsize >> 10

mount("size=20m")
assert pull().returncode == 0
needed, results = room(), []
subprocess.run(["umount", home], check=True)
part = needed // 4
for size in [64, part, 2 * part, 3 * part, needed, *range(needed + part, needed + 5 * part, part // 4)]:  # and its tar
    mount(f"size={size}k")
    done = pull()
    names = {os.path.relpath(os.path.join(where, name), home) for where, _, names in os.walk(home) for name in names}
    mount("remount,size=20m")
    again = pull()
    found = [os.path.getsize(os.path.join(where, "f")) for where, _, names in os.walk(home) if "f" in names]
    results.append((size, done.returncode, done.stderr, sorted(names), again.returncode, found))
    subprocess.run(["umount", home], check=True)
print(json.dumps(results))
"""


def test_a_full_disk(mocker, home, fake, tmp_path):
    """Wherever in a pull: one line, nothing half done, and the next one, with more room, goes well."""
    fake.put("library/x", fake.layout.image([fake.layout.layer(layer([file("f", os.urandom(3_500_000))]), "plain")]))
    home.mkdir()
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    command = ["unshare", "--mount", sys.executable, "-c", FULL, home, os.path.dirname(__file__), outputs]
    env = {**mocker.env, "MOCKER_HUB": fake.url}
    results = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE).stdout)
    for size, status, said, names, again, found in results:
        assert (size, again, found) == (size, 0, [3_500_000])
        assert re.fullmatch("" if status == 0 else "mocker: .*No space left on device.*\n", said), (size, said)
        assert ("library_x.json" in names) == (status == 0)
        known = r"oci-layout|index\.json|library_x\.json|blobs/sha256/[0-9a-f]{64}|layers/[0-9a-f]{64}/f"
        assert [name for name in names if not re.fullmatch(known, name)] == [], size
    statuses = [status for _, status, *_ in results]
    assert statuses == sorted(statuses, reverse=True) and {*statuses} == {0, 125}


# ---------------------------------------------------------------------------
# images, verify, and other programs that read the store
# ---------------------------------------------------------------------------


def test_images_when_there_are_none(mocker):
    done = mocker("images")
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^\| name +\| version +\| size +\| file +\|$", done.stdout, re.MULTILINE)


TABLE = """\
+---------------------+---------+--------+--------------------------+
| name                | version | size   | file                     |
+---------------------+---------+--------+--------------------------+
| library/hello-world | latest  | 0.0MiB | library_hello-world.json |
| library/x           | latest  | 1.5MiB | library_x.json           |
| library/x           | 9       | 0.0MiB | library_x:9.json         |
+---------------------+---------+--------+--------------------------+
"""


def test_images_is_the_seeds_table(mocker, quick, fake):
    fake.put("library/x", simple(fake.layout, os.urandom(3 << 19)))
    fake.put("library/x:9", simple(fake.layout))
    quick("pull", "x:9", env={"MOCKER_HUB": fake.url})
    quick("pull", "x", env={"MOCKER_HUB": fake.url})
    quick("pull", "hello-world")
    assert mocker("images", env={"MOCKER_HUB": "http://127.0.0.1:9"}).stdout == TABLE


def layer_blob(home):
    return json.loads((home / "library_x.json").read_text())["manifest"]["layers"][0]["digest"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


PARTS = {
    "manifest": lambda home: json.loads((home / "library_x.json").read_text())["digest"],
    "config": lambda home: json.loads((home / "library_x.json").read_text())["manifest"]["config"]["digest"],
    "layer": layer_blob,
}
HARMS = {"a bit": flip, "its end": lambda path: os.truncate(path, path.stat().st_size - 1), "everything": os.unlink}


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("part", PARTS)
def test_verify_finds_damage_and_pull_mends_it(part, harm, quick, home, fake):
    fake.put("library/x", simple(fake.layout))
    hub = {"MOCKER_HUB": fake.url}
    assert quick("pull", "x", env=hub).returncode == quick("pull", "hello-world").returncode == 0
    HARMS[harm](home / "blobs" / PARTS[part](home).replace(":", "/"))
    done = quick("verify")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^DAMAGED +library/x:latest", done.stdout, re.MULTILINE)
    assert re.search(r"^ok +library/hello-world:latest$", done.stdout, re.MULTILINE)

    again = quick("pull", "x", env=hub)
    assert again.returncode == 0, again.stderr
    assert (quick("verify").returncode, store.faults(home)) == (0, [])


@pytest.mark.parametrize("name", ["index.json", "oci-layout", "OCI manifest"])
def test_verify_looks_at_what_other_programs_read_too(name, quick, home, fake):
    """Of an image in docker's format, the manifest that index.json names is mocker's own."""
    fake.put("library/x", simple(fake.layout, style=DOCKER))
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    [entry] = json.loads((home / "index.json").read_text())["manifests"]
    path = home / "blobs" / entry["digest"].replace(":", "/") if name == "OCI manifest" else home / name
    path.write_text("{")
    done = quick("verify")
    assert (done.returncode, "DAMAGED  blob" in done.stdout) == ((1, True) if name == "OCI manifest" else (0, False))
    assert store.faults(home) == []
    subprocess.run(["skopeo", "inspect", f"oci:{home}:library/x:latest"], check=True, capture_output=True)


def test_the_store_is_valid_before_anything_is_in_it(quick, home):
    assert quick("pull", "-q", "127.0.0.1:1/not/here").returncode == 125
    assert store.faults(home) == []
    assert json.loads((home / "index.json").read_text())["manifests"] == []


def test_what_went_bad_before_it_was_unpacked_is_fetched_again(quick, home, fake):
    """No image has it yet, so verify does not know of it."""
    fake.put("library/x", simple(fake.layout))
    hub = {"MOCKER_HUB": fake.url}
    assert quick("pull", "x", env=hub).returncode == 0
    flip(home / "blobs" / layer_blob(home).replace(":", "/"))
    shutil.rmtree(home / "layers")
    (home / "library_x.json").unlink()
    assert quick("pull", "x", env=hub).returncode == 0
    assert (quick("verify").returncode, store.faults(home)) == (0, [])


def test_what_one_image_has_lost_stops_no_other(quick, home, fake):
    fake.put("library/x", simple(fake.layout, style=DOCKER))
    fake.put("library/y", simple(fake.layout, b"y", style=DOCKER))
    hub = {"MOCKER_HUB": fake.url}
    assert quick("pull", "x", env=hub).returncode == 0
    (home / "blobs" / layer_blob(home).replace(":", "/")).unlink()
    for name in "y", "x":
        done = quick("pull", name, env=hub)
        assert done.returncode == 0, done.stderr
    assert (quick("verify").returncode, store.faults(home)) == (0, [])
    assert len(json.loads((home / "index.json").read_text())["manifests"]) == 2


def test_verify_looks_at_the_index_too(quick, home, fake):
    fake.put("library/x", fake.layout.index([simple(fake.layout)]))
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == quick("verify").returncode == 0
    index = json.loads((home / "library_x.json").read_text())["index"]
    flip(home / "blobs" / index["digest"].replace(":", "/"))
    assert quick("verify").returncode == 1


def test_a_manifest_without_a_media_type_keeps_its_own(quick, home, fake):
    """OCI 1.0 lets one leave it out. The second pull takes it from the store, without a Content-Type."""
    descriptor = simple(fake.layout)
    manifest = json.loads(fake.path(descriptor["digest"]).read_text())
    del manifest["mediaType"]
    bare = {**fake.layout.json(manifest, OCI["manifest"]), "platform": descriptor["platform"]}
    fake.put("library/x", fake.layout.index([bare]))
    fake.names[f"library/x:{bare['digest']}"] = bare  # for the Content-Type
    for _ in range(2):
        assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
        assert json.loads((home / "library_x.json").read_text())["mediaType"] == OCI["manifest"]


def test_an_image_without_an_index_is_for_one_platform(quick, home, fake):
    fake.put("library/x", simple(fake.layout, arch="s390x"))
    done = quick("pull", "-q", "--platform=linux/s390x", "x", env={"MOCKER_HUB": fake.url})
    assert (done.returncode, done.stderr) == (0, "")
    done = quick("pull", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0 and "linux/s390x, and can't run here" in done.stderr
    done = quick("pull", "--platform=linux/riscv64", "x", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 125 and "linux/s390x alone" in done.stderr


def test_verify_finds_a_lost_layer_and_pull_mends_it(quick, home, fake):
    fake.put("library/x", simple(fake.layout))
    quick("pull", "x", env={"MOCKER_HUB": fake.url})
    shutil.rmtree(store.layers(home, "library_x.json")[0])
    assert quick("verify").returncode == 1
    assert quick("pull", "x", env={"MOCKER_HUB": fake.url}).returncode == 0
    assert quick("verify").returncode == 0
    assert set(blobs_asked(fake).values()) == {1}


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"name": 5}', '{"name": "a", "version": "b", "manifest": []}'])
@pytest.mark.parametrize("command", ["images", "verify"])
def test_a_broken_image_file_is_named(command, text, quick, home):
    home.mkdir()
    (home / "library_broken.json").write_text(text)
    done = quick(command)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "library_broken.json" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def podman():
    if oracle.MISSING:
        pytest.skip(f"not installed: {oracle.MISSING}")
    with oracle.Podman() as podman:
        yield podman


@pytest.mark.parametrize("style", [OCI, DOCKER], ids=["OCI", "Docker"])
def test_other_programs_read_the_store(style, quick, home, fake, podman, tmp_path):
    """Each image by the name that index.json gives it, whatever formats it came in."""
    tar = layer([file("f", b"x")])
    kinds = [fake.layout.layer(tar, kind, style) for kind in ("gzip", "plain", "zstd")]
    fake.put("library/x", fake.layout.index([fake.layout.image(kinds[:2], {"Cmd": ["x"]}, style=style)], style))
    fake.put("team/y:1.2", fake.layout.image(kinds[1:], {"Cmd": ["y"]}, style=style))
    digest = fake.names["team/y:1.2"]["digest"]
    for name in "x", f"{fake.host}/team/y:1.2", f"{fake.host}/team/y@{digest}":
        assert quick("pull", name, env={"MOCKER_HUB": fake.url}).returncode == 0
    names = [
        one["annotations"]["org.opencontainers.image.ref.name"]
        for one in json.loads((home / "index.json").read_text())["manifests"]
    ]
    assert sorted(names) == sorted(["library/x:latest", f"{fake.host}/team/y:1.2", f"{fake.host}/team/y@{digest}"])
    for number, name in enumerate(names):
        subprocess.run(
            ["skopeo", "--insecure-policy", "copy", "-q", f"oci:{home}:{name}", f"dir:{tmp_path}/{number}"], check=True
        )
        if name == "library/x:latest":  # Debian's umoci knows no zstd
            command = ["umoci", "unpack", "--image", f"{home}:{name}", tmp_path / f"bundle{number}"]
            subprocess.run(command, check=True, capture_output=True)
            assert (tmp_path / f"bundle{number}/rootfs/f").read_bytes() == b"x"
        podman.run("pull", "-q", f"oci:{home}:{name}", check=True)
