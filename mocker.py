#!/usr/bin/env python3
"""mocker: a crappy imitation of Docker, for teaching purposes.

Usage:
  mocker pull <name>[<tag>]
  mocker run <name>
  mocker images
  mocker (-h | --help)
  mocker --version

  mocker pull [options] <name>[<tag>]            fetch an image, check it, unpack its layers
  mocker run [options] <name> [<command>...]     run it in a container
  mocker serve [--port=N] [--listen=ADDRESS]     be a registry for the images pulled so far
  mocker verify                                  re-check every digest in the store
  mocker clean                                   undo whatever outlived a run
  mocker COMMAND --help                          a command's own usage

Try (as root):
  ./mocker.py pull hello-world
  ./mocker.py images
  ./mocker.py run library/hello-world
  ./mocker.py run --explain -it busybox

Images and containers live in ~/mocker, or $MOCKER_HOME. The file below follows the life of a
container: registry, store, root, network, cgroup, privileges, run. Each step's docstring is what
`--explain` shows when the step runs.

But: no daemon, no builds, no push, no compose, no swarm, no plugins, no logging drivers, no user
namespaces, no IPv6, no AppArmor. `docker` asks dockerd, which asks containerd, which asks runc;
here one process does it all and waits. README.md has the table of what is left out, and where
Docker has it.
"""
# Standard library only up here, and little of it: a command imports what it needs when it needs
# it, since `requests` and `pyroute2` take longer to import (0.1 to 0.2 s) than a container to start.
import contextlib
import errno
import fcntl
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys

__version__ = "1.0"

HOME = os.path.expanduser(os.environ.get("MOCKER_HOME") or "~/mocker")

# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Telling the story: steps, narration, the one error type
# ═══════════════════════════════════════════════════════════════════════════════════════════════
#
#  step       a function of the run that is told as it happens: its docstring is what is shown
#  primitive  asks the kernel for one thing, and says so as the shell command that does the same
#  proof      what the kernel answers when it is asked afterwards

QUIET, PLAIN, EXPLAIN = range(3)


class story:
    """How much is told, and to whom. Everything here goes to stderr: stdout is the container's."""

    level = PLAIN
    stepping = None  # with --step: the terminal that Enter is read from
    lines = None  # a worker collects its lines here, and tells them in one piece
    output = 2  # the descriptor of stderr; the container gets a 2 of its own
    style = {"": "", "heading": "", "command": "", "proof": "", "error": "", "end": ""}


class MockerError(Exception):
    """What the user can mend, in one line: what is wrong, and what to do. Exit status as docker's."""

    def __init__(self, message, status=125, number=0):
        super().__init__(message)
        self.status = status
        self.errno = number


def printable(text):
    """A name from an image may hold newlines and escape codes; they must not reach the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def write_line(text, style=""):
    """One line to stderr, whole: other processes may be writing too. A closed stderr is no error."""
    line = f"{story.style[style]}{printable(text)}{story.style['end'] if style else ''}\n"
    if story.lines is not None:
        story.lines.append(line)
    else:
        emit(line)


def emit(lines):
    """To stderr in one write, over a progress bar if there is one. A closed stderr is no error."""
    with contextlib.suppress(OSError):
        fresh = "\r\033[K" if os.isatty(story.output) else ""
        os.write(story.output, (fresh + lines).encode(errors="backslashreplace"))


def tell_all_at_once():
    """What a worker had to tell, in one piece."""
    lines, story.lines = story.lines, None
    if lines:
        emit("".join(lines))


def say(text):
    """mocker's own words; -q silences them."""
    if story.level >= PLAIN:
        write_line(text)


def tell(command):
    """Name what a primitive is about to do, as the shell command or system call that does it."""
    if story.level >= EXPLAIN:
        write_line(f"  $ {command}", "command")


def prove(question, answer):
    """Show what the kernel says now; `question` is the command that asks it the same."""
    if story.level >= EXPLAIN:
        for line in [f"{question}:"] + [f"  {line}" for line in answer.splitlines()]:
            write_line(f"  = {line}", "proof")


def step(function=None, part=None):
    """Decorator: a step of the talk. Its docstring is its explanation, here and on the screen.

    A step with a part is left out when the container, its first argument, is to be without that.
    """
    if function is None:
        return lambda function: step(function, part)

    def told(*arguments, **options):
        left_out = part and part not in arguments[0].parts
        if story.level >= EXPLAIN:
            heading, *body = function.__doc__.rstrip().splitlines()
            write_line("")
            write_line(f"■ {heading}" + " -- left out" * bool(left_out), "heading")
            for line in body[1:] if not left_out else ():
                write_line(f"  {line.strip()}")
            wait_for_enter()
        return None if left_out else function(*arguments, **options)

    told.__doc__, told.__name__ = function.__doc__, function.__name__
    return told


def wait_for_enter():
    """With --step the speaker sets the pace: Enter goes on, q ends the run cleanly."""
    if story.stepping is not None:
        os.write(story.stepping, b"  [Enter, or q] ")
        if os.read(story.stepping, 100).strip().lower() == b"q":
            raise MockerError("stopped at your word; nothing is left behind", status=0)


def use_colours():
    """Colours have meaning: headings, commands, proofs, errors. None if NO_COLOR, or no terminal."""
    if "NO_COLOR" in os.environ or not os.isatty(2):
        return
    from colorama import Fore, Style

    story.style = {"": "", "heading": Style.BRIGHT + Fore.CYAN, "command": Fore.YELLOW,
                   "proof": Fore.GREEN, "error": Fore.RED, "end": Style.RESET_ALL}  # fmt: skip

# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  The registry: reference, token, manifest, blobs
# ═══════════════════════════════════════════════════════════════════════════════════════════════
#
#  GET /v2/library/busybox/manifests/latest  → 401, Bearer realm="https://auth…",service=…,scope=…
#  GET the realm                             → {"token": "…", "expires_in": 300}
#  GET the manifest again, with the token    → an index: one manifest for each platform
#      {"manifests": [{"digest": "sha256:…", "platform": {"os": "linux", "architecture": "amd64"}}, …]}
#  GET /v2/…/manifests/sha256:…              → the manifest: a config, and the layers from the bottom up
#      {"config": {"digest": "sha256:…"}, "layers": [{"digest": "sha256:…", "size": 1234}, …]}
#  GET /v2/…/blobs/sha256:… for each         → 307 to a CDN, which must not see the token
#
#  The distribution spec: https://github.com/opencontainers/distribution-spec

DOCKER_HUB = "docker.io"
INDEX_TYPES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
MANIFEST_TYPES = (
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
MANIFEST_LIMIT = 4 << 20  # bytes, as Docker's: nobody needs a larger one, and it must fit in memory
TIMEOUT = (10, 30)  # seconds to connect, and seconds of silence
ATTEMPTS = 5

DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}")

# github.com/distribution/reference: lower-case path components, joined by separators
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)(?:\.[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)*|\[[0-9a-fA-F:]+\]"
REFERENCE = re.compile(
    rf"(?:(?P<host>(?:{_DOMAIN})(?::[0-9]+)?)/)?"
    rf"(?P<repository>{_COMPONENT}(?:/{_COMPONENT})*)"
    r"(?::(?P<tag>\w[\w.-]{0,127}))?"
    r"(?:@(?P<digest>[a-z0-9]+:[0-9a-f]+))?",
    re.ASCII,
)


class Reference:
    """Where an image is: host/repository:tag, or @digest, which is exact and so wins over a tag."""

    def __init__(self, host, repository, tag, digest):
        self.host, self.repository, self.tag, self.digest = host, repository, tag, digest

    @property
    def name(self):
        """As `images` shows it: Docker Hub goes without saying. library/tomcat, localhost:5000/app"""
        return self.repository if self.host == DOCKER_HUB else f"{self.host}/{self.repository}"

    @property
    def familiar(self):
        """As one says it: hello-world:latest"""
        return str(self).removeprefix("library/") if self.host == DOCKER_HUB else str(self)

    @property
    def version(self):
        return self.digest or self.tag

    def __str__(self):
        return f"{self.name}{'@' if self.digest else ':'}{self.version}"

    @property
    def file(self):
        """library/tomcat:latest → library_tomcat.json, library/tomcat:9 → library_tomcat:9.json

        An underscore of the name is doubled, so that two images never share a file.
        """
        version = "" if self.version == "latest" else f"{'@' if self.digest else ':'}{self.version}"
        return self.name.replace("_", "__").replace("/", "_") + version + ".json"


def parse_reference(text, tag=None):
    """tomcat:9 → docker.io, library/tomcat, 9. Raises MockerError where docker says "invalid reference"."""
    # The first component is a host only if it looks like one: else it is a user of Docker Hub.
    first, slash, rest = text.partition("/")
    is_host = slash and (any(c in first for c in ".:") or first == "localhost" or first != first.lower())
    match = REFERENCE.fullmatch(text if is_host else f"{DOCKER_HUB}/{text}")
    if not match or (tag and (match["tag"] or match["digest"])) or len(match["repository"]) > 255:
        raise MockerError(f"invalid reference '{text}': write [host/]name[:tag], in lower case, as in library/tomcat:9")
    if tag and not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
        raise MockerError(f"invalid tag '{tag}': letters, digits, '_', '.' and '-', 128 at most")
    if match["digest"] and not DIGEST.fullmatch(match["digest"]):
        raise MockerError(f"invalid digest in '{text}': write sha256: and 64 hexadecimal digits")
    host = DOCKER_HUB if match["host"] in ("index.docker.io", "registry-1.docker.io") else match["host"]
    repository = match["repository"]
    if host == DOCKER_HUB and "/" not in repository:
        repository = f"library/{repository}"
    return Reference(host, repository, tag or match["tag"] or "latest", match["digest"])


def is_local(host):
    """Plain http is only for this machine, or where MOCKER_INSECURE=host[:port],… says so."""
    name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
    insecure = os.environ.get("MOCKER_INSECURE", "").split(",")
    return name in ("localhost", "[::1]") or name.startswith("127.") or host in insecure or name in insecure


def registry_url(host):
    """https, but http for this machine. MOCKER_HUB=URL names a mirror of Docker Hub."""
    if host == DOCKER_HUB:
        return os.environ.get("MOCKER_HUB", "https://registry-1.docker.io").rstrip("/")
    return f"{'http' if is_local(host) else 'https'}://{host}"


class Registry:
    """One repository of one registry: an HTTP session that answers the registry's challenges."""

    def __init__(self, reference, authorization=None):
        import requests

        self.reference = reference
        self.base = registry_url(reference.host)
        self.authorization = authorization  # the Authorization header, once a challenge was answered
        self.session = requests.Session()
        self.session.max_redirects = 10
        self.session.hooks["response"] = [self.check_response]
        self.session.headers.update({
            "User-Agent": f"mocker/{__version__}",
            "Accept-Encoding": "identity",  # a digest is of the bytes as they are stored
        })  # fmt: skip

    def check_response(self, response, **_):
        """Each response, redirects included: say it, and see that the next one may be asked for."""
        from urllib.parse import urljoin, urlsplit

        reason = response.headers.get("Content-Length", "-")
        url = urlsplit(response.url)
        say(f'"GET {url.scheme}://{url.netloc.rpartition("@")[2]}{url.path}{public_query(url.query)} '
            f'HTTP/1.1" {response.status_code} {reason}')  # fmt: skip
        if response.is_redirect:
            target = urlsplit(urljoin(response.url, response.headers["Location"]))
            safe = target.scheme == "https" or (target.scheme == "http" and (url.scheme == "http" or is_local(target.netloc)))
            if not safe:
                raise MockerError(f"{url.netloc} redirects to {target.scheme}://{target.netloc}: only https is followed")

    def get(self, path, **options):
        """GET, patiently: a token when asked for one, again after a fault that may pass."""
        import time

        import requests

        problem, wait = None, 0
        for attempt in range(ATTEMPTS):
            if problem:
                say(f"{problem}; trying again")
                time.sleep(wait)
            wait = 0.3 * 2**attempt
            try:
                response = self.get_once(path, **options)
            except requests.exceptions.SSLError as error:
                raise MockerError(f"{self.base}: its TLS certificate is not trusted ({root_cause(error)}): "
                                  "name your CA's file in REQUESTS_CA_BUNDLE, or check the clock") from None  # fmt: skip
            except requests.exceptions.TooManyRedirects:
                raise MockerError(f"{self.base}: redirects without end") from None
            except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema) as error:
                raise MockerError(f"{self.base}: not an address that can be asked ({root_cause(error)})") from None
            except requests.exceptions.RequestException as error:
                problem = f"{self.base} can't be reached ({root_cause(error)})"
                continue
            if response.status_code < 500 and response.status_code != 429:
                return self.refuse_errors(response)
            problem = f"{self.base} answers {response.status_code} {response.reason}"
            if response.status_code == 429:
                problem, wait = too_many_requests(self.base, response)
            response.close()
            if wait > 10:
                break
        hint = "" if "429" in problem else ": check the network, or name a mirror in MOCKER_HUB"
        raise MockerError(problem + hint)

    def get_once(self, path, headers=(), **options):
        """One GET; a 401 is answered with what its challenge asks for, once."""
        for _ in range(2):
            authorized = dict(headers)
            if self.authorization:
                authorized["Authorization"] = self.authorization
            response = self.session.get(
                f"{self.base}/v2/{self.reference.repository}/{path}", headers=authorized, timeout=TIMEOUT, **options
            )
            challenge = response.headers.get("WWW-Authenticate")
            if response.status_code != 401 or not challenge:
                return response
            response.close()
            self.authorization = self.answer(challenge)
        return response

    def answer(self, challenge):
        """WWW-Authenticate (RFC 9110 §11.6.1) → the Authorization header that satisfies it."""
        from urllib.request import parse_http_list, parse_keqv_list

        scheme, _, rest = challenge.partition(" ")
        user, password = find_credentials(self.reference.host)
        prove("the registry's challenge", challenge)
        if scheme.lower() == "basic":
            if user is None:
                raise MockerError(f"{self.reference.host} wants a name and a password: docker login {self.reference.host}")
            import base64

            return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
        if scheme.lower() != "bearer":
            raise MockerError(f"{self.reference.host} asks for '{printable(scheme)}' authorization, which mocker doesn't speak")
        asked = parse_keqv_list([item for item in parse_http_list(rest) if "=" in item])
        return "Bearer " + self.fetch_token(asked, (user, password) if user is not None else None)

    def fetch_token(self, asked, credentials):
        """Ask the realm for a token that allows this pull, and no more. It may expire in mid-pull."""
        realm = asked.get("realm", "")
        if not (realm.startswith("https://") or (realm.startswith("http://") and self.base.startswith("http://"))):
            raise MockerError(f"{self.reference.host} sends its token realm as '{realm}': only https is asked")
        parameters = {"scope": f"repository:{self.reference.repository}:pull"}
        if "service" in asked:
            parameters["service"] = asked["service"]
        response = self.session.get(realm, params=parameters, auth=credentials or no_netrc, timeout=TIMEOUT)
        if response.status_code in (401, 403):
            raise MockerError(f"{self.reference.host} gives no token for {self.reference.name}: "
                              f"no such image, or it is private (docker login {self.reference.host})")  # fmt: skip
        if response.status_code == 429 or response.status_code >= 500:
            return self.retry_later(response)
        body = parse_json(response.content, "the token")
        token = body.get("token") or body.get("access_token")
        if response.status_code != 200 or not isinstance(token, str) or not token.isprintable():
            raise MockerError(f"{realm} answers {response.status_code} and no token: try again, or name a mirror in MOCKER_HUB")
        explain_token(token)
        return token

    def retry_later(self, response):
        """Let `get` treat the token service's trouble as any other."""
        import requests

        raise requests.exceptions.ConnectionError(f"the token service answers {response.status_code} {response.reason}")

    def refuse_errors(self, response):
        """Give a 2xx back; anything else becomes one line that says what to do."""
        name, status = self.reference, response.status_code
        if status in (200, 206):
            return response
        response.close()
        if status == 404:
            raise MockerError(f"no such image: {name}: check the name and the tag at {self.base}")
        if status in (401, 403):
            raise MockerError(f"{self.reference.host} refuses {name} ({status}): no such image, or it is private "
                              f"(docker login {self.reference.host})")  # fmt: skip
        raise MockerError(f"{self.base} answers {status} {printable(response.reason or '')} for {name}")


