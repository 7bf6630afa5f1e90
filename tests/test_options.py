"""mocker run's options: what each does, and that a wrong value gets one line that says what is wrong."""

import os
import re
import subprocess
from pathlib import Path

import images
import pytest
from containers import one_line

pytestmark = pytest.mark.usefixtures("host_as_before_all")

DEFAULT = {"chown", "dac_override", "fowner", "fsetid", "kill", "setgid", "setuid", "setpcap", "net_bind_service"}
DEFAULT |= {"net_raw", "sys_chroot", "mknod", "audit_write", "setfcap"}


# ---- usage ---------------------------------------------------------------------------------------


def test_help_fits_on_a_screen_and_names_every_option(mocker):
    done = mocker("run", "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    options = """--env --workdir --user --entrypoint --volume --publish --name --hostname --network --memory --cpus
    --pids-limit --read-only --rm --interactive --tty --quiet --cap-add --cap-drop --privileged"""
    assert [option for option in options.split() if option not in done.stdout] == []
    assert [letter for letter in "ewuvpmitq" if not re.search(rf"-{letter}\b", done.stdout)] == []


@pytest.mark.parametrize(
    "arguments",
    [[], ["--no-such-option", "busybox"], ["--rm"], ["-m"], ["--memory"], ["-z", "busybox"], ["--rm=yes", "busybox"]],
)
def test_malformed_commands_get_the_usage(store, arguments):
    done = store("run", *arguments)
    assert (done.returncode, done.stdout) == (125, "")
    assert "mocker run [options]" in done.stderr and "Traceback" not in done.stderr


def test_options_end_at_the_image_s_name(run):
    assert run("busybox", "echo", "--rm", "-e", "--", "-q").stdout == "--rm -e -- -q\n"


def test_options_are_written_as_docker_s(run):
    """Apart, joined by =, and short ones run together."""
    for option in ["-e", "A=1"], ["-eA=1"], ["--env", "A=1"], ["--env=A=1"]:
        assert run(*option, "busybox", "sh", "-c", "echo $A").stdout == "1\n", option
    assert run("-iw/etc", "busybox", "pwd").stdout == "/etc\n"
    done = run("-w=/etc", "-u=33", "-e=A=1", "--", "busybox", "sh", "-c", "pwd; id -u; echo $A")
    assert done.stdout == "/etc\n33\n1\n"


@pytest.mark.parametrize("words", [["help", "run"], ["run", "--help"], ["run", "-it", "--help"], ["run", "-h"]])
def test_ways_to_ask_for_help(mocker, words):
    done = mocker(*words)
    assert (done.returncode, done.stderr) == (0, "") and "mocker run [options]" in done.stdout


# ---- wrong values --------------------------------------------------------------------------------

LONG = "x" * 300


@pytest.mark.parametrize(
    ("options", "word"),
    [
        *[([f"--memory={value}"], value) for value in ["much", "-1", "1.5x", "12q", "0x10", "m", "٣m", "9" * 30]],
        *[([f"--memory={value}"], "6MB") for value in ["5", "5m", "6291455"]],
        *[([f"--cpus={value}"], value) for value in ["many", "1,5", "0x1"]],
        *[([f"--cpus={value}"], "CPUs") for value in ["-1", "0.001", "1e9", "nan", "inf", "4096"]],
        *[([f"--pids-limit={value}"], value) for value in ["many", "-x", "1.5", "1e3", "²"]],
        *[([f"--{option}="], f"--{option}") for option in ["memory", "cpus", "pids-limit", "network"]],
        *[([f"--network={value}"], value) for value in ["nat", "Bridge", "container:x", "bridge0"]],
        *[
            ([f"--publish={value}"], value)
            for value in ["80", "80:", ":80", "0:80", "80:0", "65536:80", "80:65536", "80:80/sctp", "a:80", "-1:80",
                          "1.2.3:80:80", "1.2.3.4.5:80:80", "80:80:80", "80-81:80-81", "٣:80"]
        ],
        *[
            ([f"--volume={value}"], value)
            for value in ["/etc", "/etc:", ":/etc", "/etc:/x:rx", "/etc:/x:ro:ro", "/etc:/", "/etc:/..", "/etc:/x/.."]
        ],
        *[([f"--workdir={value}"], value) for value in ["relative", "./x", "~"]],
        *[([f"--name={value}"], value) for value in ["-x", "a b", "x", "a/b", "é1", "a\nb", ".a"]],
        *[([f"--cap-{change}={value}"], value) for change in ("add", "drop") for value in ["NONSENSE", "NET-RAW"]],
        (["--publish=256.1.1.1:80:80"], "256.1.1.1"),
        (["--volume=/etc:relative"], "relative"),
        *[([f"--volume={value}"], value) for value in ["/dev:/dev/", "/etc:/proc", "/etc://proc/x"]],
        (["-v", "/etc:/x", "-v", "/tmp:/x/"], "same place"),
        (["-u", "33:33:33"], "33:33:33"),
        (["--cap-add=CAP_"], "capability"),
        *[([f"--env={value}"], "--env") for value in ["=x", "="]],
        (["-v", f"/etc:/{LONG}"], "too long"),
        (["-v", f"/{LONG}:/x"], "too long"),
        (["-v", "/etc/passwd/x:/x"], "/etc/passwd/x"),
        (["-w", f"/{LONG}"], "too long"),
        (["--hostname", LONG], "hostname"),
    ],
)  # fmt: skip
def test_wrong_values(run, options, word):
    one_line(run(*options, "busybox", "true"), word.encode("unicode_escape").decode() if "\n" in word else word)


WRONG = ["--memory=much", "--env==x", "--workdir=x", "--volume=x", "--cap-add=NONE", "--without=x"]


@pytest.mark.parametrize("option", WRONG)
def test_a_wrong_value_is_told_before_anything_is_pulled(store, option):
    done = store("run", option, "127.0.0.1:1/not/here", "true")
    one_line(done, option.partition("=")[2])
    assert "127.0.0.1" not in done.stderr


def test_what_is_empty_in_docker_too_is_left_to_the_image(run):
    """As a script with an unset variable has it."""
    done = run("--name=", "-w", "", "-u", "", "--hostname=", "busybox", "sh", "-c", "id -u; pwd; hostname | wc -c")
    assert done.stdout == "0\n/\n9\n"


def test_a_volume_is_not_made_for_an_image_that_is_not_to_be_had(store, tmp_path):
    one_line(store("run", "-q", "-v", f"{tmp_path}/a/b:/data", "127.0.0.1:1/not/here", "true"), "127.0.0.1:1")
    assert not (tmp_path / "a").exists()


SIZES = ["64m", "64M", "64mb", "64MB", "64MiB", "64 m", "65536k", "67108864", "67108864b", "0.0625g"]


@pytest.mark.parametrize("value", SIZES)
def test_sizes(run, value):
    there = "/sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max"  # of v1 or v2
    assert run("-m", value, "busybox", "sh", "-c", f"cat {there} 2>/dev/null").stdout == "67108864\n"


NUMBERS = ["--cpus=1", "--cpus=0.5", "--cpus=.5", "--cpus=0", "--memory=0", "--memory=1t", "--pids-limit=-1"]
NUMBERS += ["--pids-limit=-5", "--pids-limit=0", "--pids-limit=100"]


@pytest.mark.parametrize("option", NUMBERS)
def test_numbers(run, option):
    assert run(option, "busybox", "true").returncode == 0


# ---- names ---------------------------------------------------------------------------------------


def test_a_name_is_one_container_s_only(run, start):
    container = start("--name", "the-one", "busybox", "cat")
    one_line(run("--name", "the-one", "busybox", "true"), "the-one", "in use")
    container.end()
    one_line(run("--name", "the-one", "busybox", "true"), "the-one", "in use")  # its directory is still there
    assert run("--name", "the-other", "--rm", "busybox", "true").returncode == 0
    assert run("--name", "the-other", "--rm", "busybox", "true").returncode == 0


def test_two_containers_of_one_name_at_the_same_moment(store):
    both = [store.popen("run", "-q", "--name=twin", "busybox", "cat", stdin=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate("hi\n", timeout=60) for process in both]
    assert sorted(process.returncode for process in both) == [0, 125], said


# ---- volumes -------------------------------------------------------------------------------------


@pytest.fixture
def shared(tmp_path):
    """A directory of the host, to be used as a volume."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/file").write_text("of the host\n")
    return tmp_path / "shared"


