#!/usr/bin/env -S python3 -c "import sys, os; sys.path[0] = os.path.dirname(os.path.realpath(sys.argv.pop(1))); import mocker; sys.exit(mocker.main(sys.argv[1:]))"
# (As a module, Python compiles this file once, and not at each start: that saves 60 ms of 100.)
"""mocker: a crappy imitation of Docker, for teaching purposes.

Usage:
  mocker pull <name>[<tag>]
  mocker run <name>
  mocker images
  mocker (-h | --help)
  mocker --version

  mocker pull [options] <name>[<tag>]          fetch an image, check it, unpack its layers
  mocker run [options] <name> [<command>...]   run it in a container
  mocker serve [options]                       be a registry for the images that are here
  mocker verify                                check every digest again
  mocker clean [options]                       undo whatever outlived a run
  mocker COMMAND --help                        a command's own usage

Try (as root):
  ./mocker.py pull hello-world
  ./mocker.py images
  ./mocker.py run library/hello-world
  ./mocker.py run --explain -it busybox

Images and containers are kept in ~/mocker, or $MOCKER_HOME.

The file follows the life of a container: registry, store, root, network, cgroup, privileges, run.
A step's docstring is what --explain shows when the step runs.

But: no daemon, no builds, no push, no compose, no swarm, no plugins, no user namespaces, no IPv6,
no AppArmor. `docker` asks dockerd, which asks containerd, which asks runc; here one process does
it all and waits. README.md has a table of what is left out, and where Docker has it.
"""
# Only the quick part of the standard library up here: `requests` and `pyroute2` take longer to
# import (0.1 to 0.2 s each) than a container takes to start, so who needs them imports them.
import contextlib
import errno
import fcntl
import functools
import json
import os
import re
import shlex
import signal
import stat
import struct
import subprocess
import sys

__version__ = "1.0"
HOME = os.path.expanduser(os.environ.get("MOCKER_HOME") or "~/mocker")

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Telling the story: steps, narration, the one error type
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#  A step is a function whose docstring is told when it runs. A primitive asks the kernel for one
#  thing, and tells it as the shell command that does the same. A proof is what the kernel answers.

QUIET, PLAIN, EXPLAIN = range(3)

class story:
    """How much is told, and where to. stdout is the container's; all of this goes to stderr."""

    level, output = PLAIN, 2
    stepping = None  # with --step: the terminal from which Enter is read
    lines = None  # a worker collects its lines, and tells them in one piece
    style = dict.fromkeys(("", "heading", "command", "proof", "error", "end"), "")

class MockerError(Exception):
    """What the user can mend, in one line: what is wrong, and what to do. 125 is docker's own status."""

    def __init__(self, message, status=125, number=0):
        super().__init__(message)
        self.status, self.errno = status, number

def printable(text):
    """Names from an image may hold newlines and escape codes; those must not reach the terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def write_line(text, style=""):
    line = f"{story.style[style]}{printable(text)}{story.style['end'] * bool(style)}\n"
    if story.lines is not None:
        story.lines.append(line)
    else:
        emit(line)

def emit(text):
    """In one write, over a progress bar if there is one. That stderr is closed is no error."""
    with contextlib.suppress(OSError):
        os.write(story.output, ("\r\033[K" * os.isatty(story.output) + text).encode(errors="backslashreplace"))

def say(text):
    """mocker's own words; -q silences them."""
    if story.level >= PLAIN:
        write_line(text)

def tell(command):
    """What a primitive is about to do, as the shell command or the system call that does it."""
    if story.level >= EXPLAIN:
        write_line(f"  $ {command}", "command")

def prove(question, answer):
    """What the kernel says, now; `question` is the command that asks the same."""
    if story.level >= EXPLAIN:
        for line in [f"  ? {question}"] + [f"  = {line}" for line in answer.splitlines()]:
            write_line(line, "proof")

def step(function=None, part=None):
    """Decorator: a step of the talk. One with a part is skipped if the container is to be without it."""
    if function is None:
        return lambda function: step(function, part)

    def told(*arguments):
        left_out = part is not None and part not in arguments[0].parts
        if story.level >= EXPLAIN:
            heading, _, *body = function.__doc__.rstrip().splitlines()
            write_line("")
            write_line(f"■ {heading}{' (left out)' * left_out}", "heading")
            for line in body:
                write_line(f"  {line.strip()}")
            wait_for_enter()
        return None if left_out else function(*arguments)

    return told

def wait_for_enter():
    """With --step the speaker sets the pace."""
    if story.stepping is not None:
        os.write(story.stepping, b"  [Enter goes on, q ends] ")
        if os.read(story.stepping, 100).strip().lower() == b"q":
            raise MockerError("ended at your word; nothing is left behind", status=0)

def open_pacing_terminal():
    """Not stdin, which may be the container's."""
    try:
        story.stepping = os.open("/dev/tty", os.O_RDWR)
    except OSError:
        raise MockerError("--step waits for Enter, and there is no terminal: take --explain") from None

def use_colours():
    """Headings, commands, proofs, errors: each its colour; none if NO_COLOR is set or stderr is no terminal."""
    if "NO_COLOR" not in os.environ and os.isatty(2):
        from colorama import Fore, Style

        story.style = {"": "", "heading": Style.BRIGHT + Fore.CYAN, "command": Fore.YELLOW, "proof": Fore.GREEN,
                       "error": Fore.RED, "end": Style.RESET_ALL}

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  The registry: reference, token, manifest, blobs
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#  GET /v2/library/busybox/manifests/latest → 401, WWW-Authenticate: Bearer realm="…",service="…"
#  GET the realm                            → {"token": "…", "expires_in": 300}
#  GET the manifest again, with the token   → an index: a manifest for each platform
#      {"manifests": [{"digest": "sha256:…", "platform": {"os": "linux", "architecture": "amd64"}}, …]}
#  GET /v2/…/manifests/sha256:…             → a manifest: a config, and layers from the bottom up
#      {"config": {"digest": "sha256:…"}, "layers": [{"digest": "sha256:…", "size": 1234}, …]}
#  GET /v2/…/blobs/sha256:… for each        → 307 to a CDN, which must not see the token
#
#  https://github.com/opencontainers/distribution-spec

DOCKER_HUB = "docker.io"
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
MANIFEST_LIMIT = 4 << 20  # bytes, as Docker's
TIMEOUT = (10, int(os.environ.get("MOCKER_TIMEOUT", 30)))  # seconds to connect, seconds of silence
ATTEMPTS = 4
DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")
TAG = re.compile(r"\w[\w.-]{0,127}", re.ASCII)
# The grammar of https://github.com/distribution/reference
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
HOST = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9.-]*[a-zA-Z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
REFERENCE = re.compile(rf"({HOST})/({COMPONENT}(?:/{COMPONENT})*)(?::({TAG.pattern}))?(?:@(\S+))?", re.ASCII)

class Reference:
    """Where an image is: host/repository:tag; or @digest, which is exact and wins over a tag."""

    def __init__(self, text, tag=None):
        """tomcat:9 → docker.io, library/tomcat, 9. MockerError where docker says "invalid reference"."""
        # The first component is a host only if it looks like one; else it is somebody on Docker Hub.
        first, slash, _ = text.partition("/")
        is_host = slash and (re.search("[.:]", first) or first == "localhost" or first != first.lower())
        match = REFERENCE.fullmatch(text if is_host else f"{DOCKER_HUB}/{text}")
        if not match or (tag and (match[3] or match[4])) or len(match[2]) > 255 or re.fullmatch("[0-9a-f]{64}", text):
            raise MockerError(f"invalid reference '{text}': write [host/]name[:tag] in lower case, as in library/tomcat:9")
        if match[4] and not DIGEST.fullmatch(match[4]):
            raise MockerError(f"invalid digest in '{text}': write sha256: and 64 hexadecimal digits")
        if tag and not TAG.fullmatch(tag):
            raise MockerError(f"invalid tag '{tag}': letters, digits, '_', '.' and '-', 128 at most")
        self.host, self.repository = match[1], match[2]
        if self.host in ("index.docker.io", "registry-1.docker.io", DOCKER_HUB):
            self.host = DOCKER_HUB
            self.repository = self.repository if "/" in self.repository else f"library/{self.repository}"
        self.digest, self.version = match[4], match[4] or tag or match[3] or "latest"
        # As `images` shows it, where Docker Hub goes without saying: library/tomcat, localhost:5000/app
        self.name = self.repository if self.host == DOCKER_HUB else f"{self.host}/{self.repository}"

    def __str__(self):
        return f"{self.name}{'@' if self.digest else ':'}{self.version}"

    @property
    def file(self):
        """library_tomcat.json, library_tomcat:9.json; underscores are doubled, so no two images share one."""
        version = "" if self.version == "latest" else str(self)[len(self.name) :]
        name = self.name.replace("_", "__").replace("/", "_") + version
        # A name that no file can have is cut, and told apart by its digest.
        return (name if len(name) < 200 else f"{name[:150]}~{digest_of(name.encode())[7:27]}") + ".json"

def is_local(host):
    """Plain http is for this machine, or where MOCKER_INSECURE=host[:port],… allows it."""
    name = re.sub(r":\d+$", "", host)
    allowed = {"localhost", "[::1]", *os.environ.get("MOCKER_INSECURE", "").split(",")}
    return bool({name, host} & allowed) or re.fullmatch(r"127(\.\d+){3}", name, re.ASCII) is not None

class Registry:
    """One repository of one registry: an HTTP session that answers the registry's challenges."""

    def __init__(self, reference, authorization=None):
        import requests
        from urllib3.util import Retry

        self.reference, self.authorization = reference, authorization
        self.base = f"{'http' if is_local(reference.host) else 'https'}://{reference.host}"
        if reference.host == DOCKER_HUB:  # or a mirror of it
            self.base = os.environ.get("MOCKER_HUB", "https://registry-1.docker.io").rstrip("/")
        self.session = requests.Session()
        self.session.max_redirects = 10
        self.session.hooks["response"] = [self.check_response]
        if os.environ.get("SSL_CERT_FILE") and not os.environ.get("REQUESTS_CA_BUNDLE"):
            os.environ["REQUESTS_CA_BUNDLE"] = os.environ["SSL_CERT_FILE"]  # requests reads only its own name
        if is_local(self.base.partition("//")[2].partition("/")[0]):  # no proxy leads to this machine
            excepted = [os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), "localhost", "127.0.0.0/8", "::1"]
            os.environ["no_proxy"] = ",".join(filter(None, excepted))
        # A digest is of the bytes as they are stored, so no compression on the way.
        self.session.headers.update({"User-Agent": f"mocker/{__version__}", "Accept-Encoding": "identity"})
        patience = Retry(ATTEMPTS, read=1, backoff_factor=0.3, status_forcelist=(500, 502, 503, 504), raise_on_status=False,
                         redirect=0, respect_retry_after_header=False)
        for scheme in "https://", "http://":
            self.session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=patience))
        self.session.rebuild_auth = self.strip_authorization

    def strip_authorization(self, request, response):
        """A redirect to another host takes no token along, and finds none in ~/.netrc."""
        if self.session.should_strip_auth(response.request.url, request.url):
            request.headers.pop("Authorization", None)

    def check_response(self, response, **_):
        """Each response, redirects too: say it, and see whether its redirect may be followed."""
        from urllib.parse import urljoin, urlsplit

        url = urlsplit(response.url)
        shown = [part for part in url.query.split("&") if re.match("(service|scope)=", part)]  # never a signature
        query = "?" * bool(url.query) + "&".join(shown + ["…"] * (len(shown) <= url.query.count("&") and bool(url.query)))
        say(f'"GET {url.scheme}://{url.netloc.rpartition("@")[2]}{url.path}{query} HTTP/1.1" '
            f'{response.status_code} {response.headers.get("Content-Length", "-")}')
        if response.is_redirect:
            target = urlsplit(urljoin(response.url, response.headers["Location"]))
            if not (target.scheme == "https" or target.scheme == "http" and (url.scheme == "http" or is_local(target.netloc))):
                raise MockerError(f"{url.netloc} redirects to {target.scheme}://{target.netloc}: only https is followed")

    def ask(self, url, **options):
        """GET. A 429 that says to come back within ten seconds is waited for."""
        import time

        for _ in range(ATTEMPTS):
            response = self.session.get(url, timeout=TIMEOUT, **options)
            wait = response.headers.get("Retry-After", "")
            if response.status_code != 429 or not re.fullmatch("[0-9]|10", wait):
                break
            time.sleep(int(wait))
        return response

    def get(self, path, **headers):
        """GET, with a token if the registry's challenge asks for one. MockerError says what is wrong."""
        import requests
        import urllib3

        try:
            for _ in range(3):  # without a token, with one that others have used up, with a fresh one
                if self.authorization:
                    headers["Authorization"] = self.authorization
                response = self.ask(f"{self.base}/v2/{self.reference.repository}/{path}", headers=headers,
                                    auth=no_netrc, stream=True)
                if response.status_code != 401 or "WWW-Authenticate" not in response.headers:
                    break
                self.answer(response.headers["WWW-Authenticate"])  # the first, or one that has expired
        except requests.exceptions.SSLError as error:
            raise MockerError(f"{self.base}: its certificate is not trusted ({root_cause(error)}): name your CA's file "
                              "in REQUESTS_CA_BUNDLE, or check the clock") from None
        except requests.exceptions.TooManyRedirects:
            raise MockerError(f"{self.base} redirects without end: try again later, or name a mirror in MOCKER_HUB") from None
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # whatever an odd address leads to
            raise MockerError(f"{self.base} can't be reached ({root_cause(error)}): check the network, "
                              "or name a mirror in MOCKER_HUB") from None
        if response.status_code not in (200, 206):
            raise self.refusal(response)
        return response

    def refusal(self, response):
        """A status that is no success → the line that says what to do."""
        name, host, status = self.reference, self.reference.host, response.status_code
        if status == 429:
            limit = re.fullmatch(r"(\d{1,9});w=(\d{1,9})", response.headers.get("ratelimit-limit", ""))
            allowed = f", {limit[1]} in {int(limit[2]) // 3600} hours" if limit else ""
            when = response.headers.get("Retry-After", "")[:40]
            return MockerError(f"{self.base} answers 429: too many pulls{allowed}, for all behind this address together: try "
                               f"again {f'in {when} s' if when else 'later'}, docker login, or name a mirror in MOCKER_HUB")
        if status in (401, 403):
            return MockerError(f"{host} refuses {name} ({status}): no such image, or it is private: docker login {host}")
        if status == 404:
            return MockerError(f"no such image: {name}: check the name and the tag at {self.base}")
        return MockerError(f"{self.base} answers {status} {response.reason} for {name}: try again later")

    def answer(self, challenge):
        """WWW-Authenticate (RFC 9110 §11.6.1) → an Authorization header that satisfies it."""
        import base64
        from urllib.request import parse_http_list, parse_keqv_list

        prove("the registry's challenge", challenge)
        scheme, _, rest = challenge.partition(" ")
        asked_host = self.base.partition("//")[2]  # a mirror is not to see Docker Hub's password
        credentials = find_credentials(DOCKER_HUB if asked_host == "registry-1.docker.io" else asked_host)
        if scheme.lower() == "basic" and credentials:
            self.authorization = "Basic " + base64.b64encode(":".join(credentials).encode()).decode()
        elif scheme.lower() == "bearer":
            asked = parse_keqv_list([item for item in parse_http_list(rest) if re.search("=.", item)])
            self.authorization = "Bearer " + self.fetch_token(asked, credentials)
        else:
            raise MockerError(f"{self.reference.host} wants a name and a password: docker login {self.reference.host}")

    def fetch_token(self, asked, credentials):
        """From the realm, a token that allows this pull and no more. It may expire in mid-pull."""
        realm, scope = asked.get("realm", ""), f"repository:{self.reference.repository}:pull"
        if not realm.startswith("https://") and not (realm.startswith("http://") and self.base.startswith("http://")):
            raise MockerError(f"{self.reference.host} sends to '{realm}' for a token: only https is asked")
        parameters = {"service": asked["service"], "scope": scope} if "service" in asked else {"scope": scope}
        response = self.ask(realm, params=parameters, auth=credentials or no_netrc)
        if response.status_code != 200:
            raise self.refusal(response)
        body = parse_json(response.content, "the token")
        token = expect(body.get("token") or body.get("access_token"), str, "the token")
        with contextlib.suppress(ValueError, IndexError):
            import base64

            prove("the token's claims, decoded", base64.urlsafe_b64decode(token.split(".")[1] + "==").decode())
        if not re.fullmatch(r"[\x21-\x7e]+", token):
            raise MockerError(f"{realm} gives a token that no header can hold: try again, or name a mirror in MOCKER_HUB")
        return token

def no_netrc(request):
    """An `auth` that adds nothing: without any, requests would take one from ~/.netrc."""
    return request

def root_cause(error):
    """The innermost reason in a chain of libraries' errors, in a few words."""
    while getattr(error, "args", None) and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    error = getattr(error, "reason", error)
    return (str(error).rpartition("): ")[2] or type(error).__name__)[:150]

