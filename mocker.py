#!/usr/bin/env -S python3 -c "import os,sys;sys.path[0]=os.path.realpath(sys.argv[1]+'/..');import mocker;mocker.main()"
# (Started so, this file is a module, which Python compiles once, and not at each start: that saves 100 ms of 140.)
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
  mocker inspect <image-or-container>          its anatomy, as a tree
  mocker diff <container>                      what it added, changed and deleted
  mocker compare [<name>]                      chroot, cgroup and container side by side, probed
  mocker verify                                check every digest again
  mocker doctor                                what this machine has and lacks for all this
  mocker clean [options]                       undo whatever outlived a run
  mocker COMMAND --help                        a command's own usage

Try (as root):
  ./mocker.py pull hello-world
  ./mocker.py images
  ./mocker.py run library/hello-world
  ./mocker.py run --explain -it busybox

Images and containers are kept in ~/mocker, or $MOCKER_HOME. The file follows the life of a container:
registry, store, root, network, cgroup, privileges, run. --explain shows the docstring of each step.

But: no daemon, no builds, no push, no compose, no swarm, no plugins, no user namespaces, no IPv6,
no AppArmor. `docker` asks dockerd, which asks containerd, which asks runc; here one process does
it all and waits. README.md has a table of what is left out, and where Docker has it.
"""
import contextlib
import errno
import functools
import gc
import os
import signal
import stat
import sys

__version__ = "1.0"
STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
# The signals that are meant for the container: all but those of our own faults, children, pipes, and job control.
FORWARDED = signal.valid_signals() - {getattr(signal, f"SIG{name}") for name in (
    "KILL STOP CHLD PIPE SEGV BUS FPE ILL TSTP TTIN TTOU".split())}
HOME = os.path.abspath(os.path.expanduser(os.environ.get("MOCKER_HOME") or "~/mocker"))

class lazily:
    """A module that is imported when it is first used: most commands use few of them, and a container starts fast.
    In an image's root none can be imported: what is used there (confined, enter_root) has to be in use before."""

    def __init__(self, name):
        self.name = name

    def __getattr__(self, attribute):
        if not hasattr(sys.modules.get(self.name), attribute):  # or another thread is still importing it
            # A signal has to wait: what its handler raises may get lost in the midst of an import.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
            try:
                __import__(self.name)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return getattr(sys.modules[self.name], attribute)

base64, collections, ctypes, fcntl, hashlib, hmac, io, ipaddress, itertools, json, logging = map(lazily, (
    "base64 collections ctypes fcntl hashlib hmac io ipaddress itertools json logging".split()))
multiprocessing, re, select, shlex, shutil, socket, struct, subprocess, tarfile, termios, textwrap = map(lazily, (
    "multiprocessing re select shlex shutil socket struct subprocess tarfile termios textwrap".split()))
threading, time, tty, zlib, futures, http_server, imports, url = map(lazily, (
    "threading time tty zlib concurrent.futures http.server importlib.util urllib.parse".split()))
cgroups, colorama, docopt, requests, tabulate, urllib3 = map(lazily, (
    "cgroups colorama docopt requests tabulate urllib3".split()))

# ═══ Telling the story: steps, narration, the one error type ═════════════════════════════════════
#
#  A step is a function whose docstring is told when it runs. A primitive asks the kernel for one
#  thing, and tells it as the shell command that does the same. A proof is what the kernel answers.

QUIET, PLAIN, EXPLAIN = range(3)

class story:
    """How much is told, and where: on stderr, since stdout is the container's, or for what a command is to print."""

    level, output, style = PLAIN, 2, {}
    script = None  # with --by-hand: what is told goes in there
    stepping = None  # with --step: the terminal from which Enter is read

FULL = errno.ENOSPC, errno.EDQUOT  # of a disk

class MockerError(Exception):
    """What the user can mend, in one line: what is wrong, and what to do. 125 is docker's own status."""

    def __init__(self, message, status=125):
        super().__init__(message)
        self.status = status

class Stopped(BaseException):
    """By a signal. No part of mocker is to take it for a failure that it expects."""

def check(holds, message, status=125):
    if not holds:
        raise MockerError(message, status)

@contextlib.contextmanager
def explained(kinds, message):
    """An expected failure becomes a MockerError; {} in the message is the reason. A full disk stays one.
    kinds may be Exception, for whatever a library makes of forged bytes; then what mocker itself says stays, too."""
    try:
        yield
    except kinds as error:
        told = kinds is Exception and isinstance(error, (MockerError, ImportError))
        if told or getattr(error, "errno", None) in FULL:
            raise
        reason = re.sub(r"^\[Errno \d+\] ", "", str(error))[:150] or type(error).__name__
        raise MockerError(message.replace("{}", reason)) from None

def write_line(text, style=""):
    shown = printable(text)
    shown = shown if len(shown) < 900 or not style else f"{shown[:500]}…{shown[-300:]}"  # names may be of any length
    line = f"{story.style.get(style, '')}{shown}{story.style.get('end', '') if style else ''}\n"
    show(line.encode(errors="backslashreplace"))

def show(lines):
    """In one write, over a progress bar if there is one."""
    with contextlib.suppress(OSError):  # that stderr is closed is no error
        os.write(story.output, lines and b"\r\033[K" * os.isatty(story.output) + lines)

def printable(text):
    """What isn't printable is escaped: a terminal would obey it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

def say(text):
    """mocker's own words; -q silences them."""
    if story.level >= PLAIN:
        write_line(text)

def tell(command, wraps=False, by_hand=None):
    """What a primitive does, as the shell command or the system call that does it.
    What a shell can't do to itself, as unshare, wraps: the rest of a script becomes its argument.
    by_hand is what a script has instead, where it has to differ."""
    if story.level >= EXPLAIN:
        write_line(f"  $ {command}", "command")
    if story.script:
        story.script.add(command if by_hand is None else by_hand, wraps)

def prove(question, answer):
    """What the kernel, or a registry, says now; of the kernel, `question` is the command that asks the same."""
    if story.level >= EXPLAIN:
        for line in [f"  ? {question}"] + [f"  = {line}" for line in answer.expandtabs().splitlines()]:
            write_line(line, "proof")

def step(part=None):
    """Decorator: a step of the talk. One with a part is skipped if the container is to be without it."""
    def decorate(function):
        @functools.wraps(function)
        def told(*arguments):
            left_out = part is not None and part not in arguments[0].parts
            heading, _, text = function.__doc__.partition("\n\n")
            narrate(f"■ {heading}{' (left out)' * left_out}", text)
            return None if left_out else function(*arguments)
        return told
    return decorate

def narrate(heading, text=""):
    """For a projector: 80 columns. With --step the speaker sets the pace."""
    if story.level < EXPLAIN and not story.script:
        return
    paragraphs = [" ".join(part.split()) for part in re.split(r"\n\s+(?=See )", text)]
    lines = [f"  {line}" for part in paragraphs for line in textwrap.wrap(part, 76, break_on_hyphens=False)]
    if story.script:
        story.script.add("\n" + "\n".join(f"# {line}" for line in [heading, *lines]))
        return
    for line, style in [("", ""), (heading, "heading"), *((line, "") for line in lines)]:
        write_line(line, style)
    if story.stepping is not None:
        os.write(story.stepping, b"  [Enter goes on, q ends] ")
        answer = os.read(story.stepping, 100).strip().lower()
        check(answer != b"q", "ended at your word; what was done is undone", status=0)

def set_story(arguments):
    """-q, --explain, --step; colours unless NO_COLOR is set or stderr is no terminal."""
    explain = arguments.get("--explain") or arguments.get("--step")
    story.level = QUIET if arguments.get("--quiet") else EXPLAIN if explain else PLAIN
    if "NO_COLOR" not in os.environ and os.isatty(2):
        fore, style = colorama.Fore, colorama.Style
        story.style = {"heading": style.BRIGHT + fore.CYAN, "command": fore.YELLOW, "proof": fore.GREEN,
                       "error": fore.RED, "end": style.RESET_ALL}
    if arguments.get("--step"):
        with explained(OSError, "--step waits for Enter, and there is no terminal: take --explain"):
            story.stepping = os.open("/dev/tty", os.O_RDWR)  # not stdin, which may be the container's

class Script:
    """--by-hand: what is told, as a script for sh.

    After what wraps comes a shell, which reads the rest from a here-document. Without the old root
    there is no /dev/fd, and soon no shell: what wraps then is chained before the program.

    unshare --mount --uts sh -e /dev/fd/3 3<<'INSIDE_0_1a2b3c4d' || status=$?
    mount …
    exec setpriv … unshare --root=. … -- /bin/sh 3<&-
    INSIDE_0_1a2b3c4d
    """

    def __init__(self, header, id):
        self.lines, self.ends, self.id = [header], [], id
        self.chain = None  # what goes before the program; a list once the old root is left (pivot_by_hand)

    def add(self, line, wraps=False):
        if wraps and self.chain is not None:
            self.chain.append(line)
            self.lines.append("# (In the last line: until then a shell needs its power.)")
        elif wraps:
            end = f"INSIDE_{len(self.ends)}_{self.id}"  # no image can know it, to end it before
            shell = f"{line} sh -e /dev/fd/3 3<<'{end}'"
            self.lines.append(f"exec {shell}" if self.ends else f"{shell} || status=$?")
            self.ends.insert(0, end)
        else:
            self.lines.append(line)

    def end_with(self, program):
        self.lines += [" ".join(["exec", *(self.chain or []), program, "3<&-"]), *self.ends]

    def encoded(self):
        return "".join(f"{line}\n" for line in self.lines).encode(errors="surrogateescape")

# ═══ The registry: reference, token, manifest, blobs ═════════════════════════════════════════════
#
#  GET /v2/library/busybox/manifests/latest → 401, WWW-Authenticate: Bearer realm="…",service="…"
#  GET the realm                            → {"token": "…", "expires_in": 300}
#  GET the manifest again, with the token   → an index: a manifest for each platform
#  GET /v2/…/manifests/sha256:…             → the manifest: a config, and layers from the bottom up
#  GET /v2/…/blobs/sha256:… for each        → 307 to a CDN, which must not see the token
#
#  https://github.com/opencontainers/distribution-spec, …/image-spec

# What we need of the documents: a pattern stands for text, "?" marks what may be missing.
DIGEST, TEXT = "sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}", r"[^\0\ud800-\udfff]*"
DESCRIPTOR = {"mediaType?": TEXT, "digest": DIGEST, "size": int}
INDEX = {"manifests": [{**DESCRIPTOR, "platform?": {"os?": TEXT, "architecture?": TEXT, "variant?": TEXT}}]}
MANIFEST = {"mediaType?": TEXT, "config": DESCRIPTOR, "layers?": [DESCRIPTOR]}
CONFIG = {"os?": TEXT, "architecture?": TEXT, "rootfs": {"diff_ids?": [DIGEST]}, "history?": list,
          "config?": {"Env?": [TEXT], "Entrypoint?": [TEXT], "Cmd?": [TEXT], "WorkingDir?": TEXT, "User?": TEXT}}

DOCKER_HUB = "docker.io"
INDEX_TYPES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFEST_TYPES = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
MANIFEST_LIMIT = 4 << 20  # bytes, as Docker's
TIMEOUT = 10, 30  # seconds to connect, seconds of silence, or $MOCKER_TIMEOUT
ATTEMPTS = 4
# An architecture by its other names → by that of the specs, which is Go's.
ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "armhf": "arm/v7", "armel": "arm/v6",
                 "i386": "386"}
# The grammar of https://github.com/distribution/reference
COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
HOST = rf"(?:{LABEL}(?:\.{LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
REFERENCE = rf"({HOST})/({COMPONENT}(?:/{COMPONENT})*)(?::(\w[\w.-]{{0,127}}))?(?:@({DIGEST}))?"

class Reference:
    """Where an image is: host/repository:tag; or @digest, which is exact and wins over a tag."""

    def __init__(self, text, tag=None):
        """tomcat:9 → docker.io, library/tomcat, 9. MockerError where docker says "invalid reference"."""
        text = f"{text}:{tag}" if tag else text
        # The first component is a host only if it looks like one; else it is somebody on Docker Hub.
        first, slash, _ = text.partition("/")
        is_host = slash and (re.search("[.:]", first) or first == "localhost" or first != first.lower())
        match = re.fullmatch(REFERENCE, text if is_host else f"{DOCKER_HUB}/{text}", re.ASCII)
        check(match and len(match[2]) <= 255 and not re.fullmatch("[0-9a-f]{64}", text),
              f"invalid reference '{text[:300]}': write [host/]name[:tag][@sha256:…], the name in lower case")
        self.host, self.repository, tag, self.digest = match.groups()
        if self.host in ("index.docker.io", "registry-1.docker.io", DOCKER_HUB):
            self.host = DOCKER_HUB
            self.repository = self.repository if "/" in self.repository else f"library/{self.repository}"
        self.version = self.digest or tag or "latest"
        # As `images` shows it, where Docker Hub goes without saying: library/tomcat, localhost:5000/app
        self.name = self.repository if self.host == DOCKER_HUB else f"{self.host}/{self.repository}"

    def __str__(self):
        return full_name(vars(self))

    @property
    def file(self):
        """library_tomcat.json, library_tomcat:9.json; underscores are doubled, so no two images share one."""
        version = "" if self.version == "latest" else str(self)[len(self.name) :]
        name = self.name.replace("_", "__").replace("/", "_") + version
        # A name that no file can have is cut, and told apart by its digest.
        return (name if len(name) < 200 else f"{name[:150]}~{digest_of(name.encode())[7:27]}") + ".json"

# This machine, which is asked by plain http, and through no proxy.
LOOPBACK = r"(localhost|\[::1\]|127(\.[0-9]+){3})(:[0-9]+)?"