def no_netrc(request):
    """An `auth` that adds nothing: without one, requests would look into ~/.netrc."""
    return request


def root_cause(error):
    """The innermost reason of a chain of library errors, in a few words."""
    while getattr(error, "args", None) and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    error = getattr(error, "reason", error)
    return printable(str(error).rpartition("): ")[2] or type(error).__name__)[:200]


def public_query(query):
    """Of a URL's query, what may be shown on a projector: never a signature or a key."""
    shown = [part for part in query.split("&") if part.partition("=")[0] in ("service", "scope")]
    return ("?" + "&".join(shown + ["…"] * (len(shown) < query.count("&") + 1))) if query else ""


def too_many_requests(base, response):
    """429: → the line that says when to try again, and the seconds to wait."""
    import email.utils
    import time

    after = response.headers.get("Retry-After", "")
    with contextlib.suppress(TypeError, ValueError):
        if not after.isdigit():
            after = str(max(0, int(email.utils.parsedate_to_datetime(after).timestamp() - time.time())))
    limit = re.fullmatch(r"(\d+);w=(\d+)", response.headers.get("ratelimit-limit", ""))
    allowed = f", {limit[1]} pulls in {int(limit[2]) // 3600} hours" if limit else ""
    when = f"try again in {after} s" if after.isdigit() else "try again in some hours"
    return (f"{base} answers 429: too many pulls from this address{allowed}, which everyone behind it shares: "
            f"{when}, docker login, or name a mirror in MOCKER_HUB", int(after) if after.isdigit() else 3600)  # fmt: skip


def find_credentials(host):
    """(user, password) from docker's own ~/.docker/config.json or its credential helper, or (None, None)."""
    import base64

    folder = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        with open(os.path.join(folder, "config.json"), "rb") as file:
            config = parse_json(file.read(), "~/.docker/config.json")
    except OSError:
        return None, None
    server = "https://index.docker.io/v1/" if host == DOCKER_HUB else host
    helper = (config.get("credHelpers") or {}).get(server) or config.get("credsStore")
    if helper:
        answer = subprocess.run([f"docker-credential-{helper}", "get"], input=server.encode(), capture_output=True)
        if answer.returncode == 0:
            found = parse_json(answer.stdout, f"docker-credential-{helper}")
            return found.get("Username"), found.get("Secret")
    entry = (config.get("auths") or {}).get(server) or {}
    if not entry.get("auth"):
        return None, None
    user, _, password = base64.b64decode(entry["auth"]).decode(errors="replace").partition(":")
    return user, password


def parse_json(raw, what):
    """Bytes from outside → a dict, or a MockerError that says what is wrong with `what`."""
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        raise MockerError(f"{what} is not JSON: the registry is broken, or it is no registry") from None
    return expect(value, dict, what)


def expect(value, kind, what):
    """`value`, if it is of the kind that the spec says. JSON of another shape is refused, not guessed at."""
    if not isinstance(value, kind) or isinstance(value, bool):
        name = {dict: "an object", list: "a list", str: "text", int: "a number"}[kind]
        raise MockerError(f"{what} should be {name}: this image is broken, or no image")
    return value


def descriptor(value, what):
    """{"mediaType", "digest", "size"}: how the OCI specs point to a blob."""
    digest = expect(expect(value, dict, what).get("digest"), str, f"{what}'s digest")
    size = expect(value.get("size"), int, f"{what}'s size")
    if not DIGEST.fullmatch(digest) or size < 0:
        raise MockerError(f"{what}'s digest '{printable(digest)[:80]}' or size is not valid: this image is broken")
    return {"mediaType": expect(value.get("mediaType", ""), str, f"{what}'s mediaType"), "digest": digest, "size": size}


def hash_of(digest):
    """sha256:… → a fresh hashlib object of that kind."""
    import hashlib

    return hashlib.new(digest.partition(":")[0])


def check_digest(raw, digest, what):
    """The bytes are what was asked for, whoever served them: that is what a digest is for."""
    found = hash_of(digest)
    found.update(raw)
    if digest != f"{found.name}:{found.hexdigest()}":
        raise MockerError(f"{what} is damaged: its digest is {found.name}:{found.hexdigest()}, not {digest}; pull again")


def fetch_manifest(registry, version):
    """One manifest or index, by tag or digest → its raw bytes, its media type, its digest."""
    response = registry.get(f"manifests/{version}", headers={"Accept": ", ".join(MANIFEST_TYPES + INDEX_TYPES)}, stream=True)
    raw = response.raw.read(MANIFEST_LIMIT + 1)
    if len(raw) > MANIFEST_LIMIT:
        raise MockerError(f"the manifest of {registry.reference} is larger than 4 MiB: no real one is")
    if DIGEST.fullmatch(version):
        check_digest(raw, version, f"the manifest of {registry.reference}")
        digest = version
    else:
        found = hash_of("sha256:")
        found.update(raw)
        digest = f"sha256:{found.hexdigest()}"
    manifest = parse_json(raw, f"the manifest of {registry.reference}")
    kind = manifest.get("mediaType") or response.headers.get("Content-Type", "").partition(";")[0]
    if manifest.get("schemaVersion") == 1 or "docker.distribution.manifest.v1+" in str(kind):
        raise MockerError(f"{registry.reference} is in the old schema 1 format, which Docker dropped too: pull a newer tag")
    return raw, manifest, str(kind), digest


def this_platform():
    """{"os", "architecture", "variant"} of this machine, in Go's names as the specs use them."""
    machine = os.uname().machine
    names = {"x86_64": ("amd64", ""), "aarch64": ("arm64", "v8"), "armv7l": ("arm", "v7"), "armv6l": ("arm", "v6"),
             "i686": ("386", ""), "ppc64le": ("ppc64le", ""), "s390x": ("s390x", ""), "riscv64": ("riscv64", "")}  # fmt: skip
    architecture, variant = names.get(machine, (machine, ""))
    return {"os": "linux", "architecture": architecture, "variant": variant}


def parse_platform(text):
    """linux/arm64/v8 → as this_platform"""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise MockerError(f"invalid platform '{text}': write os/architecture, as in linux/arm64 or linux/arm/v7")
    return dict(zip(("os", "architecture", "variant"), parts + [""]))


def choose_platform(index, wanted, what):
    """The entry of an index that runs here. An attestation (unknown/unknown) is no image."""
    entries = []
    for entry in expect(index.get("manifests"), list, f"{what}'s list of manifests"):
        found = expect(expect(entry, dict, f"an entry of {what}").get("platform") or {}, dict, f"a platform of {what}")
        names = [str(found.get(key) or "") for key in ("os", "architecture", "variant")]
        if names[0] != "unknown":
            entries.append((names, entry))
    default = {"arm64": "v8"}.get(wanted["architecture"], "")
    for variant in (wanted["variant"], default, ""):
        for (system, architecture, found), entry in entries:
            if (system, architecture) == (wanted["os"], wanted["architecture"]) and (found or default) == (variant or default):
                return descriptor(entry, f"an entry of {what}")
    there = sorted({"/".join(filter(None, names)) or "(no platform)" for names, _ in entries})
    raise MockerError(f"{what} has no image for {'/'.join(filter(None, wanted.values()))}, only for {', '.join(there)}: "
                      "try --platform=…")  # fmt: skip


def explain_token(token):
    """A token is three pieces of base64: what it allows can be read, and only the registry can make one."""
    import base64

    with contextlib.suppress(ValueError, IndexError):
        claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
        prove("the token's claims (never show the token)", json.dumps(claims, indent=1))


def describe_entry(entry, chosen):
    """One line of an index, for --explain."""
    platform = entry.get("platform") or {}
    names = "/".join(filter(None, (platform.get(key) for key in ("os", "architecture", "variant"))))
    return f"{names:16} {entry.get('digest', '')[:19]}…" + "  ← this machine's" * (entry.get("digest") == chosen["digest"])


def explain_config(config, manifest):
    """The layers beside the lines of the history that made them; some lines made none."""
    made = [line for line in config.get("history") or [] if isinstance(line, dict) and not line.get("empty_layer")]
    for layer, line in zip(manifest["layers"], made):
        prove(f"layer {layer['digest'][:19]}… {layer['size']} bytes", str(line.get("created_by", ""))[:300])


@step
def find_manifest(registry, platform):
    """Ask the registry which manifest the name stands for

    A tag names an index or a manifest, both JSON. An index has one manifest for each platform: we
    take the one for this machine, by its digest. Everything below it is named by digest too, so
    from here on nobody, the registry included, can change a byte unseen.
    Spec: OCI image-spec, image-index.md and manifest.md.
    """
    what = str(registry.reference)
    version = registry.reference.version
    for _ in range(4):  # an index may point to an index
        raw, manifest, kind, digest = stored_manifest(version) or fetch_manifest(registry, version)
        save_blob(digest, raw)
        if "manifests" not in manifest and kind not in INDEX_TYPES:
            return check_manifest(manifest, what), kind, digest, len(raw)
        chosen = choose_platform(manifest, platform, what)
        prove(f"the index {digest[:19]}… has", "\n".join(describe_entry(entry, chosen) for entry in manifest["manifests"]))
        version = chosen["digest"]
    raise MockerError(f"{what} is an index of an index of an index, without end: this image is broken")


def stored_manifest(version):
    """A manifest asked for by digest may be here already, and then it can't have changed."""
    raw = DIGEST.fullmatch(version) and read_blob(version)
    if not raw:
        return None
    manifest = parse_json(raw, version)
    return raw, manifest, str(manifest.get("mediaType", "")), version


def check_manifest(manifest, what):
    """The manifest, reduced to what is needed and checked for its shape."""
    layers = expect(manifest.get("layers"), list, f"{what}'s list of layers")
    checked = {"config": descriptor(manifest.get("config"), f"{what}'s config"),
               "layers": [descriptor(layer, f"a layer of {what}") for layer in layers]}  # fmt: skip
    for layer in checked["layers"]:
        if "nondistributable" in layer["mediaType"] or "foreign" in layer["mediaType"]:
            raise MockerError(f"{what} has a foreign layer (Windows keeps those elsewhere): it can't run here")
    return checked