def find_credentials(host):
    """(user, password) from docker's ~/.docker/config.json or the helper that it names, or None."""
    import base64

    try:
        with open(os.path.join(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")) as file:
            config = parse_json(file.read(), "~/.docker/config.json")
    except OSError:
        return None

    def entries(key):  # docker has written host, https://host and https://host/v1/
        found = expect(config.get(key) or {}, dict, f"{key} of ~/.docker/config.json")
        return {re.sub("^https?://", "", name).partition("/")[0]: value for name, value in found.items()}

    server = "index.docker.io" if host == DOCKER_HUB else host
    helper = entries("credHelpers").get(server) or config.get("credsStore")
    if helper:
        answer = run_tool([f"docker-credential-{helper}", "get"], "https://index.docker.io/v1/" if host == DOCKER_HUB else host)
        found = parse_json(answer or "{}", f"docker-credential-{helper}")
        return (found["Username"], found["Secret"]) if "Secret" in found else None
    entry = expect(entries("auths").get(server) or {}, dict, f"the entry of {server} in ~/.docker/config.json")
    try:
        user, colon, password = base64.b64decode(entry.get("auth") or "").decode().partition(":")
    except (ValueError, TypeError):
        raise MockerError(f"the entry of {server} in ~/.docker/config.json is damaged: docker login {server}") from None
    return (user, password) if colon else None

def run_tool(command, text=None):
    """Another program, told as a command → its output; None if it is not there or refuses."""
    tell(shlex.join(command) + (f" <<< {shlex.quote(text)}" if text else ""))
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None

def parse_json(raw, what):
    """From outside → a dict; MockerError if it is anything else."""
    try:
        return expect(json.loads(raw), dict, what)
    except (ValueError, RecursionError):
        raise MockerError(f"{what} is not JSON: the registry is broken, or it is none") from None

def expect(value, kind, what):
    """`value`, if it is of the kind that the spec says: another shape is refused, not guessed at."""
    if not isinstance(value, kind) or isinstance(value, bool):
        name = {dict: "an object", list: "a list", str: "text", int: "a number"}[kind]
        raise MockerError(f"{what} should be {name}: this image is broken, or it is no image")
    return value

def descriptor(value, what):
    """{"mediaType", "digest", "size"}: how the OCI specs point to a blob."""
    digest = expect(expect(value, dict, what).get("digest"), str, f"{what}'s digest")
    size = expect(value.get("size"), int, f"{what}'s size")
    if not DIGEST.fullmatch(digest) or size < 0:
        raise MockerError(f"{what}'s digest '{digest[:80]}' or its size is not valid: this image is broken")
    return {"mediaType": expect(value.get("mediaType", ""), str, f"{what}'s mediaType"), "digest": digest, "size": size}

def digest_of(data, algorithm="sha256"):
    """Of bytes, or of an open file → sha256:…, the name that everything goes by."""
    import hashlib

    found = hashlib.new(algorithm)
    for piece in [data] if isinstance(data, bytes) else pieces(data):
        found.update(piece)
    return f"{algorithm}:{found.hexdigest()}"

def check_digest(data, digest, what):
    """Is it what was asked for? Whoever served it: that is what a digest is for."""
    found = digest_of(data, digest.partition(":")[0])
    if found != digest:
        raise MockerError(f"{what} is damaged: its digest is {found[:19]}…, not {digest[:19]}…; pull again")

def fetch_manifest(registry, version):
    """A manifest or an index, by tag or by digest → raw bytes, JSON, media type, digest."""
    import urllib3

    what = f"the manifest of {registry.reference}"
    if DIGEST.fullmatch(version):
        drop_damaged(version)
    raw, kind = read_blob(version) if DIGEST.fullmatch(version) else None, ""
    if raw is None:  # what was asked for by digest, and is here, can't have changed
        response = registry.get(f"manifests/{version}", Accept=", ".join(MANIFEST_TYPES + INDEX_TYPES))
        try:
            raw = response.raw.read(MANIFEST_LIMIT + 1)
        except urllib3.exceptions.HTTPError as error:
            raise MockerError(f"{what} is cut off ({root_cause(error)}): try again") from None
        kind = response.headers.get("Content-Type", "").partition(";")[0]
        if len(raw) > MANIFEST_LIMIT:
            raise MockerError(f"{what} is larger than 4 MiB: no real one is")
        if DIGEST.fullmatch(version):
            check_digest(raw, version, what)
    manifest = parse_json(raw, what)
    kind = expect(manifest.get("mediaType", kind), str, what)
    if manifest.get("schemaVersion") == 1 or "docker.distribution.manifest.v1+" in kind:
        raise MockerError(f"{registry.reference} is in the old schema 1 format, which Docker dropped, too: pull a newer tag")
    return raw, manifest, kind, version if DIGEST.fullmatch(version) else digest_of(raw)

def this_platform():
    """os/architecture/variant of this machine, in the names of the specs, which are Go's."""
    machine = os.uname().machine
    names = {"x86_64": "amd64", "aarch64": "arm64/v8", "armv7l": "arm/v7", "armv6l": "arm/v6", "i686": "386"}
    return f"linux/{names.get(machine, machine)}"

def choose_platform(index, wanted, what):
    """The index's entry for a platform. An attestation (unknown/unknown) is none; arm64 means arm64/v8."""
    there = {}
    for entry in expect(index.get("manifests"), list, f"{what}'s manifests"):
        platform = expect(expect(entry, dict, f"an entry of {what}").get("platform") or {}, dict, f"a platform of {what}")
        name = "/".join(str(platform[key]) for key in ("os", "architecture", "variant") if platform.get(key))
        if not name.startswith("unknown"):
            there.setdefault(name, entry)
    older = [re.sub("v[67]$", f"v{n}", wanted) for n in (6, 5) if wanted.startswith("linux/arm/")]
    for name in (wanted, f"{wanted}/v8", re.sub("/v8$", "", wanted), *older, ""):
        if name in there:
            prove(f"the index's platforms: {', '.join(there)}; chosen", name)
            return descriptor(there[name], f"an entry of {what}")
    raise MockerError(f"{what} is not there for {wanted}, only for {', '.join(sorted(there)) or 'none'}: try --platform=…")

@step
def find_manifest(registry, platform):
    """Ask the registry which manifest the name stands for

    A tag names an index or a manifest, both JSON. An index has one manifest for each platform; we
    take the one for this machine, by its digest. All below it is named by digest, too: from here
    on nobody, the registry included, can change a byte unseen.
    See the OCI image-spec, image-index.md and manifest.md.
    """
    what, version = str(registry.reference), registry.reference.version
    for _ in range(4):  # an index may point to an index
        raw, manifest, kind, digest = fetch_manifest(registry, version)
        save_blob(digest, raw)
        if "manifests" in manifest and "layers" in manifest:
            raise MockerError(f"{what} claims to be an index and a manifest at once: this image is broken, or a trick")
        if "manifests" not in manifest and kind not in INDEX_TYPES:
            return {"digest": digest, "mediaType": kind, "size": len(raw), "manifest": check_manifest(manifest, what)}
        version = choose_platform(manifest, platform, what)["digest"]
    raise MockerError(f"{what} is an index of indexes, without end: this image is broken")

def check_manifest(manifest, what):
    """What we need of a manifest, its shape checked."""
    layers = [descriptor(layer, f"a layer of {what}") for layer in expect(manifest.get("layers"), list, f"{what}'s layers")]
    if any(re.search("nondistributable|foreign", layer["mediaType"]) for layer in layers):
        raise MockerError(f"{what} has a foreign layer, as Windows images do: it can't run here")
    return {"config": descriptor(manifest.get("config"), f"{what}'s config"), "layers": layers}

def check_config(raw, layers, what):
    """The image's config. It must have a diff_id for each layer, and text where `run` wants text."""
    config = parse_json(raw, f"{what}'s config")
    diff_ids = expect(expect(config.get("rootfs"), dict, f"{what}'s rootfs").get("diff_ids"), list, f"{what}'s diff_ids")
    if len(diff_ids) != len(layers) or not all(isinstance(d, str) and DIGEST.fullmatch(d) for d in diff_ids):
        raise MockerError(f"{what} has {len(layers)} layers, but no valid diff_id for each: this image is broken")
    wanted = expect(config.get("config") or {}, dict, f"{what}'s config")
    for key, kind in (("Env", list), ("Entrypoint", list), ("Cmd", list), ("WorkingDir", str), ("User", str)):
        for item in expect(wanted.get(key) or kind(), kind, f"{what}'s {key}"):
            if "\0" in expect(item, str, f"{what}'s {key}"):
                raise MockerError(f"{what}'s {key} has a NUL in it: this image is broken")
    history = [line for line in expect(config.get("history") or [], list, f"{what}'s history") if isinstance(line, dict) and not line.get("empty_layer")]
    for layer, line in zip(layers, history) if story.level >= EXPLAIN else ():
        prove(f"layer {layer['digest'][:19]}…, {layer['size']} bytes, was made by", str(line.get("created_by"))[:200])
    return config

def fetch_blob(registry, blob, partial, received=lambda count: None):
    """A blob into the store, unless it is there."""
    digest = blob["digest"]
    # Two layers may have the same blob: the second waits for the first.
    with locked(os.path.join(partial, f"{digest[7:]}.lock")):
        if not os.path.exists(blob_path(digest)):
            download_blob(registry, blob, partial, received)

def download_blob(registry, blob, partial, received):
    """After a drop it goes on by Range (RFC 9110 §14.2); what comes is checked before it counts."""
    import requests
    import urllib3

    digest, size, idle = blob["digest"], blob["size"], 0
    with open(os.path.join(partial, f"{os.getpid()}-{digest[7:]}"), "w+b") as file:
        while file.tell() < size and idle < ATTEMPTS:
            offset = file.tell()
            response = registry.get(f"blobs/{digest}", **({"Range": f"bytes={offset}-"} if offset else {}))
            if response.status_code != 206:
                file.seek(0)
                file.truncate()
            try:
                for piece in pieces(response.raw):
                    file.write(piece)
                    received(file.tell())
                    if file.tell() > size:
                        break
            except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
                say(f"the connection dropped at byte {file.tell()} ({root_cause(error)}); going on")
            idle = idle + 1 if file.tell() <= offset else 0
        if file.tell() != size:
            raise MockerError(f"{digest[:19]}… has {file.tell()} bytes, not the {size} that its manifest says: pull again")
        file.seek(0)
        check_digest(file, digest, f"blob {digest[:19]}…")
    os.makedirs(os.path.dirname(blob_path(digest)), exist_ok=True)
    os.rename(file.name, blob_path(digest))

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  The image store: blobs, layers, whiteouts
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#  ~/mocker is an OCI image layout, which skopeo, podman and umoci can read, and a little more:
#
#  oci-layout  index.json  blobs/sha256/…   as the registry served them
#  library_tomcat.json                      one stored manifest an image: what `images` lists
#  layers/<chain id>/                       each layer unpacked once, as overlayfs wants it
#  containers/<id>/                         config.json, log, upper/ (what the container wrote), …
#  partial/<anything>/                      a pull under way, whose owner holds a lock on it
#
#  All is made elsewhere and appears by rename(2): there is never half of anything.

LAYER_LIMIT = int(os.environ.get("MOCKER_LAYER_LIMIT", 10 << 30))  # bytes that one layer may unpack to
OPAQUE = "trusted.overlay.opaque"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"

def store(*parts):
    return os.path.join(HOME, *parts)

def blob_path(digest):
    return store("blobs", *digest.split(":"))

def layer_path(chain_id):
    return store("layers", chain_id.partition(":")[2])

def read_blob(digest):
    """A small blob (manifest or config), checked again; None if it is not here."""
    try:
        with open(blob_path(digest), "rb") as file:
            raw = file.read(MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        return None
    check_digest(raw, digest, f"the stored blob {digest[:19]}…")
    return raw

def drop_damaged(digest):
    """A small blob that went bad on the disk is fetched again."""
    with contextlib.suppress(FileNotFoundError):
        try:
            read_blob(digest)
        except MockerError:
            os.unlink(blob_path(digest))

def save_blob(digest, raw):
    drop_damaged(digest)
    if not os.path.exists(blob_path(digest)):
        write_file(blob_path(digest), raw)

def write_file(path, content):
    """Whole, or not at all: under a name of our own, then renamed."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    mine = f"{path}.{os.getpid()}.new"
    try:
        with open(mine, "wb") as file:
            file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n")
        os.rename(mine, path)
    except OSError:
        os.unlink(mine)
        raise

@contextlib.contextmanager
def locked(directory, wait=True):
    """Hold flock(2) on a directory. The kernel lets go of it when the holder dies, however it dies."""
    os.makedirs(directory, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)

@contextlib.contextmanager
def partial_directory():
    """For one pull's unfinished work. Those of pulls that were killed are removed first."""
    path = store("partial", os.urandom(6).hex())
    with contextlib.ExitStack() as mine:
        with locked(store("partial")):  # nobody clears up between our making it and our locking it
            for name in os.listdir(store("partial")):
                with contextlib.suppress(BlockingIOError), locked(store("partial", name), wait=False):
                    run_tool(["rm", "-rf", store("partial", name)])
            mine.enter_context(locked(path))
        mine.callback(run_tool, ["rm", "-rf", path])  # not shutil.rmtree, which a deep tree exhausts
        yield path

def chain_ids(diff_ids):
    """diff_ids from the bottom up → names for the unpacked layers (OCI image-spec, "Layer ChainID").

    What a layer unpacks to depends on what lies below: a parent directory that it leaves out has the
    mode of the one below, a hard link may lead there. So the name tells what is below, too.
    """
    chain = []
    for diff_id in diff_ids:
        chain.append(digest_of(f"{chain[-1]} {diff_id}".encode()) if chain else diff_id)
    return chain

class Image:
    """A stored image: its JSON file, and its config."""

    def __init__(self, file):
        with open(store(file), "rb") as stored:
            self.stored = parse_json(stored.read(), file)
        try:
            self.file, self.name, self.version = file, self.stored["name"], self.stored["version"]
            self.manifest = self.stored["manifest"]
            self.size = self.manifest["config"]["size"] + sum(layer["size"] for layer in self.manifest["layers"])
        except (KeyError, TypeError):
            raise MockerError(f"{store(file)} is no stored image: remove it, and pull the image again") from None

    @functools.cached_property
    def config(self):
        raw = read_blob(self.manifest["config"]["digest"])
        if raw is None:
            raise MockerError(f"{self.name} has lost its config: mocker pull {self.name}")
        return parse_json(raw, f"{self.name}'s config")

    @property
    def layers(self):
        """The unpacked layers' directories, from the bottom up."""
        return [layer_path(chain_id) for chain_id in chain_ids(self.config["rootfs"]["diff_ids"])]

def all_images():
    files = os.listdir(HOME) if os.path.isdir(HOME) else []
    return [Image(file) for file in sorted(files) if file.endswith(".json") and file != "index.json"]

# ── A layer's blob: packed, counted, hashed ────────────────────────────────────────────────────────

def pieces(file):
    return iter(lambda: file.read(1 << 18), b"")

def decompressed(file):
    """The tar in a blob, in pieces. How it is packed, its first bytes tell, whatever its media type says."""
    magic = file.read(4)
    file.seek(0)
    if magic.startswith(GZIP):
        return inflate(file)
    if magic != ZSTD:
        return pieces(file)
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        from backports import zstd
    return pieces(zstd.ZstdFile(file))

def inflate(file):
    """gzip (RFC 1952): one member or several, with nothing but zeros after them."""
    import zlib

    data = file.read(1 << 18)
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data:
                raise EOFError("the gzip data ends too early")
            piece = member.decompress(data, 1 << 20)
            if piece:
                yield piece
            data = member.unconsumed_tail or (not member.eof and file.read(1 << 18))
        data = (member.unused_data or file.read(1 << 18)).lstrip(b"\0")

class LayerStream:
    """A layer's tar as a file that is read forward only; counts and hashes what passes."""

    def __init__(self, file, diff_id):
        import hashlib

        self.diff_id, self.hash = diff_id, hashlib.new(diff_id.partition(":")[0])
        self.pieces, self.buffer, self.position, self.total = decompressed(file), b"", 0, 0
        self.last = b""  # what was read last

    def read(self, size):
        """Exactly `size` bytes, or what is left. More than 1 MiB at once only a forged header asks for."""
        if size > 1 << 20:
            raise ValueError("a header is too long")
        while len(self.buffer) - self.position < size:
            piece = next(self.pieces, b"")
            if not piece:
                size = len(self.buffer) - self.position
            self.hash.update(piece)
            self.total += len(piece)
            if self.total > LAYER_LIMIT:
                raise MockerError(f"a layer unpacks to more than {LAYER_LIMIT} bytes: if you trust it, raise MOCKER_LAYER_LIMIT")
            self.buffer, self.position = self.buffer[self.position :] + piece, 0
        self.position += size
        self.last = self.buffer[self.position - size : self.position]
        return self.last

    def tell(self):
        return self.total - len(self.buffer) + self.position

    def seek(self, offset):
        while self.tell() < offset and self.read(min(offset - self.tell(), 1 << 20)):
            pass

    def copy(self, size, handle):
        """The next `size` bytes, into an open file."""
        while size:
            data = self.read(min(size, 1 << 20))
            if not data:
                raise EOFError("the tar ends in the middle of a file")
            size -= len(data)
            while data:
                data = data[os.write(handle, data) :]

    def finish(self):
        """The diff_id counts all, also what follows the end of the tar."""
        while self.read(1 << 18):
            pass
        if self.hash.hexdigest() != self.diff_id.partition(":")[2]:
            raise MockerError(f"a layer does not unpack to the diff_id {self.diff_id[:19]}… of its config: damaged, or forged")

# ── Unpacking ──────────────────────────────────────────────────────────────────────────────────────

@contextlib.contextmanager
def confined(directory):
    """chroot into a directory, and back: no path in a tar can name anything outside it.

    The way back is the classic way out of a chroot, for whoever may call chroot(2) and holds a
    directory from outside. That is why `run` does not rely on chroot.
    """
    outside, finders = os.open("/", os.O_PATH), sys.meta_path
    sys.meta_path = []  # an import would now run the image's own /usr/lib/python3
    os.chroot(directory)
    os.chdir("/")
    try:
        yield
    finally:
        os.fchdir(outside)
        os.chroot(".")
        os.close(outside)
        sys.meta_path = finders

class Unpacker:
    """One layer on its way into a directory, in a process whose root that directory is."""

    def __init__(self, stream):
        self.stream, self.names, self.directories = stream, [], {}
        self.implied = set()  # directories that the tar leaves out: the layers below know their modes
        self.borrowed = {}  # path → target of hard links to files of the layers below
        self.whiteouts = []

    def unpack(self):
        import tarfile

        try:
            tar = tarfile.TarFile(fileobj=self.stream, encoding="utf-8", errors="surrogateescape")
        except tarfile.ReadError:
            if self.stream.total:
                raise
            return self.stream.finish()  # no bytes at all are no files
        while member := tar.next():
            tar.members.clear()  # or tarfile keeps them all
            self.names += [member.name] if len(self.names) < 10 else []
            self.place(member, os.path.normpath("/" + member.name.lstrip("/")))
        if self.stream.last.strip(b"\0") or self.stream.read(512).strip(b"\0"):
            raise ValueError("a header is damaged")  # to tarfile, that is the end
        for path, member in reversed(self.directories.items()):
            set_times(path, member)  # last, since each new file changes its directory's
        return self.stream.finish()

    def place(self, member, path):
        """One member of the tar. A later one replaces an earlier one of the same name."""
        folder, name = os.path.split(path)
        if name.startswith(".wh."):
            return self.whiteout(folder, name[len(".wh.") :])
        whiteout = False
        try:
            self.make(member, path)
        except (FileExistsError, FileNotFoundError, NotADirectoryError):
            self.add_parents(folder)
            whiteout = self.remove(path)
            self.make(member, path)
        if member.isdir():
            self.directories[path] = member
            self.implied.discard(path)
            if whiteout:
                make_opaque(path)
        else:
            self.directories.pop(path, None)

    def make(self, member, path):
        """As its type says. FileExistsError, FileNotFoundError: something is in the way, or not there yet."""
        if member.isdir():
            if path not in self.directories and not is_directory(path):
                os.mkdir(path)
        elif member.isreg():
            self.make_file(member, path)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.isfifo() or member.isdev():
            kind = stat.S_IFIFO if member.isfifo() else stat.S_IFCHR if member.ischr() else stat.S_IFBLK
            os.mknod(path, kind, 0 if member.isfifo() else os.makedev(member.devmajor, member.devminor))
        elif member.islnk():
            return self.make_link(path, os.path.normpath("/" + member.linkname.lstrip("/")))
        else:
            raise MockerError(f"a layer has '{member.name}' of unknown type {member.type}: this image is broken")
        return set_metadata(path, member)

    def make_file(self, member, path):
        """Sparse files keep their holes."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            for offset, size in [(0, member.size)] if member.sparse is None else member.sparse:
                os.lseek(handle, offset, os.SEEK_SET)
                self.stream.copy(size, handle)
            if member.sparse is not None:
                os.ftruncate(handle, member.size)
        finally:
            os.close(handle)

    def make_link(self, path, target):
        if path == target:
            raise MockerError(f"a layer has a hard link '{path}' to itself: this image is broken")
        if target not in self.borrowed and os.path.lexists(target):
            os.link(target, path, follow_symlinks=False)
        else:
            os.mknod(path)  # a file holds the place, so that what comes there later replaces it as any other
            self.borrowed[path] = self.borrowed.get(target, target)

    def add_parents(self, folder):
        """Directories that a member needs, but the tar has not (yet)."""
        if not os.path.isdir(folder):
            self.add_parents(os.path.dirname(folder))
            whiteout = self.remove(folder)
            os.mkdir(folder, 0o755)
            if whiteout:
                make_opaque(folder)  # what was below is gone, and its mode with it
            else:
                self.implied.add(folder)

    def remove(self, path):
        """Whatever is there. → was it a whiteout? Then a new directory must go on hiding what is below."""
        import shutil

        try:
            status = os.lstat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if path == "/":
            raise MockerError("a layer's root is no directory: this image is broken")
        if stat.S_ISDIR(status.st_mode):
            shutil.rmtree(path)
            self.forget(path)
        else:
            os.unlink(path)
            self.borrowed.pop(path, None)
        return is_whiteout(status)

    def forget(self, path):
        """A directory that is replaced takes along what was noted of it and of all below it."""
        def gone(other):
            return other == path or other.startswith(path + "/")

        self.implied = {other for other in self.implied if not gone(other)}
        self.borrowed = {other: target for other, target in self.borrowed.items() if not gone(other)}
        self.whiteouts = [other for other in self.whiteouts if not gone(other)]
        self.directories = {other: member for other, member in self.directories.items() if not gone(other)}

    def whiteout(self, folder, name):
        """`.wh.NAME` deletes NAME of the layers below, `.wh..wh..opq` hides all that they have here.

        For overlayfs, the first is a character device 0/0, the second an xattr of the directory.
        """
        if name in ("", ".", ".."):
            raise MockerError("a layer's whiteout names no file: this image is broken")
        if name.startswith(".wh.") and name != ".wh..opq":
            return  # aufs kept its books in early images
        self.add_parents(folder)
        path = os.path.join(folder, name)
        if name == ".wh..opq":
            make_opaque(folder)
        elif is_directory(path):  # the layer's own: only what is below must go
            make_opaque(path)
        elif not os.path.lexists(path):
            with on_plain_disk():
                os.mknod(path, stat.S_IFCHR, 0)
            self.whiteouts.append(path)

def is_directory(path):
    """Itself, not by a symlink."""
    return os.path.isdir(path) and not os.path.islink(path)

def is_whiteout(status):
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0

def make_opaque(folder):
    with on_plain_disk():
        os.setxattr(folder, OPAQUE, b"y")

@contextlib.contextmanager
def on_plain_disk():
    """An overlay keeps whiteouts for itself: inside docker, the store must lie elsewhere."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
            raise
        raise MockerError(f"{HOME} can't hold whiteouts ({error.strerror}), does it lie on an overlay, as in docker? "
                          "Set MOCKER_HOME to a directory on a disk, a volume, or in /dev/shm") from None

def set_metadata(path, member):
    """Owner, mode, xattrs, times; in this order, since chown(2) clears setuid bits and capabilities."""
    if not (0 <= member.uid < 2**32 - 1 and 0 <= member.gid < 2**32 - 1):  # -1 would mean: leave it
        raise ValueError(f"owner {member.uid}:{member.gid}")
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    for key, value in member.pax_headers.items():
        if key.startswith("SCHILY.xattr.") and not key.startswith("SCHILY.xattr.trusted."):  # those are overlayfs' own
            with contextlib.suppress(OSError):  # as docker: a file system may lack them
                raw = value.encode("utf-8", "surrogateescape")
                os.setxattr(path, key[len("SCHILY.xattr.") :], raw, follow_symlinks=False)
    if not member.isdir():
        set_times(path, member)

def set_times(path, member):
    nanoseconds = int(min(max(member.mtime, 0), 2**33) * 1_000_000_000)
    os.utime(path, ns=(nanoseconds, nanoseconds), follow_symlinks=False)

def copy_metadata(source, target):
    import shutil

    status = os.lstat(source)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)

def look_below(layers, path):
    """Where a path lies in the layers below, from the top down; None if nowhere. Follows no symlink."""
    for layer in layers:
        place = layer
        for part in path.strip("/").split("/"):
            opaque = OPAQUE in os.listxattr(place)
            place = os.path.join(place, part)
            if not os.path.lexists(place):
                if opaque:
                    return None
                break
            if not is_directory(place):
                whole = place == layer + path.rstrip("/")
                return place if whole and not is_whiteout(os.lstat(place)) else None
        else:
            return place
    return None

def settle_layer(directory, below, implied, borrowed, whiteouts):
    """What the tar left to the layers below: the modes of parents, the targets of hard links."""
    import shutil

    root = os.path.realpath(directory)
    for path in [*sorted(implied), *whiteouts, *borrowed]:
        # We are outside of the chroot here: no symlink of the layer may lead us on.
        if os.path.realpath(root + os.path.dirname(path)) != os.path.normpath(root + os.path.dirname(path)):
            raise MockerError(f"a layer puts '{path}' behind a symlink of its own: this image is broken")
    for path in sorted(implied):
        source = look_below(below, path)
        if source and is_directory(source) and is_directory(directory + path):
            copy_metadata(source, directory + path)
    times = {folder: os.stat(folder) for folder in {os.path.dirname(directory + p) for p in [*whiteouts, *borrowed]}}
    for path in whiteouts:
        # One that hides nothing goes: in a directory of one layer alone, overlayfs would list it.
        ancestors = [path[:match.start()] for match in re.finditer("/", path)]
        opaque = any(OPAQUE in os.listxattr(directory + ancestor) for ancestor in ancestors)
        if is_whiteout(os.lstat(directory + path)) and (opaque or look_below(below, path) is None):
            os.unlink(directory + path)
    for path, target in borrowed.items():
        source = look_below(below, target)
        if source is None or not stat.S_ISREG(os.lstat(source).st_mode):
            raise MockerError(f"a layer has a hard link to '{target}', which is nowhere: this image is broken")
        shutil.copyfile(source, directory + path, follow_symlinks=False)
        copy_metadata(source, directory + path)
    for folder, status in times.items():
        os.utime(folder, ns=(status.st_atime_ns, status.st_mtime_ns))

def unpack_layer(file, diff_id, directory):
    """A blob's tar into a directory: confined, bounded, checked. → Unpacker"""
    import shutil  # noqa: F401  before the chroot, where nothing can be imported
    import tarfile  # noqa: F401
    import zlib  # noqa: F401

    unpacker = Unpacker(LayerStream(file, diff_id))
    try:
        with confined(directory):
            unpacker.unpack()
    except Exception as error:
        # Whatever a library makes of forged bytes; but our own words, and a full disk, stay as they are.
        if isinstance(error, MockerError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise MockerError(f"a layer is damaged, or no tar ({str(error)[:100] or type(error).__name__}): pull again, "
                          "or tell who made it") from None
    return unpacker

# ── Pull ───────────────────────────────────────────────────────────────────────────────────────────

class Progress:
    """Bytes received of each layer, in memory that the workers share."""

    def __init__(self, layers):
        import mmap

        self.total, self.counts = sum(layer["size"] for layer in layers), mmap.mmap(-1, 8 * len(layers) + 8)

    def set(self, number, count):
        struct.pack_into("Q", self.counts, 8 * number, count)

    def draw(self):
        """[########                ] 12.3 of 153.9 MiB"""
        if story.level >= PLAIN and os.isatty(2):
            count = sum(count for (count,) in struct.iter_unpack("Q", self.counts[:]))
            bar = "#" * min(30, 30 * count // max(self.total, 1))
            os.write(2, f"\r[{bar:30}] {count / 2**20:.1f} of {self.total / 2**20:.1f} MiB ".encode())

def in_workers(work, items, limit, meanwhile):
    """work(*item) for each item, in processes, `limit` at a time. → the results, in the items' order"""
    import pickle
    import select

    waiting, running, results = list(enumerate(items)), {}, {}
    try:
        for number in range(len(items)):
            while number not in results:
                while waiting and len(running) < limit:
                    start_worker(work, *waiting.pop(0), running)
                for pipe in select.select(list(running), [], [], 0.25)[0]:
                    done, pid = running.pop(pipe)
                    with open(pipe, "rb") as file:
                        results[done] = file.read()
                    os.waitpid(pid, 0)
                meanwhile()
            if not results[number]:
                raise MockerError("a worker was killed, by lack of memory? Try again with fewer programs running")
            result = pickle.loads(results.pop(number))
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for _, pid in running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

def start_worker(work, number, item, running):
    """Fork one. Its result, or its exception, comes back through a pipe."""
    import pickle

    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(writer)
        running[reader] = number, pid
        return
    try:
        die_with(parent)
        for stop in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
            signal.signal(stop, signal.SIG_DFL)
        story.lines = []  # several are at it: each tells its part in one piece
        try:
            result = work(*item)
        except (MockerError, OSError) as error:
            result = error
        emit("".join(story.lines))
        with open(writer, "wb") as file:
            pickle.dump(result, file)
    except Exception:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(0)

def fetch_layer(registry, number, blob, diff_id, partial, progress):
    """One layer, in a worker: its blob into the store, its files into partial/…/<number>."""
    say(f"Fetching layer {blob['digest']}..")
    if not os.path.exists(blob_path(blob["digest"])):
        own = Registry(registry.reference, registry.authorization)  # a connection can't be shared
        fetch_blob(own, blob, partial, lambda count: progress.set(number, count))
    directory = os.path.join(partial, str(number))
    os.mkdir(directory, 0o755)
    with open(blob_path(blob["digest"]), "rb") as file:
        unpacker = unpack_layer(file, diff_id, directory)
    for name in unpacker.names:
        say(f"- {name}")
    say("...")
    return directory, unpacker.implied, unpacker.borrowed, unpacker.whiteouts

@step
def fetch_layers(registry, layers, diff_ids, partial):
    """Fetch the layers, and unpack each

    A layer is a tar of what one build step changed: the files it added, and whiteouts, names that
    begin with `.wh.`, for those it deleted. Three workers download and unpack at a time, each
    chrooted into the directory that it fills; a layer that is there already is not fetched again.
    See the OCI image-spec, layer.md. Look: ls ~/mocker/layers
    """
    for layer in layers:
        if os.path.exists(blob_path(layer["digest"])) and os.path.getsize(blob_path(layer["digest"])) != layer["size"]:
            raise MockerError(f"layer {layer['digest'][:19]}… has not the {layer['size']} bytes that its manifest says")
    chain = chain_ids(diff_ids)
    missing = [n for n in range(len(chain)) if not os.path.isdir(layer_path(chain[n]))
               or not os.path.exists(blob_path(layers[n]["digest"]))]
    progress = Progress(layers)
    os.makedirs(store("layers"), exist_ok=True)
    jobs = [(registry, n, layers[n], diff_ids[n], partial, progress) for n in missing]
    for n, (directory, *open_ends) in zip(missing, in_workers(fetch_layer, jobs, 3, progress.draw)):
        settle_layer(directory, [layer_path(below) for below in reversed(chain[:n])], *open_ends)
        with contextlib.suppress(OSError):  # another pull may have brought it meanwhile
            os.rename(directory, layer_path(chain[n]))
    emit("")  # the progress bar goes

def pull_image(reference, platform=None):
    """From a name to a stored image: manifest, config, layers. → Image"""
    say(f"Fetching manifest for {str(reference).replace('library/', '', reference.host == DOCKER_HUB)}...")
    registry = Registry(reference)
    with partial_directory() as partial:
        found = find_manifest(registry, platform or this_platform())
        layers, blob = found["manifest"]["layers"], found["manifest"]["config"]
        if blob["size"] > MANIFEST_LIMIT:
            raise MockerError(f"the config of {reference} is larger than 4 MiB: no real one is")
        drop_damaged(blob["digest"])
        fetch_blob(registry, blob, partial)
        config = check_config(read_blob(blob["digest"]), layers, str(reference))
        fetch_layers(registry, layers, config["rootfs"]["diff_ids"], partial)
    with locked(HOME), contextlib.ExitStack() as undo:
        if not os.path.exists(store(reference.file)):
            undo.callback(os.unlink, store(reference.file))  # half of an entry is none, should the disk be full
        write_file(store(reference.file), {"name": reference.name, "version": reference.version, **found})
        write_index()
        undo.pop_all()
    return Image(reference.file)

def write_index():
    """index.json (OCI image-spec, image-layout.md), made anew from the stored images."""
    write_file(store("oci-layout"), {"imageLayoutVersion": "1.0.0"})
    manifests = []
    for image in all_images():
        name = f"{image.name}{'@' if ':' in image.version else ':'}{image.version}"
        manifests.append({**oci_manifest(image), "annotations": {"org.opencontainers.image.ref.name": name}})
    write_file(store("index.json"), {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": manifests})

def oci_manifest(image):
    """A descriptor of the image's manifest in OCI's own types, since some readers know no others."""
    if image.stored["mediaType"] == MANIFEST_TYPES[0]:
        return {key: image.stored[key] for key in ("mediaType", "digest", "size")}
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPES[0], "layers": [],
                "config": {**image.manifest["config"], "mediaType": "application/vnd.oci.image.config.v1+json"}}
    for layer in image.manifest["layers"]:
        with open(blob_path(layer["digest"]), "rb") as file:
            magic = file.read(4)
        packed = "+gzip" if magic.startswith(GZIP) else "+zstd" if magic == ZSTD else ""
        manifest["layers"].append({**layer, "mediaType": f"application/vnd.oci.image.layer.v1.tar{packed}"})
    raw = json.dumps(manifest).encode()
    save_blob(digest_of(raw), raw)
    return {"mediaType": MANIFEST_TYPES[0], "digest": digest_of(raw), "size": len(raw)}

def pull(arguments):
    """Fetch an image from Docker Hub, or from the registry that its name begins with.

    Usage:
      mocker pull [options] <name>[<tag>]

    Options:
      --platform=OS/ARCH  another machine's image, as in linux/arm64 or linux/arm/v7
      --explain           tell and show each step
      --step              the same, and wait for Enter before each one
      -q, --quiet         say nothing

    Names: hello-world   hello-world:latest   hello-world latest   library/hello-world
      127.0.0.1:5000/team/app:1.2   name@sha256:…
    """
    need_root("pull")
    platform = arguments["--platform"]
    if platform and not re.fullmatch(r"\w+/\w+(/\w+)?", platform):
        raise MockerError(f"invalid platform '{platform}': write os/architecture, as in linux/arm64 or linux/arm/v7")
    pull_image(Reference(arguments["<name>"], arguments["<tag>"]), platform)

def images(arguments):
    """List the images that are here: name, version, size of the download, file.

    Usage:
      mocker images
    """
    from tabulate import tabulate

    rows = [(image.name, image.version, f"{image.size / 2**20:.1f}MiB", image.file) for image in all_images()]
    print(tabulate(rows, headers=("name", "version", "size", "file"), tablefmt="pretty", stralign="left"))

def verify(arguments):
    """Check every image again: each blob against its digest, each layer against its diff_id.

    Usage:
      mocker verify
    """
    status = 0
    for image in all_images():
        try:
            if read_blob(image.stored["digest"]) is None:
                raise MockerError("its manifest is missing")
            for blob, diff_id, layer in zip(image.manifest["layers"], image.config["rootfs"]["diff_ids"], image.layers):
                verify_layer(blob["digest"], diff_id, layer)
            print(f"ok       {image.name}:{image.version}")
        except (MockerError, FileNotFoundError) as error:
            print(f"DAMAGED  {image.name}:{image.version}: {error}: remove it, and mocker pull {image.name}")
            status = 1
    return status

def verify_layer(digest, diff_id, layer):
    with open(blob_path(digest), "rb") as file:
        try:
            check_digest(file, digest, f"blob {digest[:19]}…")
        except MockerError:
            os.unlink(file.name)  # so that the next pull fetches it again
            raise
        file.seek(0)
        LayerStream(file, diff_id).finish()
    os.listdir(layer)

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  The kernel calls that Python does not wrap, and what containers share
# ═════════════════════════════════════════════════════════════════════════════════════════════════

CLONE_NEWNS = 0x00020000  # mount namespace: a mount table of its own
CLONE_NEWCGROUP = 0x02000000  # cgroup: its cgroup looks like the root of the tree
CLONE_NEWUTS = 0x04000000  # uts: a host name of its own
CLONE_NEWIPC = 0x08000000  # ipc: System V IPC and POSIX message queues of its own
CLONE_NEWPID = 0x20000000  # pid: process numbers of its own, from 1
CLONE_NEWNET = 0x40000000  # net: interfaces, addresses, routes and firewall of its own

MS_RDONLY = 0x1
MS_NOSUID = 0x2  # setuid bits and file capabilities count for nothing
MS_NODEV = 0x4  # device nodes can't be opened
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20  # change the flags of what is mounted
MS_BIND = 0x1000  # the same file or directory at a second place
MS_REC = 0x4000  # and all that is mounted below it
MS_PRIVATE = 0x40000  # mounts made here stay here
MS_STRICTATIME = 0x1000000
MOUNT_OPTIONS = {MS_RDONLY: "ro", MS_NOSUID: "nosuid", MS_NODEV: "nodev", MS_NOEXEC: "noexec", MS_REMOUNT: "remount",
                 MS_BIND: "bind", MS_STRICTATIME: "strictatime"}

MNT_DETACH = 2  # umount2(2): out of the tree now, gone when nobody uses it any more
AT_FDCWD = -100
OPEN_TREE_CLONE = 0x1  # open_tree(2): a copy of a mount, attached nowhere yet
AT_RECURSIVE = 0x8000  # with what is mounted below it
AT_EMPTY_PATH = 0x1000  # the descriptor itself is meant
MOUNT_ATTR_RDONLY = 0x1  # mount_setattr(2)
MOVE_MOUNT_F_EMPTY_PATH = 0x4  # move_mount(2): the descriptor itself is what moves
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, SECCOMP_MODE_FILTER = 1, 22, 24, 2

# The C library wraps no pivot_root(2), and an older one not the other three. (name: x86_64, aarch64)
SYSTEM_CALLS = {"pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442)}

def call(name, *arguments, what=None):
    """A function of the C library, or a system call that it lacks. -1 becomes a MockerError with errno."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if name in SYSTEM_CALLS:
        if os.uname().machine not in ("x86_64", "aarch64"):
            raise MockerError(f"mocker run knows the system calls of x86_64 and aarch64, not of {os.uname().machine}")
        name, arguments = "syscall", (SYSTEM_CALLS[name][os.uname().machine != "x86_64"], *arguments)
    # Numbers as long: flags use all their 32 bits.
    encoded = [os.fsencode(a) if isinstance(a, str) else ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = getattr(libc, name)(*encoded)
    if result == -1:
        number = ctypes.get_errno()
        raise MockerError(f"{what or name}: {os.strerror(number)}", number=number)
    return result

def mount(source, target, kind="", flags=0, data=""):
    """mount(2)"""
    options = ",".join([name for flag, name in MOUNT_OPTIONS.items() if flags & flag] + [data] * bool(data))
    command = shlex.join(["mount"] + ["-t", kind] * bool(kind) + ["-o", options] * bool(options) + [source, target])
    command = f"mount --make-rprivate {target}" if flags & MS_PRIVATE else command
    tell(command)
    call("mount", source, target, kind, flags, data, what=command)

def unmount(target):
    """umount2(2), lazily: it leaves the tree at once, whoever may be using it."""
    tell(f"umount -l {target}")
    call("umount2", target, MNT_DETACH, what=f"umount {target}")

def unshare(flags, names):
    """unshare(2): leave a namespace for a new one."""
    tell("unshare " + " ".join(f"--{name}" for name in names))
    call("unshare", flags, what=f"unshare {', '.join(names)}")

@contextlib.contextmanager
def coming_back(kind, flag):
    """Leave a namespace for a while; setns(2) takes an open file that stands for one."""
    handle = os.open(f"/proc/thread-self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield
    finally:
        call("setns", handle, flag)
        os.close(handle)

def seal_interpreter(argv):
    """Start again from a read-only view of Python's own program file.

    Until it becomes the image's program, /proc/self/exe of the container's first process is the host's
    Python; an image whose program is that link would get hold of the file (CVE-2019-5736; runc works
    on a copy of itself). And as a module this file is compiled only once, which makes up for the time.
    """
    if not os.statvfs("/proc/self/exe").f_flag & os.ST_RDONLY:
        with contextlib.suppress(MockerError):  # before Linux 5.12, or without the right: need_root will tell
            program = os.path.realpath("/proc/self/exe")
            handle = call("open_tree", AT_FDCWD, program, OPEN_TREE_CLONE | os.O_CLOEXEC)
            call("mount_setattr", handle, "", AT_EMPTY_PATH, struct.pack("4Q", MOUNT_ATTR_RDONLY, 0, 0, 0), 32)
            code = (f"import sys; sys.path[0] = {os.path.dirname(os.path.realpath(__file__))!r}; import mocker; "
                    "sys.exit(mocker.main(sys.argv[1:]))")
            os.execv(f"/proc/self/fd/{handle}", [sys.executable, "-c", code, *argv])

def die_with(parent):
    """Be killed when our parent dies, however it dies (man 2 PR_SET_PDEATHSIG); at once if it has."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: it is outside our pid namespace
        os._exit(1)

def write_kernel_file(path, value):
    """/proc, /sys and cgroups are told what to do by writing to their files."""
    tell(f"echo {value} > {path}")
    try:
        with open(path, "w") as file:
            file.write(str(value))
    except OSError as error:
        raise MockerError(f"echo {value} > {path}: {error.strerror}", number=error.errno) from None

def read_kernel_file(path):
    """What it says now; nothing if it is not there."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""

def need_root(command):
    """Before anything is done, not half-way through."""
    if sys.platform != "linux":
        raise MockerError("containers are made of Linux: on a Mac or Windows, docker run --privileged -it python:3")
    if os.geteuid() != 0:
        raise MockerError(f"{command} needs root, for owners, mounts and namespaces: sudo {sys.executable} {__file__} …")
    effective = int(re.search(r"CapEff:\s*(\w+)", read_kernel_file("/proc/self/status"))[1], 16)
    if command == "run" and not effective & 1 << CAPABILITIES.index("SYS_ADMIN"):
        raise MockerError("this root lacks CAP_SYS_ADMIN, as in a plain container: docker run --privileged, or a real machine")

# /run/mocker/<id>.json is a container that runs, locked by its mocker: if that dies, the lock goes.
# /run/mocker/before is what the last one puts back: {"files": {"/proc/sys/…": "0"}, "directories": […]}
SHARED = "/run/mocker"

def shared_state(**changes):
    """Read `before`, and note what is about to be changed, with what it was. The caller holds the lock."""
    state = {"files": {}, "directories": [], "subnet": None, "iptables": False}
    with contextlib.suppress(FileNotFoundError), open(f"{SHARED}/before") as file:
        state = json.load(file)
    if changes:
        state["files"] = {**changes.get("files", {}), **state["files"]}
        state["directories"] += changes.get("directories", [])
        state.update({key: value for key, value in changes.items() if key in ("subnet", "iptables")})
        write_file(f"{SHARED}/before", state)
    return state

def running_containers():
    """id → what its file says, of those that run and of those whose mocker was killed."""
    found = {}
    for name in os.listdir(SHARED) if os.path.isdir(SHARED) else ():
        if name.endswith(".json"):
            with contextlib.suppress(FileNotFoundError), open(f"{SHARED}/{name}") as file:
                try:
                    found[name[: -len(".json")]] = json.loads(file.read())
                except ValueError:  # its mocker was killed before it had written it
                    found[name[: -len(".json")]] = {}
    return found

def note_container(container):
    """What the others want to know of it, and what is to be cleared away should we be killed."""
    state = {"directory": container.directory, "remove": container.remove, "address": container.address,
             "host_mounts": "mount" not in container.parts}
    os.pwrite(container.lock, json.dumps(state).ljust(1000).encode(), 0)

def sweep():
    """What a killed mocker left is cleared away by the next command."""
    if os.geteuid() == 0 and os.path.isdir(SHARED) and os.listdir(SHARED):
        with locked(SHARED):
            for id, state in running_containers().items():
                with open(f"{SHARED}/{id}.json") as file, contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    say(f"clearing away container {id}, whose mocker was killed")
                    delete_cgroup(id)
                    delete_network(id)
                    delete_rules(f"mocker_{id}")
                    if state:
                        delete_directory(**state)
                    forget(id)

def forget(id):
    """The last container to go puts the host back as it was. The caller holds the lock."""
    os.unlink(f"{SHARED}/{id}.json")
    if not running_containers():
        restore_host()

def restore_host():
    """Undo what containers share: the bridge and its NAT, settings, empty cgroups."""
    state = shared_state()
    if os.path.isdir(f"/sys/class/net/{BRIDGE}"):
        # Each of the two has the kernel wait for those who may be reading: let them wait together.
        import threading

        deletion = threading.Thread(target=Netlink().delete_link, args=[BRIDGE])
        deletion.start()
        delete_rules("mocker")
        deletion.join()
    for path, value in state["files"].items():
        with contextlib.suppress(MockerError):
            write_kernel_file(path, value)
    for directory in reversed(state["directories"]):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    for name in os.listdir(SHARED):  # `before`, and what a killed mocker did not get to rename to it
        os.unlink(f"{SHARED}/{name}")

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Its root: overlay, /proc, /sys, /dev, pivot_root
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#  containers/<id>/lower/0, 1, …   links to the image's layers, from the top down; short names,
#                                  since overlayfs' options must fit in one page
#  containers/<id>/upper           what the container writes; work is overlayfs' own
#  containers/<id>/rootfs          where they are seen as one tree

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
         "ptmx": "pts/ptmx"}
ETC_FILES = ("hosts", "hostname", "resolv.conf")
# What /proc and /sys tell or do about the whole machine (as runc has it)
MASKED = ("/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats "
          "/proc/sched_debug /proc/scsi /sys/firmware /sys/devices/virtual/powercap").split()
READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()

@step
def leave_namespaces(container):
    """Namespaces: see other things under the same names

    mount: a mount table of its own. uts: a host name. ipc: message queues and shared memory.
    cgroup: its own cgroup looks like the root. pid came with the fork: this process is number 1.
    Only user is missing, as in Docker: root in here is root out there, held by what follows.
    See man 7 namespaces. Look: lsns; ls -l /proc/PID/ns
    """
    kinds = {"mount": CLONE_NEWNS, "uts": CLONE_NEWUTS, "ipc": CLONE_NEWIPC, "cgroup": CLONE_NEWCGROUP}
    kinds = {name: flag for name, flag in kinds.items() if name in container.parts}
    unshare(sum(kinds.values()), kinds)
    if "mount" in kinds:
        # Else our mounts would show up on the host, where systemd shares / (man 7 mount_namespaces).
        mount("none", "/", "", MS_REC | MS_PRIVATE)
    if "uts" in kinds:
        tell(f"hostname {container.hostname}")
        call("sethostname", container.hostname, len(os.fsencode(container.hostname)))
    prove("ls -l /proc/self/ns", "\n".join(f"{os.readlink(f'/proc/self/ns/{kind}'):20} the host's: {host}"
                                           for kind, host in container.host_namespaces.items()))

@step
def mount_root(container):
    """Root: an overlay of the image's layers

    The layers lie below, read-only, shared by all containers of the image; a fresh upper directory
    takes what this one writes. So the image stays clean, and a start copies nothing. nodev: no
    device node in there can be opened, wherever it came from.
    See the kernel's filesystems/overlayfs.rst. Look: ls ~/mocker/containers/ID/upper
    """
    directory, layers = container.directory, container.image.layers
    os.mkdir(f"{directory}/lower")
    for number, layer in enumerate(reversed(layers)):
        os.symlink(layer, f"{directory}/lower/{number}")
    os.chdir(f"{directory}/lower")
    try:
        mount_overlay(len(layers), directory, f"{directory}/rootfs")
    except MockerError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # An overlay can't hold another one's upper layer, and is what / is inside docker.
        say(f"{HOME} can't hold an upper layer: it goes to a tmpfs, and is lost at the end")
        os.mkdir(f"{directory}/scratch")
        mount("tmpfs", f"{directory}/scratch", "tmpfs", MS_NODEV)
        mount_overlay(len(layers), f"{directory}/scratch", f"{directory}/rootfs")
    os.chdir(f"{directory}/rootfs")
    prove("tail -1 /proc/self/mounts", read_kernel_file("/proc/self/mounts").splitlines()[-1])

def mount_overlay(count, directory, target):
    for part in "upper", "work":
        os.makedirs(f"{directory}/{part}", exist_ok=True)
    copy_metadata("0", f"{directory}/upper")  # the root directory itself is seen as the upper's
    lower = ":".join(map(str, range(count)))
    mount("overlay", target, "overlay", MS_NODEV, f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work")

@step
def take_along(container):
    """Pick up what will be needed from the host

    In the container nothing of the host can be named any more; that is the point. So its devices,
    its volumes and its three files of /etc are picked up now, as copies of their mounts.
    See man 2 open_tree.
    """
    devices = os.listdir("/dev") if container.privileged else DEVICES
    parcels = [(f"/dev/{name}", f"/dev/{name}", False) for name in devices
               if not os.path.islink(f"/dev/{name}") and not os.path.isdir(f"/dev/{name}")]
    parcels += [(f"{container.directory}/{name}", f"/etc/{name}", container.read_only) for name in ETC_FILES]
    return [(call("open_tree", AT_FDCWD, source, OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC, what=source), source, *rest)
            for source, *rest in parcels + container.volumes]

@step
def enter_root(container):
    """pivot_root: make it the root, and let go of the host's

    chroot(2) only changes where a process starts to look for `/`: the host's tree stays mounted,
    and root can climb back into it. pivot_root exchanges the root of the whole mount namespace;
    the old one is unmounted, and there is nothing left to climb to.
    See man 2 pivot_root. Look: cat /proc/PID/mountinfo
    """
    if "pivot_root" not in container.parts:
        tell("chroot .")
        os.chroot(".")
    else:
        # The old root comes to lie on top of the new one, so that no directory need be made for it.
        tell("pivot_root . .")
        call("pivot_root", ".", ".")
        unmount(".")
    os.chdir("/")
    sys.meta_path = []  # an import would now run the image's own /usr/lib/python3

@step
def mount_kernel_filesystems(container):
    """/proc, /sys and /dev, as programs expect them

    A new procfs shows the processes of this pid namespace, a new sysfs the interfaces of this
    network namespace. /dev is a small tmpfs; all mounts are nodev, but for six devices one by one.
    See man 5 proc, man 5 sysfs, OCI runtime-spec config-linux.md. Look: mount, in the container
    """
    plain, writable = MS_NOSUID | MS_NODEV | MS_NOEXEC, 0 if container.privileged else MS_RDONLY
    for target, kind, flags, options in (
        ("/dev", "tmpfs", MS_NOSUID | MS_NODEV | MS_STRICTATIME, "mode=755,size=65536k"),
        ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", plain, "mode=1777,size=65536k"),
        ("/dev/mqueue", "mqueue", plain, ""),
        ("/sys", "sysfs", plain | writable, ""),
    ):
        mount_at("shm" if target == "/dev/shm" else kind, target, kind, flags, options)
    for name, target in LINKS.items():
        os.symlink(target, f"/dev/{name}")
    mount_cgroups(container, plain, writable)

def mount_at(source, target, kind, flags, options=""):
    """At a directory that is made if it is missing; a symlink is refused, as by runc."""
    if os.path.islink(target):
        raise MockerError(f"the image's {target} is a symlink: nothing can be mounted there")
    os.makedirs(target, exist_ok=True)
    mount(source, target, kind, flags, options)

def mount_proc(container):
    """Last: while parcels are open, /proc/self/fd would lead a symlink of the image to them."""
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    if container.terminal:
        container.streams.open_terminal()

@step
def unpack_parcels(container, parcels):
    """Put what was picked up where it belongs

    Devices into /dev, volumes where -v says, and hosts, hostname and resolv.conf over the image's.
    The places are looked up in the new root, so that no symlink of the image can lead out of it.
    See man 2 move_mount.
    """
    for handle, source, target, read_only in parcels:
        target = os.path.realpath(target)  # also where a dangling symlink points
        if not os.path.exists(target):
            directory = stat.S_ISDIR(os.fstat(handle).st_mode)
            os.makedirs(target if directory else os.path.dirname(target), exist_ok=True)
            if not directory:
                os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        tell(f"mount --bind {shlex.quote(source)} {shlex.quote(target)}")
        call("move_mount", handle, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH, what=target)
        os.close(handle)
        if not target.startswith("/dev/"):
            mount("none", target, "", MS_REMOUNT | MS_BIND | MS_NODEV | MS_RDONLY * read_only)

@step(part="mask")
def mask_paths(container):
    """Masks: hide what /proc and /sys tell about the machine

    Namespaces cut procfs and sysfs only in part: settings, interrupts, keys are the whole machine's.
    What could change the machine is bound over itself read-only; what tells too much is covered.
    See OCI runtime-spec config-linux.md, "Masked Paths".
    """
    for path in () if container.privileged else filter(os.path.exists, READ_ONLY):
        mount(path, path, "", MS_BIND | MS_REC)
        mount("none", path, "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC)
    for path in () if container.privileged else filter(os.path.exists, MASKED):
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_RDONLY)
        else:
            mount("/dev/null", path, "", MS_BIND)

def write_etc(container):
    """hosts, hostname and resolv.conf, as docker writes them, to be mounted over the image's."""
    hosts = ("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n"
             "ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
    resolver = read_kernel_file("/etc/resolv.conf")
    if container.network == "host":
        hosts = read_kernel_file("/etc/hosts") + "\n"
    else:
        hosts += f"{container.address}\t{container.hostname}\n" if container.address else ""
        loopback = r"^\s*nameserver\s+(127\.|::1).*\n?"  # the host's own, as systemd-resolved: not to be reached
        if re.search(loopback, resolver, re.M):
            resolver = read_kernel_file("/run/systemd/resolve/resolv.conf") or re.sub(loopback, "", resolver, flags=re.M)
        if "nameserver" not in resolver:
            resolver += "\nnameserver 8.8.8.8\nnameserver 8.8.4.4"
    for name, text in zip(ETC_FILES, (hosts, container.hostname + "\n", resolver.strip() + "\n")):
        with open(f"{container.directory}/{name}", "w") as file:
            file.write(text)

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Its network: bridge, veth pair, address, route, NAT
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#   the host                                         the container
#   eth0 ── NAT ── mocker0 10.0.0.1 ── veth0_1a2b3c4d ═══ veth1 10.0.0.3, default via 10.0.0.1

BRIDGE = "mocker0"
SUBNETS = ["10.0.0"] + [f"10.0.{n}" for n in range(1, 8)] + [f"172.30.{n}" for n in range(8)] + ["192.168.213"]
NETNS = "/run/netns"  # where ip-netns(8) finds namespaces by name
# As docker sets them for a container: it may ping, bind any port, and has no IPv6.
NET_SYSCTLS = {"ipv4/ping_group_range": "0 2147483647", "ipv4/ip_unprivileged_port_start": "0",
               "ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"}

class Netlink:
    """A conversation with the kernel about links, addresses and routes: man 7 rtnetlink."""

    NEW_LINK, DELETE_LINK, NEW_ADDRESS, NEW_ROUTE = 16, 17, 20, 24
    REQUEST, ACKNOWLEDGE, CREATE, EXCLUSIVE = 0x1, 0x4, 0x400, 0x200

    def __init__(self):
        """The socket belongs to the network namespace in which it is made, and stays there."""
        import importlib.util
        import socket
        import types

        if "pyroute2" not in sys.modules:
            # pyroute2 imports all that it has, which takes longer than a container to start; we
            # need its messages alone, and give them an empty package to live in.
            spec = importlib.util.find_spec("pyroute2")
            if spec is None:
                raise ModuleNotFoundError("pyroute2", name="pyroute2")
            package = sys.modules["pyroute2"] = types.ModuleType("pyroute2")
            package.__path__ = spec.submodule_search_locations
        from pyroute2.netlink.rtnl import ifaddrmsg, ifinfmsg, rtmsg

        self.link, self.address, self.route = ifinfmsg.ifinfmsg, ifaddrmsg.ifaddrmsg, rtmsg.rtmsg
        self.index_of = socket.if_nametoindex
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self.socket.bind((0, 0))

    def ask(self, command, message, kind, mode, attributes, **fields):
        """One request, and the kernel's answer to it: done, or a MockerError."""
        tell(command)
        request = message()
        request["header"] = {"type": kind, "flags": self.REQUEST | self.ACKNOWLEDGE | mode, "sequence_number": 1, "pid": 0}
        for name, value in {**fields, "attrs": attributes}.items():
            request[name] = value
        request.encode()
        self.socket.send(request.data)
        (number,) = struct.unpack_from("i", self.socket.recv(65536), 16)
        if number:
            raise MockerError(f"{command}: {os.strerror(-number)}", number=-number)

    def create_link(self, command, name, *attributes):
        self.ask(command, self.link, self.NEW_LINK, self.CREATE | self.EXCLUSIVE, [("IFLA_IFNAME", name), *attributes])

    def add_bridge(self, name, mac):
        """A switch in software. Without a MAC of its own it would take one of its ports', and change it
        when that port goes, under the eyes of those who know it."""
        self.create_link(f"ip link add {name} address {mac} type bridge", name, ("IFLA_ADDRESS", mac),
                         ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]}))

    def add_veth(self, name, peer, netns, handle):
        """Two interfaces with a wire between them: what goes in here comes out there (man 4 veth)."""
        there = {"attrs": [("IFLA_IFNAME", peer), ("IFLA_NET_NS_FD", handle)]}
        pair = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", there)]})]}
        self.create_link(f"ip link add {name} type veth peer name {peer} netns {netns}", name, ("IFLA_LINKINFO", pair))

    def set_up(self, name, master=None):
        attributes = [("IFLA_IFNAME", name)] + ([("IFLA_MASTER", self.index_of(master))] if master else [])
        self.ask(f"ip link set {name} {f'master {master} ' if master else ''}up", self.link, self.NEW_LINK, 0, attributes,
                 flags=1, change=1)

    def add_address(self, name, address):
        self.ask(f"ip address add {address}/24 dev {name}", self.address, self.NEW_ADDRESS, self.CREATE | self.EXCLUSIVE,
                 [("IFA_LOCAL", address), ("IFA_ADDRESS", address)], family=2, prefixlen=24, index=self.index_of(name))

    def add_default_route(self, gateway):
        self.ask(f"ip route add default via {gateway}", self.route, self.NEW_ROUTE, self.CREATE | self.EXCLUSIVE,
                 [("RTA_GATEWAY", gateway)], family=2, table=254, proto=3, type=1)

    def delete_link(self, name):
        self.ask(f"ip link delete {name}", self.link, self.DELETE_LINK, 0, [("IFLA_IFNAME", name)])

@step(part="net")
def create_network(container, undo):
    """Network: a namespace, and a wire into it

    A network namespace has interfaces, routes and a firewall of its own, at first only a loopback
    that is down. A veth pair is a wire with two ends: veth0 stays here, on the bridge mocker0;
    veth1 goes in, and gets an address and a default route. NAT lets what the container sends leave
    under this machine's address.
    See man 7 network_namespaces, man 4 veth. Look: ip netns; ip -n NAME address; bridge link
    """
    if container.network != "bridge":
        return
    id, host = container.id, Netlink()
    undo.callback(delete_network, id)
    with coming_back("net", CLONE_NEWNET):
        create_netns(id)
        inside = Netlink()
        container.netns = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with locked(SHARED):
        subnet = create_bridge(host)
        taken = {state.get("address") for state in running_containers().values()}
        free = [f"{subnet}.{n}" for n in range(3, 255) if f"{subnet}.{n}" not in taken]
        if not free:
            raise MockerError(f"all addresses of {subnet}.0/24 are in use: stop a container, or run with --network=none")
        container.address, container.gateway = free[0], f"{subnet}.1"
        note_container(container)
    host.add_veth(f"veth0_{id}", "veth1", f"mocker_{id}", container.netns)
    host.set_up(f"veth0_{id}", master=BRIDGE)
    with coming_back("net", CLONE_NEWNET):
        call("setns", container.netns, CLONE_NEWNET)
        inside.add_address("veth1", container.address)
        inside.set_up("veth1")
        inside.add_default_route(container.gateway)
        prove(f"ip netns exec mocker_{id} cat /proc/net/route", read_kernel_file("/proc/thread-self/net/route"))
    publish_ports(container, undo)

def create_netns(id):
    """Move into a new one, and give it a name by mounting it on a file: else it would go with us."""
    before = os.readlink("/proc/thread-self/ns/net")
    os.makedirs(NETNS, exist_ok=True)
    os.close(os.open(f"{NETNS}/mocker_{id}", os.O_CREAT | os.O_EXCL, 0o444))
    tell(f"ip netns add mocker_{id}")
    call("unshare", CLONE_NEWNET, what="unshare net")
    call("mount", "/proc/thread-self/ns/net", f"{NETNS}/mocker_{id}", "", MS_BIND, "", what=f"mount {NETNS}/mocker_{id}")
    prove("readlink /proc/self/ns/net, before and after", f"{before}\n{os.readlink('/proc/thread-self/ns/net')}")
    set_up_loopback()

def set_up_loopback():
    """By an old ioctl(2), which takes no library (man 7 netdevice); and docker's settings."""
    import socket

    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    tell("ip link set lo up")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))
    for name, value in NET_SYSCTLS.items():
        if os.path.exists(f"/proc/sys/net/{name}"):
            write_kernel_file(f"/proc/sys/net/{name}", value)

@step(part="net")
def join_network(container):
    """Join the network namespace

    setns(2) takes an open file that stands for a namespace: here the one that has a name. With
    --network=none it is a new one instead, of which nobody else knows.
    See man 2 setns. Look: ip netns identify PID
    """
    if container.network == "none":
        unshare(CLONE_NEWNET, ["net"])
        set_up_loopback()
    elif container.network == "bridge":
        tell(f"nsenter --net={NETNS}/mocker_{container.id}")
        call("setns", container.netns, CLONE_NEWNET)
    interfaces = read_kernel_file("/proc/thread-self/net/dev").splitlines()[2:]
    prove("cut -d: -f1 /proc/net/dev", " ".join(line.split(":")[0].strip() for line in interfaces))

def choose_subnet():
    """10.0.0, or the next that no route of this machine overlaps but the default one."""
    taken = []
    for line in read_kernel_file("/proc/net/route").splitlines()[1:]:
        # Addresses as the kernel keeps them: 10.0.1.0 is 0001000A on a little-endian machine.
        _, network, _, _, _, _, _, mask, *_ = line.split()
        taken.append([struct.unpack("!I", struct.pack("=I", int(text, 16)))[0] for text in (network, mask)])
    for subnet in SUBNETS:
        (first,) = struct.unpack("!I", bytes(map(int, f"{subnet}.0".split("."))))
        if not any(mask and (first & mask == network or network & 0xFFFFFF00 == first) for network, mask in taken):
            return subnet
    raise MockerError(f"no free subnet: {', '.join(SUBNETS)} are all in use here: run with --network=none")

def create_bridge(netlink):
    """mocker0 with its address, forwarding and NAT: made for the first container, used by all. → 10.0.0"""
    subnet = shared_state()["subnet"]
    if subnet and os.path.isdir(f"/sys/class/net/{BRIDGE}"):
        return subnet
    subnet = choose_subnet()
    if subnet != SUBNETS[0]:
        say(f"{SUBNETS[0]}.0/24 is in use on this machine: taking {subnet}.0/24")
    forward = "/proc/sys/net/ipv4/ip_forward"
    shared_state(subnet=subnet, files={forward: read_kernel_file(forward)})
    netlink.add_bridge(BRIDGE, "02:42:" + ":".join(f"{int(part):02x}" for part in f"{subnet}.1".split(".")))
    netlink.add_address(BRIDGE, f"{subnet}.1")
    netlink.set_up(BRIDGE)
    write_kernel_file(forward, "1")
    # What leaves the bridge goes out under the host's address, or the answers would not find back.
    rules = [("postrouting", f'ip saddr {subnet}.0/24 oifname != "{BRIDGE}" masquerade',
              f"-s {subnet}.0/24 ! -o {BRIDGE} -j MASQUERADE")]
    tool = add_rules("mocker", rules)
    shared_state(iptables=tool == "iptables")
    if tool is None:
        say("no NAT here, since neither nft nor iptables works: the container reaches this machine, but not beyond")
    return subnet

def delete_network(id):
    """Its namespace, its wire, its ports. What is gone already is no error."""
    if os.path.isdir(f"/sys/class/net/veth0_{id}"):
        Netlink().delete_link(f"veth0_{id}")  # now, and not when the kernel gets round to it
    if os.path.exists(f"{NETNS}/mocker_{id}"):
        with contextlib.suppress(MockerError):
            unmount(f"{NETNS}/mocker_{id}")
        os.unlink(f"{NETNS}/mocker_{id}")
        with contextlib.suppress(OSError):
            os.rmdir(NETNS)

# ── The firewall: nft(8), or iptables(8) where it is missing ───────────────────────────────────────

def add_rules(table, rules):
    """Add (chain, rule for nft, the same for iptables) to the NAT, under a name. → the tool that did it, or None"""
    tool = "nft"
    hooks = {"prerouting": "prerouting priority -100", "output": "output priority -100",
             "postrouting": "postrouting priority 100"}
    chains = "".join(f"chain {chain} {{ type nat hook {hooks[chain]}; "
                     + "".join(f"{rule}; " for hook, rule, _ in rules if hook == chain) + "}; "
                     for chain in dict.fromkeys(chain for chain, _, _ in rules))
    if run_tool(["nft", "-f", "-"], f"table ip {table} {{ {chains}}}") is None:
        tool = "iptables"
        mark = ["-m", "comment", "--comment", table]
        for chain, _, rule in rules:
            if run_tool(["iptables", "-w", "-t", "nat", "-A", chain.upper(), *rule.split(), *mark]) is None:
                return None
    if table == "mocker" and "policy drop" in (run_tool(["nft", "list", "chain", "ip", "filter", "FORWARD"]) or ""):
        tool = "iptables"
        for direction in "-i", "-o":  # Docker is here, and forwards nothing but its own
            run_tool(["iptables", "-w", "-I", "FORWARD", direction, BRIDGE, "-j", "ACCEPT", "-m", "comment", "--comment", table])
    return tool

def delete_rules(table):
    """Of all tools that may have made them."""
    if run_tool(["nft", "delete", "table", "ip", table]) is not None and not shared_state()["iptables"]:
        return
    for kind in "nat", "filter":
        if table == "mocker" or kind == "nat":
            for rule in (run_tool(["iptables", "-w", "-t", kind, "-S"]) or "").splitlines():
                if re.search(rf"--comment {table}\b", rule):
                    run_tool(["iptables", "-w", "-t", kind, "-D", *shlex.split(rule)[1:]])

def publish_ports(container, undo):
    """-p: what arrives at a port of this machine is sent on to the container, and the answers back."""
    import socket

    rules = []
    for address, outer, inner, protocol in container.ports:
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        holder = undo.enter_context(socket.socket(socket.AF_INET, kind))  # holds the port against others
        try:
            holder.bind((address, outer))
            holder.listen(1) if protocol == "tcp" else None
        except OSError as error:
            raise MockerError(f"port {address}:{outer} can't be published ({error.strerror}): choose another") from None
        nft, iptables = f"ip daddr {address}", f"-d {address}"
        if address == "0.0.0.0":
            nft, iptables = "fib daddr type local", "-m addrtype --dst-type LOCAL"
        target = f"{container.address}:{inner}"
        rules += [(chain, f"{nft} {protocol} dport {outer} dnat to {target}",
                   f"{iptables} -p {protocol} --dport {outer} -j DNAT --to-destination {target}")
                  for chain in ("prerouting", "output")]
    for source in ("127.0.0.0/8", f"{container.gateway}/24") if rules else ():  # this machine, and a neighbour
        rules.append(("postrouting", f'oifname "{BRIDGE}" ct status dnat ip saddr {source} ip daddr {container.address} masquerade',
                      f"-o {BRIDGE} -m conntrack --ctstate DNAT -s {source} -d {container.address} -j MASQUERADE"))
    if rules:
        # From 127.0.0.1 a packet may leave by the bridge only if the bridge says so.
        write_kernel_file(f"/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet", "1")
        undo.callback(delete_rules, f"mocker_{container.id}")
        if not add_rules(f"mocker_{container.id}", rules):
            raise MockerError("ports can't be published, since neither nft nor iptables works here: install nftables")

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Its cgroup: how much it may use
# ═════════════════════════════════════════════════════════════════════════════════════════════════
#
#  v2, one tree:  /sys/fs/cgroup/mocker/<id>/{cgroup.procs,memory.max,pids.max,cpu.max,cgroup.kill}
#  v1, a tree for each controller:  /sys/fs/cgroup/{memory,cpu,pids,…}/root/mocker_<id>/tasks

CGROUP = "/sys/fs/cgroup"

def cgroup_version():
    """2 if the unified tree is mounted there, 1 for a tree of controllers, 0 for none."""
    kinds = dict(line.split()[1:3] for line in read_kernel_file("/proc/self/mounts").splitlines())
    if kinds.get(CGROUP) == "cgroup2":
        return 2
    return 1 if kinds.get(f"{CGROUP}/memory") == "cgroup" else 0

def limits_of(container, version):
    """The limits asked for → file name and text, as this cgroup version spells them."""
    memory, cpus, pids = container.memory, container.cpus, container.pids_limit
    period = 100_000  # microseconds
    if version == 2:
        wanted = {"memory.max": memory, "memory.swap.max": memory, "pids.max": pids,
                  "cpu.max": cpus and f"{int(cpus * period)} {period}"}
    else:
        wanted = {"memory.memsw.limit_in_bytes": memory and 2 * memory, "pids.max": pids,
                  "cpu.cfs_quota_us": cpus and int(cpus * period)}
    return {name: str(value) for name, value in wanted.items() if value is not None}

@step(part="cgroup")
def create_cgroup(container, undo):
    """Cgroup: how much the container may use

    Namespaces limit what a process sees; a control group limits what it uses: memory, processes,
    CPU time. It is a directory in /sys/fs/cgroup, and its files are the limits. It also is a list
    of all that belongs to the container, so that nothing is forgotten at the end. It isolates
    nothing: this is the part that "Docker is just cgroups" is about.
    See man 7 cgroups. Look: cat /sys/fs/cgroup/mocker/ID/*.max
    """
    version = container.cgroup_version
    if version == 0:
        raise MockerError("no cgroup file system is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup, or let systemd mount it")
    undo.callback(delete_cgroup, container.id)
    with locked(SHARED):
        container.cgroups = create_cgroup_v2(container) if version == 2 else create_cgroup_v1(container)
    for name, value in limits_of(container, version).items():
        for directory in container.cgroups:
            if os.path.exists(f"{directory}/{name}"):
                write_kernel_file(f"{directory}/{name}", value)
                prove(f"cat {directory}/{name}", read_kernel_file(f"{directory}/{name}"))
                break
        else:
            if name not in ("memory.swap.max", "memory.memsw.limit_in_bytes"):  # without swap there is none to limit
                raise MockerError(f"this machine's cgroups have no {name}: enable the controller, or leave the limit out")

def create_cgroup_v2(container):
    """/sys/fs/cgroup/mocker/<id>. A parent must pass each controller on (man 7 cgroups, "subtree_control")."""
    parent, own = f"{CGROUP}/mocker", f"{CGROUP}/mocker/{container.id}"
    if not os.path.isdir(parent):
        shared_state(directories=[parent])
        tell(f"mkdir {parent}")
        os.mkdir(parent)
    for directory in CGROUP, parent:
        enable_controllers(directory)
    tell(f"mkdir {own}")
    os.mkdir(own)
    return [own]

def enable_controllers(directory):
    """Write +memory +pids +cpu, as far as they are there, into a directory's subtree_control."""
    path = f"{directory}/cgroup.subtree_control"
    there = read_kernel_file(f"{directory}/cgroup.controllers").split()
    missing = [c for c in ("memory", "pids", "cpu") if c in there and c not in read_kernel_file(path).split()]
    if not missing:
        return
    shared_state(files={path: " ".join(f"-{controller}" for controller in missing)})
    try:
        write_kernel_file(path, " ".join(f"+{controller}" for controller in missing))
    except MockerError as error:
        if error.errno != errno.EBUSY:
            raise
        # A cgroup with processes can't pass controllers on, and in a container the root of the tree
        # is such a one: its processes move aside, as Docker's own docker-in-docker does it.
        aside = f"{CGROUP}/mocker_aside"
        os.makedirs(aside, exist_ok=True)
        shared_state(directories=[aside])
        for pid in read_kernel_file(f"{directory}/cgroup.procs").split():
            with contextlib.suppress(MockerError):
                write_kernel_file(f"{aside}/cgroup.procs", pid)
        write_kernel_file(path, " ".join(f"+{controller}" for controller in missing))

def create_cgroup_v1(container):
    """The `cgroups` package does memory and cpu; pids and the rest are made beside them."""
    import logging

    import cgroups

    logging.getLogger("cgroups.user").setLevel(logging.ERROR)
    hierarchies = [f"{CGROUP}/{name}" for name in os.listdir(CGROUP) if os.path.isdir(f"{CGROUP}/{name}")]
    for directory in hierarchies:  # the package makes a directory in every one, and leaves it
        if not os.path.isdir(f"{directory}/root"):
            shared_state(directories=[f"{directory}/root"])
    tell(f"mkdir {CGROUP}/memory/root/mocker_{container.id} {CGROUP}/cpu/root/mocker_{container.id}")
    group = cgroups.Cgroup(f"mocker_{container.id}", user="root")
    if container.memory:
        group.set_memory_limit(container.memory, "bytes")
        prove("cat memory.limit_in_bytes", str(group.memory_limit) + " MiB")
    own = [f"{directory}/root/mocker_{container.id}" for directory in hierarchies if controls_v1(directory)]
    for directory in own:
        os.makedirs(directory, exist_ok=True)
    return own

def controls_v1(directory):
    """Not the v2 tree of a hybrid machine, and not cpuset, whose groups take nobody until told which CPUs."""
    return os.path.exists(f"{directory}/tasks") and not os.path.exists(f"{directory}/cpuset.cpus")

@step(part="cgroup")
def join_cgroup(container):
    """Join the cgroup, while /sys/fs/cgroup is still in sight

    A process is moved by writing its number into cgroup.procs; 0 is whoever writes. All that it
    forks later is born in there.
    See man 7 cgroups. Look: cat /proc/PID/cgroup
    """
    for directory in container.cgroups:
        write_kernel_file(f"{directory}/cgroup.procs", 0)
    prove("cat /proc/self/cgroup", read_kernel_file("/proc/self/cgroup"))

def mount_cgroups(container, plain, writable):
    """/sys/fs/cgroup; by the cgroup namespace its root is the container's own group."""
    if not container.cgroups or not os.path.isdir(CGROUP):
        return
    if container.cgroup_version == 2:
        mount("cgroup", CGROUP, "cgroup2", plain | writable)
        return
    mount("tmpfs", CGROUP, "tmpfs", plain, "mode=755")
    for directory in container.cgroups:
        name = directory.split("/")[4]
        os.mkdir(f"{CGROUP}/{name}")
        mount("cgroup", f"{CGROUP}/{name}", "cgroup", plain | writable, f"{'name=' * (name == 'systemd')}{name}")
    mount("none", CGROUP, "", MS_REMOUNT | plain | writable)

def delete_cgroup(id):
    """End what is still in it, and remove it. The kernel may need a moment to let the dead go."""
    import time

    parents = [f"{CGROUP}/mocker/{id}"] + [f"{CGROUP}/{name}/root/mocker_{id}" for name in os.listdir(CGROUP)]
    for directory in filter(os.path.isdir, parents):
        deadline = time.monotonic() + 5
        while os.path.isdir(directory):
            for pid in read_kernel_file(f"{directory}/cgroup.procs").split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            try:
                if os.path.exists(f"{directory}/memory.force_empty"):  # v1 keeps a group for its cached pages' sake
                    write_kernel_file(f"{directory}/memory.force_empty", 0)
                os.rmdir(directory)
            except (OSError, MockerError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Its privileges: user, capabilities, system calls
# ═════════════════════════════════════════════════════════════════════════════════════════════════

# Root's power in pieces (man 7 capabilities); a capability's number is its place in this list.
CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE
    NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT
    SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE
    AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ
    PERFMON BPF CHECKPOINT_RESTORE
""".split()

# What Docker leaves to a container's root: enough to install packages and run servers.
DEFAULT_CAPABILITIES = """
    CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT
    MKNOD AUDIT_WRITE SETFCAP
""".split()

# The system calls that Docker refuses, and the capabilities of which any gives them back ("-": none).
# "name x86_64/aarch64", or one number where both have the same; nothing after "/": aarch64 lacks it.
REFUSED_CALLS = """
    SYS_ADMIN         mount 165/40 umount2 166/39 open_tree 428 move_mount 429 fsopen 430 fsconfig 431 fsmount 432
    SYS_ADMIN         fspick 433 mount_setattr 442 unshare 272/97 setns 308/268 clone3 435 sethostname 170/161
    SYS_ADMIN         setdomainname 171/162 quotactl 179/60 quotactl_fd 443 fanotify_init 300/262
    SYS_ADMIN         name_to_handle_at 303/264 lookup_dcookie 212/18
    SYS_ADMIN|BPF     bpf 321/280
    SYS_ADMIN|PERFMON perf_event_open 298/241
    SYS_ADMIN|SYSLOG  syslog 103/116
    SYS_PTRACE        process_vm_readv 310/270 process_vm_writev 311/271 kcmp 312/272 pidfd_getfd 438
    SYS_PTRACE        process_madvise 440
    SYS_MODULE        init_module 175/105 finit_module 313/273 delete_module 176/106
    SYS_TIME          settimeofday 164/170 clock_settime 227/112
    SYS_NICE          mbind 237/235 set_mempolicy 238/237 get_mempolicy 239/236
    SYS_BOOT          reboot 169/142
    SYS_RAWIO         iopl 172/ ioperm 173/
    SYS_PACCT         acct 163/89
    SYS_TTY_CONFIG    vhangup 153/58
    DAC_READ_SEARCH   open_by_handle_at 304/265
    -                 pivot_root 155/41 swapon 167/224 swapoff 168/225 kexec_load 246/104 kexec_file_load 320/294
    -                 add_key 248/217 request_key 249/218 keyctl 250/219 userfaultfd 323/282 move_pages 279/239
    -                 migrate_pages 256/238 pkey_mprotect 329/288 pkey_alloc 330/289 pkey_free 331/290
    -                 io_uring_setup 425 io_uring_enter 426 io_uring_register 427
    -                 uselib 134/ ustat 136/ sysfs 139/ _sysctl 156/ create_module 174/ get_kernel_syms 177/
    -                 query_module 178/ nfsservctl 180/42 getpmsg 181/ putpmsg 182/ afs_syscall 183/ tuxcall 184/
    -                 security 185/ vserver 236/
"""
LAST_CALL = 449  # futex_waitv, Linux 5.16: later calls are unknown to the profile of Docker 20.10
CLONE_NEW = 0x7E020000  # all CLONE_NEW… flags: a thread or a process may be made, but no namespace
PERSONALITIES = 0, 8, 0x20000, 0x20008, 0xFFFFFFFF  # Linux, 32-bit Linux, each with old uname; "which?"
FAMILIES = 38, 40  # AF_ALG: cryptography in the kernel; AF_VSOCK: a line to the hypervisor

def seccomp_filter(capabilities):
    """The filter as a program for the kernel's oldest virtual machine, BPF: load, compare, return.

    Each instruction is (code, skip if true, skip if false, value). There is one register, and the
    data is {int number; u32 architecture; u64 instruction_pointer; u64 arguments[6];}.
    See the kernel's userspace-api/seccomp_filter.rst, and man 2 seccomp.
    """
    x86 = os.uname().machine == "x86_64"
    equal, at_least, any_bit = 0x15, 0x35, 0x45

    def load(offset):
        return struct.pack("HBBI", 0x20, 0, 0, offset)

    def unless(test, value, skip):
        return struct.pack("HBBI", test, 0, skip, value)

    def answer(value):
        return struct.pack("HBBI", 0x06, 0, 0, value)

    allow, refuse, unknown = answer(0x7FFF0000), answer(0x00050000 | errno.EPERM), answer(0x00050000 | errno.ENOSYS)
    architecture, number, first_argument = load(4), load(0), load(16)
    # The 32-bit entry has other numbers; those of x32 begin at 2^30. Both are closed here.
    program = [architecture, struct.pack("HBBI", equal, 1, 0, 0xC000003E if x86 else 0xC00000B7), unknown,
               number, unless(at_least, LAST_CALL + 1, 1), unknown]
    for unlocking, *calls in map(str.split, REFUSED_CALLS.strip().splitlines()):
        if not set(unlocking.split("|")) & set(capabilities):
            for name, numbers in zip(calls[::2], calls[1::2]):
                if numbers.split("/")[0 if x86 else -1]:
                    # clone3 keeps its flags where no filter can look; told ENOSYS, the C library takes clone.
                    program += [unless(equal, int(numbers.split("/")[0 if x86 else -1]), 1), unknown if name == "clone3" else refuse]
    if "SYS_ADMIN" not in capabilities:
        program += [unless(equal, 56 if x86 else 220, 4), first_argument, unless(any_bit, CLONE_NEW, 1), refuse, allow]
    program += [unless(equal, 41 if x86 else 198, 2 + 2 * len(FAMILIES)), first_argument]  # socket
    for family in FAMILIES:
        program += [unless(equal, family, 1), refuse]
    program += [allow, unless(equal, 135 if x86 else 92, 2 + 2 * len(PERSONALITIES)), first_argument]
    for personality in PERSONALITIES:
        program += [unless(equal, personality, 1), allow]
    return b"".join(program + [refuse, allow])

def own_capabilities():
    """The names of the capabilities in our bounding set: nobody can hand on more."""
    bounding = int(re.search(r"CapBnd:\s*(\w+)", read_kernel_file("/proc/self/status"))[1], 16)
    return [name for number, name in enumerate(CAPABILITIES) if bounding & 1 << number]

def choose_capabilities(add, drop, privileged):
    """--cap-add, --cap-drop and --privileged → the capabilities that are kept, as docker counts them."""
    add, drop = ([name.upper().removeprefix("CAP_") for name in names] for names in (add, drop))
    for name in add + drop:
        if name not in [*CAPABILITIES, "ALL"]:
            raise MockerError(f"unknown capability '{name}': write one of man 7 capabilities, or ALL")
    if "ALL" in add or privileged:
        kept = set(CAPABILITIES) - set(drop)
    else:
        kept = (set() if "ALL" in drop else set(DEFAULT_CAPABILITIES) - set(drop)) | set(add)
    return [name for name in own_capabilities() if name in kept]

@step(part="caps")
def drop_capabilities(container):
    """Capabilities: root, but not the machine's root

    Root inside is root outside, too. So its power is cut down to 14 capabilities of about 40, and
    for good: what is dropped from the bounding set can't come back through any program.
    See man 7 capabilities. Look: grep Cap /proc/PID/status; capsh --decode=…
    """
    dropped = [name for name in own_capabilities() if name not in container.capabilities]
    tell("setpriv --bounding-set " + (",".join(f"-{name.lower()}" for name in dropped) or "+all"))
    for name in dropped:
        call("prctl", PR_CAPBSET_DROP, CAPABILITIES.index(name), 0, 0, 0, what=f"drop {name}")

@step(part="seccomp")
def filter_system_calls(container):
    """Seccomp: refuse the system calls that no container needs

    Every system call is a door into the one kernel that all containers share. A small program,
    run by the kernel before each call, keeps some of them shut: mounts, modules, clocks, keys, and
    calls so rare that they mainly have bugs.
    See man 2 seccomp. Look: grep Seccomp /proc/PID/status
    """
    if not container.privileged:
        install_filter(seccomp_filter(container.capabilities if "caps" in container.parts else CAPABILITIES))

def install_filter(program):
    """prctl(PR_SET_SECCOMP): from here on, for this process and all that it starts."""
    tell(f"prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, a program of {len(program) // 8} instructions)")
    import ctypes

    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0, what="seccomp")

@step
def become_user(container):
    """User: take the image's user, and only its groups

    The ids come from the image's /etc/passwd and /etc/group: to the kernel users are numbers. What
    is left of root's capabilities goes when the user is another; root keeps the 14.
    See man 7 credentials. Look: ps -o user,pid,args
    """
    user = User(container.user)
    container.environment.setdefault("HOME", user.home)
    for stream in 0, 1, 2:
        with contextlib.suppress(OSError):
            os.fchown(stream, user.uid, user.gid)  # so that /dev/stdout can be opened again
    if "user" in container.parts:
        tell(f"setpriv --reuid {user.uid} --regid {user.gid} --groups {','.join(map(str, user.groups)) or 'none'}")
        os.setgroups(user.groups)
        os.setresgid(user.gid, user.gid, user.gid)
        os.setresuid(user.uid, user.uid, user.uid)
    if "caps" in container.parts and os.geteuid() == 0:
        set_capabilities(container.capabilities)
    # The kernel forgets this when the user changes (man 2 PR_SET_PDEATHSIG).
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    prove("grep -E '^(Uid|Groups|Cap|Seccomp)' /proc/self/status",
          "\n".join(re.findall(r"^(?:Uid|Groups|Cap|Seccomp:).*", read_kernel_file("/proc/self/status"), re.M)))

def set_capabilities(names):
    """capset(2): effective and permitted, and none to be inherited; the bits come in two halves."""
    bits = sum(1 << CAPABILITIES.index(name) for name in names)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    version_3 = 0x20080522
    call("capset", struct.pack("Ii", version_3, 0), struct.pack("6I", low, low, 0, high, high, 0))

class User:
    """Who the container runs as: -u, or the image's User, looked up in the image's own files."""

    def __init__(self, text):
        name, _, group = text.partition(":")
        accounts, groups = read_colons("/etc/passwd", 6), read_colons("/etc/group", 3)
        name = name or "0"
        account = find_entry(accounts, name)
        if account is None and not is_id(name):
            raise MockerError(f"unable to find user {name}: no matching entries in passwd file")
        self.uid = int(account[2] if account else name)
        self.gid = int(account[3]) if account else 0
        self.home = account[5] if account else "/"
        self.groups = [self.gid]
        if group:
            entry = find_entry(groups, group)
            if entry is None and not is_id(group):
                raise MockerError(f"unable to find group {group}: no matching entries in group file")
            self.gid = int(entry[2] if entry else group)
            self.groups = [self.gid]
        elif account:
            self.groups += [int(entry[2]) for entry in groups if account[0] in entry[3].split(",") and int(entry[2]) != self.gid]
        if not all(0 <= number < 2**31 for number in (self.uid, *self.groups)):
            raise MockerError("uids and gids must be in range 0-2147483647")

def is_id(text):
    return re.fullmatch(r"[0-9]+", text, re.ASCII) is not None

def find_entry(entries, key):
    """By name, or by number if the key is one: then no name counts."""
    return next((entry for entry in entries if (int(entry[2]) == int(key) if is_id(key) else entry[0] == key)), None)

def read_colons(path, count):
    """Lines of /etc/passwd or /etc/group, as lists of fields. Any file may stand there: a FIFO, or a kernel's."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return []
    text = os.read(handle, 1 << 20).decode(errors="replace") if stat.S_ISREG(os.fstat(handle).st_mode) else ""
    os.close(handle)
    entries = [line.split(":") for line in text.splitlines()]
    return [entry + [""] for entry in entries if len(entry) >= count and is_id(entry[2]) and (count == 3 or is_id(entry[3]))]

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  run: the chapters above, in order
# ═════════════════════════════════════════════════════════════════════════════════════════════════

NAMESPACES = ("mnt", "uts", "ipc", "pid", "net", "cgroup", "user")
PARTS = ("net", "pid", "mount", "uts", "ipc", "cgroup", "overlay", "pivot_root", "caps", "seccomp", "mask", "user")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

def run(arguments):
    """Run a command in a container. The image is pulled if it is not here.

    Usage:
      mocker run [options] [-e VAR]... [-v VOLUME]... [-p PORT]...
                 [--cap-add=CAP]... [--cap-drop=CAP]... [--name=N] [--hostname=N]
                 [--network=N] [--cpus=N] [--entrypoint=PROGRAM] [--pids-limit=N]
                 [--read-only] [--privileged] [--explain] [--step] [--rm]
                 <name> [<command>...]

    Options:
      -i, --interactive   keep stdin open          --rm          remove it later
      -t, --tty           give it a terminal       --name        for later commands
      -q, --quiet         only the container talks --hostname    instead of its id
      -e, --env VAR       K=V, or K from here      --entrypoint  not the image's
      -w, --workdir DIR   start there              --network     bridge, none, host
      -u, --user USER     name or uid [:group]     --read-only   root can't change
      -v, --volume VOLUME host:container[:ro]      --privileged  nearly no limits
      -p, --publish PORT  [ip:]host:container[/udp]
      -m, --memory SIZE   as in 512m               --cpus, --pids-limit  a number
      --explain: tell and show each step. --step: and wait for Enter before it.
    """
    need_root("run")
    container = Container(find_image(arguments["<name>"]), arguments)
    with contextlib.ExitStack() as undo, undisturbed_end():
        create_container(container, undo)
        create_cgroup(container, undo)
        create_network(container, undo)
        process = start(container, undo)
        status = attend(container, process)
        say("Finalizing")
    say("done")
    return status

def inside(container):
    """The same story, told by the container's first process on its way in."""
    join_cgroup(container)
    join_network(container)
    leave_namespaces(container)
    mount_root(container)
    parcels = take_along(container)
    enter_root(container)
    mount_kernel_filesystems(container)
    unpack_parcels(container, parcels)
    mount_proc(container)
    mask_paths(container)
    enter_working_directory(container)
    drop_capabilities(container)
    filter_system_calls(container)
    become_user(container)
    execute(container)

class Container:
    """What is to be run, and what was made for it so far."""

    def __init__(self, image, arguments):
        config = image.config.get("config") or {}
        self.id = os.urandom(4).hex()
        self.image, self.directory = image, store("containers", self.id)
        self.parts = set(PARTS)
        self.arguments = command_line(config, arguments["--entrypoint"], arguments["<command>"])
        self.name = parse_container_name(arguments["--name"]) or self.id
        self.hostname = arguments["--hostname"] or self.id
        self.remove = arguments["--rm"]
        self.terminal, self.interactive = arguments["--tty"], arguments["--interactive"]
        self.environment = environment(config, arguments["--env"], self.hostname, self.terminal)
        self.user = arguments["--user"] or config.get("User") or ""
        self.working_directory = absolute(arguments["--workdir"] or config.get("WorkingDir") or "/", "the working directory")
        self.memory = parse_size(arguments["--memory"])
        self.cpus = parse_cpus(arguments["--cpus"])
        self.pids_limit = parse_count(arguments["--pids-limit"])
        self.network = parse_network(arguments["--network"])
        self.volumes = [parse_volume(text) for text in arguments["--volume"]]
        self.ports = [parse_port(text) for text in arguments["--publish"]]
        self.privileged, self.read_only = arguments["--privileged"], arguments["--read-only"]
        self.capabilities = choose_capabilities(arguments["--cap-add"], arguments["--cap-drop"], self.privileged)
        self.address = self.gateway = self.netns = self.lock = None
        self.cgroups, self.cgroup_version = [], cgroup_version()
        self.host_namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}

def find_image(name):
    """The stored image of that name; pulled if there is none."""
    reference = Reference(name)
    if os.path.exists(store(reference.file)):
        image = Image(reference.file)
        if all(map(os.path.isdir, image.layers)):
            return image
    say(f"Unable to find image '{reference}' locally")
    return pull_image(reference)

def command_line(config, entrypoint, command):
    """Entrypoint, then the command given, or else the image's Cmd; a new entrypoint drops the Cmd."""
    if entrypoint is not None:
        line = ([entrypoint] if entrypoint else []) + command
    else:
        line = (config.get("Entrypoint") or []) + (command or config.get("Cmd") or [])
    if not line:
        raise MockerError("no command specified, and the image names none: mocker run IMAGE COMMAND")
    return line

def environment(config, given, hostname, terminal):
    """The image's variables, with those of -e over them."""
    variables = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, **({"TERM": "xterm"} if terminal else {})}
    for text in (config.get("Env") or []) + [text if "=" in text else f"{text}={os.environ[text]}"
                                             for text in given if "=" in text or text in os.environ]:
        name, _, value = text.partition("=")
        if not name:
            raise MockerError(f"invalid variable '{text}': write NAME=VALUE, or NAME to take it from here")
        variables[name] = value
    return variables

def absolute(path, what):
    if not path.startswith("/"):
        raise MockerError(f"{what} '{path}' is invalid, it needs to be an absolute path")
    return os.path.normpath(path)

def parse_container_name(text):
    """--name: one word, and no other container's."""
    if text is None:
        return None
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+", text, re.ASCII):
        raise MockerError(f"invalid container name '{text}': only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
    if any(container["name"] == text for container in all_containers()):
        raise MockerError(f"the name '{text}' is in use by another container: choose another, or mocker clean --containers once it has ended")
    return text

def parse_size(text):
    """512m → 536870912 bytes; b, k, m, g as docker's."""
    match = re.fullmatch(r"(\d+)([bkmg]?)b?", (text or "0").lower(), re.ASCII)
    if not match:
        raise MockerError(f"invalid size '{text}': write a number and b, k, m or g, as in 512m")
    size = int(match[1]) << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30}[match[2]]
    if 0 < size < 6 << 20:
        raise MockerError("minimum memory limit allowed is 6MB")
    if size >= 1 << 63:
        raise MockerError(f"invalid size '{text}': larger than any machine's memory")
    return size or None

def parse_cpus(text):
    """1.5 → 1.5; None without a limit."""
    try:
        cpus = float(text or 0)
    except ValueError:
        raise MockerError(f"invalid number of CPUs '{text}': write a number, as in 1.5") from None
    if text and not 0.01 <= cpus <= os.cpu_count():
        raise MockerError(f"range of CPUs is from 0.01 to {os.cpu_count()}.00, as there are only {os.cpu_count()} CPUs available")
    return cpus or None

def parse_count(text):
    """--pids-limit: a number; 0 and -1 mean none, as docker's."""
    if text and not re.fullmatch(r"-1|\d{1,9}", text, re.ASCII):
        raise MockerError(f"invalid number of processes '{text}': write a number, as in 100")
    return int(text) if text and int(text) > 0 else None

def parse_network(text):
    if text not in (None, "bridge", "none", "host"):
        raise MockerError(f"no such network: '{text}': there are bridge, none and host")
    return text or "bridge"

def parse_volume(text):
    """host:container[:ro] → (host, container, read-only). A missing host directory is made, as by docker."""
    host, _, rest = text.partition(":")
    target, _, mode = rest.partition(":")
    if not host or not target or mode not in ("", "ro", "rw"):
        raise MockerError(f"invalid volume '{text}': write host:container or host:container:ro")
    target = absolute(target, "the volume's place")
    if target == "/":
        raise MockerError(f"invalid volume '{text}': it can't be mounted on '/'")
    host = os.path.abspath(host)
    try:
        if not os.path.exists(host):
            os.makedirs(host)
    except OSError as error:
        raise MockerError(f"invalid volume '{text[:100]}': {host[:100]} can't be made: {error.strerror}") from None
    return host, target, mode == "ro"

def parse_port(text):
    """[ip:]host:container[/udp] → (ip, host, container, protocol)"""
    match = re.fullmatch(r"(?:(\d+\.\d+\.\d+\.\d+):)?(\d+):(\d+)(?:/(tcp|udp))?", text, re.ASCII)
    if not match or not all(0 < int(port) < 65536 for port in (match[2], match[3])):
        raise MockerError(f"invalid port '{text}': write [ip:]host:container[/udp], as in 8080:80")
    return match[1] or "0.0.0.0", int(match[2]), int(match[3]), match[4] or "tcp"

def create_container(container, undo):
    """Its directory, and its entry among those that run."""
    path = f"{SHARED}/{container.id}.json"
    with locked(SHARED):
        container.lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(container.lock, fcntl.LOCK_EX)
        note_container(container)
        undo.callback(unregister, container.id)
        undo.callback(delete_directory, container.directory, container.remove, "mount" not in container.parts)
        parse_container_name(container.name)  # again, now that nobody else can take it
        os.makedirs(f"{container.directory}/rootfs")
        write_config(container, "created")

def unregister(id):
    with locked(SHARED):
        forget(id)

def write_config(container, status, **more):
    """config.json: what later commands need to know of it."""
    write_file(f"{container.directory}/config.json", {
        "id": container.id, "name": container.name, "image": f"{container.image.name}:{container.image.version}",
        "file": container.image.file, "arguments": container.arguments, "environment": container.environment,
        "user": container.user, "working_directory": container.working_directory, "address": container.address,
        "cgroups": container.cgroups, "status": status, **more})

def all_containers():
    """Every container's config.json."""
    found = []
    for id in os.listdir(store("containers")) if os.path.isdir(store("containers")) else ():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError), open(store("containers", id, "config.json")) as file:
            found.append(json.load(file))
    return found

