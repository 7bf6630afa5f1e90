"""The README's transcripts, run again: the same lines come out, but for addresses, digests, sizes and ids."""

import re
import shlex
import socket
import subprocess
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


def test_the_readme_s_commands_print_what_it_shows(hub, mocker, tmp_path):
    here = tmp_path / "checkout"
    here.mkdir()
    (here / "mocker.py").write_text(f'#!/bin/sh\nexec {shlex.join(mocker.command([]))} "$@"\n')
    (here / "mocker.py").chmod(0o755)
    for command, shown in transcripts():
        done = subprocess.run(command, shell=True, cwd=here, env={**mocker.env, "MOCKER_HUB": hub.url}, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=120)
        assert normal(done.stdout) == normal(shown), command


@pytest.mark.parametrize("command", ["tests/demo", "tests/all"])
def test_the_two_commands_are_there(command):
    assert f"    {command} " in README.read_text()
    assert subprocess.run(["bash", "-n", README.parent / command]).returncode == 0
