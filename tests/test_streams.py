"""mocker run's stdin, stdout, stderr and terminal, the signals that reach it, and its end as pid 1."""

import contextlib
import fcntl
import functools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import host
import pytest
from conftest import MOCKER
from containers import one_line, until

pytestmark = pytest.mark.usefixtures("host_as_before_all")

NUMBERS = "".join(f"{number}\n" for number in range(1, 200_001))  # 1.3 MB


# ---- output --------------------------------------------------------------------------------------


def test_stdout_and_stderr_stay_apart(run):
    done = run("busybox", "sh", "-c", "echo out; echo err >&2")
    assert (done.stdout, done.stderr) == ("out\n", "err\n")


def test_a_burst_and_then_the_end(run, store):
    assert run("busybox", "seq", 200_000).stdout == NUMBERS
    [log] = store.home.glob("containers/*/log")
    assert log.read_text() == NUMBERS


def test_a_burst_on_both(run):
    done = run("busybox", "sh", "-c", "seq 200000 & seq 200000 >&2; wait")
    assert done.stdout == NUMBERS and done.stderr == NUMBERS


def test_a_slow_reader_loses_nothing(start):
    container = start("busybox", "seq", 200_000, text=False)
    parts = []
    for _ in range(10):
        parts.append(container.process.stdout.read(1000))
        time.sleep(0.05)
    parts.append(container.process.stdout.read())
    assert b"".join(parts).decode() == NUMBERS
    assert container.process.wait(60) == 0