def delete_directory(directory, remove, host_mounts, address=None):
    """Unmount what was mounted on the host's own table; with --rm the container is forgotten."""
    import shutil

    if host_mounts:
        with contextlib.suppress(MockerError):
            unmount(f"{directory}/rootfs")
    if remove:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(directory))

# ── The process ────────────────────────────────────────────────────────────────────────────────────

class Streams:
    """stdin, stdout and stderr of the container, as pipes or as a terminal, and a pipe for bad news."""

    def __init__(self, container):
        self.terminal = container.terminal
        self.failure, self.report_end = os.pipe()
        self.inner, self.outputs, self.stdin = [None, None, None], {}, None
        self.source = 0 if self.wants_stdin(container.interactive) else None
        if self.terminal:
            import socket

            self.outer_socket, self.inner_socket = socket.socketpair()  # the terminal is made inside
            return
        for stream in 1, 2:
            reader, self.inner[stream] = os.pipe()
            self.outputs[reader] = stream
        if self.source is not None:
            self.inner[0], self.stdin = os.pipe()
            os.set_blocking(self.stdin, False)

    def wants_stdin(self, interactive):
        """With -i, whatever it is; without, a pipe or a file is passed on, and a terminal left alone."""
        try:
            device = stat.S_ISCHR(os.fstat(0).st_mode)
        except OSError:  # closed, as cron may leave it
            return False
        if interactive and self.terminal and not os.isatty(0):
            raise MockerError("the input device is not a TTY: leave out -t")
        return interactive or not device

    def close_inner(self):
        """The parent keeps only its own ends, or it would never see the others close."""
        for descriptor in [self.report_end, *filter(None, self.inner)]:
            os.close(descriptor)
        if self.terminal:
            self.inner_socket.close()

    def report(self, message, status):
        os.write(self.report_end, json.dumps({"message": message, "status": status}).encode())

    def take(self, *keep):
        """In the child: they become its 0, 1 and 2, and what else it inherited is closed. A directory of the
        host that stayed open would be a way out: /proc/self/fd/13 (CVE-2024-21626)."""
        story.output = os.dup(story.output)
        for stream in 0, 1, 2:
            os.dup2(os.open("/dev/null", os.O_RDWR) if self.inner[stream] is None else self.inner[stream], stream)
        keep = {0, 1, 2, self.report_end, story.output, story.stepping, *keep}
        keep.add(self.inner_socket.fileno() if self.terminal else None)
        for descriptor in sorted(set(map(int, os.listdir("/proc/self/fd"))) - keep):
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def open_terminal(self):
        """A pair of devices from the container's own devpts (man 4 pts); its master end goes to mocker."""
        import socket

        master, slave = os.openpty()
        fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY: the controlling terminal, whose Ctrl-C is a signal
        os.close(os.open("/dev/console", os.O_CREAT | os.O_WRONLY, 0o600))
        mount(os.ttyname(slave), "/dev/console", "", MS_BIND)
        socket.send_fds(self.inner_socket, [b"pty"], [master])
        os.close(master)
        for stream in 0, 1, 2:
            os.dup2(slave, stream)

    def receive_terminal(self):
        """The master end; None if the container failed before it made one."""
        import socket

        _, descriptors, _, _ = socket.recv_fds(self.outer_socket, 10, 1)
        self.outer_socket.close()
        if not descriptors:
            return None
        self.outputs = {descriptors[0]: 1}
        self.stdin = os.dup(descriptors[0]) if self.source is not None else None
        return descriptors[0]

