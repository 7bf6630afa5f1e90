"""mocker's store, looked at from outside: is each byte in order, and what do its layers add up to?

faults(home)        what shouldn't be there: half a blob, unfinished work, a name that nobody knows
stored(home)        the JSON files of the images that are there
rootfs(home, file)  a listing of an image's layers, put together by the kernel's overlayfs as in `run`
"""

import hashlib
import json
import os
import pickle
import re
import subprocess
import sys

import oracle

KNOWN = re.compile(r"oci-layout|blobs/sha(256|384|512)/[0-9a-f]+|layers/[0-9a-f]{64,128}|containers|[^/]+\.json")


def faults(home):
    paths = [path for pattern in ("*", "blobs/*/*", "layers/*", "partial/*") for path in home.glob(pattern)]
    names = {str(path.relative_to(home)) for path in paths} - {"blobs", "layers", "partial"}
    unknown = {name for name in names if not KNOWN.fullmatch(name)}
    return sorted(unknown | {name for name in names if name.startswith("blobs/") and is_damaged(home, name)})


def is_damaged(home, name):
    _, kind, digest = name.split("/")
    return hashlib.new(kind, (home / name).read_bytes()).hexdigest() != digest


def stored(home):
    return sorted(path.name for path in home.glob("*.json") if path.name != "index.json")


def blob(home, digest):
    return json.loads((home / "blobs" / digest.replace(":", "/")).read_bytes())


def layers(home, file):
    """The directories of an image's layers, from the bottom up: their names are chain ids (OCI image-spec)."""
    config = json.loads((home / file).read_text())["manifest"]["config"]
    chain = []
    for diff_id in blob(home, config["digest"])["rootfs"]["diff_ids"]:
        below = f"{chain[-1]} {diff_id}".encode() if chain else None
        chain.append("sha256:" + hashlib.sha256(below).hexdigest() if chain else diff_id)
    return [home / "layers" / one.partition(":")[2] for one in chain]


SHOW = """
import oracle, pickle, subprocess, sys
places, target = sys.argv[1:]
subprocess.run(["mount", "-t", "overlay", "-o", f"ro,lowerdir={places}", "overlay", target], check=True)
sys.stdout.buffer.write(pickle.dumps(oracle.rootfs_listing(target)))
"""


def rootfs(home, file, scratch):
    """oracle.rootfs_listing of the overlay, mounted in a mount namespace that ends with the call.

    `scratch` is a directory to make short names in, for mount's options must fit in a page.
    """
    (scratch / "root").mkdir()
    (scratch / "empty").mkdir(0o755)  # at the bottom: one layer alone is refused
    places = ["empty"]
    for number, layer in enumerate(layers(home, file)):
        (scratch / str(number)).symlink_to(layer)
        places.insert(0, str(number))
    command = ["unshare", "--mount", sys.executable, "-c", SHOW, ":".join(places), "root"]
    env = {**os.environ, "PYTHONPATH": os.path.dirname(oracle.__file__)}
    return pickle.loads(subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.PIPE, env=env).stdout)