class Registry:
    """One repository of one registry, and the HTTP session in which it is asked."""

    def __init__(self, reference, authorization=None, attempts=ATTEMPTS):
        self.reference, self.session = reference, requests.Session()
        host, insecure = reference.host, re.split(r"[\s,]+", os.environ.get("MOCKER_INSECURE", "").lower())
        plain = re.fullmatch(LOOPBACK, host) or {host.lower(), re.sub(r":\d+$", "", host).lower()} & {*insecure}
        self.base = f"{'http' if plain else 'https'}://{host}"
        if host == DOCKER_HUB:  # or a mirror of it
            self.base = (os.environ.get("MOCKER_HUB") or "https://registry-1.docker.io").rstrip("/")
            check(re.match("https?://[^/@]+(/|$)", self.base),
                  "invalid MOCKER_HUB: write http://host:port or https://host, and give its login to docker login")
        self.host, self.attempts = self.base.partition("//")[2].partition("/")[0], attempts
        self.remedy = "docker login" if self.host == "registry-1.docker.io" else f"docker login {self.host}"
        self.session.trust_env = False  # else requests sends the login of ~/.netrc to whoever it is
        authorities = map(os.environ.get, ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"))
        self.session.verify = next(filter(None, authorities), True)
        self.session.get_redirect_target = lambda response: None  # it would read all of a redirect's body
        # A digest is of the bytes as they are stored, so no compression on the way.
        self.session.headers.update({"User-Agent": f"mocker/{__version__}", "Accept-Encoding": "identity",
                                     "Authorization": authorization})

    def get(self, path, method="GET", **headers):
        """A path of the repository, or a whole address → the answer, not yet read; MockerError if there is none.
        A header that is None is not sent, even if the session has it."""
        address = url.urljoin(f"{self.base}/v2/{self.reference.repository}/", path)
        try:
            for _ in range(10):
                response = self.send_patiently(address, method, headers)
                status, challenge = response.status_code, response.headers.get("WWW-Authenticate")
                if status in (200, 206):
                    return response
                if status == 401 and challenge and "Authorization" not in headers:
                    headers["Authorization"] = self.session.headers["Authorization"] = self.answer(challenge)
                elif response.is_redirect:
                    here, address = address, url.urljoin(address, response.headers["Location"])
                    if url.urlsplit(here)[:2] != url.urlsplit(address)[:2]:
                        headers["Authorization"] = None  # another host gets no token, nor an answer to its challenge
                else:
                    break
                response.raw.read(1 << 16)  # once it is read, the connection can be used again
        except (OSError, ValueError, urllib3.exceptions.HTTPError) as error:  # whatever an odd address leads to
            raise MockerError(f"{origin(address)} can't be reached ({root_cause(error)}): check the network, name "
                              "a private CA's file in REQUESTS_CA_BUNDLE, or a mirror in MOCKER_HUB") from None
        raise self.refusal(response)

    def send_patiently(self, address, method, headers):
        """Again, after a pause, if the connection breaks, or the server can't answer now and asks for no long wait."""
        pauses = [0.3 * 2**n for n in range(self.attempts)]  # seconds
        while True:
            try:
                response = self.send(address, method, headers)
                wait, is_busy = asked_wait(response), response.status_code == 429 or response.status_code >= 500
                if not (is_busy and pauses and wait <= 10):
                    return response
            except requests.ConnectionError as error:
                if isinstance(error, requests.exceptions.SSLError) or not pauses:
                    raise
                wait = 0
            time.sleep(max(wait, pauses.pop(0)))

    def send(self, address, method, headers):
        """One request, told without its secrets; by https, unless the registry itself is asked by http."""
        asked, here = url.urlsplit(address), origin(address)
        check(asked.scheme in ("https", url.urlsplit(self.base).scheme),
              f"{self.base} sends to {here}: only https is followed")
        proxies = {} if re.fullmatch(LOOPBACK, here.partition("//")[2]) else requests.utils.get_environ_proxies(address)
        response = self.session.request(method, address, headers=headers, proxies=proxies,
                                        timeout=(TIMEOUT[0], min(setting("MOCKER_TIMEOUT", TIMEOUT[1]), 10**6)),
                                        allow_redirects=False, stream=True)
        shown = [part for part in asked.query.split("&") if re.match("(service|scope)=", part)]  # never a signature
        query = "?" + "&".join(shown or ["…"]) if asked.query else ""
        say(f'"{method} {here}{asked.path}{query} HTTP/1.1" {response.status_code} '
            f'{response.headers.get("Content-Length", "-")}')
        return response

    def refusal(self, response):
        """A status that is no success → the line that says what to do."""
        status, wait, here = response.status_code, asked_wait(response), origin(response.url)
        limit = re.fullmatch(r"(\d{1,9});w=(\d{1,9})", response.headers.get("ratelimit-limit", ""))
        allowed = f", {limit[1]} in {int(limit[2]) // 3600} hours" if limit else ""
        advice = f"{self.reference} can't be had now, try again later"
        # 401, 403 or 404: which one says nothing of the reason; for a blob, or from a CDN, none is about the name.
        if status == 401 or status in (403, 404) and here == origin(self.base) and "/blobs/" not in response.url:
            advice = f"no such image: {self.reference}: check the name and the tag, or if it is private, {self.remedy}"
        elif status == 429:
            advice = (f"too many pulls{allowed}, for all behind this address together: docker login, name a mirror in "
                      f"MOCKER_HUB, or try again {f'in {wait:.0f} s' if wait else 'later'}")
        elif response.is_redirect:
            advice = f"its redirects have no end: {self.reference} is not to be had there"
        return MockerError(f"{here} answers {status} {response.reason[:100]}: {advice}")

    def answer(self, challenge):
        """WWW-Authenticate (RFC 9110 §11.6.1) → an Authorization that satisfies it; a token may expire in mid-pull."""
        prove("the registry's challenge", challenge)
        login = find_login("index.docker.io" if self.host == "registry-1.docker.io" else self.host)
        asked = read_challenges(challenge).get("bearer")
        if asked is None:
            check(login, f"{self.host} wants a name and a password: {self.remedy}")
            return login
        wanted = {"service": asked.get("service"), "scope": f"repository:{self.reference.repository}:pull"}
        realm = requests.Request("GET", asked.get("realm", ""), params=wanted).prepare().url
        body = parse_json(self.get(realm, Authorization=login).raw.read(MANIFEST_LIMIT), {}, "the token")
        token = str(body.get("token") or body.get("access_token") or "")
        check(re.fullmatch(r"[\x21-\x7e]+", token), f"{self.host} gives a token that can be none: try again later")
        with contextlib.suppress(ValueError, IndexError):
            prove("the token's claims, decoded", base64.urlsafe_b64decode(token.split(".")[1] + "==").decode())
        return f"Bearer {token}"

def read_challenges(header):
    """Basic realm="a, b", Bearer realm=…,service=… → {scheme: {parameter: value}}, its names in lower case."""
    found, parameters = {}, {}
    pattern = r'([^\s,="]+)(?:\s*(=)\s*(?:"((?:[^"\\]|\\.)*)"|([^\s,"]*)))?'
    for name, equals, quoted, token in re.findall(pattern, header):
        if equals:
            parameters.setdefault(name.lower(), re.sub(r"\\(.)", r"\1", quoted) or token)
        else:
            parameters = found.setdefault(name.lower(), {})
    return found

def asked_wait(response):
    """Retry-After, which is a number or a date (RFC 9110 §10.2.3) → seconds; 0 if it doesn't say."""
    with contextlib.suppress(KeyError, ValueError, OverflowError, urllib3.exceptions.HTTPError):
        return min(urllib3.util.Retry().parse_retry_after(response.headers["Retry-After"]), 10**9)
    return 0

def setting(variable, default):
    """A number from the environment."""
    text = os.environ.get(variable) or str(default)
    check(re.fullmatch("[1-9][0-9]{0,17}", text), f"invalid {variable} '{text[:50]}': write a number from 1 on")
    return int(text)

def root_cause(error):
    """The innermost reason in a chain of libraries' errors, in a few words."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    error = getattr(error, "reason", error)
    return re.sub(r"\?\S*", "?…", str(error).rpartition("): ")[2])[:150] or type(error).__name__  # without a signature

def origin(address):
    """Whom it asks, and how: http://host:port; without a login."""
    asked = url.urlsplit(address)
    return f"{asked.scheme}://{asked.netloc.rpartition('@')[2]}"

def find_login(host):
    """From docker's ~/.docker/config.json, or the helper that it names → an Authorization, or None."""
    what, folder = "~/.docker/config.json", os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    raw = read_kernel_file(os.path.join(folder, "config.json")) or "{}"
    config = parse_json(raw, {"auths?": dict, "credHelpers?": dict, "credsStore?": TEXT}, what)
    server = f"https://{host}/v1/" if host == "index.docker.io" else host
    helper = (config.get("credHelpers") or {}).get(server) or config.get("credsStore")
    answer = ask_tool([f"docker-credential-{helper}", "get"], server) if helper else None
    spelt = re.compile(rf"(https?://)?{re.escape(host)}(/.*)?")  # docker has written any of these
    entry = next((entry for name, entry in (config.get("auths") or {}).items() if spelt.fullmatch(name)), {})
    if answer:
        found = parse_json(answer, {}, f"docker-credential-{helper}")
        entry = {"username": found.get("Username"), "password": found.get("Secret")}
    with explained((TypeError, ValueError), f"the entry of {host} in {what} is damaged: docker login {host}"):
        entry = dict(entry)
        pair = f"{entry.get('username')}:{entry['password']}" if entry.get("password") else ""
        login = entry.get("auth") or base64.b64encode(pair.encode()).decode()
        base64.b64decode(login, validate=True)
    return f"Basic {login}" if login else None

def run_tool(command):
    """Another program, told as a command once it has done it → its output; None if it is not there or refuses."""
    output = ask_tool(command)
    if output is not None:
        tell(shlex.join(command))
    return output

def ask_tool(command, text=None):
    """The same, untold: for one that changes nothing, or whose caller tells it in other words."""
    # cron's PATH, and that of `su` without a dash, has no sbin, where nft is.
    path = [place for folder in os.get_exec_path() for place in (folder, re.sub("/bin$", "/sbin", folder))]
    environment = {**os.environ, "PATH": ":".join(path)}
    with contextlib.suppress(FileNotFoundError, PermissionError, subprocess.CalledProcessError):
        return subprocess.run(command, input=text, capture_output=True, text=True, check=True, env=environment).stdout
    return None

def parse_json(raw, shape, what):
    """From outside → a document of that shape; MockerError if it is anything else."""
    with explained((ValueError, RecursionError), f"{what} is not JSON: a broken registry, or another answers for it"):
        text = raw if isinstance(raw, str) else raw.decode()
        return check_shape(json.loads(text, parse_constant=int), shape, what)  # int("NaN") fails: JSON has no NaN

def check_shape(value, shape, what):
    """`value`, if it is as the spec says: {"key": shape}, [shape], a type or a pattern. Nothing is guessed at,
    but that a list which is missing is empty."""
    kind = shape if isinstance(shape, type) else type(shape)
    names = {dict: "an object", list: "a list", str: "valid text", int: "a number"}
    check(type(value) is kind and (kind is not int or value in range(1 << 63))
          and (kind is not str or re.fullmatch(shape, value)),
          f"{what} should be {names[kind]}, and is not: it is broken, or something else")  # unshown: it may be a secret
    for key, inner in shape.items() if isinstance(shape, dict) else ():
        name = key.rstrip("?")
        if name == key or value.get(name) is not None:
            check_shape(value.get(name), inner, f"{what}'s {name}")
        elif isinstance(inner, list):
            value[name] = []  # as Go's programs leave it out, or write null
    for item in value if isinstance(shape, list) else ():
        check_shape(item, shape[0], f"an entry of {what}")
    return value

def digest_of(data, like="sha256"):
    """Of bytes, or of an open file → sha256:…, the name that everything goes by; or by the algorithm of another."""
    algorithm = like.partition(":")[0]
    found = hashlib.new(algorithm)
    for piece in [data] if isinstance(data, bytes) else pieces(data):
        found.update(piece)
    return f"{algorithm}:{found.hexdigest()}"

def check_digest(data, digest, what):
    """Is it what was asked for? Whoever served it: that is what a digest is for."""
    found = digest_of(data, digest)
    check(found == digest, f"{what} is damaged: its digest is {found[:19]}…, not {digest[:19]}…; pull again")

def fetch_manifest(registry, version):
    """A manifest or an index, by tag or by digest → JSON, and a descriptor of it. Its bytes go into the store."""
    what, digest = f"the manifest of {registry.reference}", version if re.fullmatch(DIGEST, version) else None
    raw, kind = read_blob(digest) if digest else None, ""
    if raw is None:  # what was asked for by digest, and is here, can't have changed
        response = registry.get(f"manifests/{version}", Accept=", ".join(MANIFEST_TYPES + INDEX_TYPES))
        with explained(urllib3.exceptions.HTTPError, f"{what} is cut off ({{}}): try again"):
            raw = response.raw.read(MANIFEST_LIMIT + 1)
        check(len(raw) <= MANIFEST_LIMIT, f"{what} is larger than 4 MiB: no real one is")
        if digest:
            check_digest(raw, digest, what)
        kind = response.headers.get("Content-Type", "").partition(";")[0]
    manifest = parse_json(raw, {"mediaType?": TEXT}, what)
    kind = manifest.get("mediaType") or kind or (INDEX_TYPES if "manifests" in manifest else MANIFEST_TYPES)[0]
    check(manifest.get("schemaVersion") != 1 and "docker.distribution.manifest.v1+" not in kind,
          f"{registry.reference} is in the old schema 1 format, which Docker dropped, too: pull a newer tag")
    return manifest, {"digest": save_blob(raw, digest or digest_of(raw)), "size": len(raw), "mediaType": kind}

def platform_name(system, architecture, variant=""):
    """As docker writes it: linux, aarch64 → linux/arm64; linux, arm → linux/arm/v7"""
    name = "/".join(filter(None, (system, ARCHITECTURES.get(architecture.lower(), architecture), variant))).lower()
    return re.sub("/arm$", "/arm/v7", re.sub("/(amd64/v1|arm64/v8)$", lambda same: same[0][:-3], name))

def choose_platform(index, wanted, what):
    """The digest for a platform. An attestation (unknown/unknown) is none."""
    there = {}
    for entry in check_shape(index, INDEX, what)["manifests"]:
        platform = entry.get("platform") or {}
        name = platform_name(*(platform.get(key) or "" for key in ("os", "architecture", "variant")))
        if not name.startswith("unknown"):
            there.setdefault(name, entry["digest"])
    older = [re.sub("v[67]$", f"v{n}", wanted) for n in (6, 5) if wanted.startswith("linux/arm/")]
    for name in (wanted, *older, ""):  # the last is an entry without a platform
        if name in there:
            prove(f"the index's platforms: {', '.join(there)}; chosen", name)
            return there[name]
    raise MockerError(f"{what} is not there for {wanted}, only for {', '.join(sorted(there)) or 'none'}: "
                      "try --platform=…")

@step()
def find_manifest(registry, platform):
    """Ask the registry which manifest the name stands for

    A tag names an index or a manifest, both JSON. An index has one manifest for each platform; we
    take the one for this machine, by its digest. All below it is named by digest, too: from here
    on nobody, the registry included, can change a byte unseen.
    See the OCI image-spec, image-index.md and manifest.md.
    """
    what, version, index = str(registry.reference), registry.reference.version, None
    for _ in range(4):  # an index may point to an index
        manifest, descriptor = fetch_manifest(registry, version)
        check("manifests" not in manifest or "layers" not in manifest,
              f"{what} claims to be an index and a manifest at once: this image is broken, or a trick")
        if "manifests" not in manifest and descriptor["mediaType"] not in INDEX_TYPES:
            return {**descriptor, "index": index, "manifest": check_shape(manifest, MANIFEST, what)}
        index = index or descriptor
        version = choose_platform(manifest, platform, what)
    raise MockerError(f"{what} is an index of indexes, without end: this image is broken")

def fetch_config(registry, manifest, partial):
    """The image's config. It must have a diff_id for each layer."""
    what, blob, layers = str(registry.reference), manifest["config"], manifest["layers"]
    check(blob["size"] <= MANIFEST_LIMIT, f"the config of {what} is larger than 4 MiB: no real one is")
    check(not any(re.search("nondistributable|foreign", layer.get("mediaType") or "") for layer in layers),
          f"{what} has a foreign layer, as Windows images do: it can't run here")
    check(len(layers) <= 500, f"{what} has {len(layers)} layers, and overlayfs takes 500: it can't run here")
    if read_blob(blob["digest"]) is None:
        fetch_blob(registry, blob, partial)
    config = parse_json(read_blob(blob["digest"]), CONFIG, f"{what}'s config")
    check(len(config["rootfs"]["diff_ids"]) == len(layers), f"{what} has not a diff_id for each of its layers: broken")
    history = [line for line in config.get("history") or [] if isinstance(line, dict) and not line.get("empty_layer")]
    for layer, line in zip(layers, history):
        prove(f"layer {layer['digest'][:19]}…, {layer['size']} bytes, was made by", str(line.get("created_by"))[:200])
    return config

def fetch_blob(registry, blob, partial):
    """A blob into the store. After a drop it goes on by Range (RFC 9110 §14.2); it is checked before it counts."""
    digest, size, idle = blob["digest"], blob["size"], 0
    with open(os.path.join(partial, digest[7:]), "w+b") as file:
        while file.tell() < size and idle < ATTEMPTS:
            offset = file.tell()
            response = registry.get(f"blobs/{digest}", Range=f"bytes={offset}-" if offset else None)
            part = response.headers.get("Content-Range", f"bytes {offset}-")
            if response.status_code != 206 or not part.startswith(f"bytes {offset}-"):
                file.truncate(file.seek(0))
            try:
                while file.tell() <= size and (piece := response.raw.read(1 << 14)):
                    file.write(piece)  # small ones: what has come of one is lost if the rest of it doesn't come
            except urllib3.exceptions.HTTPError as error:
                say(f"the connection dropped at byte {file.tell()} ({root_cause(error)}); going on")
            idle = idle + 1 if file.tell() <= offset else 0
        check(file.tell() == size, f"{digest[:15]}… has {file.tell()} bytes, not {size}: pull again")
        file.seek(0)
        check_digest(file, digest, f"blob {digest[:19]}…")
    os.makedirs(os.path.dirname(blob_path(digest)), exist_ok=True)
    os.rename(file.name, blob_path(digest))

# ═══ The image store: blobs, layers, whiteouts ═══════════════════════════════════════════════════
#
#  ~/mocker is an OCI image layout, which skopeo, podman and umoci can read, and a little more:
#
#  oci-layout  index.json  blobs/sha256/…   as the registry served them
#  library_tomcat.json                      one stored manifest an image: what `images` lists
#  layers/<chain id>/                       each layer unpacked once, as overlayfs wants it
#  containers/<id>/                         config.json, log, upper/ (what the container wrote), …
#  partial/<anything>                       what is being made; whoever makes something shares a lock on partial/
#
#  All is made elsewhere and appears by rename(2): there is never half of anything.

LAYER_LIMIT = 10 << 30  # bytes that one layer may unpack to, or $MOCKER_LAYER_LIMIT
DAMAGED = Exception, "a layer is damaged, or no tar ({}): pull again, or tell who made it"  # for explained

def store(*parts):
    return os.path.join(HOME, *parts)

def blob_path(digest):
    return store("blobs", *digest.split(":"))

def is_whole(digest):
    """Is the blob here, and still what its digest says? One that went bad goes, for the next pull to fetch again."""
    with contextlib.suppress(FileNotFoundError), open(blob_path(digest), "rb") as file:
        if digest_of(file, digest) == digest:
            return True
        os.unlink(file.name)
    return False

def read_blob(digest):
    """A small one (manifest or config), checked again; None if it is not here."""
    if is_whole(digest):
        with open(blob_path(digest), "rb") as file:
            return file.read(MANIFEST_LIMIT + 1)  # a hostile image may call a layer its config
    return None

def save_blob(raw, digest):
    write_file(blob_path(digest), raw)
    return digest

def write_file(path, content):
    """Whole, or not at all: made elsewhere, then renamed. What a kill leaves there, the next pull clears away."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locked(store("partial"), fcntl.LOCK_SH), contextlib.ExitStack() as undo:
        with open(store("partial", f"{os.urandom(6).hex()}.new"), "wb") as file:
            undo.callback(os.unlink, file.name)
            file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n")
        os.rename(file.name, path)
        undo.pop_all()

def open_store():
    """Its directories, for root alone, since images have setuid programs. Layers need whiteouts, which can't
    be made on an overlay, as / is one inside docker."""
    probe = store(f"{os.urandom(6).hex()}.probe")
    with explained(OSError, f"{HOME} can't be the store: {{}}: choose another MOCKER_HOME"):
        os.makedirs(HOME, exist_ok=True)
    try:
        os.mknod(probe, stat.S_IFCHR, 0)  # as overlayfs marks a whiteout
        os.unlink(probe)
    except PermissionError:
        say(f"{HOME} lies on an overlay, which can't hold layers: it gets a tmpfs, and is lost with the machine; "
            f"in docker, -v mocker:{HOME} keeps it")
        mount("tmpfs", HOME, "tmpfs", "nodev,mode=755")
    for part in "layers", "containers", "partial":
        os.makedirs(store(part), mode=0o700, exist_ok=True)
    if not os.path.exists(store("index.json")):
        os.makedirs(store("blobs", "sha256"), exist_ok=True)
        write_index({})

@contextlib.contextmanager
def locked(directory, how=fcntl.LOCK_EX):
    """Hold flock(2) on a directory. The kernel lets go of it when the holder dies, however it dies."""
    os.makedirs(directory, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, how)
        yield
    finally:
        os.close(handle)

@contextlib.contextmanager
def partial_directory():
    """For a command's unfinished work. What killed pulls left is removed first, unless another is under way."""
    with contextlib.suppress(BlockingIOError), locked(store("partial"), fcntl.LOCK_EX | fcntl.LOCK_NB):
        for name in os.listdir(store("partial")):
            remove_tree(store("partial", name))
    with locked(store("partial"), fcntl.LOCK_SH), contextlib.ExitStack() as undo:
        path = store("partial", os.urandom(6).hex())
        undo.callback(remove_tree, path)
        os.mkdir(path)
        yield path

def remove_tree(path):
    """By rm(1), since a deep tree exhausts shutil.rmtree; not by run_tool: to import subprocess takes time."""
    command = ["rm", "-rf", path]
    with contextlib.suppress(FileNotFoundError):  # a PATH without rm
        os.waitpid(os.posix_spawnp("rm", command, os.environ), 0)
        tell(shlex.join(command))

def layer_paths(diff_ids):
    """diff_ids from the bottom up → the unpacked layers, named by chain id (OCI image-spec, "Layer ChainID").
    What a layer unpacks to depends on what lies below: a parent directory that it leaves out has the mode of the one
    below, a hard link may lead there. So the name tells what is below, too."""
    chain_ids = itertools.accumulate(diff_ids, lambda below, diff_id: digest_of(f"{below} {diff_id}".encode()))
    return [store("layers", chain_id.partition(":")[2]) for chain_id in chain_ids]

class Image:
    """A stored image: its JSON file, its config, its unpacked layers from the bottom up."""

    def __init__(self, file):
        shape = {"name": TEXT, "version": TEXT, "digest": DIGEST, "mediaType": TEXT, "size": int, "manifest": MANIFEST,
                 "index?": DESCRIPTOR}
        with explained(MockerError, f"{store(file)} is no stored image: remove it, and pull the image again"), \
                open(store(file), "rb") as content:
            self.stored = parse_json(content.read(), shape, file)
        self.file, self.name, self.version, self.manifest = file, *map(self.stored.get, ("name", "version", "manifest"))
        self.blobs = [self.manifest["config"], *self.manifest["layers"]]

    @functools.cached_property
    def config(self):
        raw = read_blob(self.manifest["config"]["digest"])
        check(raw is not None, f"{self.name} has lost its config: mocker pull {full_name(self.stored)}")
        return parse_json(raw, CONFIG, f"{self.name}'s config")

    @property
    def layers(self):
        return layer_paths(self.config["rootfs"]["diff_ids"])

def full_name(stored):
    """library/tomcat:9, or library/tomcat@sha256:…"""
    return f"{stored['name']}{'@' if ':' in stored['version'] else ':'}{stored['version']}"

def all_images():
    files = os.listdir(HOME) if os.path.exists(HOME) else []
    return [Image(file) for file in sorted(files) if file.endswith(".json") and file != "index.json"]

# ── Unpacking a layer ──────────────────────────────────────────────────────────────────────────────

def pieces(file):
    return iter(lambda: file.read(1 << 18), b"")

def packing(file):
    """How a layer's blob is packed, its first bytes tell, whatever its media type says."""
    magic = file.read(4)
    file.seek(0)
    is_zstd = magic == b"\x28\xb5\x2f\xfd" or magic[1:] == b"\x2a\x4d\x18"  # the latter is a frame to be skipped
    return "+gzip" if magic.startswith(b"\x1f\x8b") else "+zstd" * is_zstd

def decompressed(file):
    """The tar in a blob, piece by piece."""
    kind = packing(file)
    if kind == "+zstd":
        in_python = "compression" if sys.version_info >= (3, 14) else "backports"
        file = lazily(f"{in_python}.zstd").ZstdFile(file)
    return gunzip(file) if kind == "+gzip" else pieces(file)

def gunzip(file):
    """Its members (RFC 1952), piece by piece. Up to Python 3.11 the gzip module takes 8 KiB at once, which is slow."""
    member = zlib.decompressobj(wbits=31)
    for piece in pieces(file):
        while piece and not (member.eof and not piece.strip(b"\0")):  # zeros may follow, or another member
            member = zlib.decompressobj(wbits=31) if member.eof else member
            yield member.decompress(piece, 1 << 20)
            piece = member.unconsumed_tail or member.unused_data
    check(member.eof, "a layer's gzip is cut off: pull again")

def checked(pieces, diff_id):
    """The same pieces, of a layer's tar; bounded, and at their end checked against the diff_id."""
    algorithm, _, wanted = diff_id.partition(":")
    found, total, limit = hashlib.new(algorithm), 0, setting("MOCKER_LAYER_LIMIT", LAYER_LIMIT)
    for piece in pieces:
        found.update(piece)
        total += len(piece)
        check(total <= limit, f"a layer unpacks to more than {limit} bytes: if you trust it, raise MOCKER_LAYER_LIMIT")
        yield piece
    check(found.hexdigest() == wanted, f"a layer does not unpack to its diff_id {diff_id[:19]}…: damaged, or forged")
    if not total:
        yield bytes(1024)  # no bytes at all are a tar of no files

class TarStream:
    """Pieces of a tar as a file that is read from front to back."""

    def __init__(self, pieces):
        self.pieces, self.piece, self.position = pieces, io.BytesIO(), 0

    def read(self, size):
        check(size <= 1 << 20, "a layer has a header without end: this image is broken")
        data = self.piece.read(size)
        while len(data) < size and (piece := next(self.pieces, None)) is not None:
            self.piece = io.BytesIO(piece)
            data += self.piece.read(size - len(data))
        self.last, self.position = data, self.position + len(data)
        return data

    def tell(self):
        return self.position

    def seek(self, position):
        check(position >= self.position, "a layer's headers lead backwards: this image is broken")
        while position > self.position and self.read(min(position - self.position, 1 << 20)):
            pass

@contextlib.contextmanager
def confined(directory):
    """chroot into a directory, and back: no path in a tar can name anything outside it.
    The way back is the classic way out of a chroot, for whoever may call chroot(2) and holds a directory from outside.
    That is why `run` does not rely on chroot."""
    outside, finders = os.open("/", os.O_PATH), sys.meta_path
    sys.meta_path = []  # an import would now run the image's own /usr/lib/python3
    tell(f"chroot {shlex.quote(directory)}")
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
    """A tar on its way into directory/upper: alone at first, with that as the root directory of this process;
    from the first entry that needs the layers below, over them, once they are here."""

    def __init__(self, tar, below, directory):
        self.tar, self.directory = tar, directory
        self.below = below  # empty once it stands on them
        self.root = contextlib.ExitStack()  # undoes stand_on
        self.names = []  # the first ten, to be shown
        self.whiteouts = []  # they can wait for the end: what this layer brings, before or after, they spare
        self.placed = set()  # what this layer has brought: no whiteout of its own touches that
        self.times = {}  # of directories: set last, since each new file changes its directory's

    def stand_on(self, layers):
        """The root directory: the layers, the topmost first, and over them what has been unpacked so far."""
        mount_overlay(layers, self.directory)
        self.root.callback(unmount, f"{self.directory}/rootfs")
        self.root.enter_context(confined(f"{self.directory}/rootfs"))

    def go_below(self):
        """Onto the layers below, if there are any, once they are here; then do the whiteouts that waited.
        The overlay lets the kernel note the difference in directory/upper: a parent directory that the tar leaves
        out keeps its mode, a hard link finds its target, a whiteout becomes what overlayfs knows as one."""
        if self.below:
            self.root.close()
            while not all(map(os.path.isdir, self.below)):  # as in unpack_layer
                time.sleep(0.01)
            self.stand_on(self.below[::-1])
            self.below = []
        waiting, self.whiteouts = self.whiteouts, []
        for folder, name in waiting:
            self.whiteout(folder, name)

    def unpack(self):
        file = self.tar.fileobj
        while self.tar.offset and (member := self.tar.next()):  # 0: it is empty; up to Python 3.10 next() then fails
            self.tar.members.clear()  # or tarfile keeps them all
            check(not self.tar.pax_headers.keys() & tarfile.PAX_FIELDS,
                  "a layer has a global header for all its files, which docker would ignore: broken, or a trick")
            name = member.pax_headers.get("GNU.sparse.name", member.name)  # not `path`, if it has that, too
            self.names = [*self.names, name][:10]
            self.place(member, rooted(name))
        if self.whiteouts:
            self.go_below()
        # tarfile takes a damaged header for the end, which is two blocks of zeros.
        check(not (file.last + file.read(512)).strip(b"\0"), "a layer has a damaged header: pull again")
        file.seek(sys.maxsize)  # to the real end, where the diff_id is checked
        for path, stamp in self.times.items():
            os.utime(path, ns=(stamp, stamp))

    def place(self, member, path):
        """One member of the tar. A later one replaces an earlier one, and what the layers below have there."""
        folder, name = os.path.split(path)
        if folder not in self.times:
            if not os.path.isdir(folder):
                self.go_below()
            folder = os.path.realpath(folder)  # a symlink may lead there
        path = os.path.join(folder, name)
        if name.startswith(".wh."):
            self.whiteouts.append((folder, name[len(".wh.") :]))
            if not self.below:  # it stands on them, or there are none: nothing to wait for
                self.go_below()
        else:
            self.enter(folder)
            if self.needs_below(member, path):
                self.go_below()
            self.placed.add(path)
            if not (member.isdir() and is_directory(path)):
                self.remove(path)
                self.make(member, path)
            if not member.islnk():
                stamp = set_metadata(path, member)
                self.times.update({path: stamp} if member.isdir() else {})

    def needs_below(self, member, path):
        return (path in self.placed and not (member.isdir() and is_directory(path))  # it may have to hide what is below
                or member.ischr()  # an overlay refuses the device that means a whiteout
                or member.islnk() and not os.path.lexists(rooted(member.linkname)))

    def make(self, member, path):
        """What the header says, where nothing is now."""
        if member.isdir():
            os.mkdir(path)
        elif member.issym():
            os.symlink(member.linkname, path)
        elif member.isreg():
            self.tar.makefile(member, path)  # sparse ones, too
        elif member.islnk():
            target = rooted(member.linkname)
            check(os.path.lexists(target) and not is_directory(target),
                  f"a layer has a hard link '{path}' to '{target}', which is nowhere: this image is broken")
            os.link(target, path, follow_symlinks=False)
        else:
            check(member.isdev(), f"a layer has '{member.name}' of unknown type: broken")
            (self.tar.makefifo if member.isfifo() else self.tar.makedev)(member, path)

    def enter(self, folder):
        """A directory in which something is to change: made, if the tar has it not (yet)."""
        if folder not in self.times:
            self.placed.add(folder)
            if folder != "/":
                self.enter(os.path.dirname(folder))
            if not os.path.isdir(folder):
                self.remove(folder)
                os.mkdir(folder, 0o755)
            self.times[folder] = os.stat(folder).st_mtime_ns

    def remove(self, path):
        check(path != "/", "a layer's root is no directory: this image is broken")
        try:
            os.unlink(path)
        except IsADirectoryError:
            for folder, *_ in os.walk(path):
                self.times.pop(folder, None)
            shutil.rmtree(path)
        except FileNotFoundError:
            pass  # as for nearly every member

    def whiteout(self, folder, name):
        """`.wh.NAME` deletes NAME of the layers below, `.wh..wh..opq` all that they have in this directory."""
        check(name not in ("", ".", ".."), "a layer's whiteout names no file: this image is broken")
        if name == ".wh..opq":
            self.placed.add(folder)
            self.hide(folder)
        elif not name.startswith(".wh."):  # aufs kept its books in early images
            self.hide(os.path.join(folder, name))

    def hide(self, path):
        """What the layers below have there goes, what this one has brought stays."""
        if path not in self.placed and os.path.lexists(path):
            self.enter(os.path.dirname(path))
            self.remove(path)
        elif is_directory(path):
            for name in os.listdir(path):
                self.hide(os.path.join(path, name))

def rooted(name):
    """A name in a tar → where it is in the root."""
    return os.path.normpath("/" + name.lstrip("/"))

def is_directory(path):
    """Itself, not by a symlink."""
    return os.path.isdir(path) and not os.path.islink(path)

def set_metadata(path, member):
    """Owner, mode, xattrs, times; in this order, since chown(2) clears setuid bits and capabilities. → time, in ns"""
    for number in member.uid, member.gid:
        check(0 <= number < 2**32 - 1, f"a layer has an owner {number}: broken")  # -1 would mean: leave it
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not member.issym():
        os.chmod(path, member.mode & 0o7777)
    xattrs = {key[len("SCHILY.xattr.") :]: value.encode("utf-8", "surrogateescape")
              for key, value in member.pax_headers.items() if key.startswith("SCHILY.xattr.") and value}
    below = os.listxattr(path) if member.isdir() else ()  # of the directory as it was, to be removed
    for name, value in {**dict.fromkeys(below), **xattrs}.items():
        with contextlib.suppress(OSError):  # as docker: a file system may lack them, or insist on them
            if value is None:
                os.removexattr(path, name)
            elif not name.startswith("trusted."):  # those are overlayfs' own
                os.setxattr(path, name, value, follow_symlinks=False)
    seconds, _, fraction = member.pax_headers.get("mtime", str(member.mtime)).partition(".")  # a float has no ns
    stamp = min(max(int(seconds) * 10**9 + int(fraction[:9].ljust(9, "0")), 0), 2**63 - 1)
    os.utime(path, ns=(stamp, stamp), follow_symlinks=False)
    return stamp

def unpack_layer(blob, diff_ids, directory):
    """In a worker: a layer's blob → its directory in layers/. → what was told, to be shown when its turn comes"""
    *below, layer = layer_paths(diff_ids)
    while not is_stored(blob):  # another worker is to bring it; if that fails, our parent ends us all
        time.sleep(0.01)
    with open(os.memfd_create("log"), "rb") as told, explained(*DAMAGED), open(blob_path(blob["digest"]), "rb") as file:
        story.output = told.fileno()
        unshare("mount")  # what it mounts is for itself alone
        stream = TarStream(checked(decompressed(file), diff_ids[-1]))
        tar = tarfile.TarFile(fileobj=stream, encoding="utf-8", errors="surrogateescape", copybufsize=1 << 18)
        unpacker = Unpacker(tar, below, directory)
        with unpacker.root:
            unpacker.stand_on([])
            unpacker.unpack()
        with contextlib.suppress(OSError):  # another pull may have brought it meanwhile
            os.rename(f"{directory}/upper", layer)
        check(os.path.isdir(layer), f"{layer} can't be made: is something else there?")
        for line in [f"- {name}" for name in unpacker.names] + ["..."]:
            say(line)
        told.seek(0)
        return told.read()

# ── Pull ───────────────────────────────────────────────────────────────────────────────────────────

def be_worker(parent):
    """A process that works for us: it ends with its parent, silently."""
    die_with(parent)
    for stop in STOPPING:
        signal.signal(stop, signal.SIG_DFL)
    sys.setrecursionlimit(10_000)  # a path in a layer may be 2,000 folders deep

def is_stored(blob):
    path = blob_path(blob["digest"])
    return os.path.exists(path) and os.path.getsize(path) == blob["size"]

def fetch_layer(reference, authorization, blob, partial):
    """In a worker, with a connection of its own."""
    if not is_stored(blob):
        fetch_blob(Registry(reference, authorization), blob, partial)

def draw_progress(blob, partial):
    """[########                ] 12.3 of 153.9 MiB"""
    with contextlib.suppress(FileNotFoundError):  # not begun, or just complete
        count, total = os.path.getsize(os.path.join(partial, blob["digest"][7:])), blob["size"]
        if story.level >= PLAIN and os.isatty(2):
            bar = "#" * min(30, 30 * count // max(total, 1))
            os.write(2, f"\r[{bar:30}] {count / 2**20:.1f} of {total / 2**20:.1f} MiB ".encode())

@contextlib.contextmanager
def workers(count):
    """Processes, not threads: who unpacks has a root directory of its own. None outlives us, however that ends."""
    pool = futures.ProcessPoolExecutor(count, multiprocessing.get_context("fork"), be_worker, [os.getpid()])
    try:
        with explained(futures.BrokenExecutor, "a worker was killed, for lack of memory? End programs, and try again"):
            yield pool
    finally:
        for process in multiprocessing.active_children():
            process.kill()
        pool.shutdown()

@step()
def fetch_layers(registry, layers, diff_ids, partial):
    """Fetch the layers, and unpack each

    A layer is a tar of what one build step changed: the files it added, and whiteouts, names that
    begin with `.wh.`, for those it deleted. Three workers download, three unpack, chrooted into the
    layer's directory, or where it needs the layers below, as for a whiteout, into an overlay of them.
    What is there is not fetched again.
    See the OCI image-spec, layer.md. Look: ls ~/mocker/layers
    """
    places, authorization = layer_paths(diff_ids), registry.session.headers.get("Authorization")
    missing = [n for n, layer in enumerate(layers) if not (is_stored(layer) and os.path.isdir(places[n]))]
    if not missing:
        say("Nothing to fetch: all of it is here")
        return
    blobs = {layers[n]["digest"]: layers[n] for n in missing}  # two layers may have the same one
    with workers(3) as fetchers, workers(3) as unpackers:
        list(fetchers.map(is_whole, blobs))  # those that aren't go, to be fetched again
        say(f"Fetching layer {layers[missing[0]]['digest']}..")  # before the workers say what they ask for
        fetched = {digest: fetchers.submit(fetch_layer, registry.reference, authorization, blob, partial)
                   for digest, blob in blobs.items()}
        unpacked = {n: unpackers.submit(unpack_layer, blobs[layers[n]["digest"]], diff_ids[: n + 1],
                                        os.path.join(partial, str(n))) for n in missing}
        for n, job in unpacked.items():
            digest = layers[n]["digest"]
            if n > missing[0]:
                say(f"Fetching layer {digest}..")
            while not futures.wait([fetched[digest]], 0.25).done:
                draw_progress(layers[n], partial)
            fetched[digest].result()
            while not futures.wait([job], 1).done:  # all that it waits for is here now, unless someone took it
                check(is_stored(blobs[digest]) and all(map(os.path.isdir, places[:n])), "a layer is gone: pull again")
            show(job.result())

def pull_image(reference, platform=None):
    """From a name to a stored image: manifest, config, layers. → Image"""
    say(f"Fetching manifest for {str(reference).removeprefix('library/')}...")
    registry, wanted = Registry(reference), platform or platform_name("linux", os.uname().machine)
    with partial_directory() as partial:
        found = find_manifest(registry, wanted)
        config = fetch_config(registry, found["manifest"], partial)
        system, architecture = config.get("os"), config.get("architecture")
        made_for = platform_name(system, architecture) if system and architecture else wanted
        if made_for.split("/")[:2] != wanted.split("/")[:2]:  # as a name without an index may be
            check(not platform, f"{reference} is there for {made_for} alone: leave out --platform")
            say(f"{reference} is for {made_for}, and can't run here")
        fetch_layers(registry, found["manifest"]["layers"], config["rootfs"]["diff_ids"], partial)
    stored = {"name": reference.name, "version": reference.version, **found}
    write_index({reference.file: stored})  # and, under the same lock, the image's own file
    return Image(reference.file)

@locked(HOME)
def write_index(added):
    """index.json (OCI image-spec, image-layout.md), made anew for the stored images and {file: …}, stored after it."""
    write_file(store("oci-layout"), {"imageLayoutVersion": "1.0.0"})
    manifests = []
    for image in {**{image.file: image.stored for image in all_images()}, **added}.values():
        if all(map(is_stored, (image, *image["manifest"]["layers"]))):  # else it is left out until it is pulled again
            annotations = {"org.opencontainers.image.ref.name": full_name(image)}
            manifests.append({**oci_manifest(image), "annotations": annotations})
    write_file(store("index.json"), {"schemaVersion": 2, "mediaType": INDEX_TYPES[0], "manifests": manifests})
    for file, stored in added.items():
        write_file(store(file), stored)

def oci_manifest(image):
    """A descriptor of a stored image's manifest in OCI's own types, since some readers know no others."""
    if image["mediaType"] == MANIFEST_TYPES[0]:
        return {key: image[key] for key in ("mediaType", "digest", "size")}
    config, *layers = [dict(blob) for blob in (image["manifest"]["config"], *image["manifest"]["layers"])]
    config["mediaType"] = "application/vnd.oci.image.config.v1+json"
    for layer in layers:
        with open(blob_path(layer["digest"]), "rb") as file:
            layer["mediaType"] = f"application/vnd.oci.image.layer.v1.tar{packing(file)}"
    raw = json.dumps({"schemaVersion": 2, "mediaType": MANIFEST_TYPES[0], "config": config, "layers": layers}).encode()
    return {"mediaType": MANIFEST_TYPES[0], "digest": save_blob(raw, digest_of(raw)), "size": len(raw)}

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
    open_store()
    platform = arguments["--platform"]
    check(not platform or re.fullmatch(r"\w+/[\w-]+(/\w+)?", platform),
          f"invalid platform '{platform}': write os/architecture, as in linux/arm64 or linux/arm/v7")
    pull_image(Reference(arguments["<name>"], arguments["<tag>"]), platform and platform_name(*platform.split("/")))

def images(arguments):
    """List the images that are here: name, version, size of the download, file.

    Usage:
      mocker images
    """
    rows = [(image.name, image.version, f"{sum(blob['size'] for blob in image.blobs) / 2**20:.1f}MiB", image.file)
            for image in all_images()]
    print(tabulate.tabulate(rows, headers=("name", "version", "size", "file"), tablefmt="pretty", stralign="left"))

def verify(arguments):
    """Check all again: each blob against its digest, what a layer unpacks to against its diff_id.

    What was unpacked is not compared, only looked for. `rm -r ~/mocker/layers` and a pull unpack it all again.

    Usage:
      mocker verify
    """
    open_store()
    digests = [f"{kind}:{name}" for kind in os.listdir(store("blobs")) for name in os.listdir(store("blobs", kind))]
    damaged = [digest for digest in digests if not is_whole(digest)]
    for digest in damaged:
        print(f"DAMAGED  blob {digest}")
    status = int(bool(damaged))
    for image in all_images():
        try:
            for document in filter(None, (image.stored, image.stored.get("index"))):
                check(is_stored(document), "its manifest or index is missing or damaged")
            for blob, diff_id, layer in zip(image.manifest["layers"], image.config["rootfs"]["diff_ids"], image.layers):
                check(is_stored(blob), f"blob {blob['digest'][:19]}… is missing or damaged")
                with explained(*DAMAGED), open(blob_path(blob["digest"]), "rb") as file:
                    collections.deque(checked(decompressed(file), diff_id), maxlen=0)  # only its check counts
                os.listdir(layer)
            print(f"ok       {full_name(image.stored)}")
        except (MockerError, FileNotFoundError) as error:
            print(f"DAMAGED  {full_name(image.stored)}: {error}: pull it again")
            status = 1
    write_index({})
    return status

# ═══ The kernel calls that Python does not wrap, and the journal of what is to be undone ═════════

# unshare(1)'s names for what unshare(2) can give a process of its own (man 7 namespaces)
NAMESPACE_FLAGS = {
    "mount": 0x00020000,  # a mount table
    "cgroup": 0x02000000,  # a view of the cgroups, where its own looks like the root of the tree
    "uts": 0x04000000,  # a host name
    "ipc": 0x08000000,  # System V IPC and POSIX message queues
    "pid": 0x20000000,  # process numbers, from 1; not for itself, but for its children
    "net": 0x40000000,  # interfaces, addresses, routes and firewall
}
# mount(8)'s names for the flags of mount(2)
MOUNT_FLAGS = {
    "ro": 0x1,
    "nosuid": 0x2,  # setuid bits and file capabilities count for nothing
    "nodev": 0x4,  # device nodes can't be opened
    "noexec": 0x8,
    "remount": 0x20,  # change the flags of what is mounted
    "bind": 0x1000,  # the same file or directory at a second place
    "rbind": 0x5000,  # and all that is mounted below it
    "rprivate": 0x44000,  # mounts made below stay here
    "strictatime": 0x1000000,
}
MNT_DETACH = 2  # umount2(2): out of the tree now, gone when nobody uses it any more
AT_FDCWD = -100
OPEN_TREE_CLONE = 0x1  # open_tree(2): a copy of a mount, attached nowhere yet
AT_RECURSIVE = 0x8000  # with what is mounted below it
AT_EMPTY_PATH = 0x1000  # the descriptor itself is meant
MOVE_MOUNT_F_EMPTY_PATH = 0x4  # move_mount(2): the descriptor itself is what moves
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, SECCOMP_MODE_FILTER = 1, 22, 24, 36, 2
# The C library wraps no pivot_root(2), and an older one not the other three. (name: x86_64, aarch64)
SYSTEM_CALLS = {"pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "mount_setattr": (442, 442)}

c_library = functools.lru_cache(lambda: ctypes.CDLL(None, use_errno=True))  # opened once, and not before it is used

def call(name, *arguments, what=None):
    """A function of the C library, or a system call that it lacks. -1 becomes a MockerError."""
    if name in SYSTEM_CALLS:
        name, arguments = "syscall", (SYSTEM_CALLS[name][os.uname().machine != "x86_64"], *arguments)
    # Numbers as long, since prctl(2) and syscall(2) read each argument as one.
    encoded = [ctypes.c_long(value) if isinstance(value, int) else os.fsencode(value) for value in arguments]
    result = getattr(c_library(), name)(*encoded)
    check(result != -1, f"{what or name}: {os.strerror(ctypes.get_errno())}")
    return result

def mount(source, target, kind="", options=""):
    """mount(2), as mount(8) does it: what is no flag among the options is for the file system itself."""
    words = options.split(",")
    flags = sum(MOUNT_FLAGS.get(word, 0) for word in words)
    data = ",".join(word for word in words if word not in MOUNT_FLAGS)
    command = shlex.join(["mount"] + ["-t", kind] * bool(kind) + ["-o", options] * bool(options) + [source, target])
    call("mount", source, target, kind, flags, data, what=command)
    if len(words) > 1 and words[0] in ("bind", "rbind"):  # it takes its other flags only once it is there
        call("mount", "none", target, "", flags | MOUNT_FLAGS["remount"], "", what=command)
    tell(command)

def unmount(target):
    """umount2(2), lazily: it leaves the tree at once, whoever may be using it."""
    call("umount2", target, MNT_DETACH, what=f"umount {target}")
    command = f"umount -l {shlex.quote(target)}"
    tell(command, by_hand=f"{command} || exit")  # or the script would empty a volume that is still mounted

def unshare(*kinds):
    """unshare(2): leave namespaces for new ones. Mounts become private, as by unshare(1): else ours would show up
    outside, too, where systemd shares / (man 7 mount_namespaces)."""
    command = " ".join(["unshare", *(f"--{kind}" for kind in kinds)])
    call("unshare", sum(NAMESPACE_FLAGS[kind] for kind in kinds), what=command)
    if "mount" in kinds:
        call("mount", "none", "/", "", MOUNT_FLAGS["rprivate"], "", what="mount --make-rprivate /")
    tell(f"{command} --fork" if "pid" in kinds else command, wraps=True)

@contextlib.contextmanager
def coming_back(kind):
    """Whatever namespace is entered within, come back to ours; setns(2) takes an open file that stands for one."""
    with open(f"/proc/thread-self/ns/{kind}") as handle:
        try:
            yield
        finally:
            call("setns", handle.fileno(), 0)

def die_with(parent):
    """Be killed when our parent dies, however it dies (man 2 PR_SET_PDEATHSIG); at once if it has."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() not in (parent, 0):  # 0: it is outside our pid namespace, where we can't see whether it lives
        os._exit(1)

def make_directory(path, journal=None):
    """With those above it. One that is there is left as it is; one that is noted goes again once it is empty."""
    if not os.path.isdir(path):
        if journal:
            journal.note(attempt, "remove_directory", path)
        os.makedirs(os.path.abspath(path))
        tell(f"mkdir -p {shlex.quote(path)}")

def remove_directory(path):
    """If it is empty, as rmdir(1)."""
    os.rmdir(path)
    tell(f"rmdir {shlex.quote(path)}")

def make_link(target, path):
    os.symlink(target, path)
    tell(shlex.join(["ln", "-s", target, path]))

def write_text(path, text):
    escaped = text.replace("\\", r"\\").replace("\n", r"\n").replace("\t", r"\t")
    with open(path, "w", errors="surrogateescape") as file:
        file.write(text)
    tell(f"printf %b {shlex.quote(escaped)} > {shlex.quote(path)}")

def write_kernel_file(path, value):
    """/proc, /sys and cgroups are told what to do by writing to their files."""
    with explained(OSError, f"echo {value} > {path}: {{}}"), open(path, "w") as file:
        file.write(str(value))
    tell(f"echo {value} > {path}")

def read_kernel_file(path):
    """What it says now; nothing if it is not there."""
    with contextlib.suppress(OSError), open(path, errors="surrogateescape") as file:
        return file.read().strip()
    return ""

def need_linux():
    machine = os.uname().machine
    check(sys.platform == "linux", "containers are made of Linux: on a Mac or Windows, "
          """docker run --privileged -it -v mocker:/root/mocker -v "$PWD":/it -w /it python:3 bash""")
    check(machine in ("x86_64", "aarch64"), f"mocker knows the system calls of x86_64 and aarch64, not of {machine}")

def need_root(command):
    """Before anything is done, not half-way through."""
    need_linux()
    check(os.geteuid() == 0, f"{command} needs root, for mounts and namespaces: sudo {sys.executable} {__file__} …")
    check("SYS_ADMIN" in capabilities_of("CapEff") or command == "clean",
          "this root lacks CAP_SYS_ADMIN, as in a plain container: docker run --privileged, or a real machine")

# ── The journal ────────────────────────────────────────────────────────────────────────────────────

JOURNALS = "/run/mocker"
THREADS = []  # that undo meanwhile

class Journal:
    """What is to be undone, noted before it is done: a list that outlives a kill -9.

    /run/mocker/<id> is a container's, locked by its mocker: when that dies the kernel drops the lock,
    and the next mocker undoes what it says. /run/mocker/host is of what all containers share, for
    the last one to undo. Each line is a function and its arguments:
    ["delete_cgroup", "/sys/fs/cgroup/mocker/1a2b3c4d"]
    """

    def __init__(self, name):
        self.path = f"{JOURNALS}/{name}"

    def note(self, function, *arguments):
        with open(self.path, "a") as file:
            file.write(json.dumps([function.__name__, *arguments]) + "\n")

    def undo(self):
        """In reverse. If one fails the others are done all the same, and the journal stays for the next mocker."""
        try:
            with contextlib.ExitStack() as undo:
                undo.callback(lambda: [thread.join() for thread in THREADS])  # the last to be done
                for line in read_kernel_file(self.path).splitlines():
                    with contextlib.suppress(ValueError, KeyError):  # it was being written when we were killed
                        name, *arguments = json.loads(line)
                        undo.callback(globals()[name], *arguments)
            os.unlink(self.path)
        except Exception as error:  # whatever it is, what was to be done now goes on
            say(f"not all could be undone: {error}")

HOST = Journal("host")

def container_ids():
    """The ids of the containers that run, and of those whose mocker was killed."""
    return [name for name in os.listdir(JOURNALS) if name != "host"] if os.path.isdir(JOURNALS) else []

@contextlib.contextmanager
def held_journal(id):
    """A container's, held while it runs. Its end is undisturbed, whatever signal comes."""
    with locked(JOURNALS):  # nobody sweeps between our making it and our locking it
        holder = os.open(f"{JOURNALS}/{id}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        yield Journal(id)
    finally:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_IGN)
        Journal(id).undo()
        sweep()

def sweep():
    """Clear away what killed mockers left, and with the last container what all shared: the host is as it was."""
    if os.geteuid() == 0 and os.path.isdir(JOURNALS):
        with locked(JOURNALS):
            for id in container_ids():
                with contextlib.suppress(BlockingIOError, FileNotFoundError), open(f"{JOURNALS}/{id}") as file:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    say(f"clearing away container {id}, whose mocker was killed")
                    Journal(id).undo()
            if not container_ids() and os.path.exists(HOST.path):
                HOST.undo()

def attempt(name, *arguments):
    """A primitive by its name, as the journal has it, on what may be gone by now, or in use by somebody else."""
    with contextlib.suppress(OSError, MockerError):
        globals()[name](*arguments)

def meanwhile(name, *arguments):
    """Undo by a primitive while others are undone: the kernel takes its time, until nobody can be using it any more."""
    thread = threading.Thread(target=attempt, args=(name, *arguments))
    thread.start()
    THREADS.append(thread)

# ═══ Its root: overlay, /proc, /sys, /dev, pivot_root ════════════════════════════════════════════
#
#  containers/<id>/lower/0, 1, …   links to the image's layers, from the top down
#  containers/<id>/upper           what the container writes; work is overlayfs' own
#  containers/<id>/rootfs          where they are seen as one tree
#
#  From here on, `container` is what is to be run, and what was made for it so far (class Container, in "run").

DEVICES = ["null", "zero", "full", "random", "urandom", "tty"]
LINUX = [int(number) for number in os.uname().release.partition("-")[0].split(".")[:2]]
# A layer is not to depend on this kernel's defaults; volatile: nothing waits for the disk at the end.
FEATURES = "nodev,index=off,metacopy=off,redirect_dir=off" + ",volatile" * (LINUX >= [5, 10])
HARMLESS = "nosuid,nodev,noexec"
ETC_FILES = ("hosts", "hostname", "resolv.conf")
# What /proc and /sys tell or do about the whole machine (as runc has it)
MASKED = ("proc/asound", "proc/acpi", "proc/kcore", "proc/keys", "proc/latency_stats", "proc/timer_list",
          "proc/timer_stats", "proc/sched_debug", "proc/scsi", "sys/firmware", "sys/devices/virtual/powercap")
READ_ONLY = ("proc/bus", "proc/fs", "proc/irq", "proc/sys", "proc/sysrq-trigger")

@step()
def leave_namespaces(container):
    """Namespaces: see other things under the same names

    mount: a mount table of its own. uts: a host name. ipc: message queues and shared memory.
    cgroup: its own cgroup looks like the root. pid, if it is to have that, came with the fork.
    user and time are missing, as in Docker: root in here is root out there, held by what follows.
    See man 7 namespaces. Look: lsns; ls -l /proc/PID/ns
    """
    kinds = [kind for kind in ("mount", "uts", "ipc", "cgroup") if kind in container.parts]
    if kinds:
        unshare(*kinds)
    if "uts" in kinds:
        call("sethostname", container.hostname, len(os.fsencode(container.hostname)))
        tell(f"printf %s {shlex.quote(container.hostname)} > /proc/sys/kernel/hostname")
    for kind, host in container.host_namespaces.items():
        prove(f"readlink /proc/self/ns/{kind}", f"{os.readlink(f'/proc/self/ns/{kind}'):20} the host's: {host}")

@step()
def mount_root(container):
    """Root: an overlay of the image's layers

    The layers lie below, read-only, shared by all containers of the image; a fresh upper directory
    takes what this one writes. So the image stays clean, and a start copies nothing. nodev: no
    device node in there can be opened, wherever it came from.
    See the kernel's filesystems/overlayfs.rst. Look: ls ~/mocker/containers/ID/upper
    """
    mount_overlay(container.layers, container.directory)
    if "overlay" not in container.parts:
        say("without overlay, all of the image is copied first")
        check(run_tool("cp -a ../rootfs ../copy".split()) is not None, "the image can't be copied: is the disk full?")
        unmount("../rootfs")
        mount("../copy", "../rootfs", "", "bind,nodev")
    tell("cd ../rootfs")
    os.chdir("../rootfs")
    prove("tail -1 /proc/self/mounts", read_kernel_file("/proc/self/mounts").splitlines()[-1])

def mount_overlay(layers, directory):
    """directory/rootfs: the layers, the topmost first, and over them directory/upper, which takes what is written."""
    for part in "lower", "upper", "work", "rootfs":
        make_directory(f"{directory}/{part}")
    tell(f"cd {shlex.quote(directory)}/lower")
    os.chdir(f"{directory}/lower")
    if not layers:  # there is nothing to lay it over
        return mount("../upper", "../rootfs", "", "bind,nodev")
    for number, layer in enumerate(layers):
        make_link(layer, str(number))  # short names: overlayfs' options must fit in one page
    lower = ":".join(map(str, range(len(layers))))
    return mount("overlay", "../rootfs", "overlay", f"{FEATURES},lowerdir={lower},upperdir=../upper,workdir=../work")

@step()
def take_along(container):
    """Pick up what will be needed from the host

    In the container nothing of the host can be named any more; that is the point. So its volumes and
    its three files of /etc are picked up now, as copies of their mounts.
    See man 2 open_tree.
    """
    etc = [(f"{container.directory}/{name}", f"/etc/{name}", container.read_only) for name in ETC_FILES]
    parcels, devices = [], [like.st_rdev for like in container.devices.values()]  # as a volume, too, they can be opened
    for source, target, read_only in sorted(etc + container.volumes, key=lambda row: row[1].count("/")):  # outer first
        handle = call("open_tree", AT_FDCWD, source, OPEN_TREE_CLONE | AT_RECURSIVE | os.O_CLOEXEC, what=source)
        options = ["nodev"] * (os.fstat(handle).st_rdev not in devices) + ["ro"] * read_only
        flags = sum(MOUNT_FLAGS[word] for word in options)  # mount_setattr has the same numbers
        with contextlib.suppress(MockerError):  # before Linux 5.12 only the topmost mount gets them, later on
            call("mount_setattr", handle, "", AT_EMPTY_PATH | AT_RECURSIVE, struct.pack("4Q", flags, 0, 0, 0), 32)
        parcels.append((handle, source, target, options))
    return parcels

@step()
def enter_root(container):
    """pivot_root: make it the root, and let go of the host's

    chroot(2) only changes where a process starts to look for `/`: the host's tree stays mounted,
    and root can climb back into it. pivot_root exchanges the root of the whole mount namespace;
    the old one is unmounted, and there is nothing left to climb to.
    See man 2 pivot_root. Look: cat /proc/PID/mountinfo
    """
    if "pivot_root" not in container.parts:
        tell("chroot . && cd /", by_hand="# (unshare --root does it, at the end: until then a shell needs its tools.)")
        os.chroot(".")
    else:
        # The old root comes to lie on top of the new one, so that no directory need be made for it.
        tell("pivot_root . . && umount -l . && cd /", by_hand="# (Further down: until then a shell needs its tools.)")
        call("pivot_root", ".", ".")
        call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    sys.meta_path = []  # as in confined

def pivot_by_hand(container):
    """A script's tools lie in the old root, so it lets go of that only now. Till here its paths were relative."""
    if story.script and "pivot_root" in container.parts:
        rootfs = shlex.quote(f"{container.directory}/rootfs")
        narrate("■ pivot_root, from a shell that takes a second view of the old root as its own meanwhile")
        tell("mkdir ../host")
        tell("mount --rbind / ../host")
        tell("unshare --root=../host --wd=.", wraps=True)
        tell(f"nsenter --mount=/proc/self/ns/mnt pivot_root {rootfs} {rootfs}")
        tell("nsenter --mount=/proc/self/ns/mnt umount -l /")
        story.script.chain = []

@step()
def mount_kernel_filesystems(container):
    """/sys and /dev, as programs expect them

    A new sysfs shows the interfaces of this network namespace. /dev is a small tmpfs, with nodes of
    its own. Where a container can make a node, a mount is nodev; these nodes are bound onto
    themselves, one by one, before /dev becomes so.
    See man 5 sysfs, OCI runtime-spec config-linux.md. Look: mount, in the container
    """
    shown = HARMLESS + ",ro" * (not container.privileged)
    mount_at("tmpfs", "dev", "tmpfs", "nosuid,strictatime,mode=755,size=65536k")
    for name, like in container.devices.items():
        make_device(f"dev/{name}", like)
        mount(f"dev/{name}", f"dev/{name}", "", "bind")
    mount("none", "dev", "", "remount,bind,nosuid,nodev,strictatime")
    mount_at("devpts", "dev/pts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5")
    mount_at("shm", "dev/shm", "tmpfs", f"{HARMLESS},mode=1777,size=65536k")
    mount_at("mqueue", "dev/mqueue", "mqueue", HARMLESS)
    mount_at("sysfs", "sys", "sysfs", shown)
    make_link("pts/ptmx", "dev/ptmx")
    for name, number in {"fd": "", "stdin": "/0", "stdout": "/1", "stderr": "/2"}.items():
        make_link(f"/proc/self/fd{number}", f"dev/{name}")
    mount_cgroups(container, shown)
    etc = "." + os.path.realpath("/etc")
    make_directory(etc)
    if not os.path.lexists(f"{etc}/mtab"):  # where older programs look for the mounts
        make_link("/proc/mounts", f"{etc}/mtab")

def make_device(path, like):
    """A node as another one is: its type, its numbers, its mode."""
    mode, kind = stat.S_IMODE(like.st_mode), "b" if stat.S_ISBLK(like.st_mode) else "c"
    os.mknod(path, like.st_mode, like.st_rdev)
    os.chmod(path, mode)  # whatever the umask
    tell(f"mknod -m {mode:o} {path} {kind} {os.major(like.st_rdev)} {os.minor(like.st_rdev)}")

def mount_at(source, target, kind, options):
    """At a directory that is made if it is missing; a symlink is refused, as by runc."""
    check(not os.path.islink(target), f"the image's /{target} is a symlink: nothing can be mounted there")
    make_directory(target)
    mount(source, target, kind, options)

@step()
def unpack_parcels(container, parcels):
    """Put what was picked up where it belongs

    Volumes where -v says, and hosts, hostname and resolv.conf over the image's.
    The places are looked up in the new root, so that no symlink of the image can lead out of it.
    See man 2 move_mount.
    """
    for handle, source, target, options in parcels:
        target = "." + os.path.realpath(target)  # also where a dangling symlink points
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        check(not os.path.exists(target) or os.path.isdir(target) == is_folder,
              f"{source} can't lie on {target[1:]}: one of them is a directory, and one is not")
        make_directory(target if is_folder else os.path.dirname(target))
        if not os.path.exists(target):
            write_text(target, "")
        call("move_mount", handle, "", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH, what=target)
        tell(shlex.join(["mount", "--rbind", source, target]))
        os.close(handle)
        flags = os.statvfs(target).f_flag  # those of the host's mount stay
        kept = [word for word in ("nodev", "ro", "nosuid", "noexec") if word in options or flags & MOUNT_FLAGS[word]]
        mount("none", target, "", ",".join(["remount", "bind", *kept]))

@step()
def mount_proc(container):
    """/proc: the processes of this pid namespace

    Only now: while what was picked up was still open, /proc/self/fd could have led a symlink of the image to it.
    See man 5 proc. Look: ps, in the container
    """
    mount_at("proc", "proc", "proc", HARMLESS)

@step("mask")
def mask_paths(container):
    """Masks: hide what /proc and /sys tell about the machine

    Namespaces cut procfs and sysfs only in part: settings, interrupts, keys are the whole machine's.
    What could change the machine is bound over itself read-only; what tells too much is covered.
    See OCI runtime-spec config-linux.md, "Masked Paths".
    """
    for path in filter(os.path.exists, READ_ONLY):
        mount(path, path, "", f"rbind,ro,{HARMLESS}")
    for path in filter(os.path.exists, MASKED):
        if os.path.isdir(path):
            mount("tmpfs", path, "tmpfs", "ro")
        else:
            mount("dev/null", path, "", "bind")

def write_etc(container):
    """hosts, hostname and resolv.conf, as docker writes them, to be mounted over the image's."""
    hosts = ("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n"
             "ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
    names = dict.fromkeys((container.hostname, container.hostname.partition(".")[0]))
    hosts += f"{container.address}\t{' '.join(names)}\n" if container.address else ""
    resolver = read_kernel_file("/etc/resolv.conf")
    if container.network == "host":
        hosts = read_kernel_file("/etc/hosts") + "\n"
    else:  # without those that can't be reached from inside: 127.…, as systemd-resolved, which has a list; and IPv6
        upstream = read_kernel_file("/run/systemd/resolve/resolv.conf") if " 127.0.0.53" in resolver else ""
        resolver = re.sub(r"^\s*nameserver\s+(127\.|\S*:).*\n?", "", upstream or resolver, flags=re.M)
    if not re.search(r"^\s*nameserver", resolver, re.M):
        resolver += "\nnameserver 8.8.8.8\nnameserver 8.8.4.4"
    for name, text in zip(ETC_FILES, (hosts, container.hostname + "\n", resolver.strip() + "\n")):
        write_text(f"{container.directory}/{name}", text)

# ═══ Its network: bridge, veth pair, address, route, NAT ═════════════════════════════════════════
#
#   the host                                         the container
#   eth0 ── NAT ── mocker0 10.0.0.1 ── veth0_1a2b3c4d ═══ veth1 10.0.0.3, default via 10.0.0.1

BRIDGE, GROUP = "mocker0", 10003  # all our links are in that group, so that one request can delete them at once
MAC = "02:42:0a:00:00:01"  # the bridge's own: else it takes one of its ports', and changes it when that port goes
SUBNETS = [f"10.0.{n}" for n in range(8)] + [f"172.30.{n}" for n in range(8)] + ["192.168.213"]
NETNS = "/run/netns"  # where ip-netns(8) finds namespaces by name
# As docker sets them for a container: it may ping, bind any port, and has no IPv6.
NET_SYSCTLS = {"ipv4/ping_group_range": "0 2147483647", "ipv4/ip_unprivileged_port_start": "0",
               "ipv6/conf/all/disable_ipv6": "1", "ipv6/conf/default/disable_ipv6": "1"}
# What the kernel can be asked for (man 7 rtnetlink): number, flags, pyroute2's name for its form. 0x5: a request,
# to be acknowledged; 0x600: create it, and it must not be there yet.
NEW_LINK, SET_LINK, DELETE_LINK = (16, 0x605, "ifinfmsg"), (16, 0x5, "ifinfmsg"), (17, 0x5, "ifinfmsg")
NEW_ADDRESS, NEW_ROUTE = (20, 0x605, "ifaddrmsg"), (24, 0x605, "rtmsg")
IFF_UP = 1
UP = {"flags": IFF_UP, "change": IFF_UP}

def ask_kernel(command, request, fields, **attributes):
    """One request about links, addresses or routes of the network namespace that we are in, and its answer."""
    if "pyroute2" not in sys.modules:
        # pyroute2 imports all that it has, which takes longer than a container to start; we need
        # its messages alone, and give them an empty package to live in.
        spec = imports.find_spec("pyroute2")
        check(spec, "the Python package 'pyroute2' is missing: pip install -r requirements.txt, or --network=none")
        sys.modules["pyroute2"] = imports.module_from_spec(spec)
    kind, flags, form = request
    message = getattr(lazily(f"pyroute2.netlink.rtnl.{form}"), form)()
    message.update(header={"type": kind, "flags": flags}, **fields, **nested(**attributes))
    message.encode()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as kernel:
        kernel.bind((0, 0))
        kernel.send(message.data)
        number = -struct.unpack_from("i", kernel.recv(65536), 16)[0]
    check(number == 0, f"{command}: {os.strerror(number)}")
    tell(command)

def nested(**attributes):
    """Attributes, as pyroute2 wants them in a message, or within another attribute."""
    return {"attrs": list(attributes.items())}

def add_address(name, address):
    fields = {"family": socket.AF_INET, "prefixlen": 24, "index": socket.if_nametoindex(name)}
    ask_kernel(f"ip address add {address}/24 dev {name}", NEW_ADDRESS, fields, IFA_LOCAL=address, IFA_ADDRESS=address)

@step("net")
def create_network(container, undo):
    """Network: a namespace, and a wire into it

    A network namespace has interfaces, routes and a firewall of its own, at first only a loopback
    that is down. A veth pair is a wire with two ends: veth0 stays here, on the bridge mocker0;
    veth1 goes in, where it will get an address. NAT lets what the container sends leave under this
    machine's address.
    See man 7 network_namespaces, man 4 veth. Look: ip netns; ip -n NAME address; bridge link
    """
    with locked(JOURNALS):
        subnet = create_bridge()
        taken = " ".join(read_kernel_file(f"{JOURNALS}/{other}") for other in container_ids())
        free = [f"{subnet}.{n}" for n in range(3, 255) if f'"{subnet}.{n}"' not in taken]
        check(free, f"all addresses of {subnet}.0/24 are in use: stop a container, or run with --network=none")
        container.address, container.gateway = free[0], f"{subnet}.1"
        undo.note(delete_network, container.id, container.address)
    netns, wire = f"mocker_{container.id}", f"veth0_{container.id}"
    create_netns(netns)
    with open(f"{NETNS}/{netns}") as handle:
        inner = nested(IFLA_IFNAME="veth1", IFLA_NET_NS_FD=handle.fileno())
        pair = nested(IFLA_INFO_KIND="veth", IFLA_INFO_DATA=nested(VETH_INFO_PEER=inner))
        ask_kernel(f"ip link add {wire} up group {GROUP} master {BRIDGE} type veth peer name veth1 netns {netns}",
                   NEW_LINK, UP, IFLA_IFNAME=wire, IFLA_GROUP=GROUP, IFLA_MASTER=socket.if_nametoindex(BRIDGE),
                   IFLA_LINKINFO=pair)
    publish_ports(container, undo)

def create_netns(name):
    """A new one; it stays for as long as it is mounted on a file, which is its name."""
    if not os.path.isdir(NETNS):
        HOST.note(attempt, "call", "rmdir", NETNS)  # not told: ip-netns(8) would leave it
        os.makedirs(NETNS, exist_ok=True)
    os.close(os.open(f"{NETNS}/{name}", os.O_CREAT | os.O_EXCL, 0o444))
    with coming_back("net"):
        call("unshare", NAMESPACE_FLAGS["net"])
        call("mount", "/proc/thread-self/ns/net", f"{NETNS}/{name}", "", MOUNT_FLAGS["bind"], "")
    tell(f"ip netns add {name}")

@step("net")
def join_network(container):
    """Join the network namespace, and set it up

    setns(2) takes an open file that stands for a namespace: here the one that has a name. With
    --network=none it is a new one instead, of which nobody else knows.
    See man 2 setns. Look: ip netns identify PID
    """
    if container.network == "none":
        unshare("net")
        set_up_loopback()
    else:
        with open(f"{NETNS}/mocker_{container.id}") as handle:
            call("setns", handle.fileno(), NAMESPACE_FLAGS["net"])
        tell(f"nsenter --net={NETNS}/mocker_{container.id}", wraps=True)
        set_up_loopback()
        add_address("veth1", container.address)
        ask_kernel("ip link set veth1 up", SET_LINK, UP, IFLA_IFNAME="veth1")
        fields = {"family": socket.AF_INET, "table": 254, "proto": 3, "type": 1}  # ip-route(8)'s own choice
        ask_kernel(f"ip route add default via {container.gateway}", NEW_ROUTE, fields, RTA_GATEWAY=container.gateway)
    prove("cat /proc/net/route", read_kernel_file("/proc/net/route"))

def set_up_loopback():
    """With docker's settings. By an old ioctl(2), which takes no library (man 7 netdevice)."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        fcntl.ioctl(handle, 0x8914, struct.pack("16sH22x", b"lo", IFF_UP))  # SIOCSIFFLAGS
    tell("ip link set lo up")
    for name, value in NET_SYSCTLS.items():
        if os.path.exists(f"/proc/sys/net/{name}"):
            write_kernel_file(f"/proc/sys/net/{name}", value)

def read_interfaces(process="thread-self"):
    return [line.split(":")[0].strip() for line in read_kernel_file(f"/proc/{process}/net/dev").splitlines()[2:]]

def read_routes(process="thread-self"):
    """(interface, network, gateway) of each, from its table, where 10.0.1.0 is 0001000A on a little-endian machine."""
    for line in read_kernel_file(f"/proc/{process}/net/route").splitlines()[1:]:
        interface, *numbers = line.split()
        network, gateway, mask = (socket.inet_ntoa(struct.pack("=I", int(numbers[n], 16))) for n in (0, 1, 6))
        yield interface, ipaddress.ip_network(f"{network}/{mask}"), gateway

def free_subnet():
    """The first of ours that no route leads to."""
    taken = [network for _, network, _ in read_routes() if network.prefixlen]  # not the default route: it is everywhere
    free = [subnet for subnet in SUBNETS if not any(map(ipaddress.ip_network(f"{subnet}.0/24").overlaps, taken))]
    check(free, f"no free subnet: {', '.join(SUBNETS)} are all in use here: run with --network=none")
    return free[0]

def create_bridge():
    """mocker0 with its address, forwarding and NAT: made for the first container, used by all. → 10.0.0"""
    for interface, network, _ in read_routes():
        if interface == BRIDGE:
            return str(network[0]).rpartition(".")[0]
    check(BRIDGE not in read_interfaces(), f"{BRIDGE} is here and has no address, so it is not mocker's: rename it")
    subnet, forward = free_subnet(), "/proc/sys/net/ipv4/ip_forward"
    if subnet != SUBNETS[0]:
        say(f"{SUBNETS[0]}.0/24 is in use on this machine: taking {subnet}.0/24")
    HOST.note(attempt, "write_kernel_file", forward, read_kernel_file(forward))
    HOST.note(delete_bridge)
    ask_kernel(f"ip link add {BRIDGE} up group {GROUP} address {MAC} type bridge", NEW_LINK, UP, IFLA_IFNAME=BRIDGE,
               IFLA_GROUP=GROUP, IFLA_ADDRESS=MAC, IFLA_LINKINFO=nested(IFLA_INFO_KIND="bridge"))
    add_address(BRIDGE, f"{subnet}.1")
    write_kernel_file(forward, "1")
    add_nat(subnet)
    return subnet

def delete_network(id, address):
    """Its namespace, its wire; its address is free once nothing of it is left in a journal."""
    if container_ids() != [id] and f"veth0_{id}" in read_interfaces():  # the last one's goes with the bridge
        ask_kernel(f"ip link delete veth0_{id}", DELETE_LINK, {}, IFLA_IFNAME=f"veth0_{id}")
    if os.path.exists(f"{NETNS}/mocker_{id}"):
        attempt("call", "umount2", f"{NETNS}/mocker_{id}", MNT_DETACH)  # it may not have been mounted yet
        os.unlink(f"{NETNS}/mocker_{id}")
        tell(f"ip netns delete mocker_{id}")

def delete_bridge():
    """With the last container's wire: the kernel waits for those who may be using them, once for the whole group."""
    if BRIDGE in read_interfaces():
        ask_kernel(f"ip link delete group {GROUP}", DELETE_LINK, {}, IFLA_GROUP=GROUP)

# ── The firewall: nft(8), or iptables(8) where it is missing ───────────────────────────────────────

IPTABLES = "iptables", "iptables-legacy"  # mostly the first one is for nftables, which not every kernel has

def add_rules(owner, rules, note=lambda *undo: None):
    """Add (rule for nft, the same for iptables) under an owner's name. → the tool that could, or None"""
    # type nat hook output priority -100; … → chain output { type nat hook output priority -100; …; }
    chains = "".join(f"chain {rule.split()[3]} {{ {rule}; }}; " for rule, _ in rules)
    note(meanwhile, "run_tool", ["nft", "delete", "table", "ip", owner])
    if run_tool(["nft", f"table ip {owner} {{ {chains}}}"]) is not None:
        return "nft"
    others = [rule for _, rule in rules]
    return next((tool for tool in IPTABLES if add_iptables(tool, owner, others, note)), None)

def add_iptables(tool, owner, rules, note):
    note(meanwhile, "change_iptables", tool, "-D", owner, rules)
    return change_iptables(tool, "-I", owner, rules)

def change_iptables(tool, verb, owner, rules):
    """nat OUTPUT … → iptables -t nat -I OUTPUT …, with the owner's name in a comment; a table's all in one request."""
    answers, split = [], [rule.split(" ", 1) for rule in rules]
    for table in dict(split):  # each once
        rows = [f"{verb} {rule} -m comment --comment {owner}" for name, rule in split if name == table]
        answers.append(ask_tool([f"{tool}-restore", "-w", "--noflush"], "\n".join([f"*{table}", *rows, "COMMIT\n"])))
        for row in rows if answers[-1] is not None else ():
            tell(f"{tool} -w -t {table} {row}")
    return None not in answers

def list_iptables(table):
    """{tool: its rules}. The older one would make a table by looking at it, and never remove it."""
    tools = IPTABLES if table in read_kernel_file("/proc/net/ip_tables_names").split() else IPTABLES[:1]
    return {tool: ask_tool([tool, "-w", "-t", table, "-S"]) or "" for tool in tools}

def nat_rules(owner):
    """As nft or iptables lists them."""
    listed = ask_tool(["nft", "list", "table", "ip", owner]) or "".join(list_iptables("nat").values())
    rules = re.findall(rf"^\s*(.* dnat to .*|.* masquerade|.*--comment {owner}\b.*)$", listed, re.M)
    return list(dict.fromkeys(rules))  # of prerouting and output alike

def add_nat(subnet):
    """What leaves the bridge goes out under the host's address, or the answers would not find back. And nothing gets
    from a container to what listens to this machine alone: for published ports the bridge will exchange packets with
    127.0.0.1, and a container can make some by hand (CVE-2020-8558)."""
    rules = [(f'type filter hook prerouting priority -150; iifname "{BRIDGE}" ip daddr 127.0.0.0/8 drop',
              f"mangle PREROUTING -i {BRIDGE} -d 127.0.0.0/8 -j DROP"),
             (f'type nat hook postrouting priority 100; ip saddr {subnet}.0/24 oifname != "{BRIDGE}" masquerade',
              f"nat POSTROUTING -s {subnet}.0/24 ! -o {BRIDGE} -j MASQUERADE")]
    if not add_rules("mocker", rules, HOST.note):
        say("no NAT here, since neither nft nor iptables works: the container reaches this machine, but not beyond")
    # Where Docker is, this machine forwards nothing but Docker's own, or what is allowed by name.
    for tool, listed in list_iptables("filter").items():
        if "-P FORWARD DROP" in listed:
            ways = [f"filter FORWARD {way} {BRIDGE} -j ACCEPT" for way in ("-i", "-o")]
            add_iptables(tool, "mocker", ways, HOST.note)
    # Where firewalld is, as on Fedora, it lets nothing through but from an interface of a zone that may.
    zone = ["firewall-cmd", "--quiet", "--zone=trusted"]
    HOST.note(run_tool, [*zone, f"--remove-interface={BRIDGE}"])
    run_tool([*zone, f"--change-interface={BRIDGE}"])

def hold_port(address, port, is_tcp):
    """A socket that keeps others from the port for as long as the container runs."""
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM if is_tcp else socket.SOCK_DGRAM)
    # Of a server that was there before, connections may be waiting for their end.
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, is_tcp)
    holder.bind((address, port))
    if is_tcp:
        holder.listen()  # or another could bind it in the same way
    return holder

def publish_ports(container, undo):
    """-p: what arrives at a port of this machine is sent on to the container."""
    rules = []
    for address, outer, inner, protocol in container.ports:
        with explained(OSError, f"port {address}:{outer} can't be published ({{}}): choose another"):
            container.holders.add(hold_port(address, outer, protocol == "tcp"))
        at, to = address.replace("0.0.0.0", "0.0.0.0/0"), f"{container.address}:{inner}"
        rules += [(f"type nat hook {hook} priority -100; "
                   f"fib daddr type local ip daddr {at} {protocol} dport {outer} dnat to {to}",
                   f"nat {hook.upper()} -m addrtype --dst-type LOCAL -d {at} "
                   f"-p {protocol} --dport {outer} -j DNAT --to-destination {to}") for hook in ("prerouting", "output")]
    if rules:
        # This machine and a neighbour come under the bridge's address: else the answers would pass this machine by.
        near = f"127.0.0.0/8,{container.gateway}/24"
        way = f'oifname "{BRIDGE}" ct status dnat ip saddr {{ {near} }}'
        rules.append((f"type nat hook postrouting priority 100; {way} masquerade",
                      f"nat POSTROUTING -o {BRIDGE} -m conntrack --ctstate DNAT -s {near} -j MASQUERADE"))
        check(nat_rules("mocker") and add_rules(f"mocker_{container.id}", rules, undo.note),
              "ports can't be published, since neither nft nor iptables works here: install nftables")
        # From 127.0.0.1 a packet may leave by the bridge only if the bridge says so.
        write_kernel_file(f"/proc/sys/net/ipv4/conf/{BRIDGE}/route_localnet", "1")
        # To the container itself it goes back by the port that it came from. (That /sys may be of another network.)
        attempt("write_kernel_file", f"/sys/class/net/veth0_{container.id}/brport/hairpin_mode", "1")

# ═══ Its cgroup: how much it may use ═════════════════════════════════════════════════════════════
#
#  v2, one tree:  /sys/fs/cgroup/mocker/<id>/{cgroup.procs,memory.max,pids.max,cpu.max}
#  v1, a tree for each controller:  /sys/fs/cgroup/{memory,cpu,pids,…}/root/mocker_<id>/tasks

CGROUP = "/sys/fs/cgroup"
CONTROLLERS = "memory", "pids", "cpu"

def cgroup_version():
    """2 if the unified tree is mounted there, 1 if there is a tree for each controller."""
    trees = [name for name in CONTROLLERS if os.path.exists(f"{CGROUP}/{name}/tasks")]
    version = 2 if os.path.exists(f"{CGROUP}/cgroup.controllers") else int(bool(trees))
    check(version, f"no cgroup file system is mounted: mount -t cgroup2 cgroup2 {CGROUP}")
    return version

def limits_of(container):
    """The limits asked for → {file: number}, as this cgroup version spells them."""
    memory, pids = container.memory, container.pids_limit
    quota = container.cpus and int(container.cpus * 100_000)  # microseconds of each 100,000
    wanted = {1: {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": 2 * memory, "pids.max": pids,
                  "cpu.cfs_quota_us": quota},
              2: {"memory.max": memory, "memory.swap.max": memory, "pids.max": pids, "cpu.max": quota}}
    return {name: number for name, number in wanted[container.cgroup_version].items() if number}

@step("cgroup")
def create_cgroup(container, undo):
    """Cgroup: how much the container may use

    Namespaces limit what a process sees; a control group limits what it uses: memory, processes,
    CPU time. It is a directory in /sys/fs/cgroup, and its files are the limits. It also is a list
    of all that belongs to the container, so that nothing is forgotten at the end. It isolates
    nothing: this is the part that "Docker is just cgroups" is about.
    See man 7 cgroups. Look: cat /sys/fs/cgroup/mocker/ID/*.max
    """
    container.cgroup_version = cgroup_version()
    with locked(JOURNALS):
        container.cgroups = {1: groups_v1, 2: groups_v2}[container.cgroup_version](container.id)
    for directory in container.cgroups:
        undo.note(delete_cgroup, directory)
        make_directory(directory)
    for name, number in limits_of(container).items():
        path = next(filter(os.path.exists, (f"{directory}/{name}" for directory in container.cgroups)), None)
        check(path or re.search("swap|memsw", name),  # without swap there is none to limit
              f"the cgroups here have no {name}: enable the controller, or leave the limit out")
        if path:
            (limit_memory_v1 if name == "memory.limit_in_bytes" else write_kernel_file)(path, number)
            prove(f"cat {path}", read_kernel_file(path))

def groups_v2(id):
    """One directory; those above it must pass the controllers on."""
    for directory in CGROUP, f"{CGROUP}/mocker":
        make_directory(directory, HOST)
        pass_on(directory)
    return [f"{CGROUP}/mocker/{id}"]

def pass_on(directory):
    """Let the directories below have controllers, too (man 7 cgroups, "subtree_control")."""
    passed, aside = f"{directory}/cgroup.subtree_control", f"{directory}/mocker_aside"
    there, on = read_kernel_file(f"{directory}/cgroup.controllers").split(), read_kernel_file(passed).split()
    missing = [name for name in CONTROLLERS if name in there and name not in on]
    # A group with processes can't, unless it is the root of the tree, which has no type. In a container what looks
    # like the root is none, and has some: they move aside, as Docker's own docker-in-docker does it.
    if missing and os.path.exists(f"{directory}/cgroup.type") and read_kernel_file(f"{directory}/cgroup.procs"):
        make_directory(aside, HOST)
        HOST.note(run_tool, moving(aside, directory))
        run_tool(moving(directory, aside))
    if missing:
        HOST.note(attempt, "write_kernel_file", passed, " ".join(f"-{name}" for name in missing))
        write_kernel_file(passed, " ".join(f"+{name}" for name in missing))

def moving(source, target):
    """The command that moves all processes; one may have ended meanwhile."""
    return ["sh", "-c", f"for pid in $(cat {source}/cgroup.procs); do echo $pid >{target}/cgroup.procs; done; true"]

def groups_v1(id):
    """One in each tree, except cpuset's, whose groups take nobody until told which CPUs, and a hybrid machine's v2."""
    names = [name for name in os.listdir(CGROUP) if os.path.isdir(f"{CGROUP}/{name}")]
    for name in names:  # the `cgroups` package would make it, and leave it
        make_directory(f"{CGROUP}/{name}/root", HOST)
    # Where cpu and cpuacct are one tree, cpu,cpuacct, these are links to it.
    return [f"{CGROUP}/{name}/root/mocker_{id}" for name in names if not os.path.islink(f"{CGROUP}/{name}")
            and os.path.exists(f"{CGROUP}/{name}/tasks") and not os.path.exists(f"{CGROUP}/{name}/cpuset.cpus")]

def limit_memory_v1(path, number):
    """By the `cgroups` package, which knows v1 alone, and a group by the name of its directory."""
    logging.getLogger("cgroups.user").setLevel(logging.ERROR)
    cgroups.Cgroup(path.split("/")[-2], user="root").set_memory_limit(number, "bytes")
    tell(f"echo {number} > {path}")

@step("cgroup")
def join_cgroup(container):
    """Join the cgroup, while /sys/fs/cgroup is still in sight

    A process is moved by writing its number into cgroup.procs; 0 is whoever writes. All that it
    forks later is born in there.
    See man 7 cgroups. Look: cat /proc/PID/cgroup
    """
    # v1: tasks moves one thread, which is all that we have; cgroup.procs would wait until nobody on the machine forks.
    for directory in container.cgroups:
        write_kernel_file(f"{directory}/{'tasks' if container.cgroup_version == 1 else 'cgroup.procs'}", 0)
    prove("cat /proc/self/cgroup", read_kernel_file("/proc/self/cgroup"))

def mount_cgroups(container, shown):
    """/sys/fs/cgroup; by the cgroup namespace its root is the container's own group."""
    target = CGROUP.lstrip("/")
    if container.cgroups and container.cgroup_version == 2:
        mount("cgroup", target, "cgroup2", shown)
    elif container.cgroups:
        mount("tmpfs", target, "tmpfs", f"{HARMLESS},mode=755")
        for name in (directory.split("/")[4] for directory in container.cgroups):  # /sys/fs/cgroup/NAME/…
            mount_at("cgroup", f"{target}/{name}", "cgroup", f"{shown},{'name=' * (name == 'systemd')}{name}")
            for controller in name.split(",") if "," in name else ():  # where programs look for it
                make_link(name, f"{target}/{controller}")
        mount("none", target, "", f"remount,{shown}")

def delete_cgroup(directory):
    """End what is still in it, and remove it. The kernel may need a moment to let the dead go; it gets five seconds."""
    for _ in range(1000):
        for group, *_ in os.walk(directory, topdown=False):  # a privileged container may have made some in its own
            attempt("remove_directory", group)
            if os.path.isdir(group):
                end_members(group)
        if not os.path.isdir(directory):
            return
        time.sleep(0.005)
    raise MockerError(f"{directory} is still in use")

def end_members(directory):
    members = read_kernel_file(f"{directory}/cgroup.procs").split()
    for pid in filter(None, map(int, members)):  # 0 would be one whom this pid namespace can't see
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if members or story.script:
        kill = "while grep -q . cgroup.procs; do kill -9 $(cat cgroup.procs); sleep 0.1; done"
        tell(f"(cd {directory} && {kill}) 2>/dev/null")

# ═══ Its privileges: user, capabilities, system calls ════════════════════════════════════════════

# Root's power in pieces (man 7 capabilities); a capability's number is its place in this list.
CAPABILITIES = """
    CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE
    NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN
    SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE
    MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE""".split()

# What Docker leaves to a container's root: enough to install packages and run servers.
DEFAULT_CAPABILITIES = """
    CHOWN DAC_OVERRIDE FOWNER FSETID KILL SETGID SETUID SETPCAP NET_BIND_SERVICE NET_RAW SYS_CHROOT
    MKNOD AUDIT_WRITE SETFCAP""".split()

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
    -                 io_uring_setup 425 io_uring_enter 426 io_uring_register 427 uselib 134/ ustat 136/ sysfs 139/
    -                 _sysctl 156/ create_module 174/ get_kernel_syms 177/ query_module 178/ nfsservctl 180/42
    -                 getpmsg 181/ putpmsg 182/ afs_syscall 183/ tuxcall 184/ security 185/ vserver 236/"""
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
    load, equal, at_least, any_bit, answer = 0x20, 0x15, 0x35, 0x45, 0x06

    def op(code, value, skip_unless=0):
        return struct.pack("HBBI", code, 0, skip_unless, value)

    allow = op(answer, 0x7FFF0000)
    refuse, unknown = (op(answer, 0x50000 | number) for number in (errno.EPERM, errno.ENOSYS))
    # The 32-bit entry has other numbers; those of x32 begin at 2^30. Both are closed here.
    program = [op(load, 4), op(equal, 0xC000003E if x86 else 0xC00000B7, 2),
               op(load, 0), op(at_least, LAST_CALL + 1, 1), unknown]
    for unlocking, *calls in map(str.split, REFUSED_CALLS.strip().splitlines()):
        for name, numbers in zip(calls[::2], calls[1::2]):
            number = numbers.split("/")[0 if x86 else -1]
            if number and not set(unlocking.split("|")) & set(capabilities):
                # clone3 keeps its flags where no filter can look; told ENOSYS, the C library takes clone.
                program += [op(equal, int(number), 1), unknown if name == "clone3" else refuse]
    # Three calls depend on their first argument: (x86_64, aarch64), comparison, values, answer to those, to others
    for numbers, compare, values, those, others in [
            ((56, 220), any_bit, [] if "SYS_ADMIN" in capabilities else [CLONE_NEW], refuse, allow),  # clone
            ((41, 198), equal, FAMILIES, refuse, allow),  # socket
            ((135, 92), equal, PERSONALITIES, allow, refuse)]:  # personality
        body = [op(load, 16)] + [line for value in values for line in (op(compare, value, 1), those)] + [others]
        program += [op(equal, numbers[0 if x86 else 1], len(body)), *body]
    return b"".join([*program, allow])

def capabilities_of(kind, pid="self"):
    """The names in a process's set: CapEff is what it may do, CapBnd what anybody it starts can ever get."""
    # The last one: a process may give itself a name that looks like it.
    bits = int(re.findall(rf"{kind}:\s*(\w+)", read_kernel_file(f"/proc/{pid}/status"))[-1], 16)
    return [name for number, name in enumerate(CAPABILITIES) if bits & 1 << number]

def choose_capabilities(add, drop, privileged):
    """--cap-add, --cap-drop and --privileged → the capabilities that are kept, as docker counts them."""
    if "ALL" in add or privileged:
        kept = set(CAPABILITIES) - set(drop)
    else:
        kept = (set() if "ALL" in drop else set(DEFAULT_CAPABILITIES) - set(drop)) | set(add)
    return [name for name in capabilities_of("CapBnd") if name in kept]

@step("caps")
def drop_capabilities(container):
    """Capabilities: root, but not the machine's root

    Root inside is root outside, too. So its power is cut down to 14 capabilities of about 40, and
    for good: what is dropped from the bounding set can't come back through any program. What this
    process itself has in effect it needs a little longer, and gives up with the user.
    See man 7 capabilities. Look: grep Cap /proc/PID/status; capsh --decode=…
    """
    dropped = [name for name in capabilities_of("CapBnd") if name not in container.capabilities]
    tell("setpriv --bounding-set " + (",".join(f"-{name.lower()}" for name in dropped) or "+all"), wraps=True)
    for name in dropped:
        call("prctl", PR_CAPBSET_DROP, CAPABILITIES.index(name), 0, 0, 0, what=f"drop {name}")

@step("seccomp")
def filter_system_calls(container):
    """Seccomp: refuse the system calls that no container needs

    Every system call is a door into the one kernel that all containers share. A small program,
    run by the kernel before each call, keeps some of them shut: mounts, modules, clocks, keys, and
    calls so rare that they mainly have bugs. To install one takes root, or no_new_privs, which would
    make `su` useless in there: so it comes before the user.
    See man 2 seccomp. Look: grep Seccomp /proc/PID/status
    """
    program = seccomp_filter(container.capabilities if "caps" in container.parts else CAPABILITIES)
    command = f"prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, a program of {len(program) // 8} instructions)"
    tell(command, by_hand=f"# {command}: no command does that")
    buffer = ctypes.create_string_buffer(program)
    header = struct.pack("HP", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0, what="seccomp")

@step()
def become_user(container):
    """User: take the image's user, and only its groups

    The ids come from the image's /etc/passwd and /etc/group: to the kernel users are numbers. What
    is left of root's capabilities goes when the user is another; root keeps the 14.
    See man 7 credentials. Look: ps -o user,pid,args
    """
    uid, gids, home = find_user(container.user)
    container.environment["HOME"] = container.environment.get("HOME") or home
    for stream in 0, 1, 2:
        if os.fstat(stream).st_rdev != os.makedev(1, 3):  # not /dev/null
            os.fchown(stream, uid, -1)  # so that /dev/stdout can be opened again
    if "user" in container.parts:
        groups = f"--regid {gids[0]} --groups {','.join(map(str, gids))}"
        tell(f"setpriv --reuid {uid} {groups}", wraps=True, by_hand=f"setpriv {groups}")  # it needs root to the last
        os.setgroups(gids)
        os.setresgid(gids[0], gids[0], gids[0])
        os.setresuid(uid, uid, uid)
    if "caps" in container.parts:  # what may be inherited goes for every user (CVE-2022-24769)
        set_capabilities(container.capabilities if os.geteuid() == 0 else [])
    # The kernel forgets this when the user changes (man 2 PR_SET_PDEATHSIG).
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    prove("grep -E '^(Uid|Groups|Cap|Seccomp)' /proc/self/status",
          "\n".join(re.findall(r"^(?:Uid|Groups|Cap|Seccomp:).*", read_kernel_file("/proc/self/status"), re.M)))

def set_capabilities(names):
    """capset(2): effective and permitted, and none to be inherited; the bits come in two halves."""
    bits = sum(1 << CAPABILITIES.index(name) for name in names)
    low, high, version_3 = bits & 0xFFFFFFFF, bits >> 32, 0x20080522
    call("capset", struct.pack("Ii", version_3, 0), struct.pack("6I", low, low, 0, high, high, 0))

def find_user(text):
    """-u, or the image's User, looked up in the image's own files → uid, gids, home"""
    name, _, group = text.partition(":")
    account = find_entry("passwd", name or "0", "user")
    uid, home = int(account[2]), find_entry("passwd", account[2], "user")[5]  # the first of that number, as in docker
    if group:
        gids = [int(find_entry("group", group, "group")[2])]
    else:
        more = [int(entry[2]) for entry in read_colons("/etc/group") if account[0] in entry[3].split(",")]
        gids = list(dict.fromkeys([int(account[3] if is_id(account[3]) else 0), *more]))
    check(all(number < 2**31 for number in (uid, *gids)), "uids and gids must be in range 0-2147483647")
    return uid, gids, home

def is_id(text):
    return re.fullmatch("[0-9]{1,10}", text)

def find_entry(file, key, kind):
    """By name or number. A key of digits is only ever a number, and needs no entry."""
    found = [entry for entry in read_colons(f"/etc/{file}")
             if (int(entry[2]) == int(key) if is_id(key) else entry[0] == key)]
    check(found or is_id(key), f"unable to find {kind} {key}: no matching entries in {file} file")
    return found[0] if found else [None, "", key, "", "", "/"]  # nobody's

def read_colons(path):
    """Lines of /etc/passwd or /etc/group → lists of fields. What an image has there may be a FIFO, or have no end."""
    text = ""
    with contextlib.suppress(OSError), open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
        seen = os.fstat(file.fileno())  # of a file in /proc the size is 0
        text = file.read(1 << 20).decode(errors="replace") if stat.S_ISREG(seen.st_mode) and seen.st_size else ""
    entries = [[*line.strip().split(":"), *[""] * 6] for line in text.splitlines()]
    return [entry for entry in entries if is_id(entry[2])]

# ═══ run: the chapters above, in order ═══════════════════════════════════════════════════════════

NAMESPACES = ("mnt", "uts", "ipc", "pid", "net", "cgroup", "user")  # as /proc/PID/ns has them
PARTS = ("net", "pid", "mount", "uts", "ipc", "cgroup", "overlay", "pivot_root", "caps", "seccomp", "mask", "user")
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

def run(arguments):
    """Run a command in a container. The image is pulled if it is not here.

    Usage:
      mocker run [options] [-e VAR]... [-v VOL]... [-p PORT]...
                 [--cap-add=CAP]... [--cap-drop=CAP]... [--] <name> [<command>...]

    Options:
      -i, --interactive   keep stdin open       --rm            remove it later
      -t, --tty           give it a terminal    --name=N        beside its id
      -q, --quiet         mocker says nothing   --hostname=N    instead of its id
      -e, --env VAR       K=V, or K from here   --entrypoint=P  not the image's
      -w, --workdir DIR   start there           --network=N     bridge, none, host
      -u, --user USER     name or uid [:group]  --read-only     root can't change
      -m, --memory SIZE   as in 512m            --privileged    nearly no limits
      --cpus=N            as in 1.5             --pids-limit=N  as in 100
      -v, --volume VOL    host:container[:ro]
      -p, --publish PORT  [ip:]host:container[/udp]
      --explain           tell and show each step
      --step              the same, and wait for Enter before each one
      --by-hand           print a shell script instead that makes such a container
      --without=PARTS     some of net,pid,mount,uts,ipc,cgroup,overlay,pivot_root,
      --only=PARTS        caps,seccomp,mask,user, to see what each is for, or chroot
    """
    given = {**arguments, **{name: parse(name, arguments[name]) for name in FORMS if arguments[name] is not None}}
    check(given["--only"] is None or given["--without"] is None, "--only is the opposite of --without: give just one")
    targets = [target for _, target, _ in given["--volume"]]
    check(len(targets) == len({*targets}), "invalid --volume: two have the same place in the container")
    check(os.isatty(0) or not (given["--tty"] and given["--interactive"]),
          "the input device is not a TTY: leave out -t")
    container = Container(given, find_image(given["<name>"]))  # pulled only now that all of this is right
    return rehearse(container) if given["--by-hand"] else perform(container)

def perform(container):
    """What a container is, from the outside."""
    with held_journal(container.id) as undo:
        create_container(container, undo)
        create_cgroup(container, undo)
        if container.network != "none":
            create_network(container, undo)
        write_etc(container)
        start(container)
        status = attend(container)
        say("Finalizing")
    say("done")
    return status

SCRIPT_HEADER = """\
#!/bin/sh
# The container that `mocker run` makes, by hand: with util-linux, iproute2, coreutils, and nft or iptables.
# But without a seccomp filter, for which there is no command; and in the terminal's session.
# For root on this machine as it was then, with the containers that ran. If it fails, run the lines under "The end".
set -e
umask 022
status=0
trap : INT TERM HUP  # what is made is undone, too
{  # should this come by stdin, a shell now reads all of it before the program does"""

OBEYED = "LD_|GLIBC_|GCONV_PATH|GETCONF_DIR|LOCPATH|MALLOC_|NLSPATH|RESOLV_|TZDIR"  # by the C library (man 8 ld.so)

def rehearse(container):
    """--by-hand: all of it but the program itself; what was told on the way is printed, once it is undone. The
    child prints how the container is made (its stdout is a file here), we add how it ends."""
    missing = sorted({"SETUID", "SETGID", "SYS_CHROOT"} - {*container.capabilities})
    check(not missing or "caps" not in container.parts,
          f"--by-hand needs {', '.join(missing)} to the last, for setpriv(1) and unshare(1): keep them")
    for name in container.environment:
        check(not re.match(OBEYED, name), f"--by-hand: unshare(1) would obey {name}, too: leave it out with -e {name}")
    container.remove, container.terminal, container.takes_stdin = True, False, False
    stdout, text = os.dup(1), os.memfd_create("script")
    os.dup2(text, 1)
    story.level, story.script = QUIET, Script(SCRIPT_HEADER, container.id)
    status = perform(container)
    story.script.add("exit $status\n}")
    raw = os.pread(text, os.fstat(text).st_size, 0) + story.script.encoded()
    if os.isatty(stdout):
        raw = "\n".join(map(printable, raw.decode(errors="replace").split("\n"))).encode()
    if status == 0:
        write_all(stdout, raw)
    return status

@explained(OSError, "{}: something in the image is in the way")
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
    open_streams(container)
    mask_paths(container)
    enter_working_directory(container)
    pivot_by_hand(container)
    drop_capabilities(container)
    filter_system_calls(container)
    become_user(container)
    execute(container)

# ── What the command line says ─────────────────────────────────────────────────────────────────────

def to_bytes(number, unit):
    """0.5, g → 536870912"""
    size = int(float(number) * (1 << {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40}[unit.lower()]))
    return size if size == 0 or 6 << 20 <= size < 1 << 63 else None

def to_cpus(number):
    return float(number) if float(number) == 0 or 0.01 <= float(number) <= os.cpu_count() else None

def to_volume(host, target, mode):
    """→ (host, container, read-only)"""
    place = rooted(target)
    is_allowed = not re.fullmatch("/|/dev|/proc(/.*)?", place)  # a volume is nodev, and /proc comes after it
    return (os.path.abspath(host), place, mode == ":ro") if is_allowed else None

def to_port(address, outer, inner, protocol):
    """→ (ip, host, container, protocol)"""
    are_ports = 0 < int(outer) < 65536 and 0 < int(inner) < 65536
    return (address or "0.0.0.0", int(outer), int(inner), protocol or "tcp") if are_ports else None

def to_parts(names):
    parts = set(filter(None, names.split(",")))
    return parts if parts <= {*PARTS, "chroot"} else None

CAPABILITY = (rf"(?i)(?:CAP_)?({'|'.join(CAPABILITIES)}|ALL)", str.upper, "a capability of man 7 capabilities, or ALL")
SOME_PARTS = ("(.*)", to_parts, f"some of {','.join(PARTS)}, chroot")
FORMS = {  # what a value looks like, what its groups become (None: it is out of range), and how to say so
    "--cap-add": CAPABILITY, "--cap-drop": CAPABILITY, "--without": SOME_PARTS, "--only": SOME_PARTS,
    "--name": (r"(|[a-zA-Z0-9][a-zA-Z0-9_.-]+)", str, "two or more letters and digits, after the first also _ . and -"),
    "--hostname": ("(.*)", lambda name: name if len(os.fsencode(name)) <= 64 else None, "at most 64 bytes"),
    "--user": (r"([^:]*:?[^:]*)", str, "a name or uid, and maybe :group"),
    "--env": (r"([^=]+)(?:=(.*))?", lambda *pair: pair, "NAME=VALUE, or NAME to take it from here"),
    "--workdir": (r"(|/.*)", lambda path: path and os.path.normpath(path), "an absolute path"),
    "--network": (r"(bridge|none|host)", str, "bridge, none or host"),
    "--memory": (r"(?i)(\d{1,19}(?:\.\d+)?) ?([bkmgt]?)i?b?", to_bytes,
                 "a number and b, k, m, g or t, of 6MB or more, as in 512m or 1.5g"),
    "--cpus": (r"(\d+\.?\d*|\.\d+)", to_cpus, f"a number from 0.01 to this machine's {os.cpu_count()} CPUs"),
    "--pids-limit": (r"-\d+|0|(\d{1,9})", lambda number: int(number or 0), "a number, as in 100"),
    "--volume": (r"([^:]+):(/[^:]*)(:ro|:rw)?", to_volume,
                 "host:container or host:container:ro, the latter as an absolute path, but not '/', '/dev' or '/proc'"),
    "--publish": (r"(?:(\d+\.\d+\.\d+\.\d+):)?(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?", to_port,
                  "[ip:]host:container[/udp], as in 8080:80; ports are from 1 to 65535"),
}

def parse(option, text):
    """What a value means, as FORMS has it; of several, each."""
    if isinstance(text, list):
        return [parse(option, one) for one in text]
    pattern, meaning, form = FORMS[option]
    if option != "--env" or text.count("=") > 1:
        text = text.removeprefix("=")  # -m=64m is -m 64m, -e=K=V is -e K=V
    match = re.fullmatch(pattern, text, re.ASCII | re.DOTALL)
    value = match and meaning(*match.groups())
    check(value is not None, f"invalid {option} '{text[:100]}': write {form}")
    return value

class Container:
    """What is to be run, and what was made for it. What the command line leaves open, the image's config says."""

    def __init__(self, given, image):
        config, self.image, self.layers = image.config.get("config") or {}, full_name(image.stored), image.layers[::-1]
        self.id = os.urandom(4).hex()
        self.directory = store("containers", self.id)
        self.parts = choose_parts(given)
        own_name = os.uname().nodename if given["--network"] == "host" else self.id
        self.name, self.hostname = given["--name"] or self.id, given["--hostname"] or own_name
        self.terminal = given["--tty"]
        # With -i, whatever it is; without -i and -t, a pipe or a file, but no terminal and not /dev/null.
        self.takes_stdin = given["--interactive"] or not (self.terminal or stat.S_ISCHR(os.fstat(0).st_mode))
        self.memory, self.cpus, self.pids_limit = given["--memory"] or 0, given["--cpus"], given["--pids-limit"]
        self.network = (given["--network"] or "bridge") if "net" in self.parts else "host"
        self.volumes, self.ports = given["--volume"], given["--publish"]
        self.privileged, self.read_only, self.remove = given["--privileged"], given["--read-only"], given["--rm"]
        self.capabilities = choose_capabilities(given["--cap-add"], given["--cap-drop"], self.privileged)
        self.address = self.gateway = self.pid = self.console = None
        self.holders, self.cgroups = set(), []
        names = [name for name in os.listdir("/dev") if name != "ptmx"] if self.privileged else DEVICES
        self.devices = {name: seen for name in names if stat.S_IFMT((seen := os.lstat(f"/dev/{name}")).st_mode)
                        in (stat.S_IFCHR, stat.S_IFBLK)}
        self.host_namespaces = {name: os.readlink(f"/proc/self/ns/{name}") for name in NAMESPACES}
        self.arguments = command_line(config, given["--entrypoint"], given["<command>"])
        self.environment = environment(config, given["--env"], self.hostname, self.terminal)
        self.user = given["--user"] or config.get("User") or ""
        self.working_directory = given["--workdir"] or parse("--workdir", config.get("WorkingDir") or "/")

def choose_parts(given):
    """--without=net,pid: all other parts; --only=net,pid: none but these; chroot is what then remains."""
    parts = {*(PARTS if given["--only"] is None else given["--only"])} - (given["--without"] or set())
    if given["--privileged"]:
        parts -= {"mask", "seccomp"}
    if given["--network"] == "host":
        parts -= {"net"}
        if given["--publish"]:
            say("with --network=host, published ports are discarded")
    if "pivot_root" in parts and "mount" not in parts:
        say("without a mount namespace, pivot_root would move this machine's own root: chroot instead")
        parts -= {"pivot_root"}
    return parts

def find_image(name):
    """The stored image of that name; pulled if there is none."""
    open_store()
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
        config = {"Entrypoint": [entrypoint] * bool(entrypoint)}
    line = (config.get("Entrypoint") or []) + (command or config.get("Cmd") or [])
    check(line, "no command specified, and the image names none: mocker run IMAGE COMMAND")
    return line

def environment(config, given, hostname, terminal):
    """Those of -e, then the image's others, over the defaults; a name without a value takes one away, as in docker."""
    given = {name: os.environ.get(name) if value is None else value for name, value in given}
    image = dict(parse("--env", [*filter(None, config.get("Env") or [])]))
    default = {"PATH": DEFAULT_PATH, "HOSTNAME": hostname, **({"TERM": "xterm"} if terminal else {})}
    # Those given stand twice: for their place, before the image's, and for their value, over the image's.
    return {name: value for name, value in {**default, **given, **image, **given}.items() if value is not None}

def create_container(container, undo):
    """Its directory, and its name, which no other may have."""
    if container.remove:
        undo.note(delete_directory, container.directory)
    if "mount" not in container.parts:
        undo.note(attempt, "unmount", f"{container.directory}/rootfs")
    with locked(JOURNALS):
        check(all(other["name"] != container.name for other in all_containers()),
              f"the name '{container.name}' is in use: choose another, or mocker clean --containers once it has ended")
        make_directory(container.directory)
        write_config(container, "created")
    for host, *_ in container.volumes:  # one that is missing is made, as by docker
        with explained(OSError, f"invalid --volume: {host[:100]} can't be made: {{}}"):
            if not os.path.exists(host):
                os.makedirs(host)

def write_config(container, status, **more):
    """config.json: what later commands need to know of it."""
    known = {key: getattr(container, key) for key in ("id", "name", "image", "pid", "arguments", "layers")}
    write_file(f"{container.directory}/config.json", {**known, "status": status, **more})

def all_containers():
    """Every container's config.json."""
    found = []
    for id in os.listdir(store("containers")) if os.path.isdir(store("containers")) else ():
        with contextlib.suppress(OSError, ValueError), open(store("containers", id, "config.json")) as file:
            found.append(json.load(file))
    return found

def delete_directory(directory):
    # If something is still mounted there, volumes would be emptied. (mountinfo writes a blank as \040.)
    if f" {os.path.realpath(directory)}/" not in read_kernel_file("/proc/self/mountinfo").replace(r"\040", " "):
        remove_tree(directory)

# ── Its first process ──────────────────────────────────────────────────────────────────────────────

@step()
def start(container):
    """Fork: the container's first process

    unshare(2) with CLONE_NEWPID does not move us; it makes our next child number 1 of a new
    namespace. When number 1 ends, the kernel ends all the others in there: nothing survives.
    See man 7 pid_namespaces. Look: ps -ef --forest
    """
    container.line, inner = socket.socketpair()  # our end and the child's: for its streams, then for an errno
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until forward_signals, and in the child go_inside
    with coming_back("pid_for_children"), inner:
        if "pid" in container.parts:
            unshare("pid")
        else:
            tell("fork", wraps=True, by_hand="env")
            call("prctl", PR_SET_CHILD_SUBREAPER, 1)  # for end_others
        # From here on there are two of container and of story; each process has its own end of the line.
        mocker, container.pid = os.getpid(), os.fork()
        if container.pid == 0:
            go_inside(container, inner, mocker)
    if story.script:
        story.script = Script("\n# ■ The end\nset +e", container.id)  # the other is the child's

def go_inside(container, line, mocker):
    """The child's whole life; it never returns."""
    status = 125
    try:
        die_with(mocker)
        for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGPIPE}:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.setsid()  # so that it can have a terminal of its own
        container.line, story.output = line, fcntl.fcntl(story.output, fcntl.F_DUPFD_CLOEXEC, 4)  # 3 is the stub's
        close_inherited({line.fileno(), story.output, story.stepping})
        status = guarded(inside, container)
    except BaseException:
        os.dup2(story.output, 2)  # our own 2 is the container's by now
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status or 0)