@step
def start(container, undo):
    """Fork: the first process of a new pid namespace

    unshare(2) with CLONE_NEWPID does not move us; it makes our next child number 1 of a new
    namespace. When number 1 ends, the kernel ends all the others in there: nothing survives.
    See man 7 pid_namespaces. Look: ps -ef --forest
    """
    write_etc(container)
    streams = Streams(container)
    mocker = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # the child must not run our handlers
    with coming_back("pid_for_children", CLONE_NEWPID):
        if "pid" in container.parts:
            unshare(CLONE_NEWPID, ["pid", "fork"])
        pid = os.fork()
        if pid == 0:
            go_inside(container, streams, mocker)
    container.pid = pid
    undo.callback(end_process, container)
    streams.close_inner()
    return streams

def go_inside(container, streams, mocker):
    """In the child. What goes wrong is reported through a pipe, which exec closes."""
    import traceback

    try:
        die_with(mocker)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        container.streams = streams
        streams.take(container.netns)
        inside(container)
    except MockerError as error:
        streams.report(str(error), error.status)
    except OSError as error:
        streams.report(f"{error.filename or 'the image'}: {error.strerror}: something in the image is in the way", 125)
    except BaseException:
        emit(traceback.format_exc())
        streams.report("a bug: please report it", 125)
    finally:
        os._exit(125)