def test_a_volume(run, shared):
    assert run("-v", f"{shared}:/data", "busybox", "cat", "/data/file").stdout == "of the host\n"
    script = "echo new >/data/new; chown 33 /data/new"
    assert run("--volume", f"{shared}:/data:rw", "busybox", "sh", "-c", script).returncode == 0
    assert ((shared / "new").read_text(), (shared / "new").stat().st_uid) == ("new\n", 33)


def test_a_volume_that_is_read_only(run, shared):
    script = "cat /data/file; echo x >/data/file; mount -o remount,rw /data"
    done = run("-v", f"{shared}:/data:ro", "busybox", "sh", "-c", script)
    assert done.stdout == "of the host\n" and "Read-only file system" in done.stderr and done.returncode
    assert (shared / "file").read_text() == "of the host\n"


def test_a_volume_that_is_a_file(run, shared):
    assert run("-v", f"{shared}/file:/etc/passwd:ro", "busybox", "cat", "/etc/passwd").stdout == "of the host\n"
    assert run("-v", f"{shared}/file:/a/new/place", "busybox", "cat", "/a/new/place").stdout == "of the host\n"


def test_a_volume_and_its_place_are_of_one_kind(run, image, shared):
    (shared / "file").write_text("")
    for source, target in (shared / "file", "/bin"), (shared, "/etc/passwd"):
        one_line(run("-v", f"{source}:{target}", "busybox", "true"), f"{source} can't lie on {target}", "a directory")
    one_line(run(image({}, [images.folder("etc/hosts")]), "true"), "hosts can't lie on /etc/hosts", "a directory")