def check_config(raw, layers, what):
    """The image's config: its diff_ids, one a layer, must be there; what `run` uses must have its kind."""
    config = parse_json(raw, f"{what}'s config")
    rootfs = expect(config.get("rootfs"), dict, f"{what}'s rootfs")
    diff_ids = expect(rootfs.get("diff_ids"), list, f"{what}'s list of diff_ids")
    if len(diff_ids) != len(layers) or not all(isinstance(d, str) and DIGEST.fullmatch(d) for d in diff_ids):
        raise MockerError(f"{what} has {len(layers)} layers, but not a diff_id for each: this image is broken")
    wanted = expect(config.get("config") or {}, dict, f"{what}'s config")
    for key, kind in (("Env", list), ("Entrypoint", list), ("Cmd", list), ("WorkingDir", str), ("User", str)):
        value = expect(wanted.get(key) or kind(), kind, f"{what}'s {key}")
        if not all(isinstance(item, str) and "\0" not in item for item in value):
            raise MockerError(f"{what}'s {key} should be text: this image is broken")
    return config


def fetch_blob(registry, blob, partial, received=lambda count: None):
    """Download a blob into the store, unless it is there. After a drop, Range goes on (RFC 9110 §14.2)."""
    import requests
    import urllib3

    if os.path.exists(blob_path(blob["digest"])):
        return
    path = os.path.join(partial, blob["digest"].replace(":", "-"))
    failures = 0
    with open(path, "w+b") as file:
        while True:
            offset = file.tell()
            try:
                response = registry.get(f"blobs/{blob['digest']}", stream=True,
                                        headers={"Range": f"bytes={offset}-"} if offset else {})  # fmt: skip
                if response.status_code != 206:
                    file.seek(0)
                    file.truncate()
                for chunk in iter(lambda: response.raw.read(1 << 18), b""):
                    file.write(chunk)
                    received(file.tell())
                    if file.tell() > blob["size"]:
                        break
            except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                say(f"the connection dropped at byte {file.tell()} ({root_cause(error)})")
            if file.tell() >= blob["size"]:
                break
            failures = failures + 1 if file.tell() == offset else 0
            if failures >= ATTEMPTS or not blob["size"]:
                raise MockerError(f"{blob['digest'][:19]}… is cut off at {file.tell()} of {blob['size']} bytes: pull again")
        if file.tell() != blob["size"]:
            raise MockerError(f"{blob['digest'][:19]}… is longer than the {blob['size']} bytes that its manifest says")
        check_file(file, blob["digest"])
    keep_blob(path, blob["digest"])


def check_file(file, digest):
    """The whole file against its digest."""
    found = hash_of(digest)
    file.seek(0)
    for chunk in iter(lambda: file.read(1 << 18), b""):
        found.update(chunk)
    if found.hexdigest() != digest.partition(":")[2]:
        raise MockerError(f"{digest[:19]}… is damaged: its digest is {found.name}:{found.hexdigest()[:12]}…; pull again")


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  The image store: blobs, layers, whiteouts
# ═══════════════════════════════════════════════════════════════════════════════════════════════
#
#  ~/mocker is an OCI image layout, which skopeo, podman and umoci can read, and a little more:
#
#  oci-layout  index.json  blobs/sha256/…   as the registry served them
#  library_tomcat.json                      one stored manifest an image: what `images` lists
#  layers/<chain id>/                       each layer unpacked once, as overlayfs wants it
#  containers/<id>/                         config.json, log, upper/ (what the container wrote), …
#  partial/<anything>/                      a pull under way; its owner holds a lock on it
#
#  All is made elsewhere and appears by rename: there is never half of anything.

LAYER_LIMIT = int(os.environ.get("MOCKER_LAYER_LIMIT", 10 << 30))  # bytes that one layer may unpack to


def store(*parts):
    """A path in the store."""
    return os.path.join(HOME, *parts)


def blob_path(digest):
    return store("blobs", *digest.split(":"))


def read_blob(digest):
    """A small blob (a manifest or config), checked again, or None if it is not here."""
    try:
        with open(blob_path(digest), "rb") as file:
            raw = file.read(MANIFEST_LIMIT + 1)
    except FileNotFoundError:
        return None
    check_digest(raw, digest, f"the stored blob {digest[:19]}…")
    return raw


def save_blob(digest, raw):
    if not os.path.exists(blob_path(digest)):
        write_file(blob_path(digest), raw)


def keep_blob(path, digest):
    os.makedirs(os.path.dirname(blob_path(digest)), exist_ok=True)
    os.rename(path, blob_path(digest))


def write_file(path, content):
    """Write it whole, or not at all: to a name of our own, then rename(2), which is atomic."""
    content = content if isinstance(content, bytes) else (json.dumps(content, indent=2) + "\n").encode()
    os.makedirs(os.path.dirname(path), exist_ok=True)
    mine = f"{path}.{os.getpid()}.new"
    with open(mine, "wb") as file:
        file.write(content)
    os.rename(mine, path)


@contextlib.contextmanager
def locked(directory, wait=True):
    """Hold flock(2) on a directory. The kernel lets go of it when its holder dies, however it dies."""
    os.makedirs(directory, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def partial_directory():
    """A directory for one pull's unfinished work, gone when it ends; those of killed pulls go first."""
    import shutil

    for name in os.listdir(store("partial")) if os.path.isdir(store("partial")) else ():
        with contextlib.suppress(BlockingIOError, FileNotFoundError), locked(store("partial", name), wait=False):
            shutil.rmtree(store("partial", name), ignore_errors=True)
    path = store("partial", os.urandom(6).hex())
    with locked(path):
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def chain_ids(diff_ids):
    """diff_ids, from the bottom up → the names of the unpacked layers (OCI image-spec, "Layer ChainID").

    A layer's files depend on what lies below: a parent directory that it leaves out has the mode of
    the layer below, a hard link may go there. So its name says what is below, too.
    >>> chain_ids(["sha256:a", "sha256:b"])[0]
    'sha256:a'
    """
    chain = []
    for diff_id in diff_ids:
        if chain:
            found = hash_of("sha256:")
            found.update(f"{chain[-1]} {diff_id}".encode())
            diff_id = f"sha256:{found.hexdigest()}"
        chain.append(diff_id)
    return chain


class Image:
    """A stored image: what its JSON file says, and its config."""

    def __init__(self, file):
        with open(store(file), "rb") as stored:
            self.stored = parse_json(stored.read(), file)
        self.file = file
        self.name, self.version = self.stored["name"], self.stored["version"]
        self.manifest = self.stored["manifest"]
        self.size = self.manifest["config"]["size"] + sum(layer["size"] for layer in self.manifest["layers"])

    @property
    def config(self):
        raw = read_blob(self.manifest["config"]["digest"])
        if raw is None:
            raise MockerError(f"{self.name} has lost its config: mocker pull {self.name}")
        return parse_json(raw, f"{self.name}'s config")

    @property
    def layers(self):
        """The unpacked layers' directories, from the bottom up."""
        return [layer_path(chain) for chain in chain_ids(self.config["rootfs"]["diff_ids"])]


def layer_path(chain):
    return store("layers", chain.partition(":")[2])


def all_images():
    """Every stored image, by name."""
    files = os.listdir(HOME) if os.path.isdir(HOME) else []
    return [Image(file) for file in sorted(files) if file.endswith(".json") and file != "index.json"]


# ── Layers ─────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def confined(directory):
    """chroot into a directory and back: no path in a tar can name anything outside it.

    The way back is the classic way out of a chroot, for whoever may call chroot(2) and holds a
    directory from outside. That is why `run` doesn't rely on chroot.
    """
    outside, finders = os.open("/", os.O_PATH), sys.meta_path
    sys.meta_path = []  # an import in here would run the image's own /usr/lib/python3
    os.chroot(directory)
    os.chdir("/")
    try:
        yield
    finally:
        os.fchdir(outside)
        os.chroot(".")
        os.close(outside)
        sys.meta_path = finders


def decompressed(file):
    """The tar inside a blob, in pieces; its first bytes tell how it is packed, not its media type."""
    magic = file.read(4)
    file.seek(0)
    if magic[:2] == b"\x1f\x8b":
        return inflate(file)
    if magic == b"\x28\xb5\x2f\xfd":
        return pieces(open_zstd(file))
    return pieces(file)


def pieces(file):
    return iter(lambda: file.read(1 << 18), b"")


def open_zstd(file):
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise MockerError("this layer is packed with zstd: pip install backports.zstd") from None
    return zstd.ZstdFile(file)


def inflate(file):
    """gzip (RFC 1952): one member or several, and nothing after them but zeros."""
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
    """A layer's tar as a file that can only be read forward; counts and hashes what passes."""

    def __init__(self, file, diff_id):
        self.diff_id, self.hash = diff_id, hash_of(diff_id)
        self.chunks = decompressed(file)
        self.buffer, self.position, self.total = b"", 0, 0

    def next_chunk(self):
        chunk = next(self.chunks, b"")
        self.hash.update(chunk)
        self.total += len(chunk)
        if self.total > LAYER_LIMIT:
            raise MockerError(f"a layer unpacks to more than {LAYER_LIMIT} bytes: if you trust it, raise MOCKER_LAYER_LIMIT")
        return chunk

    def read(self, size):
        """Exactly `size` bytes, or less at the end."""
        while len(self.buffer) - self.position < size:
            chunk = self.next_chunk()
            if not chunk:
                size = len(self.buffer) - self.position
                break
            self.buffer, self.position = self.buffer[self.position :] + chunk, 0
        self.position += size
        return self.buffer[self.position - size : self.position]

    def tell(self):
        return self.total - len(self.buffer) + self.position

    def seek(self, offset):
        while self.tell() < offset and self.read(min(offset - self.tell(), 1 << 20)):
            pass

    def copy(self, size, descriptor):
        """The next `size` bytes into an open file."""
        while size:
            data = self.read(min(size, 1 << 20))
            if not data:
                raise EOFError("the tar ends in the middle of a file")
            os.write(descriptor, data)
            size -= len(data)

    def finish(self):
        """What follows the tar's end counts for the diff_id, too."""
        while self.read(1 << 18):
            pass
        if self.hash.hexdigest() != self.diff_id.partition(":")[2]:
            raise MockerError(f"a layer does not unpack to the diff_id {self.diff_id[:19]}… of its config: damaged, or forged")


class Layer:
    """One layer being unpacked, by a process whose root is the layer's directory."""

    def __init__(self, stream):
        self.stream = stream
        self.names = []  # the first ten, for the transcript
        self.implied = set()  # directories that the tar leaves out: the layer below has their modes
        self.borrowed = []  # (path, target): hard links to files of the layers below
        self.directories = {}  # path → member, whose times are set last

    def unpack(self):
        """Each member of the tar in its place, as overlayfs wants it."""
        import tarfile

        tar = tarfile.TarFile(fileobj=self.stream, encoding="utf-8", errors="surrogateescape")
        while member := tar.next():
            tar.members.clear()  # or tarfile remembers all of them
            if len(self.names) < 11:
                self.names.append(member.name)
            self.place(member)
        for path, member in reversed(self.directories.items()):
            set_times(path, member)
        self.stream.finish()

    def place(self, member):
        """One member. A later one replaces an earlier one of the same name."""
        path = os.path.normpath("/" + member.name.lstrip("/"))
        folder, name = os.path.split(path)
        if name == ".wh..wh..opq":
            self.make_directory(folder, None)
            make_opaque(folder)
        elif name.startswith(".wh..wh."):
            pass  # aufs kept its books in the layers of early images
        elif name.startswith(".wh."):
            self.make_whiteout(folder, name[len(".wh.") :])
        elif member.isdir():
            self.make_directory(path, member)
        else:
            if path == "/":
                raise MockerError("a layer's root is no directory: this image is broken")
            if not self.try_to_make(path, member):
                self.make_way(path)
                self.try_to_make(path, member)
            self.directories.pop(path, None)

    def try_to_make(self, path, member):
        """Make it; False if something is in the way: an older entry, or a parent that is missing."""
        try:
            if member.isreg():
                self.make_file(path, member)
            elif member.islnk():
                self.make_link(path, os.path.normpath("/" + member.linkname.lstrip("/")))
            elif member.issym():
                os.symlink(member.linkname, path)
                set_metadata(path, member)
            elif member.isfifo() or member.isdev():
                kind = 0o010000 if member.isfifo() else 0o020000 if member.ischr() else 0o060000
                os.mknod(path, kind, os.makedev(member.devmajor, member.devminor) if member.isdev() else 0)
                set_metadata(path, member)
            else:
                raise MockerError(f"a layer holds '{member.name}' of the unknown type {member.type}: this image is broken")
        except (FileExistsError, FileNotFoundError, NotADirectoryError):
            return False
        return True

    def make_file(self, path, member):
        """A regular file, with all that belongs to it. Sparse files keep their holes."""
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            if member.sparse is not None:
                for offset, size in member.sparse:
                    os.lseek(handle, offset, os.SEEK_SET)
                    self.stream.copy(size, handle)
                os.ftruncate(handle, min(member.size, LAYER_LIMIT))
            elif member.size:
                self.stream.copy(member.size, handle)
            set_metadata(handle, member)
        finally:
            os.close(handle)

    def make_link(self, path, target):
        """A hard link; if its target is in a layer below, that is settled when those are there."""
        if os.path.lexists(target):
            if path != target:
                os.link(target, path, follow_symlinks=False)
        else:
            os.lstat(os.path.dirname(path))
            self.borrowed.append((path, target))

    def make_way(self, path):
        """Make the parents that the tar left out, and remove an older entry of this name."""
        import shutil

        self.make_directory(os.path.dirname(path), None)
        with contextlib.suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)

    def make_directory(self, path, member):
        """A directory, by a member of its own, or (None) since something in it needs it."""
        if member is None and os.path.isdir(path):
            return
        replaces = None
        with contextlib.suppress(FileNotFoundError):
            replaces = os.lstat(path)
        if replaces is None or not is_directory(replaces):
            self.make_directory(os.path.dirname(path), None)
            if replaces is not None:
                os.unlink(path)
            os.mkdir(path)
            if replaces is not None and is_whiteout(replaces):
                make_opaque(path)
        if member is None:
            self.implied.add(path)
        else:
            self.implied.discard(path)
            set_metadata(path, member)
            self.directories[path] = member

    def make_whiteout(self, folder, name):
        """`.wh.NAME` deletes NAME of the layers below; for overlayfs that is a character device 0/0."""
        if name in ("", ".", ".."):
            raise MockerError("a layer's whiteout names no file: this image is broken")
        self.make_directory(folder, None)
        path = os.path.join(folder, name)
        try:
            os.mknod(path, 0o020000, 0)
        except FileExistsError:  # the layer has its own: only what is below it must go
            if is_directory(os.lstat(path)):
                make_opaque(path)
        except PermissionError:
            raise MockerError(f"whiteouts can't be stored in {HOME}, it lies on an overlay itself: "
                              "set MOCKER_HOME to a folder on a disk, a volume, or /dev/shm") from None  # fmt: skip


