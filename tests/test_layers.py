"""What a pulled image's layers add up to, entry by entry, against umoci and Docker."""

import gzip
import json
import os
import subprocess
import tarfile
import time

import images
import oracle
import pytest
import store
from containers import one_line
from images import DOCKER, OCI, device, entry, file, folder, hardlink, layer, opaque, symlink, whiteout

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="owners, devices and mounts need root"),
    pytest.mark.beside,
]

# ---------------------------------------------------------------------------
# Images: for each, its layers from the bottom up, and each layer's entries
# ---------------------------------------------------------------------------

BASE = [
    folder("etc", 0o750, uid=7, gid=8, mtime=1000),
    file("etc/motd", b"hello\n", 0o640, uid=7),
    folder("etc/deep", 0o2711, gid=8, mtime=2000),
    folder("etc/deep/er", 0o700, uid=9, mtime=3000),
    file("etc/deep/er/x", b"x"),
    file("etc/deep/y", b"y"),
    symlink("link", "etc"),
    file("tool", b"#!", 0o4755),
]
XATTRS = {
    "SCHILY.xattr.user.text": "blau",
    "SCHILY.xattr.user.bytes": b"\x00\xff=\n\x80".decode("utf-8", "surrogateescape"),
    # CAP_NET_RAW, effective and permitted (struct vfs_cap_data, revision 2)
    "SCHILY.xattr.security.capability": (b"\x01\x00\x00\x02\x00\x20" + bytes(14)).decode(),
}

