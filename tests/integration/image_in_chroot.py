"""Build the Dockerfile without a container engine, and train five steps in the image as its user. Linux, as root.

    apt-get install debootstrap
    python tests/integration/image_in_chroot.py --work /tmp/image [CHECKOUT]

Each stage gets a root directory, and each RUN a chroot with its own mounts. The base must be Debian, made by debootstrap. If pip
cannot reach a package index: --bind /opt/wheels --env PIP_FIND_LINKS=/opt/wheels, which apply to each RUN but not to the image.
Needs only the standard library.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

# Runs in the image, as its user, without the checkout, on four images with labels. Masks at a quarter of the size are the CAMs.
DRAW = """
from pathlib import Path
import numpy as np
from PIL import Image
from weakclip.demo import world
from weakclip.labels import class_names

for name in ("images", "cams"):
    Path(name).mkdir()
rows = ["file,labels"]
for number in range(4):
    drawn = world.picture(0, number)
    Image.fromarray(drawn.image).save(f"images/{number}.jpg")
    small = [Image.fromarray(255 * (drawn.mask == each).astype(np.uint8)).resize((48, 48)) for each in drawn.classes]
    np.savez(f"cams/{number}.npz", keys=drawn.classes, cam=np.stack([np.asarray(cam) for cam in small]))
    rows.append(f"{number}.jpg,{';'.join(class_names('demo')[each] for each in drawn.classes)}")
Path("labels.csv").write_text("\\n".join(rows) + "\\n")
"""

RECIPE = """
run: run
classes: demo
data: {train: train, scale: [384, 96], workers: 1, shuffle_window: 2}
augment: {crop: 96, photometric: false}
clip: {model: null, pretrained: demo, image_size: 96}
matching: {width: 32}
decoder: {fpn_channels: 16, head_channels: 16}
loss: {grid: [24, 24]}
optim: {lr: 1.0e-3, warmup: 2}
train: {batch: 2, deepspeed: configs/deepspeed/zero2.json, log_every: 1}
"""

CHECK = f"""set -eux
test "$(id -u)" != 0
for program in git g++; do if command -v $program; then exit 1; fi; done
command -v scontrol
python -c 'import ctypes, torch, weakclip; ctypes.CDLL("libmunge.so.2"); print(torch.__version__, weakclip.__file__)'
python -c {shlex.quote(DRAW)}
echo {shlex.quote(RECIPE)} > recipe.yaml
python -m weakclip.datasets.build folder --classes demo \\
    --images images --labels labels.csv --cams cams --cam-keys class --out train
python -m weakclip.train --config recipe.yaml train.steps=5
ls -l run/weights
test -s run/weights/last.safetensors
"""

# Mounts for a RUN, like a container's. They end with its process, so that copies do not contain them.
MOUNT = """set -e
mount -t proc proc "$ROOT/proc"
mount --rbind /dev "$ROOT/dev"
for bind in $BINDS; do
    from=${bind%%:*} to=$ROOT${bind##*:}
    if [ -d "$from" ]; then mkdir -p "$to"; else mkdir -p "$(dirname "$to")"; touch -a "$to"; fi
    mount --bind "$from" "$to"
done
exec chroot --groups= --userspec="$USER_ID" "$ROOT" /usr/bin/env -i "$@"
"""


@dataclass
class Stage:
    """A root directory, and what the instructions so far have set."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"})
    args: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "0"
    shell: tuple[str, ...] = ("/bin/sh", "-c")

    @property
    def account(self) -> list[str]:
        """The user's line of /etc/passwd."""
        lines = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
        return next(line for line in lines if self.user in (line[0], line[2]))

    def run(self, command: str, options: argparse.Namespace) -> None:
        """Raises CalledProcessError when it fails."""
        _, _, uid, gid, _, home, _ = self.account
        variables = {"HOME": home} | self.env | self.args | dict(each.split("=", 1) for each in options.env)
        line = ["unshare", "--mount", "sh", "-c", MOUNT, "sh", *(f"{name}={value}" for name, value in variables.items())]
        line += ["/bin/sh", "-c", f'cd {shlex.quote(self.folder)} && exec "$@"', "sh", *self.shell, command]
        given = {
            "ROOT": str(self.root),
            "USER_ID": f"{uid}:{gid}",
            "BINDS": " ".join(["/etc/hosts", "/etc/resolv.conf", *options.bind]),
        }
        subprocess.run(line, env=os.environ | given, check=True)