def test_a_reader_that_does_not_block(run, store):
    """A terminal or an ssh session may have left our stdout non-blocking."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    process = store.popen("run", "-q", "busybox", "seq", 200_000, stdout=writer, stdin=subprocess.DEVNULL)
    os.close(writer)
    with open(reader) as file:
        time.sleep(1)
        assert file.read() == NUMBERS
    assert (process.wait(60), process.stderr.read()) == (0, "")


@pytest.mark.parametrize("stream", ["", ">&2"])
def test_a_reader_that_has_seen_enough(store, stream):
    """mocker run busybox yes | head -1"""
    reader, writer = os.pipe()
    ends = {"stdin": subprocess.DEVNULL, "stderr" if stream else "stdout": writer}
    process = store.popen("run", "-q", "busybox", "sh", "-c", f"yes {stream}", **ends)
    os.close(writer)
    assert os.read(reader, 2) == b"y\n"
    os.close(reader)
    out, err = process.communicate(timeout=60)
    assert "Traceback" not in (out or "") + (err or "")


def test_any_bytes_arrive_as_they_are(run):
    data = bytes(range(256)) * 5000
    done = run("busybox", "cat", input=data, text=False)
    assert (done.stdout, done.stderr) == (data, b"")


# ---- stdin ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["-i"]])
def test_stdin_reaches_it_and_its_end_too(run, options):
    assert run(*options, "busybox", "wc", "-l", input="a\nb\n", timeout=60).stdout == "2\n"
    assert run(*options, "busybox", "wc", "-c", input="", timeout=60).stdout == "0\n"


def test_stdin_from_a_file(run, tmp_path):
    (tmp_path / "file").write_text(NUMBERS)
    with open(tmp_path / "file") as file:
        assert run("busybox", "wc", "-l", stdin=file, timeout=60).stdout == "200000\n"


def test_stdin_that_nobody_reads(run):
    assert run("busybox", "true", input=NUMBERS, timeout=60).returncode == 0
    assert run("busybox", "head", "-1", input=NUMBERS, timeout=60).stdout == "1\n"
    assert run("busybox", "sh", "-c", "exec <&-; sleep 0.3; echo on", input=NUMBERS, timeout=60).stdout == "on\n"


def test_stdin_that_never_ends(start):
    container = start("busybox", "head", "-1")
    container.process.stdin.write("first\n")
    container.process.stdin.flush()
    assert container.process.wait(60) == 0
    assert container.process.stdout.read() == "first\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
@pytest.mark.parametrize("options", [["-q"], ["-i"]])
def test_closed_descriptors(store, tmp_path, closed, options):
    """As cron and some daemons leave them: mocker run … <&- >&- 2>&-"""
    volume = f"{tmp_path}:/shared"
    words = " ".join(f"{number}>&-" if number else "<&-" for number in closed)
    script = "echo out; echo err >&2; echo ran >/shared/file; read line; exit 7"
    command = store.command(["run", *options, "-v", volume, "busybox", "sh", "-c", script])
    settings = {"env": store.env, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 20}
    done = subprocess.run(["sh", "-c", f'exec "$@" {words}', "sh", *command], **settings)
    assert (tmp_path / "file").read_text() == "ran\n"
    assert done.returncode == 7
    assert done.stdout == ("" if 1 in closed else "out\n")
    assert "Traceback" not in done.stderr and ("err\n" in done.stderr) == (2 not in closed)


def test_no_terminal_at_all(run):
    done = run("busybox", "sh", "-c", "tty; : </dev/tty", start_new_session=True)
    assert done.stdout == "not a tty\n" and "/dev/tty" in done.stderr


# ---- a terminal ----------------------------------------------------------------------------------


class Screen:
    """A terminal of the test's own, with mocker in it as the foreground process."""

    def __init__(self, store, *arguments, rows=33, columns=101, quiet=True, under=()):
        self.master, self.slave = pty.openpty()
        self.resize(rows, columns)
        self.before = termios.tcgetattr(self.slave)
        self.said = ""
        self.process = subprocess.Popen(
            [*under, *store.command(["run", *["-q"] * quiet, *arguments])],
            **dict.fromkeys(("stdin", "stdout", "stderr"), self.slave),
            env=store.env,
            preexec_fn=self.take_terminal,
        )

    def take_terminal(self):
        os.setsid()
        fcntl.ioctl(self.slave, termios.TIOCSCTTY, 0)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, keys):
        os.write(self.master, keys)

    def see(self, text, seconds=20):
        """Wait until this text is on the screen."""

        def seen():
            ended = self.process.poll() is not None
            self.look()
            assert text in self.said or not ended, f"it has ended, and said: {self.said!r}"
            return text in self.said

        until(seen, lambda: f"{text!r} not in {self.said!r}", seconds)

    def look(self):
        while select.select([self.master], [], [], 0.05)[0]:
            self.said += os.read(self.master, 4096).decode(errors="replace")

    def end(self):
        """→ its exit status; the terminal must be as it was."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None and time.monotonic() < deadline:
            self.look()
        self.look()
        assert termios.tcgetattr(self.slave) == self.before, "the terminal is not as it was"
        return self.process.wait(1)

    def close(self):
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2)
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@pytest.fixture
def screen(store):
    screens = []

    def screen(*arguments, **size):
        screens.append(Screen(store, *arguments, **size))
        return screens[-1]

    yield screen
    for one in screens:
        one.close()


def test_a_terminal(screen):
    script = "tty; stty size; echo $TERM; test -t 0 -a -t 1 -a -t 2 && echo three; exit 9"
    shell = screen("-it", "busybox", "sh", "-c", script)
    assert shell.end() == 9
    assert shell.said.split("\r\n")[:4] == ["/dev/pts/0", "33 101", "xterm", "three"]


def test_the_terminal_is_mocker_s_until_the_program_runs(screen):
    """Raw only then: before, a line that mocker tells would not return to the left, nor Enter reach --step."""
    shell = screen("-it", "--explain", "busybox", "true", quiet=False)
    assert shell.end() == 0
    assert "Exec: become" in shell.said and "\n" not in shell.said.replace("\r\n", "")


def test_output_waits_until_the_terminal_is_raw(screen):
    slowly = ["strace", "-f", "-qq", "-o/dev/null", "-etrace=ioctl", "-einject=ioctl:delay_enter=20000"]
    shell = screen("-it", "busybox", "echo", "first", under=slowly)
    assert shell.end() == 0
    assert shell.said == "first\r\n"


def test_keys_are_for_step_until_the_program_runs(screen):
    shell = screen("-it", "--step", "busybox", "cat", quiet=False)
    enters, deadline = 0, time.monotonic() + 60
    while 'Running "cat"' not in shell.said:
        shell.look()
        if shell.said.count("q ends] ") > enters:
            time.sleep(0.05)  # for somebody else to take the key
            shell.type(b"\r")
            enters += 1
        assert shell.process.poll() is None and time.monotonic() < deadline, shell.said
    assert enters > 10
    until(lambda: not termios.tcgetattr(shell.slave)[3] & termios.ICANON)  # before, Ctrl-D is no key
    shell.type(b"meow\r\x04")
    assert shell.end() == 0
    assert shell.said.count("meow") == 2  # the terminal's echo, and cat's


def test_end_of_file_before_the_program_runs_is_not_its(screen):
    shell = screen("-it", "busybox", "sh")
    shell.type(b"\x04")
    shell.see("# ")
    shell.type(b"exit 7\r")
    assert shell.end() == 7


def test_what_is_typed_before_the_program_runs_is_kept(screen):
    shell = screen("-it", "busybox", "sh", "-c", "read a; read b; echo got $a $b")
    shell.type(b"early\rbi")
    shell.see("early")
    time.sleep(1)
    shell.type(b"rd\r")
    shell.see("got early bird")
    assert shell.end() == 0


def test_a_dialogue_with_a_shell(screen):
    shell = screen("-i", "-t", "busybox", "sh")
    shell.see("# ")
    assert termios.tcgetattr(shell.slave)[3] & (termios.ECHO | termios.ICANON | termios.ISIG) == 0, "not raw"
    shell.type(b"echo $((6 * 7)) is it\r")
    shell.see("\r\n42 is it\r\n")
    shell.type(b"exit 5\r")
    assert shell.end() == 5


def test_end_of_file_on_the_terminal_ends_a_shell(screen):
    shell = screen("-it", "busybox", "sh")
    shell.see("# ")
    shell.type(b"\x04")
    assert shell.end() == 0


def test_a_window_that_is_closed_ends_a_shell(screen, store):
    """As number 1 it ignores SIGHUP; but its terminal is gone, too."""
    shell = screen("-it", "busybox", "sh")
    shell.see("# ")
    os.close(shell.master)
    shell.master = os.open(os.devnull, os.O_RDWR)
    shell.process.wait(60)
    assert [config["status"] for config in configs(store)] == ["exited"]


def test_control_c_reaches_the_program_and_not_mocker(screen):
    script = "trap 'echo caught; exit 3' INT; echo ready; while :; do sleep 1; done"
    shell = screen("-it", "busybox", "sh", "-c", script)
    shell.see("ready")
    shell.type(b"\x03")
    assert shell.end() == 3
    assert "caught" in shell.said


def test_job_control_works(screen):
    shell = screen("-it", "busybox", "sh")
    shell.see("# ")
    assert "job control" not in shell.said
    shell.type(b"sh -c 'echo be''gun; exec sleep 1000'\r")  # what it echoes is not what it says
    shell.see("begun")
    shell.type(b"\x1a")
    shell.see("Stopped")
    shell.type(b"kill %1; exit 4\r")
    time.sleep(0.2)
    shell.type(b"exit 4\r")
    assert shell.end() == 4


def test_the_window_s_size_follows(screen):
    shell = screen("-it", "busybox", "sh")
    shell.see("# ")
    shell.resize(44, 123)

    def followed():
        shell.type(b"stty size\r")
        shell.look()
        return "44 123" in shell.said

    until(followed, "the size did not follow", 10)
    shell.type(b"exit\r")
    assert shell.end() == 0


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM])
def test_the_terminal_is_as_before_after_a_violent_end(screen, store, ending):
    shell = screen("-it", "busybox", "sh", "-c", "trap : TERM; echo ready; exec sleep 1000")
    shell.see("ready")
    [child] = [pid for pid in host.pids() if (host.process_status(pid) or {}).get("parent") == shell.process.pid]
    if ending == signal.SIGKILL:
        os.kill(child, ending)
    else:
        for _ in range(3):
            os.kill(shell.process.pid, ending)
            time.sleep(1)  # or two may become one
    assert shell.end() == 137


def test_the_terminal_is_as_before_after_a_failure(screen):
    shell = screen("-it", "busybox", "no-such-program")
    assert shell.end() == 127
    assert "no-such-program" in shell.said


def test_a_terminal_without_one_outside(run):
    """docker run -t, from a script: the program has a terminal, its output goes on as it is."""
    done = run("-t", "busybox", "sh", "-c", "tty; test -t 1 && echo yes; exit 6", timeout=60)
    assert (done.stdout.split(), done.returncode) == (["/dev/pts/0", "yes"], 6)


def test_keys_without_a_keyboard(run):
    one_line(run("-it", "busybox", "sh", input="exit\n"), "TTY")


def test_a_burst_on_the_terminal(screen):
    shell = screen("-t", "busybox", "seq", "20000")
    assert shell.end() == 0
    assert shell.said.replace("\r", "") == "".join(f"{number}\n" for number in range(1, 20_001))


def test_without_i_the_terminal_s_keys_are_left_alone(screen):
    shell = screen("busybox", "sh", "-c", "read line; echo \"<$line>\"")
    assert shell.end() == 0
    assert shell.said.endswith("<>\r\n")


def test_output_that_finds_no_room(store):
    """As docker, it says so, and does not end as if all were well."""
    with open("/dev/full", "w") as full:
        process = store.popen("run", "-q", "busybox", "seq", "100000", stdout=full)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 125 and re.fullmatch("mocker: .*no space is left.*\n", said)


# ---- signals -------------------------------------------------------------------------------------

SIGNALS = ["HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ABRT", "SYS", "XCPU", "PROF", "PWR"]
TRAPS = "; ".join(f"trap 'echo {name}; exit {40 + number}' {name}" for number, name in enumerate(SIGNALS))


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_is_passed_on(start, name):
    container = start("busybox", "sh", "-c", f"{TRAPS}; echo ready; while :; do sleep 0.1; done")
    assert container.process.stdout.readline() == "ready\n"
    container.process.send_signal(getattr(signal, f"SIG{name}"))
    assert container.process.wait(60) == 40 + SIGNALS.index(name)
    assert container.process.stdout.read() == f"{name}\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_third_one_is_meant(start, number):
    container = start("busybox", "sh", "-c", "trap 'echo no' INT TERM; echo ready; while :; do sleep 0.05; done")
    assert container.process.stdout.readline() == "ready\n"
    for _ in range(2):
        container.process.send_signal(number)
        assert container.process.stdout.readline() == "no\n"
    container.process.send_signal(number)
    assert container.process.wait(60) == 137


def test_a_program_that_has_no_handler_as_pid_1_ends_at_the_third(start):
    container = start("busybox", "sleep", "1000")
    for _ in range(3):
        container.process.send_signal(signal.SIGTERM)
        time.sleep(1)  # or two may become one
    assert container.process.wait(60) == 137


def test_a_signal_is_passed_on_even_if_mocker_has_not_seen_the_exec(store):
    """On a busy machine it learns of both at once; here it is stopped meanwhile."""
    process = store.popen("run", "-q", "busybox", "sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done")
    pid = until(lambda: next((config["pid"] for config in configs(store) if config["pid"]), None))
    process.send_signal(signal.SIGSTOP)
    until(lambda: signal.SIGTERM in caught(pid) and signal.SIGHUP not in caught(pid))  # mocker's child has both
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 7, process.communicate()


def test_a_signal_just_before_a_wait(start, tmp_path):
    """Python's handler is not called before the wait is over: an endless one would keep the signal."""
    library = tmp_path / "nap.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, MOCKER.parent / "tests/programs/nap.c"], check=True)
    script = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    container = start("busybox", "sh", "-c", script, env={"LD_PRELOAD": str(library)})
    assert container.process.stdout.readline() == "ready\n"
    container.process.send_signal(signal.SIGTERM)
    assert container.process.wait(60) == 7