CASES = {
    "types": [
        [
            folder("d"),
            file("d/empty"),
            file("d/file", b"content"),
            symlink("d/relative", "../d/file"),
            symlink("d/absolute", "/d/file"),
            symlink("d/dangling", "/nowhere/at/all"),
            symlink("d/loop", "loop"),
            symlink("d/out", "../../../../../etc/passwd"),
            entry("d/fifo", tarfile.FIFOTYPE, 0o600),
            device("d/null", 1, 3),
            device("d/disk", 8, 1, tarfile.BLKTYPE, 0o660, gid=6),
        ]
    ],
    "modes": [
        [
            file("setuid", b"", 0o4755, uid=33, gid=44),
            file("setgid", b"", 0o2755, uid=33, gid=44),
            folder("sticky", 0o1777),
            folder("shared", 0o2775, gid=50),
            file("shared/inside", gid=0),
            file("locked", b"secret", 0),
            folder("closed", 0),
            file("closed/inside"),
        ]
    ],
    "owners": [
        [
            file("nobody", uid=65534, gid=65534),
            file("large", uid=4_000_000_000, gid=3_000_000_000),
            symlink("link", "nobody", uid=33, gid=33),
            file("named", uid=1234, uname="root", gname="root"),
        ]
    ],
    "times": [
        [
            folder("old", mtime=1),
            file("old/epoch", mtime=0),
            file("old/fraction", pax_headers={"mtime": "1234567890.987654321"}),
            file("old/far", mtime=2**32 + 1),
            symlink("old/link", "far", mtime=5),
        ]
    ],
    "xattrs": [
        [
            folder("d", pax_headers={"SCHILY.xattr.user.place": "here"}),
            file("d/f", b"x", 0o755, pax_headers=XATTRS),
            file("d/setuid", b"x", 0o4755, uid=5, pax_headers=XATTRS),
            file("d/empty", b"x", pax_headers={"SCHILY.xattr.user.empty": ""}),
        ]
    ],
    "hard links": [
        [
            file("a", b"shared", 0o600, uid=3),
            hardlink("b", "a", 0o600, uid=3),
            folder("d"),
            hardlink("d/c", "./b", 0o600, uid=3),
            symlink("s", "a"),
            hardlink("t", "s"),
        ],
        [file("e", b"other"), hardlink("f", "/e"), hardlink("b", "e")],
    ],
    "a hard link to a lower file, then another file": [
        BASE,
        [hardlink("hard", "etc/motd"), file("hard", b"own", 0o600)],
    ],
    "whiteouts": [
        BASE,
        [whiteout("etc/motd"), whiteout("etc/deep"), whiteout("link"), whiteout("tool"), whiteout("etc/never")],
    ],
    "whiteouts leave the parents as they are": [BASE, [whiteout("etc/deep/er/x")]],
    "whiteouts are for lower layers": [
        BASE,
        [file("new", b"n"), whiteout("tool"), file("tool", b"again"), whiteout("new2"), folder("new2"), file("new2/x")],
        [file("tool2"), whiteout("etc/deep"), folder("etc/deep"), file("etc/deep/z", b"z")],
    ],
    "whiteout, then a parent that is left out": [BASE, [whiteout("etc/deep"), file("etc/deep/z", b"z")]],
    "deleted, and back in the next layer": [
        BASE,
        [whiteout("etc/deep"), whiteout("tool")],
        [folder("etc/deep", 0o755), file("etc/deep/new", b"new"), file("tool", b"tool")],
    ],
    "opaque first": [BASE, [folder("etc"), opaque("etc"), file("etc/new", b"n")]],
    "opaque last": [BASE, [folder("etc"), file("etc/new", b"n"), folder("etc/deep"), opaque("etc")]],
    "opaque in the middle": [BASE, [folder("etc"), file("etc/1"), opaque("etc"), file("etc/2")]],
    "opaque deep down": [BASE, [opaque("etc/deep")], [file("etc/deep/z")]],
    "opaque, with whiteouts in it": [BASE, [folder("etc"), opaque("etc"), whiteout("etc/motd")]],
    "opaque, of the layers below only": [BASE, [opaque("etc"), file("etc/a")], [folder("etc"), file("etc/b")]],
    "a folder becomes a file": [BASE, [file("etc", b"now a file")]],
    "a folder becomes a link": [BASE, [symlink("etc", "tool")]],
    "a file becomes a folder": [BASE, [folder("tool", 0o700), file("tool/inside")]],
    "a link becomes a folder": [BASE, [folder("link"), file("link/inside")]],
    "a folder becomes a file, and a folder again": [
        BASE,
        [file("etc/deep", b"file")],
        [folder("etc/deep", 0o711), file("etc/deep/z", b"z")],
    ],
    "a folder becomes a link, and a folder again": [
        BASE,
        [symlink("etc/deep", "../tool")],
        [folder("etc/deep"), file("etc/deep/z", b"z")],
    ],
    "twice in one layer": [
        [
            file("f", b"one"),
            file("f", b"two, longer", 0o600),
            folder("d", 0o700),
            file("d/x"),
            folder("d", 0o711, uid=3),
            symlink("s", "f"),
            file("s", b"no link any more"),
        ]
    ],
    "a folder with folders in it is replaced in its own layer": [
        [folder("d"), folder("d/sub"), file("d/sub/x"), file("d", b"file"), folder("e/sub"), symlink("e", "d")],
    ],
    "parents left out": [
        BASE,
        [file("etc/deep/er/new", b"n"), folder("etc/deep/more", 0o700)],
        [file("etc/deep/more/x", b"x")],
    ],
    "xattrs of a directory that comes again": [
        [folder("d", pax_headers={"SCHILY.xattr.user.a": "1", "SCHILY.xattr.user.b": "1"})],
        [folder("d", 0o700, pax_headers={"SCHILY.xattr.user.b": "2"})],
    ],
    "times to the nanosecond": [
        [file("f", pax_headers={"mtime": "1234567890.123456789"}), folder("d", pax_headers={"mtime": "7.0000000019"})]
    ],
    "the root": [[folder(".", 0o711, uid=3, mtime=77), file("./f")], [folder("./", 0o750), file("g")]],
    "dots and slashes": [[folder("./d/"), file("./d//f", b"1"), file("d/./g", b"2"), file("/h", b"3")]],
    "names": [
        [
            file("n" * 255, b"long"),
            file("/".join(["deep" * 20] * 12), b"deeper"),
            symlink("to", "/".join(["deep" * 20] * 12)),
            file("new\nline"),
            file("escape\x1b[31m"),
            file("blank and 'quote' \\ "),
            file("größer/日本"),
        ]
    ],
    "names that are no whiteouts": [
        [file(".wh"), file(".white"), file("x.wh.y"), file("wh.tool"), folder(".why"), file(".why/.wh")],
        [file("tool"), file(".w", b"w")],
    ],
    "the same layer twice": [BASE, [whiteout("tool")], BASE],
    "an empty layer": [BASE, [], []],
    "127 layers": [
        [file(f"{number:03}", b"own"), file("top", str(number).encode()), whiteout(f"{number - 2:03}")]
        for number in range(127)
    ],
}

