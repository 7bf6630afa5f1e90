"""Fixtures: mocker with a home of its own, and the registries that it pulls from."""

import os
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import fake as fakes
import images
import pytest
import quick as quick_calls
import registry as registries

pytest_plugins = ["containers"]  # and those to run containers with

for number, usual in (signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL):
    if signal.getsignal(number) == signal.SIG_IGN:  # as under nohup; what is started here would inherit that
        signal.signal(number, usual)

MOCKER = Path(__file__).resolve().parent.parent / "mocker.py"
START = shlex.split(MOCKER.read_text().partition("\n")[0])[-1]  # what its first line says


class Mocker:
    """Calls mocker.py as a user would. Its store is `home`, its Docker Hub is `hub`."""

    def __init__(self, home, hub, user_home):
        self.home = home
        self.env = {
            **os.environ,
            "MOCKER_HOME": str(home),
            "MOCKER_HUB": hub,
            "HOME": str(user_home),
            "PYTHONDONTWRITEBYTECODE": "",  # so that it is compiled once, as for a user
        }

    def __call__(self, *args, input=None, env=None, timeout=120, check=False, **options):
        """Run `mocker ARGS` to its end; returns subprocess.CompletedProcess."""
        stdin = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
        settings = {"capture_output": True, **stdin, **self.settings(env, options)}
        done = subprocess.run(self.command(args), check=False, timeout=timeout, **settings)
        if check:
            assert done.returncode == 0, f"{args}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def popen(self, *args, env=None, **options):
        """Start `mocker ARGS`; pipes, unless the options say otherwise."""
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen(self.command(args), **{**pipes, **self.settings(env, options)})

    def command(self, args):
        return [sys.executable, "-c", START, str(MOCKER), *map(str, args)]

    def settings(self, env, options):
        """Text unless text=False is among the options, with mocker's environment and `env`."""
        text = {"text": True, "errors": "replace"} if options.get("text", True) else {}
        return {**text, **options, "env": {**self.env, **(env or {})}}


@pytest.fixture
def home(tmp_path):
    """Where mocker keeps its images and containers in this test."""
    return tmp_path / "mocker"


@pytest.fixture
def mocker(home, registry, tmp_path):
    """mocker(*args, input=, env=, timeout=, check=) and mocker.popen(*args)"""
    user_home = tmp_path / "user"
    user_home.mkdir()
    return Mocker(home, registry.url, user_home)


def with_images(registry):
    """Push the two small images; give .need("library/tomcat") for the others."""
    pushed = set()

    def need(name):
        if name not in pushed:
            registry.push(images.image(name.rpartition("/")[2]), f"{name}:latest")
            pushed.add(name)
        return name

    registry.need = need
    need("library/hello-world")
    need("library/busybox")
    return registry


@pytest.fixture(scope="session")
def registry():
    """A registry without login, with library/hello-world and library/busybox in it."""
    if "MOCKER_TEST_INSIDE" in os.environ:  # in another kernel there is none: see test_cgroup.py
        yield types.SimpleNamespace(url="http://127.0.0.1:1")
        return
    with registries.plain() as plain:
        yield with_images(plain)


@pytest.fixture(scope="session")
def hub():
    """As Docker Hub: wants a token, redirects blobs to a CDN. The same two images."""
    with registries.hub() as hub:
        yield with_images(hub)


@pytest.fixture
def fake(tmp_path):
    """A registry that serves whatever the test puts in, lies too (fake.py)."""
    with fakes.serving(tmp_path / "layout") as fake:
        yield fake


@pytest.fixture(scope="session")
def forks(tmp_path_factory):
    forks = quick_calls.Quick(tmp_path_factory.mktemp("quick"))
    yield forks
    forks.close()


@pytest.fixture
def quick(mocker, forks):
    """quick(*args, env=): as mocker(), but a fork of what has begun already, for hundreds of calls."""
    return lambda *args, env=(): forks(*args, env={**mocker.env, "MOCKER_TIMEOUT": "1", **dict(env)})