def is_directory(status):
    return status.st_mode & 0o170000 == 0o040000


def is_whiteout(status):
    return status.st_mode & 0o170000 == 0o020000 and status.st_rdev == 0


def make_opaque(folder):
    """What the layers below have in this directory is hidden (kernel docs, filesystems/overlayfs)."""
    try:
        os.setxattr(folder, "trusted.overlay.opaque", b"y")
    except OSError as error:
        raise MockerError(f"{HOME} can't hold opaque directories ({error.strerror}): "
                          "set MOCKER_HOME to a folder on a disk, a volume, or /dev/shm") from None  # fmt: skip


def set_metadata(path, member):
    """Owner, mode, xattrs, times: in this order, since chown(2) clears setuid bits and capabilities."""
    symbolic = member.issym()
    if not (0 <= member.uid < 2**32 - 1 and 0 <= member.gid < 2**32 - 1):  # -1 would mean: leave it
        raise ValueError(f"owner {member.uid}:{member.gid}")
    os.chown(path, member.uid, member.gid, follow_symlinks=not symbolic)
    if not symbolic:
        os.chmod(path, member.mode & 0o7777)
    for key, value in member.pax_headers.items():
        if key.startswith("SCHILY.xattr.") and not key.startswith("SCHILY.xattr.trusted.overlay."):  # ours
            with contextlib.suppress(OSError):  # as docker: a file system may lack them
                os.setxattr(path, key[len("SCHILY.xattr.") :], value.encode("utf-8", "surrogateescape"), follow_symlinks=not symbolic)
    if not member.isdir():
        set_times(path, member)


def set_times(path, member):
    seconds = int(min(max(member.mtime, 0), 2**33) * 1_000_000_000)
    os.utime(path, ns=(seconds, seconds), follow_symlinks=not member.issym())


def look_below(layers, path):
    """Where a path of the rootfs lies in the layers (from the top down), or None. Follows no symlink."""
    for layer in layers:
        place = layer
        for part in path.strip("/").split("/"):
            parent, place = place, os.path.join(place, part)
            try:
                status = os.lstat(place)
            except FileNotFoundError:
                if get_xattr(parent, "trusted.overlay.opaque") == b"y":
                    return None
                break
            if not is_directory(status):
                return place if place == os.path.join(layer, path.strip("/")) and not is_whiteout(status) else None
        else:
            return place
    return None


def get_xattr(path, name):
    try:
        return os.getxattr(path, name, follow_symlinks=False)
    except OSError:
        return None


def settle_layer(directory, layers_below, implied, borrowed):
    """Take from the layers below what the tar left to them: modes of parents, targets of hard links."""
    import shutil

    for path in sorted(implied):
        source = look_below(layers_below, path)
        here = os.path.join(directory, path.strip("/"))
        if source and is_directory(os.lstat(source)):
            copy_metadata(source, here)
        elif path != "/":
            os.chmod(here, 0o755)
    for path, target in borrowed:
        source = look_below(layers_below, target)
        if source is None or is_directory(os.lstat(source)):
            raise MockerError(f"a layer has a hard link to '{target}', which is nowhere: this image is broken")
        here = os.path.join(directory, path.strip("/"))
        shutil.copyfile(source, here, follow_symlinks=False)
        copy_metadata(source, here)


def copy_metadata(source, target):
    """Owner, mode, xattrs, times."""
    import shutil

    status = os.lstat(source)
    os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    shutil.copystat(source, target, follow_symlinks=False)


def fetch_layer(registry, number, blob, diff_id, partial, progress):
    """One layer, in a worker process: its blob into the store, its files into partial/<number>."""
    story.lines = []  # told in one piece when the layer is done: several workers are at it
    say(f"Fetching layer {blob['digest']}..")
    if not os.path.exists(blob_path(blob["digest"])):
        own = Registry(registry.reference, registry.authorization)  # a connection can't be shared
        fetch_blob(own, blob, partial, lambda count: progress.set(number, count))
    directory = os.path.join(partial, str(number))
    os.mkdir(directory, 0o755)
    with open(blob_path(blob["digest"]), "rb") as file:
        layer = unpack_layer(file, diff_id, directory)
    for name in layer.names[:10]:
        say(f"- {name}")
    say("...")
    tell_all_at_once()
    return directory, layer.implied, layer.borrowed


def unpack_layer(file, diff_id, directory):
    """A blob's tar into a directory, in an order of its own: confined, bounded, checked."""
    import tarfile
    import zlib

    layer = Layer(LayerStream(file, diff_id))
    try:
        with confined(directory):
            layer.unpack()
    except (tarfile.TarError, EOFError, zlib.error, ValueError, OverflowError, RecursionError) as error:
        raise MockerError(f"a layer is damaged, or no tar ({printable(str(error))[:100] or type(error).__name__}): pull again, "
                          "or tell who made it") from None  # fmt: skip
    return layer