# Where Docker 20.10 has another rootfs, or none
NOT_DOCKERS = {
    "a hard link to a lower file, then another file": "no such file or directory, with overlay2",
    "whiteouts": "one that deletes nothing stays visible, as a name without a file",
    "opaque, with whiteouts in it": "the same",
    "whiteouts leave the parents as they are": "Docker gives parents that are left out to root, with mode 0755",
    "deleted, and back in the next layer": "the same",
    "opaque deep down": "the same",
    "a folder becomes a file, and a folder again": "the same",
    "a folder becomes a link, and a folder again": "the same",
    "parents left out": "the same",
    "whiteouts are for lower layers": "a folder after its own whiteout gets the old content back",
    "whiteout, then a parent that is left out": "not a directory",
    "twice in one layer": "duplicates of file paths not supported",
    "a folder with folders in it is replaced in its own layer": "chtimes /d/sub: not a directory",
    "127 layers": "max depth exceeded, with a container's own layer",
}
TIMELESS = {  # umoci deletes a folder's files one by one, and then forgets the folder's own time
    "opaque last": {"etc/deep"},
    "whiteout, then a parent that is left out": {"etc", "etc/deep"},  # the latter is made anew, now
}


def pull(mocker, fake, descriptor):
    """As library/image."""
    fake.put("library/image", descriptor)
    done = mocker("pull", "image", env={"MOCKER_HUB": fake.url})
    assert done.returncode == 0, done.stderr


def test_a_path_as_deep_as_the_kernel_takes_it(mocker, home, fake):
    """4,096 bytes; docker takes it, too. Python's own limit is 1,000 calls."""
    try:
        pull(mocker, fake, fake.layout.image([layer([file("a/" * 1900 + "x", b"deep")])]))
    finally:
        subprocess.run(["rm", "-rf", home / "layers"], check=True)  # which shutil.rmtree, thus pytest, could not


def by_umoci(fake, descriptor, directory):
    fake.layout.tag(descriptor)
    command = ["umoci", "unpack", "--image", f"{fake.layout.path}:latest", directory]
    subprocess.run(command, check=True, capture_output=True)
    return oracle.rootfs_listing(directory / "rootfs")


def without_times(listing, layers, touched):
    """Nobody says when a folder is from that no layer has an entry for."""
    named = {os.path.normpath(info.name.lstrip("/")) for entries in layers for info, _ in entries} - touched
    return [item if item.path in named else item._replace(mtime=None) for item in listing]


def without_root(listing):
    """Docker makes the root itself, whatever the layers say of it."""
    return [item for item in listing if item.path != "."]


@pytest.fixture(scope="module")
def docker():
    if oracle.MISSING:
        pytest.skip(f"not installed: {oracle.MISSING}")
    with oracle.Docker(private_network=True) as docker:
        yield docker


@pytest.mark.parametrize("case", CASES)
def test_the_rootfs_equals_umocis_and_dockers(case, quick, home, fake, tmp_path, docker):
    timeless = TIMELESS.get(case, set())
    descriptor = fake.layout.image([layer(entries) for entries in CASES[case]])
    pull(quick, fake, descriptor)
    umocis = without_times(by_umoci(fake, descriptor, tmp_path / "bundle"), CASES[case], timeless)
    ours = without_times(store.rootfs(home, "library_image.json", tmp_path), CASES[case], timeless)
    assert oracle.listing_difference(umocis, ours) == []
    assert store.faults(home) == []

    if case not in NOT_DOCKERS:
        docker.load_layout(fake.layout.path, "case")
        with docker.rootfs("case") as directory:
            dockers = without_times(oracle.rootfs_listing(directory), CASES[case], timeless)
        assert oracle.listing_difference(without_root(dockers), without_root(ours)) == []