def close_inherited(keep):
    """A directory of the host that stayed open would be a way out: /proc/self/fd/N (CVE-2024-21626)."""
    for stream in 0, 1, 2:
        os.dup2(os.open(os.devnull, os.O_RDWR), stream)
    for descriptor in set(map(int, os.listdir("/proc/self/fd"))) - {0, 1, 2} - keep:
        with contextlib.suppress(OSError):
            os.close(descriptor)

def open_streams(container):
    """stdin, stdout and stderr: pipes, or with -t a terminal of the container's own devpts (man 4 pts).
    mocker gets the other ends, as open files through a socket (man 7 unix, SCM_RIGHTS)."""
    if container.terminal:
        master, slave = os.openpty()
        fcntl.ioctl(slave, 0x540E, 0)  # TIOCSCTTY: the controlling terminal, whose Ctrl-C is a signal
        os.close(os.open("/dev/console", os.O_CREAT | os.O_WRONLY, 0o600))
        mount(os.ttyname(slave), "/dev/console", "", "bind")
        inner, outer = [slave, slave, slave], [master, master]
    else:
        (stdout, out), (stderr, err), (keys, stdin) = os.pipe(), os.pipe(), os.pipe()
        nothing = os.open("/dev/null", os.O_RDWR)  # the container's own, not the host's
        inner, outer = [keys if container.takes_stdin else nothing, out, err], [stdin, stdout, stderr]
    rights = struct.pack(f"{len(outer)}i", *outer)
    container.line.sendmsg([b"streams"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
    for number, stream in enumerate(inner):
        os.dup2(stream, number)

def enter_working_directory(container):
    """Made if it is missing, by root, as docker does; inside, so that its symlinks lead nowhere else."""
    make_directory("." + os.path.realpath(container.working_directory))
    if container.read_only:  # not before: it was the last thing to be made
        mount("none", ".", "", "remount,bind,nodev,ro")
    os.chdir(container.working_directory)

def program_by_hand(container):
    """As execute does it, for a script: unshare looks for the program in $PATH, in the new root."""
    variables = shlex.join(f"{name}={value}" for name, value in container.environment.items())
    return (f'env -i -- {variables} "$(command -v unshare)" --root=. --wd={shlex.quote(os.getcwd())} '
            f"--setuid={os.getuid()} -- {shlex.join(container.arguments)}")

@step()
def execute(container):
    """Exec: become the program of the image

    Entrypoint and Cmd, with the image's environment and working directory. No shell is added. The
    process has been in the container for a while; now the last thing of the host, Python, is gone.
    See man 2 execve. Look: cat /proc/PID/cmdline
    """
    name, path = container.arguments[0], container.environment.get("PATH")
    places = [os.path.join(folder or ".", name) for folder in path.split(":")] if path else []
    places = [name] if "/" in name else [at for at in places if os.path.isfile(at) and os.access(at, os.X_OK)]
    check(places, f'exec "{name}": not found in $PATH: look into the image, or give another command', 127)
    try:
        if story.script:
            os.stat(places[0])  # if it isn't there, execve(2) would say so
            story.script.end_with(program_by_hand(container))
            container.line.close()
            return write_all(1, story.script.encoded())
        say(f'Running "{" ".join(container.arguments)}"')
        for variable, value in container.environment.items():
            say(f"Setting ENV {variable}={value}")
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python had ignored
        os.set_inheritable(os.dup2(container.line.fileno(), 3), True)  # also if it is 3 already
        with contextlib.suppress(PermissionError):  # where vm.memfd_noexec forbids it
            os.execve(exec_stub(), [places[0], *container.arguments], container.environment)
        os.set_inheritable(3, False)
        os.execve(places[0], container.arguments, container.environment)
    except OSError as error:
        container.line.send(bytes([error.errno]))

STUB = {  # machine: its number in an ELF file, and its code: four system calls
    "x86_64": (62, bytes.fromhex("6a035f 6a025e 6a015a 6a4858 0f05 85c0 751f"  # fcntl(3, F_SETFD, FD_CLOEXEC), or exit
                                 "59 5f 4889e6 488d14cc 6a3b58 0f05"  # execve(argv[0], argv + 1, environment)
                                 "f7d8 50 4889e6 6a035f 6a015a 6a0158 0f05"  # write(3, &errno, 1)
                                 "6a3c58 0f05")),  # exit()
    "aarch64": (183, bytes.fromhex("600080d2 410080d2 220080d2 280380d2 010000d4 a00100b5"  # the same
                                   "e903c1a8 e1030091 220c098b a81b80d2 010000d4"
                                   "e00300cb e00f1ff8 e1030091 600080d2 220080d2 080880d2 010000d4"
                                   "a80b80d2 010000d4")),
}

def exec_stub():
    """A program that only becomes another: its first argument, with the rest of them. → a file in memory

    As long as the container's first process is Python, its /proc/self/exe is the host's Python; an image whose program
    is that link would get hold of the file (CVE-2019-5736). So in between it is this, as runc once had its runc-dmz.
    If it can't become the other, it tells mocker why, by descriptor 3. Without one, the image has started it: it ends.
    See man 5 elf: a header, a segment to load (1), to be read and executed (5), and in it the code.
    """
    (machine, code), address, start = STUB[os.uname().machine], 0x400000, 64 + 56
    size, stub = start + len(code), os.memfd_create("stub")
    header = struct.pack("16s2HI3QI6H", b"\x7fELF\2\1\1", 2, machine, 1, address + start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    os.write(stub, header + struct.pack("2I6Q", 1, 5, 0, address, address, size, size, 0x10000) + code)
    tell(f"execve(a program of {len(code)} bytes, which becomes the image's by execve(2) in turn)")
    return stub

# ── Its parent: streams, signals, the end ──────────────────────────────────────────────────────────

def attend(container):
    """Copy its output, pass signals on, wait. → exit status, 128+N for signal N."""
    handle, faults = os.pidfd_open(container.pid), []
    try:
        forward_signals(container, handle)
        write_config(container, "running")
        copies = [] if story.script else open_copies(container)
        streams = socket.recv_fds(container.line, 10, 3)[1]
        if container.terminal and streams:  # none, if it failed before it made them
            container.console = streams[1]
            copy_window_size(container.console)
        threads = relays(container, streams, copies, faults)
        failure = container.line.recv(1)  # the errno of execve(2), or nothing: it has become the program, or has ended
        with contextlib.ExitStack() as undo:
            if container.console and container.takes_stdin:  # it interprets the keys, Ctrl-C too
                undo.enter_context(contextlib.suppress(termios.error))  # our terminal may be gone by then
                undo.callback(termios.tcsetattr, 0, termios.TCSADRAIN, termios.tcgetattr(0))
                tty.setraw(0, termios.TCSANOW)  # which keeps what has been typed
            start_threads(threads)  # only now: till now keys are for --step, and output would get another \r
            while not select.select([handle], [], [], 0.2)[0]:
                pass  # a signal that comes just before a wait is seen after it: so none may be endless
            status = os.waitstatus_to_exitcode(os.waitpid(container.pid, 0)[1])
            end_others(container)
            for thread in threads[: len(streams[1:])]:
                thread.join()
    except BaseException:  # a fault or a signal: it must not go on without us
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.waitpid(container.pid, 0)
        end_others(container)
        raise
    status = exit_status(container, status, failure)
    if not container.remove:
        write_config(container, "exited", exit_code=status)
    check(not faults, "some of its output is lost: no space is left where it goes to: make room there")
    return status

def exit_status(container, status, failure):
    """As docker's. If it could not become its program, as a shell's: 127 if that, or its interpreter, is not there."""
    if not failure:
        return status if status >= 0 else 128 - status
    reason = f'exec "{container.arguments[0]}": {os.strerror(failure[0])}'
    write_line(f"mocker: {reason}: look into the image, or give another command", "error")
    return 127 if failure[0] in (errno.ENOENT, errno.ENOTDIR) else 126

def end_others(container):
    """Without a pid namespace what it started is still there; what has lost its parent has become our child."""
    if "pid" not in container.parts:
        for directory in container.cgroups:
            end_members(directory)
        while orphan := read_kernel_file(f"/proc/self/task/{os.getpid()}/children").partition(" ")[0]:
            os.kill(int(orphan), signal.SIGKILL)
            os.waitpid(int(orphan), 0)

def relays(container, streams, copies, faults):
    """A thread for each direction. Those of the outputs come first: stdin's may wait for a key forever."""
    ways = [(*way, faults, copies) for way in zip(streams[1:], (1, 2))]
    ways += [(os.dup(0), target, faults) for target in streams[:1] if container.takes_stdin]
    return [threading.Thread(target=relay, args=way, daemon=True) for way in ways]

def start_threads(threads):
    """Signals are the main thread's: a new one has the mask that was there when it was started."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    for thread in threads:
        thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

def relay(source, target, faults, copies=()):
    """Copy until there is no more, or nobody reads any more; closing both ends tells the others."""
    try:
        while data := insist(os.read, source, 1 << 16):
            for copy in copies:
                with contextlib.suppress(OSError):  # a full disk must not stop the container
                    os.write(copy, data)
            write_all(target, data)
    except OSError as error:  # EPIPE, or EIO from a terminal whose other side is gone: these are no faults
        faults += [error] * (error.errno in FULL)
    os.close(source)
    if target > 2:
        os.close(target)

def write_all(target, data):
    while data:
        data = data[insist(os.write, target, data) :]

def insist(function, stream, argument):
    """read(2) or write(2), even if another program has made our streams non-blocking."""
    while True:
        try:
            return function(stream, argument)
        except BlockingIOError:
            readable, writable = ([stream], []) if function is os.read else ([], [stream])
            select.select(readable, writable, [])

def forward_signals(container, handle):
    """What reaches mocker goes on to number 1; but what is to stop it stops mocker, until number 1 is the program. That
    ignores what it has no handler for; the third SIGINT or SIGTERM is SIGKILL (man 7 pid_namespaces, "Signals")."""
    urgent, begun = [], select.poll()
    begun.register(container.line, 0)  # POLLHUP: the child's end is closed, whatever lies here unread

    def forward(number, frame):
        if number in (signal.SIGINT, signal.SIGTERM):
            urgent.append(number)
        if number in STOPPING and not begun.poll(0) or len(urgent) > 3:  # or it has ended, and nobody reads its output
            interrupted(number, frame)
        if container.console:
            copy_window_size(container.console)
        if container.console and number == signal.SIGHUP:
            hang_up(container.console)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL if len(urgent) > 2 else number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)

def hang_up(terminal):
    """Ours is gone, so the container's goes too, and a shell in there finds its input at an end (man 2 vhangup)."""
    with contextlib.suppress(OSError):
        slave = fcntl.ioctl(terminal, 0x5441, os.O_RDWR | os.O_NOCTTY)  # TIOCGPTPEER
        fcntl.ioctl(slave, 0x5437)  # TIOCVHANGUP
        os.close(slave)

def copy_window_size(terminal):
    """The container's terminal is as large as ours (man 2 TIOCSWINSZ)."""
    with contextlib.suppress(OSError):
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(8)))

def open_copies(container):
    """Where output goes besides our own: the container's log, and /tmp/stdout, as ever. Made under a name that nobody
    can know, and renamed: a link that another user planted there is replaced, not followed; /tmp is everybody's."""
    copies = [os.open(f"{container.directory}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)]
    mine = f"/tmp/.stdout_{os.urandom(8).hex()}"
    try:
        copies.append(os.open(mine, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
        os.rename(mine, "/tmp/stdout")
    except OSError as error:
        say(f"/tmp/stdout can't be written: {error.strerror}")
        with contextlib.suppress(OSError):
            os.unlink(mine)
    return copies

# ═══ serve: the protocol's other side ════════════════════════════════════════════════════════════

def serve(arguments):
    """Be a registry, read-only, for the images that are here: for a class behind one address.

    It makes the whole dance of Docker Hub: the token, and blobs from another address, on PORT+1.

    Usage:
      mocker serve [--port=N] [--listen=ADDRESS]

    Options:
      --port=N          [default: 5000]
      --listen=ADDRESS  who may ask: 127.0.0.1 only this machine, 0.0.0.0 anyone [default: 127.0.0.1]
    """
    address, port = arguments["--listen"], arguments["--port"]
    # Put together only here, since it takes a while to import http.server.
    handler = type("Handler", (Answers, http_server.BaseHTTPRequestHandler), {"key": os.urandom(16)})
    with explained((OSError, ValueError, OverflowError), f"can't listen on {address}:{port} and the next port: {{}}; "
                   "choose another with --port"):
        registry = http_server.ThreadingHTTPServer((address, int(port)), handler)
        cdn = http_server.ThreadingHTTPServer((address, int(port) and int(port) + 1), handler)
    handler.cdn_port = cdn.server_port
    say(f"Serving {len(all_images())} images: MOCKER_HUB=http://{address.replace('0.0.0.0', 'THIS_MACHINE')}:"
        f"{registry.server_port} mocker pull …")
    for server in registry, cdn:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    while True:  # a signal ends it here, since http.server takes any exception for a fault in a request
        time.sleep(1)  # no endless wait, as in attend

class Answers:
    """To GET and HEAD, at both ports. Tokens and the CDN's addresses are signed with a key that only we have."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path, _, query = self.path.partition("?")
        query = dict(url.parse_qsl(query))
        try:
            if path == "/token":
                self.reply(200, {"token": self.sign(f"token {query.get('scope', '')}"), "expires_in": 300})
            elif asked := re.fullmatch(r"/v2/(?:(.+)/(manifests|blobs)/([^/]+))?", path):
                self.answer(*asked.groups(""))
            elif query.get("Signature") == self.sign(f"blob {path[1:]}"):
                self.send_blob(path[1:], "application/octet-stream")
            else:
                self.reply(403, "DENIED")
        except (MockerError, FileNotFoundError):  # the store has lost it
            self.reply(404, "BLOB_UNKNOWN")

    do_HEAD = do_GET

    def answer(self, repository, kind, name):
        """With a token for the repository: its manifests, and at which address of the CDN its blobs are."""
        scope, host = f"repository:{repository}:pull", self.headers.get("Host", "localhost")
        if self.headers.get("Authorization") != f"Bearer {self.sign(f'token {scope}')}":
            challenge = f'Bearer realm="http://{host}/token",service="mocker",scope="{scope}"'
            return self.reply(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        if not kind:  # /v2/ itself: is this a registry?
            return self.reply(200, {})
        for image in [one for one in all_images() if repository in (one.name, one.name.partition("/")[2])]:
            index = image.stored.get("index") or image.stored
            named = {image.version: image.stored, image.stored["digest"]: image.stored, index["digest"]: index}
            if kind == "manifests" and name in named:
                return self.send_blob(named[name]["digest"], named[name]["mediaType"])
            if kind == "blobs" and name in [blob["digest"] for blob in image.blobs]:
                cdn = f"http://{host.rpartition(':')[0] or host}:{self.cdn_port}"
                return self.reply(307, {}, Location=f"{cdn}/{name}?Signature={self.sign(f'blob {name}')}")
        return self.reply(404, f"{kind.upper()[:-1]}_UNKNOWN")

    def send_blob(self, digest, kind):
        """All of it, or with a Range the rest from there on."""
        wanted = re.fullmatch(r"bytes=(\d{1,18})-", self.headers.get("Range", ""))
        with open(blob_path(digest), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.seek(min(int(wanted[1]), size) if wanted else 0)
            part = {"Content_Range": f"bytes {start}-{size - 1}/{size}"} if wanted else {}
            self.reply(206 if wanted else 200, pieces(file), Content_Type=kind, Content_Length=size - start,
                       Docker_Content_Digest=digest, **part)

    def sign(self, text):
        return hmac.new(self.key, text.encode(), "sha256").hexdigest()

    def reply(self, status, body, **headers):
        """Status, headers and, unless it is a HEAD, the body: pieces of a blob, a document, or an error's code."""
        if isinstance(body, str):  # as the distribution spec has it
            body = {"errors": [{"code": body, "message": body.lower()}]}
        if isinstance(body, dict):
            body = [json.dumps(body).encode()]
            headers = {"Content_Type": "application/json", "Content_Length": len(body[0]), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.writelines(body if self.command != "HEAD" else [])

    def log_message(self, *_):
        say(f"{self.client_address[0]} {self.requestline.partition('?')[0]}")

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that hangs up is no news
            super().handle()

# ═══ Life after run ══════════════════════════════════════════════════════════════════════════════

def doctor(arguments):
    """Look at what this machine has and lacks for the demo. Exit status 1 if it would fail.

    Usage:
      mocker doctor
    """
    status, story.level = 0, QUIET
    for look in (look_at_kernel, look_at_root, look_at_packages, try_namespaces, try_overlay, try_firewall,
                 look_at_cgroup, look_at_subnet, look_for_leftovers, look_at_hub):
        try:
            verdict, found = "ok", in_a_worker(look) if look.__name__.startswith("try_") else look()
        except MockerError as error:
            verdict, found = "LACKS" if error.status else "warn", error
        status = status or int(verdict == "LACKS")
        print(f"{verdict:6} {look.__name__.rpartition('_')[2]}: {printable(str(found))}")
        if status and look in (look_at_kernel, look_at_root):
            break  # without them there is nothing to look at
    return status

def in_a_worker(look):
    """In a process of its own, with which the namespaces go that it makes; and within ten seconds."""
    with workers(1) as pool, explained((futures.TimeoutError, ImportError, OSError), "{}: network, packages, disk?"):
        return pool.submit(look).result(10)

def look_at_kernel():
    """open_tree(2) came with Linux 5.2, pidfd_open(2) with 5.3."""
    need_linux()
    check(LINUX >= [5, 3], f"Linux {os.uname().release} is too old: 5.3 or newer is needed")
    return f"Linux {os.uname().release}, {os.uname().machine}"

def look_at_root():
    need_root("run")
    return "with CAP_SYS_ADMIN"

def look_at_packages():
    names = "cgroups", "colorama", "docopt", "pyroute2", "requests", "tabulate"
    missing = [name for name in names if imports.find_spec(name) is None]
    check(not missing, f"{', '.join(missing)} missing: pip install -r requirements.txt")
    return ", ".join(names)

def try_namespaces():
    unshare(*NAMESPACE_FLAGS)
    return "mount, uts, ipc, pid, net, cgroup"

def try_overlay():
    unshare("mount")
    open_store()
    with partial_directory() as directory, explained(MockerError, "{}: modprobe overlay, or move MOCKER_HOME"):
        os.mkdir(f"{directory}/layer")
        mount_overlay([f"{directory}/layer"], directory)
        unmount(f"{directory}/rootfs")
    return f"works in {HOME}"

def try_firewall():
    """In a network of its own: that nft can list its tables does not say that this kernel has NAT."""
    unshare("net")
    rules = [("type nat hook postrouting priority 100; masquerade", "nat POSTROUTING -j MASQUERADE")]
    tool = add_rules("mocker", rules)
    check(tool, "neither nft nor iptables works: a container reaches this machine, but not beyond, and no port is "
          "published: apt install nftables", status=0)
    return tool

def look_at_cgroup():
    version = cgroup_version()
    there = read_kernel_file(f"{CGROUP}/cgroup.controllers").split() if version == 2 else os.listdir(CGROUP)
    missing = {*CONTROLLERS} - {*there}
    check(not missing, f"v{version}, without {', '.join(missing)}: that can't be limited; try "
          "cgroup_enable=memory on the kernel's command line", status=0)
    return f"v{version}, with memory, pids, cpu"

def look_at_subnet():
    if any(interface == BRIDGE for interface, *_ in read_routes()):
        return f"{BRIDGE} is up"
    free = free_subnet()
    check(free == SUBNETS[0], f"{SUBNETS[0]}.0/24 is in use here: run takes {free}.0/24", status=0)
    return f"{SUBNETS[0]}.0/24 is free"

def look_for_leftovers():
    running = container_ids()
    ended = [one for one in all_containers() if one["id"] not in running]
    return f"{len(running)} containers run, {len(ended)} that have ended are kept (mocker clean --containers)"

def look_at_hub():
    try:
        return in_a_worker(ask_hub)
    except MockerError as error:
        there = len(all_images())
        raise MockerError(f"{error}; {there} images are here", status=0 if there else 125) from None

def ask_hub():
    """By HEAD, which does not count as a pull; once, and no second time."""
    registry = Registry(Reference("hello-world"), attempts=0)
    answer = registry.get("manifests/latest", "HEAD", Accept=", ".join(MANIFEST_TYPES + INDEX_TYPES))
    left = answer.headers.get("ratelimit-remaining", "").partition(";")[0]
    check(left != "0", f"{registry.base} has no pulls left for this address: docker login, or mocker serve next door")
    return f"{registry.base} answers" + (f", {left} pulls are left" if left else "")

# ── The slide: what each part gives ────────────────────────────────────────────────────────────────

PROBE = r"""
can() { row=$1; shift; if "$@" >/dev/null 2>&1; then echo "$row|yes"; else echo "$row|no"; fi; }
echo "processes it sees|$(ls -d /proc/[0-9]* | wc -l)"
echo "its own number|$$"
echo "host name|$(uname -n)"
echo "network interfaces|$(grep -c : /proc/net/dev)"
echo "mounts it sees|$(grep -c . /proc/self/mounts)"
can "may take 200 MB of memory" dd if=/dev/zero of=/dev/null bs=200M count=1
# PID/root has this file: it is the host's process, not just one of that number
can "may signal the host's" sh -c 'test -e "/proc/$1/root$0" && kill -0 "$1"' "$0" "$1"
can "may mount" sh -c 'mount -t tmpfs none /tmp && umount /tmp'
can "may rename the host" dd of=/proc/sys/kernel/hostname count=0 conv=notrunc  # it is only opened
can "may set the kernel" dd of=/proc/sys/kernel/panic count=0 conv=notrunc
can "may read the kernel's log" dmesg
can "has a filter of system calls" grep "Seccomp:.2" /proc/self/status
sed -n "s/^CapEff:\s*/capabilities|/p" /proc/self/status
"""

def compare(arguments):
    """Host, chroot, cgroup, container (mocker's, and docker's if it has the image): what each sees and may do.

    Usage:
      mocker compare [<name>]
    """
    image = arguments["<name>"] or "busybox"
    find_image(image)
    probe = ["sh", "-c", PROBE, os.path.realpath(__file__), str(os.getpid())]  # a file and a process of the host
    mocker = [sys.executable, __file__, "run", "-q", "--rm"]
    answers = {
        "host": ask_tool(["unshare", "-m", *probe]),  # what it mounts shows nowhere else
        "chroot": ask_tool([*mocker, "--only=chroot", image, *probe]),
        "cgroup": ask_tool([*mocker, "--only=cgroup", "-m", "64m", image, *probe]),
        "mocker": ask_tool([*mocker, "-m", "64m", image, *probe]),
        "docker": ask_tool(["docker", "run", "--rm", "--pull=never", "-m", "64m", image, *probe]),
    }
    if answers["docker"] is None:
        say(f"docker is not here, or has not the image: docker pull {image}")
        del answers["docker"]
    check(all(answers.values()), f"the probe can't run in {image}: it takes a shell, as busybox has one")
    table = {}  # row → what each of the worlds says
    for answer in answers.values():
        for row, value in re.findall(r"(.*)\|(.*)", answer):
            value = str(bin(int(value, 16)).count("1")) if row == "capabilities" else printable(value[:12])
            table.setdefault(row, []).append(value)
    print(tabulate.tabulate([[row, *values] for row, values in table.items()], ["", *answers], disable_numparse=True))

def clean(arguments):
    """Undo whatever outlived a run: leftovers of killed mockers, unfinished pulls.

    Usage:
      mocker clean [--containers]

    Options:
      --containers  also remove the directories of containers that have ended
    """
    with partial_directory():
        pass  # that removed what pulls left; what runs left, every command sweeps away before it begins
    for container in all_containers() if arguments["--containers"] else ():
        if container["id"] not in container_ids():
            delete_directory(store("containers", container["id"]))
            say(f"removed {container['name']}")

# ── Looking into it: inspect, diff ─────────────────────────────────────────────────────────────────

MEASURES = ("memory.current", "memory.max", "memory.usage_in_bytes", "memory.limit_in_bytes", "pids.current",
            "pids.max", "cpu.max", "cpu.cfs_quota_us", "cpu.stat", "cpuacct.usage")  # of cgroup v2 and v1
# What mocker makes if an image lacks it. (docker makes its own in a layer between.)
MOUNT_POINTS = {"/dev", "/proc", "/sys", "/etc", "/etc/mtab", *(f"/etc/{name}" for name in ETC_FILES)}

def inspect(arguments):
    """Show the anatomy of an image or a container (name, id, or how the id begins), as a tree or for programs.

    Usage:
      mocker inspect [--json] <name>
    """
    name = arguments["<name>"]
    container = find_container(name)
    document = anatomy_of_container(container) if container else anatomy_of_image(name)
    if arguments["--json"]:
        print(json.dumps(document, indent=2))
    else:
        draw(name, document)

def find_container(name):
    """By its name, its id, or how its id begins; None if there is none."""
    there = all_containers()
    found = [one for one in there if name in (one["name"], one["id"])] or [
        one for one in there if name and one["id"].startswith(name)]
    check(len(found) < 2, f"the ids of {len(found)} containers begin with {name}: write more of it")
    return found[0] if found else None

def draw(label, value, first="", rest=""):
    """A document as a tree for a screen of 80 columns, which cuts what is long; --json doesn't."""
    branches = []
    if isinstance(value, list):
        branches = [(number, ", ".join(in_words(*pair) for pair in row.items())) for number, row in enumerate(value, 1)]
    elif isinstance(value, dict) and any(isinstance(inner, dict) for inner in value.values()):
        branches = list(value.items())
    text = label if branches else f"{label}: {in_words(label, value)}"
    print(textwrap.fill(printable(str(text)), 80, initial_indent=first, subsequent_indent=f"{rest}  ", placeholder=" …",
                        max_lines=3 if len(first) < 8 else 1, break_on_hyphens=False))  # 3 for the config and its like
    for number, (name, inner) in enumerate(branches, 1):
        last = number == len(branches)
        draw(name, inner, rest + ("└── " if last else "├── "), rest + ("    " if last else "│   "))

def in_words(key, value):
    """A value in one line; of a digest the beginning is enough."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {in_words(name, inner)}" for name, inner in value.items())
    text = " ".join(value) if isinstance(value, list) else f"{value:,} bytes" if key == "size" else str(value)
    return re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52,}", r"\1…", text)

def anatomy_of_image(name):
    """index → manifest → config → layers: each names the next by its digest."""
    missing = f"no such image or container: {name[:100]}: see mocker images, or ls {store('containers')}"
    with explained(MockerError, missing):
        file = Reference(name).file
    with explained(FileNotFoundError, missing):
        image = Image(file)
    config, *layers = [{"digest": blob["digest"], "size": blob["size"]} for blob in image.blobs]
    settings = image.config.get("config") or {}
    left = iter(layers)
    history = [{**({} if line.get("empty_layer") else next(left, {})), "history": str(line.get("created_by", "?"))}
               for line in image.config.get("history") or [] if isinstance(line, dict)]
    return {
        "image": {"name": image.name, "version": image.version, "file": image.file},
        "index": image.stored.get("index") or {},
        "manifest": {key: image.stored[key] for key in ("digest", "size", "mediaType")},
        "config": {**config, **{key: settings[key] for key in ("Entrypoint", "Cmd", "User", "WorkingDir", "Env")
                                if settings.get(key)}},
        "layers": history + list(left),
    }

def anatomy_of_container(container):
    """Of one that runs, what the kernel says; of one that has ended, what it left."""
    id, pid, directory = container["id"], container["pid"], store("containers", container["id"])
    facts = {key: container[key] for key in ("id", "name", "status", "exit_code", "image") if key in container}
    facts["command"] = shlex.join(container["arguments"])
    root = {"upper": f"{directory}/upper", "layers": container["layers"]}  # the topmost first
    if facts["status"] != "running" or id not in container_ids():
        facts["status"] = facts["status"].replace("running", "killed")  # mocker was, and could not note it
        return {"container": facts, "root": root}
    with explained((OSError, LookupError), f"container {id} has just ended: inspect it again"):
        status = dict(re.findall(r"^(\w+):\s*(.*)", read_kernel_file(f"/proc/{pid}/status"), re.M))
        mounts = re.findall(r"^\S+ / (.*) 0 0$", read_kernel_file(f"/proc/{pid}/mounts"), re.M)
        return {
            "container": facts,
            "process": {"pid": pid, "inside": int(status["NSpid"].split()[-1]), "uid": int(status["Uid"].split()[1])},
            "namespaces": {kind: {"inside": os.readlink(f"/proc/{pid}/ns/{kind}"),
                                  "host": os.readlink(f"/proc/self/ns/{kind}")} for kind in NAMESPACES},
            "root": {**root, "mount": mounts[-1]},
            "network": network_of(pid, id),
            "cgroup": cgroup_of(pid),
            "privileges": {"seccomp": {"1": "strict", "2": "filter"}.get(status.get("Seccomp"), "none"),
                           "capabilities": capabilities_of("CapEff", pid), "bounding": capabilities_of("CapBnd", pid)},
        }

def network_of(pid, id):
    """What is inside, and on the host the other end of the wire, the bridge, and the NAT."""
    addresses = re.findall(r"\|-- (\S+)\n\s+/32 host LOCAL", read_kernel_file(f"/proc/{pid}/net/fib_trie"))
    found = {"interfaces": read_interfaces(pid), "addresses": sorted(set(addresses))}
    for name, network, gateway in read_routes(pid):
        found[f"route to {network}"] = f"via {gateway} dev {name}".replace("via 0.0.0.0 ", "")
    if f"veth0_{id}" in read_interfaces():
        found.update(wire=f"veth0_{id} on {BRIDGE}", NAT=nat_rules("mocker") + nat_rules(f"mocker_{id}"))
    return found

def cgroup_of(pid):
    """The files of its groups, in the kernel's own words; a line of /proc/PID/cgroup is number:controllers:path."""
    found = {}
    for line in read_kernel_file(f"/proc/{pid}/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        directory = os.path.normpath(f"{CGROUP}/{controllers.split(',')[0]}/{path}")
        for file in MEASURES:
            if value := read_kernel_file(f"{directory}/{file}").partition("\n")[0]:
                found.update({"path": path, file: value})
    return found

def diff(arguments):
    """Show what a container changed in its root, as its upper layer has it: A added, C changed, D deleted.

    (After --without=overlay there is no upper layer to look at.)

    Usage:
      mocker diff <container>
    """
    name = arguments["<container>"]
    container = find_container(name)
    check(container, f"no such container: {name[:100]}: see ls {store('containers')}")
    unshare("mount")  # nobody else sees that mount: the layers alone, as the container found them
    with explained(OSError, f"{name} can't be compared ({{}}): try again"), contextlib.ExitStack() as undo:
        scratch = undo.enter_context(partial_directory())
        mount_overlay(container["layers"], scratch)
        undo.callback(unmount, f"{scratch}/rootfs")
        found = changes(store("containers", container["id"], "upper"), f"{scratch}/rootfs")
    for path in sorted(found):
        print(printable(f"{found[path]} {path}"))

def changes(upper, lower):
    """What an upper layer does to what is below it → {path: A, C or D}, as docker diff counts"""
    found, folders = {}, [("", True)]
    while folders:
        folder, is_below = folders.pop()
        names = set(os.listdir(upper + folder))
        if is_below and "trusted.overlay.opaque" in os.listxattr(upper + folder):  # of what is below, nothing is seen
            names.update(os.listdir(lower + folder))
        for path in [f"{folder}/{name}" for name in names]:
            new, old = looks(upper + path), looks(lower + path) if is_below else None
            if new and stat.S_ISDIR(new[0]):
                folders.append((path, old is not None and stat.S_ISDIR(old[0])))
            if new != old and (old or path not in MOUNT_POINTS):
                found[path] = "A" if not old else "C" if new else "D"
                while path := os.path.dirname(path).rstrip("/"):
                    found.setdefault(path, "C")
    return found

def looks(path):
    """What docker compares: not a directory's size and times. None for what is not there, and for a whiteout."""
    try:
        seen, capable = os.lstat(path), "security.capability" in os.listxattr(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISCHR(seen.st_mode) and seen.st_rdev == 0:
        return None
    content = () if stat.S_ISDIR(seen.st_mode) else (seen.st_size, seen.st_mtime_ns)
    return (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_rdev, capable, *content)

# ═══ main: from a command's name to its function ═════════════════════════════════════════════════

COMMANDS = {one.__name__: one for one in (pull, images, run, inspect, diff, compare, serve, verify, doctor, clean)}

def dispatch(argv):
    """A command's docstring is its usage, for docopt as for you."""
    for number in STOPPING:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup(1) has it
            signal.signal(number, interrupted)
    name, *words = argv or [""]
    if name == "help" and words:
        name, words = words[0], ["--help"]
    function = COMMANDS.get(name)
    usage = re.sub(r"\n {4}", "\n", function.__doc__) if function else __doc__[__doc__.index("Usage:") :]
    if name == "--version":
        return print(f"mocker {__version__}")
    if name in ("help", "-h", "--help") or (function and words[:1] in (["-h"], ["--help"])):
        return print(usage.strip())
    arguments = function and parse_words(name, function, usage, words)
    if arguments is None:
        if "--help" in words:
            return print(usage.strip())
        print(usage[usage.index("Usage:") :].partition("\n\nTry")[0].strip(), file=sys.stderr)
        return 125 if argv else 1
    if function is not doctor:  # which must be able to say that colorama is missing
        set_story(arguments)
    sweep()
    if function not in (images, serve, doctor):
        need_root(name)
    return function(arguments)

def parse_words(name, function, usage, words):
    """→ {"--option" or "<argument>": its value}; None if the command takes other words."""
    if function is doctor and not words:  # which must be able to say that docopt is missing, too
        return {}
    # docopt takes no options after the first word that is none, so that `ls -l` can follow `run busybox`;
    # the command's own name must not be that word. Nor does it know of a second column of options.
    usage = re.sub(r"(?<=\S)  +--", "\n  --", usage.replace(f"mocker {name}", "mocker"))
    with contextlib.suppress(docopt.DocoptExit):
        return docopt.docopt(usage, words, False, options_first=function is run)

def interrupted(number, frame):
    """Ctrl-C or SIGTERM before the container runs: undo what was done so far, undisturbed by a second one, then end."""
    for other in STOPPING:
        signal.signal(other, signal.SIG_IGN)
    raise Stopped(number)

def guarded(function, *arguments):
    """What the user can mend becomes one line; what is a bug keeps its traceback. → exit status"""
    try:
        status = function(*arguments)
        sys.stdout and sys.stdout.flush()  # now, when a closed pipe can still be told
        return status
    except MockerError as error:
        write_line(f"mocker: {error}", "error")
        return error.status
    except Stopped as error:
        [number] = error.args
        write_line(f"mocker: stopped by {signal.Signals(number).name}; what was done is undone", "error")
        return 128 + number
    except ModuleNotFoundError as error:
        write_line(f"mocker: the Python package '{error.name}' is missing: pip install -r requirements.txt, "
                   "and run it with that Python", "error")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more at exit
    except OSError as error:
        advice = {**dict.fromkeys(FULL, "make room, or move MOCKER_HOME"),
                  **dict.fromkeys((errno.EROFS, errno.ENOTDIR), "choose another MOCKER_HOME"),
                  errno.EACCES: "only root may" if os.geteuid() else None}.get(error.errno)
        if not advice:
            raise
        write_line(f"mocker: {error.strerror}: {error.filename or HOME}: {advice}", "error")
    return 125

def main():
    argv = sys.argv[2:] if sys.argv[0] == "-c" else sys.argv[1:]  # by the first line, or by python3 mocker.py
    if argv[:1] == ["run"]:
        gc.disable()  # a start leaves too little garbage to look for
    os.umask(0o022)  # what is made is for containers, whose users are others
    while (handle := os.open(os.devnull, os.O_RDWR)) < 3:
        pass  # stdin, stdout or stderr was closed, as cron may do: nothing else may take its number
    os.close(handle)
    os._exit(guarded(dispatch, argv) or 0)  # at once: to take itself apart, Python needs as long as to start

if __name__ == "__main__":
    main()