class Progress:
    """Bytes received of each layer, in memory that the workers share."""

    def __init__(self, layers):
        import mmap

        self.total = sum(layer["size"] for layer in layers) or 1
        self.shared = mmap.mmap(-1, 8 * len(layers) + 8)

    def set(self, number, count):
        struct.pack_into("Q", self.shared, 8 * number, count)

    def draw(self):
        """[########                ] 12.3 of 153.9 MiB"""
        count = sum(number for (number,) in struct.iter_unpack("Q", self.shared[:]))
        bar = "#" * min(30, 30 * count // self.total)
        if story.level >= PLAIN and os.isatty(2):
            os.write(2, f"\r[{bar:30}] {count / 2**20:.1f} of {self.total / 2**20:.1f} MiB ".encode())


def in_workers(work, items, limit, meanwhile):
    """Run work(*item) for each item in a process of its own, `limit` at a time; → results, in order."""
    import pickle
    import select

    waiting, running, results = list(enumerate(items)), {}, {}
    try:
        for number in range(len(items)):
            while number not in results:
                while waiting and len(running) < limit:
                    start_worker(work, *waiting.pop(0), running)
                ready, _, _ = select.select(list(running), [], [], 0.25)
                for pipe in ready:
                    done, _ = running.pop(pipe)
                    with open(pipe, "rb") as file:
                        results[done] = file.read()
                meanwhile()
            result = pickle.loads(results.pop(number) or pickle.dumps(MockerError("a worker was killed: out of memory?")))
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        for _, pid in running.values():
            os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while True:
                os.wait()


def start_worker(work, number, item, running):
    """Fork; the worker's result, or its exception, comes back through a pipe."""
    import pickle

    reader, writer = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid:
        os.close(writer)
        running[reader] = (number, pid)
        return
    try:
        die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            result = work(*item)
        except (MockerError, OSError) as error:
            tell_all_at_once()
            result = error
        with open(writer, "wb") as file:
            pickle.dump(result, file)
    finally:
        if sys.exc_info()[0]:
            sys.excepthook(*sys.exc_info())
        os._exit(0)


@step
def fetch_layers(registry, layers, diff_ids, partial):
    """Fetch the layers, and unpack each one

    A layer is a tar of what one build step changed: the files it added, and whiteouts, names that
    begin with `.wh.`, for those it deleted. Workers download and unpack several at once, each
    chrooted into the directory that it fills; a layer that another image brought already is not
    fetched again.
    Spec: OCI image-spec, layer.md. Look: ls ~/mocker/layers
    """
    chain = chain_ids(diff_ids)
    missing = [n for n in range(len(chain)) if not os.path.isdir(layer_path(chain[n]))]
    progress = Progress([layers[n] for n in missing])
    os.makedirs(store("layers"), exist_ok=True)
    jobs = [(registry, n, layers[n], diff_ids[n], partial, progress) for n in missing]
    for n, (directory, implied, borrowed) in zip(missing, in_workers(fetch_layer, jobs, 3, progress.draw)):
        settle_layer(directory, [layer_path(below) for below in reversed(chain[:n])], implied, borrowed)
        with contextlib.suppress(OSError):  # another pull may have brought it meanwhile
            os.rename(directory, layer_path(chain[n]))


def save_image(reference, kind, digest, manifest, raw_size):
    """The image's JSON file, and its line in index.json: with these it is there."""
    entry = {"name": reference.name, "version": reference.version, "digest": digest, "mediaType": kind,
             "size": raw_size, "manifest": manifest}  # fmt: skip
    with locked(HOME):
        write_file(store(reference.file), entry)
        write_index()


def write_index():
    """index.json (OCI image-spec, image-layout.md), made anew from the stored images."""
    write_file(store("oci-layout"), {"imageLayoutVersion": "1.0.0"})
    manifests = []
    for image in all_images():
        digest, size = oci_manifest(image)
        name = f"{image.name}{'@' if DIGEST.fullmatch(image.version) else ':'}{image.version}"
        manifests.append({"mediaType": MANIFEST_TYPES[0], "digest": digest, "size": size,
                          "annotations": {"org.opencontainers.image.ref.name": name}})  # fmt: skip
    write_file(store("index.json"), {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": manifests})


def oci_manifest(image):
    """(digest, size) of the image's manifest in OCI's own types: some readers know no others."""
    if image.stored["mediaType"] == MANIFEST_TYPES[0]:
        return image.stored["digest"], image.stored["size"]
    layers = [dict(layer, mediaType=layer_type(layer["digest"])) for layer in image.manifest["layers"]]
    config = dict(image.manifest["config"], mediaType="application/vnd.oci.image.config.v1+json")
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPES[0], "config": config, "layers": layers}
    raw = json.dumps(manifest).encode()
    found = hash_of("sha256:")
    found.update(raw)
    save_blob(f"sha256:{found.hexdigest()}", raw)
    return f"sha256:{found.hexdigest()}", len(raw)


def layer_type(digest):
    """A blob's media type, by its first bytes."""
    with open(blob_path(digest), "rb") as file:
        magic = file.read(4)
    packed = "+gzip" if magic[:2] == b"\x1f\x8b" else "+zstd" if magic == b"\x28\xb5\x2f\xfd" else ""
    return f"application/vnd.oci.image.layer.v1.tar{packed}"


def pull_image(reference, platform=None):
    """From a name to a stored image: manifest, config, layers. → Image"""
    say(f"Fetching manifest for {reference.familiar}...")
    registry = Registry(reference)
    with partial_directory() as partial:
        manifest, kind, digest, size = find_manifest(registry, platform or this_platform())
        fetch_blob(registry, manifest["config"], partial)
        raw = read_blob(manifest["config"]["digest"])
        config = check_config(raw, manifest["layers"], str(reference))
        explain_config(config, manifest)
        fetch_layers(registry, manifest["layers"], config["rootfs"]["diff_ids"], partial)
        save_image(reference, kind, digest, manifest, size)
    return Image(reference.file)


def pull(arguments):
    """Fetch an image from Docker Hub, or from the registry that its name begins with.

    Usage:
      mocker pull [options] <name>[<tag>]

    Options:
      --platform=OS/ARCH  another machine's image, as in linux/arm64 or linux/arm/v7
      --explain           tell and show each step
      --step              the same, and wait for Enter before each one
      -q, --quiet         say nothing

    Examples: hello-world   hello-world:latest   hello-world latest   library/hello-world
      127.0.0.1:5000/team/app:1.2   name@sha256:…
    """
    need_root("pull")
    platform = parse_platform(arguments["--platform"]) if arguments["--platform"] else None
    pull_image(parse_reference(arguments["<name>"], arguments["<tag>"]), platform)
    return 0


def images(arguments):
    """List the images that are here: name, version, size of the download, file.

    Usage:
      mocker images
    """
    from tabulate import tabulate

    rows = [(image.name, image.version, f"{image.size / 2**20:.1f}MiB", image.file) for image in all_images()]
    print(tabulate(rows, headers=("name", "version", "size", "file"), tablefmt="pretty", stralign="left"))
    return 0


def verify(arguments):
    """Check every image again: each blob against its digest, each layer against its diff_id.

    Usage:
      mocker verify
    """
    damaged = 0
    for image in all_images():
        try:
            verify_image(image)
            print(f"ok       {image.name}:{image.version}")
        except MockerError as error:
            damaged += 1
            print(f"DAMAGED  {image.name}:{image.version}: {error}")
    return 1 if damaged else 0


def verify_image(image):
    """Raises MockerError at the first thing that isn't as the registry served it."""
    read_blob(image.stored["digest"])
    for blob, diff_id, layer in zip(image.manifest["layers"], image.config["rootfs"]["diff_ids"], image.layers):
        try:
            with open(blob_path(blob["digest"]), "rb") as file:
                check_file(file, blob["digest"])
                file.seek(0)
                LayerStream(file, diff_id).finish()
        except (FileNotFoundError, NotADirectoryError):
            raise MockerError(f"{blob['digest'][:19]}… is missing: mocker pull {image.name}") from None
        if not os.path.isdir(layer):
            raise MockerError(f"the unpacked layer {layer} is missing: mocker pull {image.name}")


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  The kernel calls that Python does not wrap
# ═══════════════════════════════════════════════════════════════════════════════════════════════

# Flags of unshare(2) and setns(2): which namespaces
CLONE_NEWNS = 0x00020000  # mount: a mount table of its own
CLONE_NEWCGROUP = 0x02000000  # cgroup: its cgroup looks like the root of the tree
CLONE_NEWUTS = 0x04000000  # uts: a host name of its own
CLONE_NEWIPC = 0x08000000  # ipc: System V IPC and POSIX message queues of its own
CLONE_NEWPID = 0x20000000  # pid: process numbers of its own, from 1
CLONE_NEWNET = 0x40000000  # net: interfaces, addresses, routes, firewall of its own

# Flags of mount(2), and how mount(8) spells them
MS_RDONLY = 0x1
MS_NOSUID = 0x2  # setuid bits and file capabilities count for nothing
MS_NODEV = 0x4  # device nodes can't be opened
MS_NOEXEC = 0x8
MS_REMOUNT = 0x20  # change the flags of what is mounted
MS_BIND = 0x1000  # the same directory at a second place
MS_REC = 0x4000  # and all that is mounted below it
MS_PRIVATE = 0x40000  # mounts made here stay here
MS_STRICTATIME = 0x1000000
MOUNT_OPTIONS = {MS_RDONLY: "ro", MS_NOSUID: "nosuid", MS_NODEV: "nodev", MS_NOEXEC: "noexec",
                 MS_REMOUNT: "remount", MS_BIND: "bind", MS_STRICTATIME: "strictatime"}  # fmt: skip

MNT_DETACH = 2  # umount2(2): out of the tree now, gone when nobody uses it
OPEN_TREE_CLONE = 1  # open_tree(2): a copy of a mount, not yet anywhere
AT_RECURSIVE = 0x8000
AT_EMPTY_PATH = 0x1000
MOVE_MOUNT_F_EMPTY_PATH = 4  # move_mount(2): what to move is the descriptor itself
PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2

# The C library wraps no pivot_root(2); the others are younger than some C libraries.
SYSTEM_CALLS = {"x86_64": {"pivot_root": 155, "open_tree": 428, "move_mount": 429},
                "aarch64": {"pivot_root": 41, "open_tree": 428, "move_mount": 429}}  # fmt: skip


class _Libc:
    """ctypes' view of the C library, loaded at the first call: `images` needs none."""

    def __getattr__(self, name):
        import ctypes

        self.__dict__.update(ctypes=ctypes, library=ctypes.CDLL(None, use_errno=True))
        return getattr(self, name) if name in ("ctypes", "library") else getattr(self.library, name)


libc = _Libc()


def call(what, function, *arguments):
    """Call a C function; -1 becomes a MockerError that says what failed and why."""
    result = getattr(libc, function)(*[encode(argument) for argument in arguments])
    if result == -1:
        number = libc.ctypes.get_errno()
        raise MockerError(f"{what}: {os.strerror(number)}", number=number)
    return result


def encode(argument):
    """Python value → C: text as bytes, numbers as long, so that flags above 2^31 fit."""
    if isinstance(argument, str):
        return os.fsencode(argument)
    return libc.ctypes.c_ulong(argument) if isinstance(argument, int) else argument


def system_call(name, *arguments):
    """syscall(2), for what the C library lacks."""
    numbers = SYSTEM_CALLS.get(os.uname().machine)
    if numbers is None:
        raise MockerError(f"mocker run knows the system calls of {' and '.join(SYSTEM_CALLS)}, not of {os.uname().machine}")
    return call(name, "syscall", numbers[name], *arguments)


def unshare(flags, names):
    """unshare(2): leave a namespace for a new one."""
    tell(f"unshare {' '.join(f'--{name}' for name in names)}")
    call(f"unshare {' '.join(names)}", "unshare", flags)


def enter_namespace(handle, flags):
    """setns(2): move into a namespace that an open file stands for."""
    call("setns", "setns", handle, flags)


def mount(source, target, kind="", flags=0, data=""):
    """mount(2)"""
    options = ",".join([name for flag, name in MOUNT_OPTIONS.items() if flags & flag] + [data] * bool(data))
    command = ["mount"] + (["-t", kind] if kind else []) + (["-o", options] if options else []) + [source, target]
    if flags & MS_PRIVATE:
        command = ["mount", "--make-rprivate", target]
    tell(shlex.join(command))
    call(shlex.join(command), "mount", source, target, kind, flags, data)


def bind_mount(source, target, flags=0):
    """A directory or file at a second place. Its flags need a second call (man 2 mount, "Remounting")."""
    mount(source, target, "", MS_BIND | MS_REC)
    if flags:
        mount("none", target, "", MS_REMOUNT | MS_BIND | flags)


def unmount(target):
    """umount2(2), lazily: it leaves the tree at once, whoever may still be using it."""
    tell(f"umount -l {target}")
    call(f"umount {target}", "umount2", target, MNT_DETACH)


def open_tree(path):
    """open_tree(2): a copy of what is mounted at `path`, to be attached elsewhere. → descriptor"""
    return system_call("open_tree", -100, path, OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC)


def move_mount(handle, target, source):
    """move_mount(2): attach it. The target's symlinks are followed in the root that we have by now."""
    tell(f"mount --bind {shlex.quote(source)} {shlex.quote(target)}")
    system_call("move_mount", handle, "", -100, target, MOVE_MOUNT_F_EMPTY_PATH)
    os.close(handle)


def pivot_root():
    """pivot_root(2): the current directory becomes the root of the mount namespace.

    The old root comes to lie on top of the new one, at the same place, and is taken away: no put_old
    directory is needed (man 2 pivot_root, "pivot_root(".", ".")").
    """
    tell("pivot_root . .")
    system_call("pivot_root", ".", ".")
    unmount(".")
    os.chdir("/")


def die_with(parent):
    """PR_SET_PDEATHSIG: SIGKILL when our parent dies, however it dies. Too late if it is dead already."""
    call("prctl PDEATHSIG", "prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: our parent is outside our pid namespace
        os._exit(1)


def write_kernel_file(path, value):
    """Write to a file of /proc, /sys or a cgroup: that is how those are told what to do."""
    tell(f"echo {shlex.quote(str(value))} > {path}")
    try:
        with open(path, "w") as file:
            file.write(str(value))
    except OSError as error:
        raise MockerError(f"echo {value} > {path}: {error.strerror}", number=error.errno) from None


def read_kernel_file(path, default=""):
    """What a file of the kernel says now, without the newline; `default` if there is none."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return default


def need_root(command):
    """Said before anything is done, not half-way through it."""
    if sys.platform != "linux":
        raise MockerError("mocker needs Linux: its kernel is what containers are made of. On a Mac or Windows: "
                          "docker run --privileged -it python:3")  # fmt: skip
    if os.geteuid() != 0:
        raise MockerError(f"mocker {command} needs root, for mounts, owners and namespaces: sudo {sys.executable} {sys.argv[0]} …")
    effective = int(re.search(r"CapEff:\s*(\w+)", read_kernel_file("/proc/self/status"))[1], 16)
    if command == "run" and not effective & 1 << 21:
        raise MockerError("root here lacks CAP_SYS_ADMIN, as in a plain container: docker run --privileged, or a real machine")


# ── What all containers of this machine share ──────────────────────────────────────────────────
#
#  /run/mocker/<id>.json   a running container, locked by its mocker: when that dies, the lock goes
#  /run/mocker/before      what to put back when the last one ends: {"/proc/sys/net/…": "0", …}

SHARED = "/run/mocker"


def shared_state():
    """What `before` says: sysctls and cgroup files to write back, directories to remove, the subnet."""
    try:
        with open(f"{SHARED}/before") as file:
            return json.load(file)
    except (FileNotFoundError, ValueError):
        return {"files": {}, "directories": [], "subnet": None}


def remember(path=None, value=None, directory=None, subnet=None):
    """Note, before the change, how to undo something that the containers share."""
    state = shared_state()
    if path is not None:
        state["files"].setdefault(path, value)
    if directory is not None and directory not in state["directories"]:
        state["directories"].append(directory)
    state["subnet"] = subnet or state["subnet"]
    write_file(f"{SHARED}/before", state)


def set_shared(path, value):
    """Write a kernel file that concerns the whole host; the last container to end puts it back."""
    now = read_kernel_file(path)
    if now != value:
        remember(path=path, value=now)
        write_kernel_file(path, value)


def register(container):
    """Note that it runs: a file, locked as long as we live. Others see by it what is in use."""
    path = f"{SHARED}/{container.id}.json"
    with locked(SHARED):
        container.lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(container.lock, fcntl.LOCK_EX)
        note_container(container)


def note_container(container):
    """Write what the others may want to know, and what is to be cleared away should we be killed."""
    state = {"directory": container.directory, "remove": container.remove, "address": container.address,
             "mount_namespace": "mount" in container.parts, "ports": bool(container.ports)}  # fmt: skip
    os.pwrite(container.lock, json.dumps(state).ljust(1000).encode(), 0)


def running_containers():
    """id → what its file in /run/mocker says, of those that run, and of those that were killed."""
    found = {}
    for name in os.listdir(SHARED) if os.path.isdir(SHARED) else ():
        if name.endswith(".json"):
            with contextlib.suppress(FileNotFoundError, ValueError), open(f"{SHARED}/{name}") as file:
                found[name[: -len(".json")]] = json.load(file)
    return found


def is_alive(id):
    """Does its mocker still hold the lock?"""
    try:
        with open(f"{SHARED}/{id}.json") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    return False


def sweep():
    """Clear away what a killed mocker left. Every command begins with it."""
    if os.geteuid() != 0 or not os.path.isdir(SHARED) or not os.listdir(SHARED):
        return
    with locked(SHARED):
        for id, state in running_containers().items():
            if not is_alive(id):
                say(f"Clearing what container {id} left: its mocker was killed")
                delete_cgroup(id)
                delete_network(id)
                if state["ports"]:
                    unpublish_ports(id)
                delete_directory(state["directory"], state["remove"], state["mount_namespace"])
                forget(id)


def unregister(id):
    with locked(SHARED):
        forget(id)


def forget(id):
    """The container is gone; the last one puts the host back as it was."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{SHARED}/{id}.json")
    if not running_containers():
        restore_host()


def restore_host():
    """Undo what the containers shared: bridge, NAT, sysctls, empty cgroups."""
    state = shared_state()
    delete_bridge()
    for path, value in state["files"].items():
        with contextlib.suppress(MockerError):
            write_kernel_file(path, value)
    for directory in reversed(state["directories"]):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(f"{SHARED}/before")


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Its root: overlay, /proc, /sys, /dev, pivot_root
# ═══════════════════════════════════════════════════════════════════════════════════════════════
#
#  containers/<id>/lower/0, 1, …   links to the image's layers, from the top down: short names,
#                                  since all of overlayfs' options must fit in one page
#  containers/<id>/upper           what the container writes; work is overlayfs' own
#  containers/<id>/rootfs          where the two are seen as one tree

DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
DEVICE_LINKS = {"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1",
                "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"}  # fmt: skip


@step
def leave_host_namespaces(container):
    """Namespaces: see other things under the same names

    mount: a mount table of its own. uts: a host name. ipc: message queues and shared memory.
    cgroup: its own cgroup looks like the root. pid came with the fork: this process is number 1 in
    there. Only user is missing, as in Docker: root inside is root outside, held by what follows.
    See man 7 namespaces. Look: lsns; readlink /proc/*/ns/*
    """
    kinds = {"mount": CLONE_NEWNS, "uts": CLONE_NEWUTS, "ipc": CLONE_NEWIPC, "cgroup": CLONE_NEWCGROUP}
    kinds = {name: flag for name, flag in kinds.items() if name in container.parts}
    unshare(sum(kinds.values()), kinds)
    if "mount" in container.parts:
        # Or our mounts would show up on the host, where systemd makes / shared (man 7 mount_namespaces).
        mount("none", "/", "", MS_REC | MS_PRIVATE)
    if "uts" in container.parts:
        tell(f"hostname {container.hostname}")
        call("sethostname", "sethostname", container.hostname, len(container.hostname))
    prove("ls -l /proc/self/ns", "\n".join(
        f"{name:7} {os.readlink(f'/proc/self/ns/{name}'):20} the host's is {container.host_namespaces[name]}"
        for name in NAMESPACES))  # fmt: skip


@step
def mount_root(container):
    """Root: an overlay of the image's layers

    The layers lie below, read-only, shared by all containers of the image; a fresh upper directory
    takes what this container writes. So the image stays clean, and a start costs no copy. nodev: a
    device node in it can't be opened, wherever it came from.
    See the kernel's filesystems/overlayfs.rst. Look: ls ~/mocker/containers/ID/upper
    """
    directory = container.directory
    os.mkdir(f"{directory}/lower")
    for number, layer in enumerate(reversed(container.image.layers)):
        os.symlink(layer, f"{directory}/lower/{number}")
    os.chdir(f"{directory}/lower")
    lower = ":".join(str(number) for number in range(len(container.image.layers)))
    try:
        mount_overlay(lower, directory)
    except MockerError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # overlayfs' upper can't lie on another overlay: that is what / is inside docker.
        say(f"{HOME} lies on a file system that can't hold an upper layer: it goes to a tmpfs, and is lost at the end")
        mount("tmpfs", f"{directory}/scratch", "tmpfs", MS_NODEV)
        mount_overlay(lower, f"{directory}/scratch", f"{directory}/rootfs")
    os.chdir(f"{directory}/rootfs")
    prove("grep overlay /proc/self/mounts", read_kernel_file("/proc/self/mounts").splitlines()[-1])


def mount_overlay(lower, directory, target=None):
    for part in "upper", "work":
        os.makedirs(f"{directory}/{part}", exist_ok=True)
    # The root directory itself is seen with the upper's mode and owner.
    copy_metadata("0", f"{directory}/upper")
    mount("overlay", target or f"{directory}/rootfs", "overlay", MS_NODEV,
          f"lowerdir={lower},upperdir={directory}/upper,workdir={directory}/work")  # fmt: skip


@step
def take_along(container):
    """Carry in: what will be needed from the host's side

    Inside, nothing of the host can be named any more, and that is the point. So the few device
    nodes, the volumes and the three files of /etc are picked up now, as copies of their mounts.
    See man 2 open_tree.
    """
    devices = host_devices() if container.privileged else DEVICES
    parcels = [(f"/dev/{name}", f"/dev/{name}", False) for name in devices]
    parcels += [(f"{container.directory}/{name}", f"/etc/{name}", container.read_only) for name in ETC_FILES]
    parcels += container.volumes
    return [(open_tree(source), source, target, read_only) for source, target, read_only in parcels]


@step
def enter_root(container):
    """pivot_root: make it the root, and let go of the host's

    chroot(2) only moves where a process looks for `/`: the host's tree stays mounted, and root can
    climb back to it. pivot_root exchanges the root of the whole mount namespace; then the old one
    is unmounted, and there is nothing left to climb to.
    See man 2 pivot_root. Look: cat /proc/PID/mountinfo
    """
    before = len(read_kernel_file("/proc/self/mounts").splitlines())
    if "pivot_root" in container.parts:
        pivot_root()
    else:
        tell("chroot .")
        os.chroot(".")
        os.chdir("/")
    return before


@step
def mount_kernel_filesystems(container):
    """/proc, /sys, /dev: what programs expect to find there

    A new procfs shows the processes of this pid namespace, a new sysfs the interfaces of this
    network namespace. /dev is a small tmpfs with six devices, one by one; every mount is nodev but
    those. What would reach the whole machine through /proc and /sys is read-only, or hidden.
    See man 5 proc, man 5 sysfs, OCI runtime-spec config-linux.md, "Default Filesystems".
    """
    plain = MS_NOSUID | MS_NODEV | MS_NOEXEC
    mount_at("proc", "/proc", "proc", plain)
    mount_at("tmpfs", "/dev", "tmpfs", MS_NOSUID | MS_STRICTATIME | MS_NODEV, "mode=755,size=65536k")
    for folder, kind, flags, options in (
        ("/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", plain, "mode=1777,size=65536k"),
        ("/dev/mqueue", "mqueue", plain, ""),
    ):
        mount_at(kind if kind != "tmpfs" else "shm", folder, kind, flags, options)
    for name, target in DEVICE_LINKS.items():
        os.symlink(target, f"/dev/{name}")
    mount_at("sysfs", "/sys", "sysfs", plain | MS_RDONLY)
    mount_cgroups(container)


def mount_at(source, target, kind, flags, options=""):
    """Mount at a directory of the image, made if it is missing; a symlink there is refused, as by runc."""
    os.makedirs(target, exist_ok=True)
    if os.path.islink(target):
        raise MockerError(f"the image's {target} is a symlink: nothing can be mounted there")
    mount(source, target, kind, flags, options)


@step
def attach_parcels(container, parcels):
    """Put what was carried in where it belongs

    Devices into /dev, volumes where -v says, and hosts, hostname and resolv.conf over the image's.
    The places are looked up now, in the new root: a symlink of the image can't lead out of it.
    See man 2 move_mount.
    """
    for handle, source, target, read_only in parcels:
        make_mount_point(target, os.fstat(handle))
        move_mount(handle, target, source)
        if not target.startswith("/dev/"):
            mount("none", target, "", MS_REMOUNT | MS_BIND | MS_NODEV | (MS_RDONLY if read_only else 0))
    if container.read_only:
        mount("none", "/", "", MS_REMOUNT | MS_BIND | MS_NODEV | MS_RDONLY)


def make_mount_point(target, status):
    """An empty file or directory to mount on, unless there is something."""
    if os.path.exists(target):
        return
    os.makedirs(target if is_directory(status) else os.path.dirname(target), exist_ok=True)
    if not is_directory(status):
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))