# ---------------------------------------------------------------------------
# Real tars, real compressors, real images
# ---------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    """A folder for GNU tar to pack."""
    tree = tmp_path / "tree"
    (tree / "folder").mkdir(parents=True)
    (tree / "folder").chmod(0o2750)
    (tree / "folder/file").write_bytes(b"content")
    (tree / "folder/file").chmod(0o4711)
    os.chown(tree / "folder/file", 33, 44)
    (tree / "link").symlink_to("/folder/file")
    os.link(tree / "folder/file", tree / "hard")
    with open(tree / "sparse", "wb") as sparse:
        for place in 0, 5 << 20, 11 << 20:
            sparse.seek(place)
            sparse.write(b"data" * 1024)
        sparse.truncate(16 << 20)
    return tree


@pytest.mark.parametrize("version", ["0.0", "0.1", "1.0"])
def test_a_sparse_file_of_a_long_name(version, mocker, home, fake, tree, tmp_path):
    """A tar says twice what it is called, and tarfile takes the wrong one."""
    (tree / "sparse").rename(tree / ("long" * 50))
    pull(mocker, fake, fake.layout.image([gnu_tar(tree, "--format=posix", "--sparse", f"--sparse-version={version}")]))
    ours = store.rootfs(home, "library_image.json", tmp_path)
    assert oracle.listing_difference(oracle.rootfs_listing(tree), ours) == []


def gnu_tar(tree, *options):
    command = ["tar", "--create", "--file=-", "--sort=name", "--numeric-owner", *options, "."]
    return subprocess.run(command, cwd=tree, check=True, stdout=subprocess.PIPE).stdout


FORMATS = [
    ["--format=v7"],
    ["--format=ustar"],
    ["--format=oldgnu", "--sparse"],
    ["--format=gnu", "--sparse"],
    ["--format=posix"],
    ["--format=posix", "--sparse", "--sparse-version=0.0"],
    ["--format=posix", "--sparse", "--sparse-version=0.1"],
    ["--format=posix", "--sparse", "--sparse-version=1.0"],
    ["--format=posix", "--xattrs", "--label=a label", "--blocking-factor=200"],
]


@pytest.mark.parametrize("options", FORMATS, ids=" ".join)
def test_the_formats_of_gnu_tar(options, mocker, home, fake, tree, tmp_path):
    pull(mocker, fake, fake.layout.image([gnu_tar(tree, *options)]))
    ours = store.rootfs(home, "library_image.json", tmp_path)
    assert oracle.listing_difference(oracle.rootfs_listing(tree), ours) == []
    if "--sparse" in options:
        [unpacked] = store.layers(home, "library_image.json")
        assert (unpacked / "sparse").stat().st_blocks * 512 < 1 << 20


def test_names_of_bytes_that_are_no_text(mocker, home, fake, tmp_path):
    name = b"caf\xe9\xff".decode("utf-8", "surrogateescape")
    entries = [folder(name), file(f"{name}/{name}", b"x"), symlink("link", name), hardlink("hard", f"{name}/{name}")]
    descriptor = fake.layout.image(
        [layer(entries, tarfile.GNU_FORMAT), layer([whiteout(f"{name}/{name}")], tarfile.GNU_FORMAT)]
    )
    pull(mocker, fake, descriptor)
    umocis = by_umoci(fake, descriptor, tmp_path / "bundle")
    ours = store.rootfs(home, "library_image.json", tmp_path)
    assert oracle.listing_difference(without_root(umocis), without_root(ours)) == []


SOME = layer([folder("d"), file("d/f", b"some content" * 1000), symlink("s", "d")])
HALF = len(SOME) // 1024 * 512
PACKED = {
    "plain": SOME,
    "gzip": gzip.compress(SOME),
    "gzip of several members": gzip.compress(SOME[:HALF]) + gzip.compress(b"") + gzip.compress(SOME[HALF:]),
    "gzip with zeros after it": gzip.compress(SOME) + bytes(512),
    "gzip with a name in its head": subprocess.run(["gzip", "-c", "--name"], input=SOME, stdout=subprocess.PIPE).stdout,
    "zstd": images.compress(SOME, "zstd"),
    "zstd after a frame to be skipped": b"\x50\x2a\x4d\x18\x04\0\0\0skip" + images.compress(SOME, "zstd"),
    "zstd of several frames": images.compress(SOME[:HALF], "zstd") + images.compress(SOME[HALF:], "zstd"),
    "zstd of Debian": subprocess.run(["zstd", "-19", "--long", "-c"], input=SOME, stdout=subprocess.PIPE).stdout,
}
TYPES = [OCI["plain"], OCI["gzip"], OCI["zstd"], DOCKER["gzip"], DOCKER["zstd"], "", "application/octet-stream"]