def test_a_volume_that_is_not_there_is_made(run, tmp_path):
    assert run("-v", f"{tmp_path}/a/b:/data", "busybox", "touch", "/data/x").returncode == 0
    assert (tmp_path / "a/b/x").exists()


def test_a_volume_that_is_a_device_which_containers_have(run, tmp_path):
    """To blank a file is an idiom. Any other device is as dead as always."""
    os.mknod(tmp_path / "memory", 0o20666, os.makedev(1, 1))
    options = ["-v", "/dev/null:/a-file:ro", "-v", "/dev/zero:/dev/random", "-v", f"{tmp_path}/memory:/memory"]
    done = run(*options, "busybox", "sh", "-c", "cat /a-file; head -c2 /dev/random | od -An -tx1; head -c1 /memory")
    assert done.stdout == " 00 00\n" and "denied" in done.stderr


def test_several_volumes_one_in_the_other(run, shared, tmp_path):
    options = ["-v", f"{shared}:/data", "-v", f"{tmp_path}/inner:/data/inner", "-v", f"{tmp_path}/c d:/with blank"]
    assert run(*options, "busybox", "touch", "/data/inner/x", "/with blank/y").returncode == 0
    assert (tmp_path / "inner/x").exists() and (tmp_path / "c d/y").exists()


def test_what_is_mounted_below_a_volume_comes_along_and_stays_read_only(run, shared):
    (shared / "below").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "mocker-below", shared / "below"], check=True)
    try:
        (shared / "below/file").write_text("deep\n")
        assert run("-v", f"{shared}:/data", "busybox", "cat", "/data/below/file").stdout == "deep\n"
    finally:
        subprocess.run(["umount", shared / "below"], check=True)


def test_what_the_host_has_forbidden_on_a_volume_stays_forbidden(run, shared):
    """The mount's own options, as docker keeps them; and that no device opens, also on what is mounted below."""
    (shared / "below").mkdir()
    subprocess.run(["mount", "--bind", shared, shared], check=True)
    try:
        subprocess.run(["mount", "-t", "tmpfs", "mocker-below", shared / "below"], check=True)
        os.mknod(shared / "below/node", 0o20666, os.makedev(1, 5))
        subprocess.run(["mount", "-o", "remount,bind,ro,nosuid,noexec", shared], check=True)
        script = "touch /data/x; grep -o ' /data [^ ]* ro,nosuid,nodev,noexec' /proc/mounts; head -c1 /data/below/node"
        done = run("-v", f"{shared}:/data", "busybox", "sh", "-c", script)
        assert done.stderr.count("Read-only file system") == 1 and done.stdout.startswith(" /data ")
        assert "denied" in done.stderr.splitlines()[-1]
    finally:
        subprocess.run(["umount", "-R", shared], check=True)


def test_a_volume_in_another_that_is_named_later(run, shared, tmp_path):
    options = ["-v", f"{tmp_path}/inner:/data/inner", "-v", f"{shared}:/data", "-v", f"{tmp_path}/etc:/etc"]
    done = run(*options, "busybox", "sh", "-c", "touch /data/inner/x; cat /data/file /etc/hostname")
    assert done.stdout.startswith("of the host\n") and len(done.stdout.split()) == 4
    assert (tmp_path / "inner/x").exists()


def test_a_relative_volume_is_below_the_current_directory(run, shared):
    assert run("-v", "./shared:/data", "busybox", "cat", "/data/file", cwd=shared.parent).stdout == "of the host\n"