MASKED = ("/proc/asound /proc/acpi /proc/kcore /proc/keys /proc/latency_stats /proc/timer_list /proc/timer_stats "
          "/proc/sched_debug /proc/scsi /sys/firmware /sys/devices/virtual/powercap").split()  # fmt: skip
READ_ONLY = "/proc/bus /proc/fs /proc/irq /proc/sys /proc/sysrq-trigger".split()


@step(part="mask")
def mask_paths(container):
    """Masks: hide what /proc and /sys tell about the machine

    procfs and sysfs are only partly cut by namespaces: kernel settings, interrupts, keys are the
    whole machine's. What would change the machine is bound over itself read-only; what would tell
    too much is covered by /dev/null, or by an empty directory.
    See OCI runtime-spec config-linux.md, "Masked Paths". Look: mount, in the container
    """
    if container.privileged:
        return
    for path in READ_ONLY:
        if os.path.exists(path):
            bind_mount(path, path, MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY)
    for path in MASKED:
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", MS_RDONLY, "")
        elif os.path.exists(path):
            mount("/dev/null", path, "", MS_BIND)


ETC_FILES = ("hosts", "hostname", "resolv.conf")


def host_devices():
    """With --privileged: every device of the host."""
    import stat

    return [entry.name for entry in os.scandir("/dev")
            if stat.S_ISCHR(entry.stat(follow_symlinks=False).st_mode) or stat.S_ISBLK(entry.stat(follow_symlinks=False).st_mode)]  # fmt: skip


def write_etc(container):
    """hosts, hostname and resolv.conf, as docker writes them; mounted over the image's."""
    hosts = ("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n"
             "ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")  # fmt: skip
    if container.address:
        hosts += f"{container.address}\t{container.hostname}\n"
    for name, text in (("hosts", hosts), ("hostname", container.hostname + "\n"), ("resolv.conf", name_servers(container))):
        with open(f"{container.directory}/{name}", "w") as file:
            file.write(text)


def name_servers(container):
    """The host's resolv.conf; a name server on the host's loopback can't be reached from inside."""
    for path in "/etc/resolv.conf", "/run/systemd/resolve/resolv.conf":
        text = read_kernel_file(path)
        lines = [line for line in text.splitlines() if not re.match(r"\s*nameserver\s+(127\.|::1)", line)]
        if container.network == "host" or any(line.startswith("nameserver") for line in lines):
            return "\n".join(text.splitlines() if container.network == "host" else lines) + "\n"
    return "\n".join([line for line in lines if line] + ["nameserver 8.8.8.8", "nameserver 8.8.4.4"]) + "\n"


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Its network: bridge, veth pair, address, route, NAT
# ═══════════════════════════════════════════════════════════════════════════════════════════════
#
#   the host                                          the container
#   eth0 ── NAT ── mocker0 10.0.0.1 ── veth0_1a2b3c4d ═══ veth1 10.0.0.3, default via 10.0.0.1

BRIDGE = "mocker0"
SUBNETS = ["10.0.0"] + [f"10.0.{n}" for n in range(1, 8)] + [f"172.30.{n}" for n in range(8)] + ["192.168.213"]
NETNS_DIRECTORY = "/run/netns"  # where ip-netns(8) looks for named namespaces


def netns_path(id):
    return f"{NETNS_DIRECTORY}/mocker_{id}"


class Netlink:
    """A conversation with the kernel about interfaces, addresses and routes (man 7 rtnetlink)."""

    NEW_LINK, DELETE_LINK, SET_LINK, NEW_ADDRESS, NEW_ROUTE = 16, 17, 19, 20, 24
    REQUEST, ACKNOWLEDGE, CREATE_ONLY = 0x1, 0x4, 0x600

    def __init__(self):
        """The socket belongs to the network namespace that we are in now, and stays there."""
        import importlib.util
        import socket
        import types

        if "pyroute2" not in sys.modules:
            # pyroute2's package imports all that it has, which takes longer than a container to
            # start; we need only its messages, so its parts get an empty package to live in.
            spec = importlib.util.find_spec("pyroute2")
            sys.modules["pyroute2"] = package = types.ModuleType("pyroute2")
            package.__path__ = spec.submodule_search_locations
        from pyroute2.netlink.rtnl import ifaddrmsg, ifinfmsg, rtmsg

        self.link_message, self.address_message, self.route_message = ifinfmsg.ifinfmsg, ifaddrmsg.ifaddrmsg, rtmsg.rtmsg
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self.socket.bind((0, 0))

    def ask(self, command, message, kind, flags, attributes, fields=()):
        """One request, and the kernel's acknowledgement; its refusal becomes a MockerError."""
        tell(command)
        request = message()
        request["header"] = {"type": kind, "flags": self.REQUEST | self.ACKNOWLEDGE | flags, "sequence_number": 1, "pid": 0}
        for name, value in dict(fields, attrs=attributes).items():
            request[name] = value
        request.encode()
        self.socket.send(request.data)
        (number,) = struct.unpack_from("i", self.socket.recv(65536), 16)
        if number:
            raise MockerError(f"{command}: {os.strerror(-number)}", number=-number)

    def add_bridge(self, name, address):
        """A switch in software. With a MAC address of its own: else it takes the lowest of its ports',
        and changes it when a container comes or goes, under the eyes of those that know the old one."""
        self.ask(f"ip link add {name} address {address} type bridge", self.link_message, self.NEW_LINK, self.CREATE_ONLY,
                 [("IFLA_IFNAME", name), ("IFLA_ADDRESS", address), ("IFLA_LINKINFO", {"attrs": [("IFLA_INFO_KIND", "bridge")]})])  # fmt: skip

    def add_veth(self, name, peer, netns, handle):
        """Two interfaces with a wire between them: what enters one leaves the other (man 4 veth)."""
        peer_end = {"attrs": [("IFLA_IFNAME", peer), ("IFLA_NET_NS_FD", handle)]}
        pair = {"attrs": [("IFLA_INFO_KIND", "veth"), ("IFLA_INFO_DATA", {"attrs": [("VETH_INFO_PEER", peer_end)]})]}
        self.ask(f"ip link add {name} type veth peer name {peer} netns {netns}", self.link_message, self.NEW_LINK,
                 self.CREATE_ONLY, [("IFLA_IFNAME", name), ("IFLA_LINKINFO", pair)])  # fmt: skip

    def set_up(self, name, master=None):
        import socket

        more = [("IFLA_MASTER", socket.if_nametoindex(master))] if master else []
        self.ask(f"ip link set {name} {f'master {master} ' if master else ''}up", self.link_message, self.NEW_LINK, 0,
                 [("IFLA_IFNAME", name), *more], fields={"flags": 1, "change": 1})  # fmt: skip

    def add_address(self, name, address, length=24):
        """Asked from inside the interface's namespace: its index is looked up there."""
        import socket

        index = socket.if_nametoindex(name)
        self.ask(f"ip address add {address}/{length} dev {name}", self.address_message, self.NEW_ADDRESS, self.CREATE_ONLY,
                 [("IFA_LOCAL", address), ("IFA_ADDRESS", address)], {"family": 2, "prefixlen": length, "index": index})  # fmt: skip

    def add_default_route(self, gateway):
        self.ask(f"ip route add default via {gateway}", self.route_message, self.NEW_ROUTE, self.CREATE_ONLY,
                 [("RTA_GATEWAY", gateway)], {"family": 2, "table": 254, "proto": 3, "type": 1})  # fmt: skip

    def delete_link(self, name):
        self.ask(f"ip link delete {name}", self.link_message, self.DELETE_LINK, 0, [("IFLA_IFNAME", name)])


