"""exec_stub: what the container's first process is between mocker's Python and the image's program.

Its code for both machines runs in an emulator; this machine's runs for real in every other test, too.
"""

import os
import struct
import subprocess
import sys
import types
from pathlib import Path

import pytest
import unicorn
from containers import one_line
from unicorn import arm64_const as arm
from unicorn import x86_const as x86

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import mocker as program  # noqa: E402

pytestmark = pytest.mark.usefixtures("host_as_before_all")

STACK, SIZE = 0x7F000000, 0x10000
MACHINES = {  # machine: its emulator, stack pointer, registers of a system call, and what the calls' numbers mean
    "x86_64": ((unicorn.UC_ARCH_X86, unicorn.UC_MODE_64), x86.UC_X86_REG_RSP,
               (x86.UC_X86_REG_RAX, x86.UC_X86_REG_RDI, x86.UC_X86_REG_RSI, x86.UC_X86_REG_RDX),
               {72: "fcntl", 59: "execve", 1: "write", 60: "exit"}),
    "aarch64": ((unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM), arm.UC_ARM64_REG_SP,
                (arm.UC_ARM64_REG_X8, arm.UC_ARM64_REG_X0, arm.UC_ARM64_REG_X1, arm.UC_ARM64_REG_X2),
                {25: "fcntl", 221: "execve", 64: "write", 93: "exit"}),
}  # fmt: skip
ARGUMENTS, ENVIRONMENT = [b"/bin/program", b"program", b"", b"a b"], [b"A=1", b"B="]


class Machine:
    """One machine that runs the stub, and a kernel that answers to its calls what it is told: .calls"""

    def __init__(self, name, answers):
        (architecture, mode), self.sp, self.registers, self.names = MACHINES[name]
        self.cpu, self.answers, self.calls = unicorn.Uc(architecture, mode), answers, []
        if name == "x86_64":
            self.cpu.hook_add(unicorn.UC_HOOK_INSN, self.system_call, None, 1, 0, x86.UC_X86_INS_SYSCALL)
        else:
            self.cpu.hook_add(unicorn.UC_HOOK_INTR, self.system_call)

    def run(self, program):
        """As execve(2) starts it: its segment where that wants to be, and the arguments on the stack."""
        entry, start = struct.unpack_from("<QQ", program, 24)
        kind, flags, offset, address, _, in_file, in_memory, _ = struct.unpack_from("<IIQQQQQQ", program, start)
        assert (kind, flags, in_file, in_memory) == (1, 5, len(program), len(program))
        assert (offset, struct.unpack_from("<H", program, 56)[0]) == (0, 1)
        self.cpu.mem_map(address, SIZE)
        self.cpu.mem_write(address, program)
        self.cpu.mem_map(STACK, SIZE)
        texts, pointers = STACK + SIZE // 2, [len(ARGUMENTS)]
        for text in [*ARGUMENTS, None, *ENVIRONMENT, None]:
            pointers.append(0 if text is None else texts)
            if text is not None:
                self.cpu.mem_write(texts, text + b"\0")
                texts += len(text) + 1
        self.cpu.mem_write(STACK + 0x1000, struct.pack(f"<{len(pointers)}Q", *pointers))
        self.cpu.reg_write(self.sp, STACK + 0x1000)
        self.cpu.emu_start(entry, 0, count=1000)
        return self.calls

    def system_call(self, cpu, *_):
        number, *values = map(cpu.reg_read, self.registers)
        name = self.names[number]
        if name == "execve":
            self.calls.append((name, self.text(values[0]), self.texts(values[1]), self.texts(values[2])))
        elif name == "write":
            self.calls.append((name, values[0], bytes(cpu.mem_read(values[1], values[2]))))
        else:
            self.calls.append((name, *values[:3]) if name == "fcntl" else (name,))
        if name in self.answers:
            cpu.reg_write(self.registers[self.answer_register()], self.answers[name] % 2**64)
        else:
            cpu.emu_stop()

    def answer_register(self):
        """Which of the registers takes the answer: rax, or x0."""
        return 0 if self.sp == x86.UC_X86_REG_RSP else 1

    def text(self, address):
        return bytes(self.cpu.mem_read(address, 100)).partition(b"\0")[0]

    def texts(self, address):
        found = []
        while pointer := struct.unpack("<Q", self.cpu.mem_read(address + 8 * len(found), 8))[0]:
            found.append(self.text(pointer))
        return found


def run_stub(monkeypatch, machine, answers):
    monkeypatch.setattr(os, "uname", lambda: types.SimpleNamespace(machine=machine))
    file = program.exec_stub()
    try:
        stub = os.pread(file, SIZE, 0)
    finally:
        os.close(file)
    assert struct.unpack_from("<HH", stub, 16) == (2, {"x86_64": 62, "aarch64": 183}[machine])
    return Machine(machine, answers).run(stub)


CLOSED_LATER = ("fcntl", 3, 2, 1)  # F_SETFD, FD_CLOEXEC
EXEC = ("execve", ARGUMENTS[0], ARGUMENTS[1:], ENVIRONMENT)


@pytest.mark.parametrize("machine", MACHINES)
def test_it_becomes_the_other_program(monkeypatch, machine):
    assert run_stub(monkeypatch, machine, {"fcntl": 0}) == [CLOSED_LATER, EXEC]


@pytest.mark.parametrize("number", [2, 8, 133])
@pytest.mark.parametrize("machine", MACHINES)
def test_it_says_why_it_cannot(monkeypatch, machine, number):
    calls = run_stub(monkeypatch, machine, {"fcntl": 0, "execve": -number, "write": 1})
    assert calls == [CLOSED_LATER, EXEC, ("write", 3, bytes([number])), ("exit",)]


@pytest.mark.parametrize("machine", MACHINES)
def test_it_ends_if_it_is_not_mocker_that_starts_it(monkeypatch, machine):
    """An image whose program is the stub (/proc/self/exe) would have it start itself again and again."""
    assert run_stub(monkeypatch, machine, {"fcntl": -9}) == [CLOSED_LATER, ("exit",)]


# ---- for real ------------------------------------------------------------------------------------


def test_arguments_and_environment_arrive_as_they_are(run):
    odd = ["", "a b", "\n", "ä", "x" * 100_000]
    done = run("-e", "ODD=a\nb", "busybox", "sh", "-c", 'printf "%s|" "$@" "$ODD"', *odd)
    assert done.stdout == "|".join([*odd[1:], "a\nb", ""])


def test_an_environment_that_no_program_can_get(run, image):
    one_line(run(image({"Env": [f"A={'x' * 200_000}"], "Cmd": ["/bin/true"]}, [])), "too long", status=126)


@pytest.mark.parametrize(
    ("command", "status"), [(["sh", "-c", "ls -l /proc/$$/fd; :"], 0), (["/no/such/program"], 127)]
)
def test_a_machine_that_runs_no_program_from_memory(store, command, status):
    """vm.memfd_noexec=2 (Linux 6.3): then it is done without. strace(1) plays the kernel."""
    refusing = ["strace", "-f", "-qq", "-o/dev/null", "-etrace=execveat", "-einject=execveat:error=EACCES"]
    command = [*refusing, *store.command(["run", "-q", "--rm", "busybox", *command])]
    done = subprocess.run(command, env=store.env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (status, status // 127), done
    assert "socket" not in done.stdout