@pytest.mark.parametrize("packed", PACKED)
def test_the_first_bytes_tell_how_a_layer_is_packed(packed, quick, home, fake, tmp_path):
    for number, media_type in enumerate(TYPES):
        fake.put(
            f"library/{number}",
            fake.layout.image([(fake.layout.blob(PACKED[packed], media_type), images.digest(SOME))]),
        )
        done = quick("pull", number, env={"MOCKER_HUB": fake.url})
        assert (media_type, done.returncode) == (media_type, 0), done.stderr
    [item] = [item for item in store.rootfs(home, "library_0.json", tmp_path) if item.path == "d/f"]
    assert item.size == 12000
    assert store.faults(home) == []


def test_a_layer_of_no_bytes_at_all(mocker, home, fake, tmp_path):
    """Docker unpacks it to nothing; some builders write it."""
    pull(mocker, fake, fake.layout.image([b"", layer([file("f")])]))
    assert [item.path for item in store.rootfs(home, "library_image.json", tmp_path)] == [".", "f"]


def test_an_image_without_layers(mocker, home, fake):
    pull(mocker, fake, fake.layout.image([]))
    assert store.layers(home, "library_image.json") == []
    assert mocker("verify").returncode == 0


@pytest.mark.host
@pytest.mark.parametrize("rootfs", [{"type": "layers"}, {"type": "layers", "diff_ids": None}], ids=str)
def test_an_image_without_layers_as_docker_builds_it(rootfs, mocker, home, fake):
    """`FROM scratch`, and only ENV and CMD."""
    pull(mocker, fake, fake.layout.image([], {"Cmd": ["/x"]}, rootfs=rootfs))
    assert mocker("verify").returncode == 0
    done = mocker("run", "-q", "--rm", "--network=none", "image")
    assert done.returncode == 127 and "/x" in done.stderr


def test_a_hard_link_to_a_file_of_a_lower_layer(mocker, home, fake, tmp_path):
    """Docker's overlay2 refuses it; umoci, and Docker's other drivers, link to it."""
    upper = [folder("d", mtime=1), hardlink("d/motd", "etc/motd"), hardlink("tool2", "tool")]
    upper += [hardlink("tool3", "tool2"), file("tool2", b"another now")]
    descriptor = fake.layout.image([layer(BASE), layer(upper)])
    pull(mocker, fake, descriptor)
    umocis = by_umoci(fake, descriptor, tmp_path / "bundle")
    ours = store.rootfs(home, "library_image.json", tmp_path)
    assert oracle.listing_difference(without_root(umocis), without_root(ours), without=["links"]) == []


GONE = {
    "whiteout": [whiteout("etc/motd")],
    "opaque": [opaque("etc")],
    "folder": [folder("etc/motd")],
    "parent": [file("etc")],
}


@pytest.mark.parametrize("entries", GONE.values(), ids=GONE)
def test_a_hard_link_to_what_is_not_there_any_more_is_refused(entries, quick, home, fake):
    layers = [layer(BASE[:2]), layer(entries), layer([hardlink("hard", "etc/motd")])]
    done = quick("pull", "-q", fake.put("x", fake.layout.image(layers)))
    assert (done.returncode, store.stored(home)) == (125, [])
    assert "hard link" in done.stderr and "etc/motd" in done.stderr


ALONE = {  # what needs no layer below
    "plain": [],
    "root": [folder("./")],
    "twice": [folder("d", 0o700)],
    "fifo": [folder("d"), entry("d/fifo", tarfile.FIFOTYPE, 0o600)],
}