def enter_working_directory(container):
    """Made if it is missing, by root, as docker does; inside, so that its symlinks lead nowhere else."""
    os.makedirs(container.working_directory, exist_ok=True)
    os.chdir(container.working_directory)
    if container.read_only:
        mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_NODEV | MS_RDONLY)

@step
def execute(container):
    """Exec: become the program of the image

    Entrypoint and Cmd, with the image's environment and working directory. No shell is added. The
    process has been in the container for a while; now the last thing of the host, Python, is gone.
    See man 2 execve. Look: cat /proc/PID/cmdline
    """
    program = find_program(container.arguments[0], container.environment["PATH"])
    say(f'Running "{" ".join(container.arguments)}"')
    for name, value in container.environment.items():
        say(f"Setting ENV {name}={value}")
    try:
        os.execve(program, container.arguments, container.environment)
    except OSError as error:
        status = 127 if error.errno == errno.ENOENT else 126
        raise MockerError(f'exec "{program}": {error.strerror}: it has no interpreter here, or is for another machine', status) from None

def find_program(name, path):
    """As execvp(3) would, within the image. 127 if there is none, 126 if it can't be run, as docker."""
    if "/" not in name:
        for folder in path.split(":"):
            place = os.path.join(folder or ".", name)
            if os.path.isfile(place) and os.access(place, os.X_OK):
                return place
        raise MockerError(f'exec: "{name}": executable file not found in $PATH: look into the image, or give another command', 127)
    if not os.path.exists(name):
        raise MockerError(f'exec: "{name}": no such file or directory: look into the image, or give another command', 127)
    if not os.path.isfile(name) or not os.access(name, os.X_OK):
        raise MockerError(f'exec: "{name}": permission denied: it is a directory, or not executable', 126)
    return name