def test_the_fourth_ends_mocker_though_nobody_takes_its_output(start, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDWR)
    container = start("busybox", "yes", stdout=reader)
    for _ in range(40):  # on a busy machine two may become one
        if container.process.poll() is None:
            container.process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
    assert container.process.wait(60) == 143
    os.close(reader)


def test_nohup(store):
    """Whoever serves a class may close the window."""
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = store.popen("serve", "--port=0", preexec_fn=ignore)
    assert process.stderr.readline().startswith("Serving")
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)
    assert "SIGTERM" in process.communicate(timeout=60)[1]
    assert process.returncode == 143


def test_threads_wait_for_each_other_s_imports(tmp_path):
    """As two do that undo something at the same time."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.5)\nvalue = 1\n")
    code = f"""if True:
        import sys, threading, time, mocker
        sys.path.append({str(tmp_path)!r})
        slow, found = mocker.lazily("slow"), []
        threads = [threading.Thread(target=lambda: found.append(slow.value)) for _ in range(2)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # so that the second one finds half a module
        for thread in threads:
            thread.join()
        print(found)
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=MOCKER.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[1, 1]\n", "")


def test_a_second_signal_does_not_disturb_the_end_of_the_first():
    code = """if True:
        import os, signal, mocker
        signal.signal(signal.SIGTERM, mocker.interrupted)
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except mocker.Stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            print("undone")
        """
    done = subprocess.run([sys.executable, "-c", code], cwd=MOCKER.parent, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("undone\n", "")


def configs(store):
    return [json.loads(path.read_text()) for path in store.home.glob("containers/*/config.json")]


def caught(pid):
    """The signals that a process has a handler for."""
    [bits] = re.findall(r"SigCgt:\s*(\w+)", host.content(f"/proc/{pid}/status")) or ["0"]
    return {number for number in signal.valid_signals() if int(bits, 16) >> number - 1 & 1}


# ---- the end -------------------------------------------------------------------------------------


def running(argument):
    return [pid for pid in host.pids() if f"\0{argument}\0" in host.content(f"/proc/{pid}/cmdline")]


@pytest.mark.parametrize("redirect", ["", ">/dev/null 2>&1 </dev/null"])
def test_a_daemon_ends_with_its_container(run, redirect):
    done = run("busybox", "sh", "-c", f"setsid sleep 4321.5 {redirect} & echo started")
    assert (done.returncode, done.stdout) == (0, "started\n")
    assert running("4321.5") == []


def test_a_daemon_s_last_words_are_not_lost(run):
    script = "(trap '' HUP; seq 200000; >/done) & until [ -e /done ]; do sleep 0.1; done; echo first gone >&2"
    done = run("busybox", "sh", "-c", script)
    assert done.stdout == NUMBERS


def test_orphans_are_reaped_by_its_first_process(run):
    script = "(sleep 0.1 & ) ; sleep 0.5; wait; cat /proc/[0-9]*/stat | grep -c ' Z '"
    assert run("busybox", "sh", "-c", script).stdout == "0\n"


def test_stdout_is_closed_when_it_ends_and_not_before(start):
    container = start("busybox", "sh", "-c", "exec >&-; exec 2>&-; cat")
    time.sleep(0.5)
    assert container.process.poll() is None
    container.close_stdin()
    assert container.process.wait(60) == 0


def test_a_stdin_that_does_not_block_is_read_to_its_end(run, store):
    """As another program may have left it: nothing there yet is not the end."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with subprocess.Popen(store.command(["run", "-q", "--rm", "busybox", "cat"]), env=store.env, stdin=reader,
                          stdout=subprocess.PIPE) as process:
        os.close(reader)
        time.sleep(0.5)
        os.write(writer, b"late")
        os.close(writer)
        assert process.stdout.read() == b"late"
    assert process.returncode == 0
