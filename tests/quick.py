"""mocker fifty times in a second: each call is a fork of a Python that has imported its packages.

A call does what `python mocker.py ARGUMENTS` does, but for the 0.3 s that it takes to start, and
it waits less between two attempts. For tests with hundreds of calls; the fixture `quick` starts it.
"""

import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

MOCKER = Path(__file__).resolve().parent.parent / "mocker.py"
SECONDS = 60  # then a call is ended by SIGALRM, and its status is -14


class Quick:
    """quick(*args, env=) → subprocess.CompletedProcess, as the fixture `mocker`."""

    def __init__(self, directory):
        self.output = [directory / "stdout", directory / "stderr"]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, __file__, *self.output], text=True, **pipes)

    def __call__(self, *args, env):
        self.process.stdin.write(json.dumps([[str(arg) for arg in args], env]) + "\n")
        self.process.stdin.flush()
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(args, status, *(path.read_text(errors="replace") for path in self.output))

    def close(self):
        self.process.communicate(timeout=60)


def serve(output):
    import docopt  # noqa: F401  what `pull` imports
    import requests  # noqa: F401

    source, pauses = MOCKER.read_text(), "[0.3 * 2**n for"
    assert pauses in source
    code = compile(source.replace(pauses, "[0.02 * 2**n for"), MOCKER, "exec")
    for line in sys.stdin:
        arguments, env = json.loads(line)
        pid = os.fork()
        if pid == 0:
            run(code, arguments, env, output)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def run(code, arguments, env, output):
    """In the fork: be mocker."""
    status = 1
    try:
        for number, path in enumerate(["/dev/null", *output]):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [str(MOCKER), *arguments]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        main.__file__ = str(MOCKER)
        signal.alarm(SECONDS)
        exec(code, main.__dict__)
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1:])
