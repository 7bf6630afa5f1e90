"""The README's transcripts, run again: the same lines come out, but for addresses, digests, sizes and ids."""

import re
import shlex
import socket
import subprocess
import time
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"
# What differs from one run to the next, and what stands for it.
CHANGING = [
    (r"http://127\.0\.0\.1:\d+", "https://registry-1.docker.io"),
    (r"http://127\.0\.0\.3:\d+", "https://auth.docker.io"),
    (r"http://127\.0\.0\.2:\d+/[^ ]*", "https://cdn.example/…"),
    (r"[0-9a-f]{64}|[0-9a-f]{12}…", "…"),
    (r"[\d,]+ bytes", "… bytes"),
    (r'(HTTP/1.1" \d+) .*', r"\1 …"),
    (r"HOSTNAME=[0-9a-f]{8}", "HOSTNAME=1a2b3c4d"),
    (r"process \d{2,} ?", "process 4711 "),
    (rf"\b{re.escape(socket.gethostname())}$", "laptop"),
    (r"\b10\.[0-9.]+\.", "10.0.0."),  # another subnet, if that one is in use
]


def transcripts():
    """(command, what the README shows of it), in order."""
    found = []
    for block in re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif found:
                found[-1][1].append(line)
    return [(command, "\n".join(lines).strip()) for command, lines in found]


def normal(text):
    for pattern, stand_in in CHANGING:
        text = re.sub(pattern, stand_in, text, flags=re.MULTILINE)
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


@pytest.fixture
def talk(hub, mocker, tmp_path):
    """talk(command, ...): as the README has it, in a checkout."""
    here = tmp_path / "checkout"
    here.mkdir()
    (here / "mocker.py").write_text(f'#!/bin/sh\nexec {shlex.join(mocker.command([]))} "$@"\n')
    (here / "mocker.py").chmod(0o755)
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**mocker.env, "MOCKER_HUB": hub.url}
    return lambda command, **more: subprocess.Popen(command, cwd=here, env=env, **{**pipes, "shell": True, **more})


def test_the_readme_s_commands_print_what_it_shows(talk):
    for command, shown in transcripts():
        assert normal(talk(command).communicate(timeout=120)[0]) == normal(shown), command


def test_the_speaker_s_commands(talk, store):
    """Those without a transcript: in a terminal, with the speaker at its keys, and a second one."""
    commands = re.findall(r"^    (?:\$ )?(\./mocker\.py .*?)(?: +#.*)?$", README.read_text(), re.MULTILINE)
    step, inspect, compare, clean = [command for command in commands if "--help" not in command]
    with talk(["script", "-qefc", step, "/dev/null"], shell=False, stdin=subprocess.PIPE) as speaker:
        for _ in range(300):
            speaker.stdin.write("exit\r")  # which goes on at each step, and ends the shell
            speaker.stdin.flush()
            seen = talk(inspect).communicate(timeout=60)[0]
            if "seccomp" in seen:
                break
        assert "box" in seen and "seccomp" in seen
        while speaker.poll() is None:
            speaker.stdin.write("exit\r")
            speaker.stdin.flush()
            time.sleep(0.3)
        assert speaker.returncode == 0
        assert speaker.stdout.read().count("■ ") > 12
    assert "may mount" in talk(compare).communicate(timeout=120)[0]
    assert "mocker run" in talk("./mocker.py run --help").communicate(timeout=60)[0]
    assert re.match("ok +kernel", talk("./mocker.py doctor").communicate(timeout=60)[0])
    talk("./mocker.py run -q --name=kept busybox true").communicate(timeout=60)
    assert "removed kept" in talk(clean).communicate(timeout=60)[0]
    assert not list(store.home.glob("containers/*"))


@pytest.mark.parametrize("command", ["tests/demo", "tests/all"])
def test_the_two_commands_are_there(command):
    assert f"    {command} " in README.read_text()
    assert subprocess.run(["bash", "-n", README.parent / command]).returncode == 0