def is_ignored(path: str, patterns: list[str]) -> bool:
    """By .dockerignore: the last pattern that fits the path, or a folder that it is in, decides."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    verdict = False
    for pattern in patterns:
        bare = re.escape(pattern.removeprefix("!").strip("/"))
        regex = bare.replace(r"\*\*/", "(.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]")
        if any(re.fullmatch(regex, prefix) for prefix in prefixes):
            verdict = not pattern.startswith("!")
    return verdict


def copy(source: Path, names: list[str], stage: Stage, to: str, patterns: list[str]) -> None:
    """COPY without wildcards. A folder's contents go into the target, a file beside others if the target ends with a slash."""
    target = stage.root / os.path.join(stage.folder, to).lstrip("/")

    def left_out(folder: str, entries: list[str]) -> list[str]:
        return [each for each in entries if is_ignored(os.path.relpath(os.path.join(folder, each), source), patterns)]

    for name in names:
        path = source / name.lstrip("/")
        if not path.exists() or (path != source and left_out(str(path.parent), [path.name])):
            raise SystemExit(f"COPY {name}: not there, or left out by .dockerignore")
        if path.is_dir():
            shutil.copytree(path, target, symlinks=True, ignore=left_out, dirs_exist_ok=True)
        else:
            inside = target / path.name if to.endswith("/") else target
            inside.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, inside)


def base(image: str, options: argparse.Namespace) -> Path:
    """The root of debian:SUITE, made once for a work folder."""
    found = re.fullmatch(r"(?:docker\.io/library/)?debian:([a-z]+)(-slim)?", image)
    if not found:
        raise SystemExit(f"FROM {image}: only debian:SUITE can be made here")
    root = options.work / f"debian-{found[1]}"
    if not root.exists():
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run(["debootstrap", "--variant=minbase", found[1], partial, options.mirror], check=True)
        (partial / "usr/sbin/policy-rc.d").write_text("#!/bin/sh\nexit 101\n")  # as in Docker's image: start no daemons
        (partial / "usr/sbin/policy-rc.d").chmod(0o755)
        partial.rename(root)
    return root


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """Name and rest of each, with its lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", "").splitlines():
        name, rest = line.split(maxsplit=1)
        yield name.upper(), rest.strip()


def build(options: argparse.Namespace) -> Stage:
    """The last stage. Raises CalledProcessError when a RUN fails."""
    context: Path = options.checkout
    patterns = [line.strip() for line in (context / ".dockerignore").read_text().splitlines()]
    patterns = [line for line in patterns if line and not line.startswith("#")]
    given = dict(each.split("=", 1) for each in options.build_arg)
    stages: dict[str, Stage] = {}
    outer: dict[str, str] = {}  # ARGs before the first FROM
    stage: Stage | None = None

    def expanded(text: str) -> str:
        known = stage.env | stage.args if stage else outer
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)

    for name, rest in instructions((context / "Dockerfile").read_text()):
        print(f"\n=== {name} {rest}", flush=True)
        began = time.monotonic()
        if name == "FROM":
            stage = None
            image, _, label = expanded(rest).partition(" AS ")
            root = options.work / f"stage-{len(stages)}-{label or 'image'}"
            shutil.rmtree(root, ignore_errors=True)
            source = stages[image] if image in stages else Stage(base(image, options))
            subprocess.run(["cp", "-a", source.root, root], check=True)
            stage = stages[label] = replace(source, root=root, env=dict(source.env), args={})
        elif name == "ARG":
            key, _, default = rest.partition("=")
            (stage.args if stage else outer)[key] = given.get(key, default or outer.get(key, ""))
        elif stage is None:
            raise SystemExit(f"{name} before FROM")
        elif name == "ENV":
            stage.env |= dict(each.split("=", 1) for each in shlex.split(expanded(rest)))
        elif name == "WORKDIR":
            stage.folder = os.path.join(stage.folder, expanded(rest))
            (stage.root / stage.folder.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif name == "USER":
            stage.user = expanded(rest)
        elif name == "SHELL":
            stage.shell = tuple(json.loads(rest))
        elif name == "COPY":
            *names, to = shlex.split(expanded(rest))
            if names[0].startswith("--from="):
                copy(stages[names[0].removeprefix("--from=")].root, names[1:], stage, to, [])
            else:
                copy(context, names, stage, to, patterns)
        elif name == "RUN":
            stage.run(rest, options)
        elif name != "CMD":
            raise SystemExit(f"{name}: unknown here")
        print(f"--- {time.monotonic() - began:.0f} s", flush=True)
    assert stage is not None
    return stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path(__file__).resolve().parents[2])
    parser.add_argument("--work", type=Path, required=True, help="folder of the roots; takes some GB")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build's")
    parser.add_argument("--bind", action="append", default=[], metavar="FROM[:TO]", help="mount it for each RUN")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for each RUN")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap gets the base")
    options = parser.parse_args()
    options.checkout, options.work = options.checkout.resolve(), options.work.resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        image = build(options)
        print(f"\n=== the image, as user {image.user}", flush=True)
        image.run(CHECK, options)
    except subprocess.CalledProcessError as error:
        sys.exit(f"\nFAILED with {error.returncode}")
    size = subprocess.run(["du", "-sxm", image.root], capture_output=True, text=True, check=True).stdout.split()[0]
    print(f"\nbuilt and trained: {image.root}, {size} MB")


if __name__ == "__main__":
    main()