@pytest.mark.parametrize("before", ALONE.values(), ids=ALONE)
def test_a_layer_is_unpacked_while_those_below_are_on_their_way(before, quick, home, fake, tmp_path):
    """It waits for them only where it speaks of them."""
    entries = [*before, folder("d", 0o711), file("d/new", b"new")]
    descriptor = fake.layout.image([layer(BASE), layer(entries)])
    base = json.loads(fake.path(descriptor["digest"]).read_text())["layers"][0]["digest"]
    came_first = []

    def slowly(handler):
        if handler.path.endswith(base):
            deadline = time.monotonic() + 60
            while not came_first and time.monotonic() < deadline:
                came_first.extend((home / "layers").iterdir())
                time.sleep(0.01)

    fake.intercept = slowly
    pull(lambda *words, env: quick(*words, env={**env, "MOCKER_TIMEOUT": "30"}), fake, descriptor)
    assert len(came_first) == 1
    names = {item.path: item.mode for item in store.rootfs(home, "library_image.json", tmp_path)}
    assert names["d"] == "0711" and {"d/new", "etc/motd"} <= set(names)


@pytest.mark.parametrize("waits", [whiteout("tool"), file("etc/new"), hardlink("hard", "tool")])
def test_what_waits_for_a_damaged_layer_ends_with_it(waits, quick, home, fake):
    damaged = fake.layout.blob(b"no tar" * 100, OCI["gzip"]), images.digest(layer(BASE))
    for layers in ([damaged, layer([waits])], [layer(BASE), damaged, layer([waits]), layer([waits]), layer([waits])]):
        done = quick("pull", "-q", fake.put("x", fake.layout.image(layers)))
        assert one_line(done, "a layer is damaged, or no tar")
        assert store.stored(home) == store.faults(home) == []


def test_a_blob_of_two_layers_and_two_sizes(quick, home, fake):
    """The registry's word for its size is not what a layer waits for."""
    tar, diff_id = fake.layout.layer(layer([folder("d")]))
    for sizes in ((0, 1), (1, 0)):
        pairs = [({**tar, "size": tar["size"] + more}, diff_id) for more in sizes]
        done = quick("pull", "-q", fake.put("x", fake.layout.image(pairs)))
        assert done.returncode == (125 if sizes[1] else 0) and "Traceback" not in done.stderr  # the last word counts
        assert store.faults(home) == []


def test_what_a_layer_waits_for_is_taken_away(quick, home, fake):
    descriptor = fake.layout.image([layer(BASE), layer([file("etc/new", b"new")])])
    top = json.loads(fake.path(descriptor["digest"]).read_text())["layers"][1]["digest"]

    def thief(handler):
        if handler.path.endswith(top):
            deadline = time.monotonic() + 60
            while not list((home / "layers").iterdir()) and time.monotonic() < deadline:
                time.sleep(0.01)
            subprocess.run(f"rm -rf {home}/layers/*", shell=True, check=True)

    fake.intercept = thief
    done = quick("pull", "-q", fake.put("x", descriptor), env={"MOCKER_TIMEOUT": "30"})
    assert one_line(done, "a layer is gone: pull again")
    fake.intercept = None
    pull(quick, fake, descriptor)


def test_more_layers_than_an_overlay_takes_are_refused(quick, home, fake):
    same = fake.layout.layer(layer([folder("d")]))
    done = quick("pull", "-q", fake.put("x", fake.layout.image([same] * 501)))
    assert one_line(done, "501 layers") and store.stored(home) == store.faults(home) == []


@pytest.mark.host
def test_127_layers_run(mocker, fake):
    """Their names together are longer than the page that mount(2) takes as options."""
    layers = [layer([file("bin/busybox", images.Path("/bin/busybox").read_bytes(), 0o755)])]
    layers += [layer([file("top", str(number).encode())]) for number in range(126)]
    name = fake.put("many", fake.layout.image(layers, {"Cmd": ["/bin/busybox", "cat", "/top"]}))
    done = mocker("run", "-q", "--rm", "--network", "none", name)
    assert (done.returncode, done.stdout) == (0, "125"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tomcat", "many-files"])
def test_real_images_equal_umocis(name, registry, mocker, home, tmp_path):
    mocker("pull", registry.need(f"library/{name}"), check=True)
    with oracle.unpacked(images.image(name)) as bundle:
        umocis = oracle.rootfs_listing(bundle / "rootfs")
    ours = store.rootfs(home, f"library_{name}.json", tmp_path)
    assert oracle.listing_difference(without_root(umocis), without_root(ours)) == []