@contextlib.contextmanager
def inside_netns(handle):
    """Be in a network namespace for a moment. A socket made there stays there."""
    host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_namespace(handle, CLONE_NEWNET)
        yield
    finally:
        enter_namespace(host, CLONE_NEWNET)
        os.close(host)


def host_networks():
    """(network, mask) of every route of this machine but the default one, as numbers."""
    rows = [line.split() for line in read_kernel_file("/proc/net/route").splitlines()[1:]]
    routes = [(row[0], socket_order(row[1]), socket_order(row[7])) for row in rows]
    return [(network, mask) for interface, network, mask in routes if mask and interface != BRIDGE]


def socket_order(hexadecimal):
    """/proc/net/route shows addresses as the kernel keeps them, 0001000A for 10.0.1.0 on x86."""
    return struct.unpack("!I", struct.pack("=I", int(hexadecimal, 16)))[0]


def to_number(address):
    """10.0.0.1 → 167772161"""
    return struct.unpack("!I", bytes(int(part) for part in address.split(".")))[0]


def choose_subnet():
    """10.0.0 (of 10.0.0.0/24), or the next that no route of this machine overlaps."""
    taken = host_networks()
    for subnet in SUBNETS:
        first = to_number(f"{subnet}.0")
        if not any(first & mask == network or network & 0xFFFFFF00 == first for network, mask in taken):
            return subnet
    raise MockerError(f"no free subnet: {', '.join(SUBNETS)} are all in use here; leave the network out: --network=none")


@step(part="net")
def create_network(container, undo):
    """Network: a namespace, and a wire into it

    The container gets a network namespace: interfaces, routes and firewall of its own, at first
    none but a loopback that is down. A veth pair is a wire with two ends: veth0 stays here, on the
    bridge mocker0; veth1 goes in, and gets an address and a default route. NAT lets the
    container's traffic out under this machine's address.
    See man 7 network_namespaces, man 4 veth. Look: ip netns; ip -n NAME address; bridge link
    """
    if container.network != "bridge":
        return
    id = container.id
    undo.callback(delete_network, id)
    container.netns = create_netns(id)
    with locked(SHARED):
        subnet = create_bridge()
        container.address, container.gateway = free_address(subnet), f"{subnet}.1"
        note_container(container)
    netlink = Netlink()
    netlink.add_veth(f"veth0_{id}", "veth1", f"mocker_{id}", container.netns)
    netlink.set_up(f"veth0_{id}", master=BRIDGE)
    with inside_netns(container.netns):
        inside = Netlink()
        inside.add_address("veth1", container.address)
        inside.set_up("veth1")
        inside.add_default_route(container.gateway)
        prove(f"ip netns exec mocker_{id} cat /proc/net/route", read_kernel_file("/proc/thread-self/net/route"))
    publish_ports(container, undo)


@step(part="net")
def join_network(container):
    """Join the network namespace

    setns(2) takes an open file that stands for a namespace, here the one that has a name; with
    --network=none it is a new one, of which nobody else knows.
    See man 2 setns. Look: ip netns identify PID
    """
    if container.network == "none":
        unshare(CLONE_NEWNET, ["net"])
        set_up_loopback()
    elif container.network == "bridge":
        tell(f"nsenter --net={netns_path(container.id)}")
        enter_namespace(container.netns, CLONE_NEWNET)
    prove("cat /proc/net/dev", interface_names())


def interface_names():
    return "\n".join(line.split(":")[0].strip() for line in read_kernel_file("/proc/thread-self/net/dev").splitlines()[2:])


def set_up_loopback():
    """By the old ioctl(2), which needs no library (man 7 netdevice)."""
    import socket

    SIOCSIFFLAGS, IFF_UP = 0x8914, 1
    tell("ip link set lo up")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", IFF_UP))


def create_netns(id):
    """Make it, and give it a name by mounting it on a file: without processes it would be gone."""
    path = netns_path(id)
    os.makedirs(NETNS_DIRECTORY, exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o444))
    host = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    before = os.readlink("/proc/thread-self/ns/net")
    tell(f"ip netns add mocker_{id}")
    call("unshare net", "unshare", CLONE_NEWNET)
    try:
        call("mount", "mount", "/proc/thread-self/ns/net", path, "", MS_BIND, "")
        prove("readlink /proc/self/ns/net, on the host and in there", f"{before}\n{os.readlink('/proc/thread-self/ns/net')}")
        set_up_loopback()
        for name, value in NET_SYSCTLS:
            with contextlib.suppress(MockerError):
                write_kernel_file(f"/proc/sys/net/{name}", value)
    finally:
        enter_namespace(host, CLONE_NEWNET)
        os.close(host)
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


NET_SYSCTLS = (("ipv4/ping_group_range", "0 2147483647"), ("ipv4/ip_unprivileged_port_start", "0"),
               ("ipv6/conf/all/disable_ipv6", "1"), ("ipv6/conf/default/disable_ipv6", "1"))  # fmt: skip


def create_bridge():
    """mocker0, its address, forwarding, NAT: made for the first container, used by all. → 10.0.0"""
    state = shared_state()
    if state["subnet"] and os.path.isdir(f"/sys/class/net/{BRIDGE}"):
        return state["subnet"]
    subnet = choose_subnet()
    if subnet != SUBNETS[0]:
        say(f"{SUBNETS[0]}.0/24 is in use on this machine: taking {subnet}.0/24")
    remember(subnet=subnet)
    delete_bridge()
    netlink = Netlink()
    mac = "02:42:" + ":".join(f"{int(part):02x}" for part in f"{subnet}.1".split("."))
    netlink.add_bridge(BRIDGE, mac)
    netlink.add_address(BRIDGE, f"{subnet}.1")
    netlink.set_up(BRIDGE)
    set_shared("/proc/sys/net/ipv4/ip_forward", "1")
    create_nat(subnet)
    return subnet


def free_address(subnet):
    """10.0.0.3 for the first container; then the next that no other has."""
    taken = {state.get("address") for state in running_containers().values()}
    for last in range(3, 255):
        if f"{subnet}.{last}" not in taken:
            return f"{subnet}.{last}"
    raise MockerError(f"all addresses of {subnet}.0/24 are in use: stop a container, or use --network=none")


def delete_network(id):
    """The namespace; the veth pair goes with it. Nothing happens if they are gone already."""
    if os.path.exists(netns_path(id)):
        if os.path.isdir(f"/sys/class/net/veth0_{id}"):
            Netlink().delete_link(f"veth0_{id}")  # at once, instead of when the kernel gets round to it
        tell(f"ip netns delete mocker_{id}")
        with contextlib.suppress(MockerError):
            call("umount", "umount2", netns_path(id), MNT_DETACH)
        os.unlink(netns_path(id))
    with contextlib.suppress(OSError):
        os.rmdir(NETNS_DIRECTORY)


def delete_bridge():
    if os.path.isdir(f"/sys/class/net/{BRIDGE}"):
        delete_nat()
        Netlink().delete_link(BRIDGE)


# ── The firewall: NAT, and published ports. nft(8), or iptables(8) where there is none ──────────


def run_tool(command, text=None):
    """Run nft or iptables → its output, or None if it is not there or refuses."""
    tell(f"{command}" + (f" <<< {shlex.quote(text)}" if text else ""))
    try:
        done = subprocess.run(shlex.split(command), input=text, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


def create_nat(subnet):
    """Traffic that leaves the bridge goes out under the host's own address, or answers can't find back."""
    rule = f'ip saddr {subnet}.0/24 oifname != "{BRIDGE}" masquerade'
    made = run_tool("nft -f -", f"table ip mocker {{ chain postrouting {{ type nat hook postrouting priority 100; {rule}; }}; }}")
    if made is None:
        made = run_tool(f"iptables -w -t nat -A POSTROUTING -s {subnet}.0/24 ! -o {BRIDGE} -j MASQUERADE")
    if made is None:
        say("no NAT here: neither nft nor iptables works; the container reaches this machine, but no further")
    if "policy drop" in (run_tool("nft list chain ip filter FORWARD") or ""):  # Docker runs here
        for direction in "-i", "-o":
            run_tool(f"iptables -w -I FORWARD {direction} {BRIDGE} -j ACCEPT")


def publish_ports(container, undo):
    """-p: what arrives at a port of this machine is sent on to the container's, and back (DNAT)."""
    import socket

    for address, host_port, port, protocol in container.ports:
        kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
        holder = undo.enter_context(socket.socket(socket.AF_INET, kind))  # keeps the port from others
        try:
            holder.bind((address, host_port))
            if protocol == "tcp":
                holder.listen(1)
        except OSError as error:
            raise MockerError(f"port {address}:{host_port} can't be published: {error.strerror}; choose another") from None
        # A packet from 127.0.0.1 may leave by the bridge only if the bridge says so.
        write_kernel_file(f"/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet", "1")
    if container.ports:
        undo.callback(unpublish_ports, container.id)
    if container.ports and run_tool("nft -f -", nft_ports(container)) is None:
        for rule in iptables_ports(container):
            if run_tool(f"iptables -w -t nat -A {rule}") is None:
                raise MockerError("ports can't be published: neither nft nor iptables works here; install nftables")


def nft_ports(container):
    """A table of the container's own, which goes with it."""
    chains = {"prerouting": ["type nat hook prerouting priority -100;"], "output": ["type nat hook output priority -100;"],
              "postrouting": ["type nat hook postrouting priority 100;"]}  # fmt: skip
    for address, host_port, port, protocol in container.ports:
        where = "fib daddr type local" if address == "0.0.0.0" else f"ip daddr {address}"
        for hook in "prerouting", "output":
            chains[hook].append(f"{where} {protocol} dport {host_port} dnat to {container.address}:{port};")
    # The answer must come back through here, also to this machine itself and to a neighbour.
    mine = f"ip saddr {{ 127.0.0.0/8, {container.gateway}/24 }} ip daddr {container.address}"
    chains["postrouting"].append(f'oifname "{BRIDGE}" ct status dnat {mine} masquerade;')
    return f"table ip mocker_{container.id} {{ {' '.join(f'chain {name} {{ {chr(32).join(rules)} }};' for name, rules in chains.items())} }}"


def iptables_ports(container):
    """The same in iptables' words; the comment tells later whose they are."""
    mark = f"-m comment --comment mocker_{container.id}"
    for address, host_port, port, protocol in container.ports:
        where = "-m addrtype --dst-type LOCAL" if address == "0.0.0.0" else f"-d {address}"
        for chain in "PREROUTING", "OUTPUT":
            yield (f"{chain} {where} -p {protocol} --dport {host_port} {mark} "
                   f"-j DNAT --to-destination {container.address}:{port}")  # fmt: skip
    for source in "127.0.0.0/8", f"{container.gateway}/24":
        yield f"POSTROUTING -s {source} -d {container.address} -o {BRIDGE} -m conntrack --ctstate DNAT {mark} -j MASQUERADE"


def unpublish_ports(id):
    if run_tool(f"nft delete table ip mocker_{id}") is None:
        rules = (run_tool("iptables -w -t nat -S") or "").splitlines()
        for rule in rules:
            if f"--comment mocker_{id} " in rule:
                run_tool(f"iptables -w -t nat -D {rule[len('-A ') :]}")


def delete_nat():
    """What create_nat made, whichever way it was."""
    subnet = shared_state()["subnet"]
    if run_tool("nft delete table ip mocker") is None:
        run_tool(f"iptables -w -t nat -D POSTROUTING -s {subnet}.0/24 ! -o {BRIDGE} -j MASQUERADE")
    if "policy drop" in (run_tool("nft list chain ip filter FORWARD") or ""):
        for direction in "-i", "-o":
            run_tool(f"iptables -w -D FORWARD {direction} {BRIDGE} -j ACCEPT")


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Its cgroup: how much it may use
# ═══════════════════════════════════════════════════════════════════════════════════════════════
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
                  "cpu.max": cpus and f"{int(cpus * period)} {period}"}  # fmt: skip
    else:
        wanted = {"memory.memsw.limit_in_bytes": memory and 2 * memory, "pids.max": pids,
                  "cpu.cfs_quota_us": cpus and int(cpus * period)}  # fmt: skip
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
        raise MockerError("no cgroup file system is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup, or run --without=cgroup")
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
        remember(directory=parent)
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
    remember(path=path, value=" ".join(f"-{controller}" for controller in missing))
    try:
        write_kernel_file(path, " ".join(f"+{controller}" for controller in missing))
    except MockerError as error:
        if error.errno != errno.EBUSY:
            raise
        # A cgroup with processes can't pass controllers on, and in a container the root of the tree
        # is such a one: its processes move aside, as Docker's own docker-in-docker does it.
        aside = f"{CGROUP}/mocker_aside"
        os.makedirs(aside, exist_ok=True)
        remember(directory=aside)
        move_processes(directory, aside)
        write_kernel_file(path, " ".join(f"+{controller}" for controller in missing))


def move_processes(source, target):
    for pid in read_kernel_file(f"{source}/cgroup.procs").split():
        with contextlib.suppress(MockerError):
            write_kernel_file(f"{target}/cgroup.procs", pid)