def test_a_volume_through_a_symlink_of_the_image_stays_in_the_container(run, image, shared, tmp_path):
    links = [images.symlink("data", f"{tmp_path}/outside"), images.symlink("up", "../../../../../../../../etc")]
    name = image({}, links)
    script = "cat /data/file /up/mine/file; ls -d /etc/mine"
    done = run("-v", f"{shared}:/data", "-v", f"{shared}:/up/mine", name, "sh", "-c", script)
    assert done.stdout == "of the host\nof the host\n/etc/mine\n"
    assert not (tmp_path / "outside").exists() and not os.path.lexists("/etc/mine")


# ---- the rest ------------------------------------------------------------------------------------


def test_read_only(run, shared):
    script = "touch /file; touch /etc/hosts; touch /dev/shm/yes /data/yes && echo yes; mount -o remount,rw /"
    done = run("--read-only", "-v", f"{shared}:/data", "busybox", "sh", "-c", script)
    assert done.stdout == "yes\n"
    assert done.stderr.count("Read-only file system") == 2 and done.returncode


def test_read_only_with_a_place_to_work_in(run):
    """What has to be made in the image is made before."""
    assert run("--read-only", "-w", "/new", "busybox", "pwd").stdout == "/new\n"


def capabilities(done):
    """The names in CapEff of /proc/self/status, and those that may be had."""
    found = dict(re.findall(r"Cap(\w+):\s*(\w+)", done.stdout))
    decoded = {kind: subprocess.check_output(["capsh", f"--decode={bits}"], text=True) for kind, bits in found.items()}
    return {kind: set(re.findall(r"cap_(\w+)", text.partition("=")[2])) for kind, text in decoded.items()}


STATUS = ("busybox", "cat", "/proc/self/status")


def test_capabilities_by_default(run):
    found = capabilities(run(*STATUS))
    assert found["Bnd"] == found["Prm"] == found["Eff"] == DEFAULT
    assert found["Inh"] == found["Amb"] == set()


@pytest.mark.parametrize("user", ["0", "1000"])
def test_what_mocker_may_pass_on_is_not_passed_on(store, user):
    """A file in the image could make it effective (CVE-2022-24769)."""
    command = ["setpriv", "--inh-caps", "+sys_admin", *store.command(["run", "-q", "--rm", "-u", user, *STATUS])]
    done = subprocess.run(command, env=store.env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert capabilities(done)["Inh"] == set()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--cap-add=NET_ADMIN"], {*DEFAULT, "net_admin"}),
        (["--cap-add", "CAP_NET_ADMIN", "--cap-add=sys_time"], {*DEFAULT, "net_admin", "sys_time"}),
        (["--cap-drop=mknod"], DEFAULT - {"mknod"}),
        (["--cap-drop=ALL"], set()),
        (["--cap-drop=ALL", "--cap-add=chown"], {"chown"}),
        (["--cap-add=ALL", "--cap-drop=chown"], "all but chown"),
        (["--privileged"], "all"),
    ],
)
def test_capabilities_asked_for(run, options, expected):
    found = capabilities(run(*options, *STATUS))
    bounding = re.search(r"CapBnd:\s*(\w+)", Path("/proc/self/status").read_text())[1]
    decoded = subprocess.check_output(["capsh", f"--decode={bounding}"], text=True).partition("=")[2]
    ours = set(re.findall(r"cap_(\w+)", decoded))
    named = {"all": ours, "all but chown": ours - {"chown"}}
    assert found["Bnd"] == found["Eff"] == (named[expected] if isinstance(expected, str) else expected & ours)


def test_an_added_capability_can_be_used(run):
    set_up = ("busybox", "ip", "link", "set", "lo", "down")
    assert run(*set_up).returncode != 0
    assert run("--cap-add=NET_ADMIN", *set_up).returncode == 0


def test_privileged(run):
    script = "mkdir /mnt; mount -t tmpfs none /mnt && echo mounted; : >/proc/sys/kernel/domainname && echo writable; "
    script += "ls /dev | wc -l; grep Seccomp: /proc/self/status"
    done = run("--privileged", "busybox", "sh", "-c", script)
    mounted, writable, devices, seccomp = done.stdout.splitlines()
    assert (mounted, writable, seccomp.split()) == ("mounted", "writable", ["Seccomp:", "0"])
    assert int(devices) > 20


def test_a_step_is_told_and_shown(store):
    """--explain, in a container of its own words and output."""
    done = store("run", "--explain", "busybox", "echo", "hi")
    assert (done.returncode, done.stdout) == (0, "hi\n")
    assert "pivot_root" in done.stderr and "Traceback" not in done.stderr