# ── The parent: streams, signals, the end ──────────────────────────────────────────────────────────

FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
             signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH}

def attend(container, streams):
    """Copy output, pass signals on, wait. → exit status, 128+N for signal N."""
    terminal = streams.receive_terminal() if streams.terminal else None
    forward_signals(container.pid, terminal)
    write_config(container, "running", pid=container.pid)
    with raw_terminal(terminal, streams.source):
        copy_streams(streams, open_copies(container), container.pid)
    ignore_signals()  # once it is reaped, its number may be another's
    with open(streams.failure, "rb") as file:
        failure = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(container.pid, 0)[1])
    container.pid = None
    if failure:
        bad_news = json.loads(failure)
        raise MockerError(bad_news["message"], bad_news["status"])
    status = status if status >= 0 else 128 - status
    write_config(container, "exited", exit_code=status)
    return status

def forward_signals(pid, terminal):
    """What reaches mocker goes on to number 1. That ignores what it has no handler for; the third
    SIGINT or SIGTERM therefore is SIGKILL (man 7 pid_namespaces, "Signals")."""
    urgent = []

    def forward(number, frame):
        if number == signal.SIGWINCH:
            return copy_window_size(terminal)
        if number in (signal.SIGINT, signal.SIGTERM):
            urgent.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL if len(urgent) > 2 else number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    copy_window_size(terminal)