def create_cgroup_v1(container):
    """The `cgroups` package does memory and cpu; pids and the rest are made beside them."""
    import logging

    import cgroups

    logging.getLogger("cgroups.user").setLevel(logging.ERROR)
    hierarchies = [f"{CGROUP}/{name}" for name in os.listdir(CGROUP) if os.path.isdir(f"{CGROUP}/{name}")]
    for directory in hierarchies:  # the package makes a directory in every one, and leaves it
        if not os.path.isdir(f"{directory}/root"):
            remember(directory=f"{directory}/root")
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


def mount_cgroups(container):
    """/sys/fs/cgroup, read-only; by the cgroup namespace its root is the container's own group."""
    if not container.cgroups or not os.path.isdir(CGROUP):
        return
    flags = MS_NOSUID | MS_NODEV | MS_NOEXEC | MS_RDONLY
    if container.cgroup_version == 2:
        mount("cgroup", CGROUP, "cgroup2", flags)
        return
    mount("tmpfs", CGROUP, "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "mode=755")
    for directory in container.cgroups:
        name = directory.split("/")[4]
        os.mkdir(f"{CGROUP}/{name}")
        mount("cgroup", f"{CGROUP}/{name}", "cgroup", flags, f"{'name=' * (name == 'systemd')}{name}")
    mount("none", CGROUP, "", MS_REMOUNT | flags)


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
                os.rmdir(directory)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Its privileges: user, capabilities, system calls
# ═══════════════════════════════════════════════════════════════════════════════════════════════

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
               number, unless(at_least, LAST_CALL + 1, 1), unknown]  # fmt: skip
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
    kept = set(CAPABILITIES if privileged else DEFAULT_CAPABILITIES)
    for names, change in ((drop, kept.difference_update), (add, kept.update)):
        for name in names:
            name = name.upper().removeprefix("CAP_")
            if name != "ALL" and name not in CAPABILITIES:
                raise MockerError(f"unknown capability '{name}': write one of man 7 capabilities, or ALL")
            change(CAPABILITIES if name == "ALL" else [name])
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
        call(f"drop {name}", "prctl", PR_CAPBSET_DROP, CAPABILITIES.index(name), 0, 0, 0)


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
    buffer = libc.ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, libc.ctypes.addressof(buffer))
    call("seccomp", "prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)


@step
def become_user(container):
    """User: take the image's user, and only its groups

    The ids come from the image's /etc/passwd and /etc/group: to the kernel users are numbers. What
    is left of root's capabilities goes when the user is another; root keeps the 14.
    See man 7 credentials. Look: ps -o user,pid,args
    """
    user = User(container.user)
    container.environment.setdefault("HOME", user.home)
    container.streams.take()
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
    prove("grep -E '^(Uid|Groups|Cap|Seccomp)' /proc/self/status",
          "\n".join(re.findall(r"^(?:Uid|Groups|Cap|Seccomp:).*", read_kernel_file("/proc/self/status"), re.M)))  # fmt: skip


def set_capabilities(names):
    """capset(2): effective and permitted, and none to be inherited; the bits come in two halves."""
    bits = sum(1 << CAPABILITIES.index(name) for name in names)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    version_3 = 0x20080522
    call("capset", "capset", struct.pack("Ii", version_3, 0), struct.pack("6I", low, low, 0, high, high, 0))


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
    with open(handle, "rb") as file:
        regular = os.fstat(handle).st_mode & 0o170000 == 0o100000
        text = (file.read(1 << 20) or b"").decode(errors="replace") if regular else ""
    entries = [line.split(":") for line in text.splitlines()]
    return [entry + [""] for entry in entries if len(entry) >= count and is_id(entry[2]) and (count == 3 or is_id(entry[3]))]


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  run: the chapters above, in order
# ═══════════════════════════════════════════════════════════════════════════════════════════════

NAMESPACES = ("mnt", "uts", "ipc", "pid", "net", "cgroup", "user")
PARTS = ("net", "pid", "mount", "uts", "ipc", "cgroup", "overlay", "pivot_root", "caps", "seccomp", "mask", "user")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def run(arguments):
    """Run a command in a container. The image is pulled if it is not here.

    Usage:
      mocker run [options] [-e VAR]... [-v VOLUME]... [-p PORT]... [--cap-add=CAP]...
                 [--cap-drop=CAP]... [--name=N] [--hostname=N] [--entrypoint=PROGRAM]
                 [--network=N] [--cpus=N] [--pids-limit=N] [--read-only] [--privileged]
                 [--without=PARTS] [--only=PARTS] [--explain] [--step] [--rm]
                 <name> [<command>...]

    Options:
      -i, --interactive   keep stdin open          --rm          remove it at the end
      -t, --tty           give it a terminal       --name        for later commands
      -q, --quiet         only the container talks --hostname    instead of its id
      -e, --env VAR       K=V, or K from here      --entrypoint  instead of the image's
      -w, --workdir DIR   start there              --network     bridge, none or host
      -u, --user USER     name or uid [:group]     --read-only   its root can't change
      -v, --volume VOLUME host:container[:ro]      --privileged  nearly no limits
      -p, --publish PORT  [ip:]host:container[/udp]
      -m, --memory SIZE   as in 512m               --cpus, --pids-limit  a number
      --explain: tell and show each step. --step: and wait for Enter before it.
      --without, --only: net pid mount uts ipc cgroup overlay pivot_root caps
      seccomp mask user, with commas between; or --only=chroot
    """
    need_root("run")
    container = Container(find_image(arguments["<name>"]), arguments)
    with contextlib.ExitStack() as undo:
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
    leave_host_namespaces(container)
    mount_root(container)
    parcels = take_along(container)
    enter_root(container)
    mount_kernel_filesystems(container)
    attach_parcels(container, parcels)
    mask_paths(container)
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
    reference = parse_reference(name)
    if os.path.exists(store(reference.file)):
        image = Image(reference.file)
        if all(map(os.path.isdir, image.layers)):
            return image
    say(f"Unable to find image '{reference.familiar}' locally")
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
                                             for text in given if "=" in text or text in os.environ]:  # fmt: skip
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
        raise MockerError(f"the name '{text}' is in use by another container: choose another, or remove it with mocker rm {text}")
    return text


def parse_size(text):
    """512m → 536870912 bytes; b, k, m, g as docker's."""
    match = re.fullmatch(r"(\d+)([bkmg]?)b?", (text or "0").lower(), re.ASCII)
    if not match:
        raise MockerError(f"invalid size '{text}': write a number and b, k, m or g, as in 512m")
    size = int(match[1]) << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30}[match[2]]
    if 0 < size < 6 << 20:
        raise MockerError("minimum memory limit allowed is 6MB")
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
    os.makedirs(host, exist_ok=True) if not os.path.exists(host) else None
    return host, target, mode == "ro"


def parse_port(text):
    """[ip:]host:container[/udp] → (ip, host, container, protocol)"""
    match = re.fullmatch(r"(?:(\d+\.\d+\.\d+\.\d+):)?(\d+):(\d+)(?:/(tcp|udp))?", text, re.ASCII)
    if not match or not all(0 < int(port) < 65536 for port in (match[2], match[3])):
        raise MockerError(f"invalid port '{text}': write [ip:]host:container[/udp], as in 8080:80")
    return match[1] or "0.0.0.0", int(match[2]), int(match[3]), match[4] or "tcp"


def create_container(container, undo):
    """Its directory, and its entry among those that run."""
    undo.callback(unregister, container.id)
    register(container)
    undo.callback(delete_directory, container.directory, container.remove, "mount" in container.parts)
    os.makedirs(f"{container.directory}/rootfs")
    write_config(container, "created")


def write_config(container, status, **more):
    """config.json: what later commands need to know of it."""
    write_file(f"{container.directory}/config.json", {
        "id": container.id, "name": container.name, "image": f"{container.image.name}:{container.image.version}",
        "file": container.image.file, "arguments": container.arguments, "environment": container.environment,
        "user": container.user, "working_directory": container.working_directory, "address": container.address,
        "cgroups": container.cgroups, "status": status, **more})  # fmt: skip


def all_containers():
    """Every container's config.json."""
    found = []
    for id in os.listdir(store("containers")) if os.path.isdir(store("containers")) else ():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError), open(store("containers", id, "config.json")) as file:
            found.append(json.load(file))
    return found


def delete_directory(directory, remove, mount_namespace):
    """Unmount what was mounted on the host's own table; with --rm the container is forgotten."""
    import shutil

    if not mount_namespace:
        with contextlib.suppress(MockerError):
            unmount(f"{directory}/rootfs")
    if remove:
        shutil.rmtree(directory, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(directory))


# ── The process ────────────────────────────────────────────────────────────────────────────────


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
            mode = os.fstat(0).st_mode & 0o170000
        except OSError:  # closed, as cron may leave it
            return False
        if interactive and self.terminal and not os.isatty(0):
            raise MockerError("the input device is not a TTY: leave out -t")
        return interactive or mode != 0o020000

    def close_inner(self):
        """The parent keeps only its own ends, or it would never see the others close."""
        for descriptor in [self.report_end, *filter(None, self.inner)]:
            os.close(descriptor)
        if self.terminal:
            self.inner_socket.close()

    def report(self, message, status):
        os.write(self.report_end, json.dumps({"message": message, "status": status}).encode())

    def take(self):
        """In the container: they become its 0, 1 and 2; all else is closed, or closes at exec."""
        story.output = os.dup(story.output)
        if self.terminal:
            self.open_terminal()
        for stream in 0, 1, 2:
            source = self.inner[stream]
            os.dup2(os.open("/dev/null", os.O_RDWR) if source is None else source, stream)
        keep = {0, 1, 2, self.report_end, story.output, story.stepping}
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
        self.inner = [slave] * 3

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
    host = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
    if "pid" in container.parts:
        unshare(CLONE_NEWPID, ["pid", "fork"])
    mocker = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # the child must not run our handlers
    pid = os.fork()
    if pid == 0:
        go_inside(container, streams, mocker)
    enter_namespace(host, CLONE_NEWPID)
    os.close(host)
    container.pid = pid
    undo.callback(end_process, container)
    streams.close_inner()
    return streams


def go_inside(container, streams, mocker):
    """In the child. What goes wrong is reported through a pipe, which exec closes."""
    try:
        die_with(mocker)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()
        container.streams = streams
        inside(container)
    except MockerError as error:
        streams.report(str(error), error.status)
    except BaseException:
        import traceback

        streams.report(traceback.format_exc(), 125)
    finally:
        os._exit(125)


@step
def execute(container):
    """Exec: become the program of the image

    Entrypoint and Cmd, with the image's environment and working directory. No shell is added. The
    process has been in the container for a while; now the last thing of the host, Python, is gone.
    See man 2 execve. Look: cat /proc/PID/cmdline
    """
    os.makedirs(container.working_directory, exist_ok=True)
    os.chdir(container.working_directory)
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


# ── The parent: streams, signals, the end ──────────────────────────────────────────────────────

FORWARDED = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
             signal.SIGALRM, signal.SIGCONT, signal.SIGWINCH}  # fmt: skip


def attend(container, streams):
    """Copy output, pass signals on, wait. → exit status, 128+N for signal N."""
    terminal = streams.receive_terminal() if streams.terminal else None
    forward_signals(container.pid, terminal)
    write_config(container, "running", pid=container.pid)
    with raw_terminal(terminal, streams.source):
        copy_streams(streams, open_copies(container), container.pid)
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


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  serve: the protocol's other side
# ═══════════════════════════════════════════════════════════════════════════════════════════════


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

    port = parse_count(arguments["--port"]) or 0
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
            say(f"{self.client_address[0]} {self.command} {self.path.partition('?')[0]}")

    return http.server.ThreadingHTTPServer((address, port), Request)


def reply(request, status, body=b"", **headers):
    """Status, headers and, unless it is a HEAD, the body."""
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.send_header("Content-Length", headers.pop("Length", len(body)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)


def refuse(request, status, code, **headers):
    """The error document of the distribution spec."""
    reply(request, status, json.dumps({"errors": [{"code": code, "message": code.lower()}]}).encode(),
          Content_Type="application/json", **headers)  # fmt: skip


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
                return reply(request, 200, read_blob(image.stored["digest"]), Content_Type=image.stored["mediaType"],
                             Docker_Content_Digest=image.stored["digest"])  # fmt: skip
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


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  Life after run
# ═══════════════════════════════════════════════════════════════════════════════════════════════


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
            delete_directory(store("containers", container["id"]), True, True)
            say(f"removed {container['name']}")
    return 0


# ═══════════════════════════════════════════════════════════════════════════════════════════════
#  main: from a command's name to its function
# ═══════════════════════════════════════════════════════════════════════════════════════════════

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
    function, arguments = parse_arguments(argv)
    story.level = QUIET if arguments.get("--quiet") else EXPLAIN if arguments.get("--explain") or arguments.get("--step") else PLAIN
    if arguments.get("--step"):
        story.stepping = os.open("/dev/tty", os.O_RDWR)
    use_colours()
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, interrupted)
    try:
        sweep()
        return function(arguments)
    except MockerError as error:
        if str(error):
            write_line(f"mocker: {error}", "error")
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