def ignore_signals():
    for number in FORWARDED:
        signal.signal(number, signal.SIG_IGN)

@contextlib.contextmanager
def undisturbed_end():
    """However it ends: what is undone then is undone whole, whatever signal comes."""
    try:
        yield
    finally:
        ignore_signals()

def copy_window_size(terminal):
    """The container's terminal is as large as ours (man 2 TIOCSWINSZ)."""
    TIOCGWINSZ, TIOCSWINSZ = 0x5413, 0x5414
    if terminal is not None:
        with contextlib.suppress(OSError):
            fcntl.ioctl(terminal, TIOCSWINSZ, fcntl.ioctl(0, TIOCGWINSZ, bytes(8)))

@contextlib.contextmanager
def raw_terminal(terminal, source):
    """Keys go through as they are, Ctrl-C too: the container's own terminal interprets them."""
    if terminal is None or source is None or not os.isatty(source):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(source)
    try:
        tty.setraw(source)
        yield
    finally:
        termios.tcsetattr(source, termios.TCSADRAIN, before)

def open_copies(container):
    """Where output goes besides our own: the container's log, and /tmp/stdout, as ever.

    /tmp is everybody's. So the file is made under a name that nobody can know and renamed: a link
    that another user planted as /tmp/stdout is replaced, not followed.
    """
    copies = [os.open(f"{container.directory}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)]
    mine = f"/tmp/.stdout_{os.urandom(8).hex()}"
    try:
        handle = os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        say(f"/tmp/stdout can't be written: {error.strerror}")
        return copies
    try:
        os.rename(mine, "/tmp/stdout")
        copies.append(handle)
    except OSError as error:
        os.unlink(mine)
        os.close(handle)
        say(f"/tmp/stdout can't be replaced: {error.strerror}; remove it")
    return copies

def copy_streams(streams, copies, pid):
    """Until the process has ended and its outputs are drained. What is slow makes the container wait."""
    import select

    poller = select.poll()
    ended = os.pidfd_open(pid)
    watched = {ended, *streams.outputs}
    for descriptor in watched | ({streams.source} if streams.stdin is not None else set()):
        poller.register(descriptor, select.POLLIN)
    pending = b""
    while watched:
        for descriptor, _ in poller.poll():
            if descriptor in watched:
                if descriptor == ended or not copy_output(descriptor, streams.outputs[descriptor], copies):
                    poller.unregister(descriptor)
                    watched.remove(descriptor)
                    os.close(descriptor)
            elif descriptor == streams.source:
                pending = read_some(streams.source)
                poller.unregister(streams.source)
                if pending:
                    poller.register(streams.stdin, select.POLLOUT)
                else:
                    os.close(streams.stdin)  # the container reads to the end, too
            else:
                pending = write_some(streams.stdin, pending)
                if not pending:
                    poller.unregister(streams.stdin)
                if pending == b"":
                    poller.register(streams.source, select.POLLIN)

def copy_output(source, destination, copies):
    """One piece, as it is, to our own stdout or stderr and to the copies. False at the end."""
    data = read_some(source)
    for copy in copies if data else ():
        with contextlib.suppress(OSError):  # a full disk must not stop the container
            os.write(copy, data)
    return bool(data) and write_all(destination, data)

def read_some(descriptor):
    """Up to 64 KiB, or nothing at the end; a terminal whose other side is gone says EIO."""
    try:
        return os.read(descriptor, 1 << 16)
    except BlockingIOError:
        return b""
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EBADF):
            raise
        return b""

def write_some(descriptor, data):
    """→ what is left to write; None if nobody reads any more."""
    try:
        return data[os.write(descriptor, data) :]
    except BlockingIOError:
        return data
    except OSError:
        return None

def write_all(descriptor, data):
    """False if nobody reads any more: our reading end is closed then, and the container learns of it."""
    import select

    while data:
        left = write_some(descriptor, data)
        if left is None:
            return False
        if left == data:
            select.select([], [descriptor], [])
        data = left
    return True

def end_process(container):
    """If it still runs, a fault or a signal brought us here."""
    if container.pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(container.pid, signal.SIGKILL)
        os.waitpid(container.pid, 0)

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  serve: the protocol's other side
# ═════════════════════════════════════════════════════════════════════════════════════════════════

def serve(arguments):
    """Be a registry, read-only, for the images that are here: for a class behind one address.

    It makes the whole dance of Docker Hub: the token, and blobs from another address, on PORT+1.

    Usage:
      mocker serve [--port=N] [--listen=ADDRESS]

    Options:
      --port=N          [default: 5000]
      --listen=ADDRESS  who may ask: 127.0.0.1 only this machine, 0.0.0.0 anyone [default: 127.0.0.1]
    """
    import threading

    if not re.fullmatch("[0-9]{1,5}", arguments["--port"]) or int(arguments["--port"]) > 65534:
        raise MockerError(f"invalid port '{arguments['--port']}': write a number up to 65534, the next one is used, too")
    port = int(arguments["--port"])
    try:
        cdn = make_server(arguments["--listen"], port and port + 1, serve_blob)
        registry = make_server(arguments["--listen"], port, serve_registry)
    except OSError as error:
        raise MockerError(f"can't listen on {arguments['--listen']}:{port}: {error.strerror}; choose another with --port") from None
    registry.cdn_port = cdn.server_port
    registry.key = cdn.key = os.urandom(16)
    say(f"Serving {len(all_images())} images: MOCKER_HUB=http://{arguments['--listen']}:{registry.server_port} mocker pull …")
    threading.Thread(target=cdn.serve_forever, daemon=True).start()
    registry.serve_forever()

def make_server(address, port, answer):
    """A threaded HTTP/1.1 server whose GET and HEAD are answer(request, path, query)."""
    import http.server
    from urllib.parse import parse_qs, urlsplit

    class Request(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            url = urlsplit(self.path)
            answer(self, url.path, {key: values[0] for key, values in parse_qs(url.query).items()})

        do_HEAD = do_GET

        def log_message(self, text, *values):
            say(f"{self.client_address[0]} {self.requestline.partition('?')[0]}")

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request, client_address):
            """A client that hangs up, or never spoke HTTP, is no news."""
            if not isinstance(sys.exc_info()[1], (ConnectionError, UnicodeError)):
                sys.excepthook(*sys.exc_info())

    return Server((address, port), Request)

def reply(request, status, body=b"", **headers):
    """Status, headers and, unless it is a HEAD, the body."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", len(body))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)

def refuse(request, status, code, **headers):
    """The error document of the distribution spec."""
    reply(request, status, json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode(),
          Content_Type="application/json", **headers)

def sign(server, text):
    """A signature that only we can make: no path but the one that we gave out opens a blob."""
    import hmac

    return hmac.new(server.key, text.encode(), "sha256").hexdigest()

def serve_registry(request, path, query):
    """/token gives a token; /v2/… wants it, serves manifests, and sends blobs to the CDN."""
    server, host = request.server, request.headers.get("Host", "localhost")
    if path == "/token":
        token = sign(server, query.get("scope", ""))
        return reply(request, 200, json.dumps({"token": token, "expires_in": 300}).encode(), Content_Type="application/json")
    found = re.fullmatch(r"/v2/(.+)/(manifests|blobs)/([^/]+)", path)
    scope = f"repository:{found[1]}:pull" if found else ""
    if request.headers.get("Authorization") != f"Bearer {sign(server, scope)}":
        challenge = f'Bearer realm="http://{host}/token",service="mocker"' + (f',scope="{scope}"' if scope else "")
        return refuse(request, 401, "UNAUTHORIZED", WWW_Authenticate=challenge, Docker_Distribution_Api_Version="registry/2.0")
    if not found:
        return reply(request, 200 if path == "/v2/" else 404, b"{}", Content_Type="application/json")
    images = [image for image in all_images() if found[1] in (image.name, image.name.partition("/")[2])]
    if found[2] == "manifests":
        for image in images:
            if found[3] in (image.version, image.stored["digest"]):
                digest = found[3] if DIGEST.fullmatch(found[3]) else image.stored["digest"]  # also that of its index
                raw = read_blob(digest)
                kind = parse_json(raw, digest).get("mediaType") or image.stored["mediaType"]
                return reply(request, 200, raw, Content_Type=kind, Docker_Content_Digest=digest)
        return refuse(request, 404, "MANIFEST_UNKNOWN")
    blobs = {blob["digest"] for image in images for blob in [image.manifest["config"], *image.manifest["layers"]]}
    if found[3] not in blobs:
        return refuse(request, 404, "BLOB_UNKNOWN")
    place = f"http://{host.rpartition(':')[0] or host}:{server.cdn_port}/{found[3]}?Signature={sign(server, found[3])}"
    return reply(request, 307, Location=place)

def serve_blob(request, path, query):
    """The CDN: whoever has a signed address gets the blob, or the rest of it from a Range on."""
    import shutil

    digest = path[1:]
    if query.get("Signature") != sign(request.server, digest):
        return refuse(request, 403, "DENIED")
    with open(blob_path(digest), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        start = min(int(wanted[1]), size) if wanted else 0
        partial = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if wanted else {}
        request.send_response(206 if wanted else 200)
        for name, value in {"Content_Length": size - start, "Content_Type": "application/octet-stream", **partial}.items():
            request.send_header(name.replace("_", "-"), value)
        request.end_headers()
        file.seek(start)
        if request.command != "HEAD":
            shutil.copyfileobj(file, request.wfile)

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  Life after run
# ═════════════════════════════════════════════════════════════════════════════════════════════════

def clean(arguments):
    """Undo whatever outlived a run: leftovers of killed mockers, unfinished pulls.

    Usage:
      mocker clean [--containers]

    Options:
      --containers  also remove the directories of containers that have ended
    """
    need_root("clean")
    with partial_directory():
        pass
    with locked(SHARED):
        if not running_containers():
            restore_host()
    running = running_containers()
    for container in all_containers() if arguments["--containers"] else ():
        if container["id"] not in running:
            delete_directory(store("containers", container["id"]), True, False)
            say(f"removed {container['name']}")

# ═════════════════════════════════════════════════════════════════════════════════════════════════
#  main: from a command's name to its function
# ═════════════════════════════════════════════════════════════════════════════════════════════════

COMMANDS = {
    "pull": pull,
    "images": images,
    "run": run,
    "serve": serve,
    "verify": verify,
    "clean": clean,
}

def usage_of(function):
    """A command's docstring is its usage, for docopt as for you."""
    return re.sub(r"\n {4}", "\n", function.__doc__).strip()

def parse_arguments(argv):
    """→ (the command's function, docopt's dict), or SystemExit once what was asked for is printed."""
    from docopt import DocoptExit, docopt

    usage = __doc__[__doc__.index("Usage:") : __doc__.index("\n\nTry")]
    if argv[:1] in (["help"], ["-h"], ["--help"]):
        raise SystemExit(print(__doc__[__doc__.index("Usage:") :].strip()))
    if argv[:1] == ["--version"]:
        raise SystemExit(print(f"mocker {__version__}"))
    if argv and argv[0] in COMMANDS:
        function = COMMANDS[argv[0]]
        if argv[1:2] in (["-h"], ["--help"]):
            raise SystemExit(print(usage_of(function)))
        # docopt stops at the first word that is no option, so that `ls -l` can follow `run busybox`;
        # the command's own name must not be that word.
        usage = usage_of(function)
        with contextlib.suppress(DocoptExit):
            return function, docopt(usage.replace(f"mocker {argv[0]}", "mocker"), argv[1:], False, options_first=function is run)
        usage = usage[usage.index("Usage:") :]
    print(usage, file=sys.stderr)
    raise SystemExit(125 if argv else 1)

def interrupted(number, frame):
    """Ctrl-C or SIGTERM before the container runs: undo what was done so far, then end."""
    raise MockerError(f"stopped by {signal.Signals(number).name}; nothing is left behind", status=128 + number)

def main(argv):
    """Run the command; what the user can mend becomes one line. → exit status"""
    if argv[:1] == ["run"] and sys.platform == "linux":
        seal_interpreter(argv)
    function, arguments = parse_arguments(argv)
    story.level = QUIET if arguments.get("--quiet") else EXPLAIN if arguments.get("--explain") or arguments.get("--step") else PLAIN
    use_colours()
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, interrupted)
    try:
        if arguments.get("--step"):
            open_pacing_terminal()
        sweep()
        return function(arguments)
    except MockerError as error:
        words = printable(str(error))
        if words:  # a name in them may be as long as its image likes
            write_line(f"mocker: {words if len(words) < 900 else f'{words[:440]}…{words[-440:]}'}", "error")
        return error.status
    except ModuleNotFoundError as error:
        write_line(f"mocker: the Python package '{error.name}' is missing: pip install -r requirements.txt, and run it with that Python", "error")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more at exit
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        write_line(f"mocker: {error.strerror}: {error.filename or HOME}: make room, or set MOCKER_HOME to another folder", "error")
    return 125

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
