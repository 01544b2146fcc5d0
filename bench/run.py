#!/usr/bin/env python3
"""Compares slipway with the image builders that are on PATH. Standard library only.

    run.py [--rounds N] [--files N] [--tools slipway,buildkit,buildah] [--only WORKLOAD] [--markdown FILE]

The tools take turns, round by round, so that a busy moment of the machine meets all of them; medians are compared
and ratios are what counts. Every build starts `FROM scratch` with a static busybox, so no registry is needed. See
README.md beside this file for what is measured and why.
"""

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(HERE)
TARGET = os.environ.get("CARGO_TARGET_DIR", f"{REPOSITORY}/target")
STEPS = 100
FLOOR_RUNS = 50


def fail(message):
    sys.exit(f"bench: {message}")


def measure(command, environment=None, log=None):
    """Runs a command; returns seconds and the largest resident set, in KiB, of it and of what it waited for."""
    log.write(f"\n$ {' '.join(command)}\n".encode())
    log.flush()
    began = time.monotonic()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        fail(f"{command[0]} failed with {process.returncode}; see {log.name}")
    return seconds, usage.ru_maxrss


class Slipway:
    """The embedded door: each build is a process of its own."""

    name = "slipway"

    def __init__(self, work, log, binary):
        self.work, self.log, self.binary = work, log, binary
        self.root = None

    @staticmethod
    def here(arguments):
        return arguments.slipway if os.access(arguments.slipway, os.X_OK) else None

    def fresh(self):
        self.close()
        self.root = tempfile.mkdtemp(prefix="slipway-", dir=self.work)

    def build(self, context):
        command = [self.binary, "--root", self.root, "build", "--progress=plain", "-t", "bench:latest", context]
        return measure(command, log=self.log)

    def close(self):
        self.root = None

    def version(self):
        return first_line([self.binary, "--version"])


class BuildKit:
    """`buildctl` against a `buildkitd` that stays warm; the daemon's memory counts, its start does not."""

    name = "buildkit"

    def __init__(self, work, log, binary):
        self.work, self.log = work, log
        self.root = self.daemon = None

    @staticmethod
    def here(_):
        return shutil.which("buildctl") if shutil.which("buildkitd") else None

    def fresh(self):
        self.close()
        self.root = tempfile.mkdtemp(prefix="buildkit-", dir=self.work)
        self.address = f"unix://{self.root}/socket"
        self.daemon = subprocess.Popen(
            ["buildkitd", "--root", f"{self.root}/state", "--addr", self.address, "--oci-worker=true",
             "--containerd-worker=false", "--oci-worker-snapshotter=overlayfs", "--oci-worker-net=host",
             "--config", os.devnull],
            stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        deadline = time.monotonic() + 60
        while subprocess.run(["buildctl", "--addr", self.address, "debug", "workers"], stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode != 0:
            if self.daemon.poll() is not None or time.monotonic() > deadline:
                fail(f"buildkitd does not start; see {self.log.name}")
            time.sleep(0.1)

    def build(self, context):
        with open(f"/proc/{self.daemon.pid}/clear_refs", "w") as file:
            file.write("5")  # The high-water mark starts again.
        seconds, client = measure(
            ["buildctl", "--addr", self.address, "build", "--progress=plain", "--frontend=dockerfile.v0",
             f"--local=context={context}", f"--local=dockerfile={context}", "--output=type=image,name=bench:latest"],
            log=self.log)
        return seconds, client + high_water(self.daemon.pid)

    def close(self):
        if self.daemon:
            self.daemon.terminate()
            self.daemon.wait()
        self.root = self.daemon = None

    def version(self):
        return first_line(["buildkitd", "--version"])


class Buildah:
    """`buildah build --layers`, with a store of its own."""

    name = "buildah"

    def __init__(self, work, log, binary):
        self.work, self.log = work, log
        self.root = self.isolation = None

    @staticmethod
    def here(_):
        return shutil.which("buildah")

    def choose_isolation(self):
        """The runtimes differ in which machines they can work on: the first that runs a step here is taken."""
        context = tempfile.mkdtemp(prefix="probe-", dir=self.work)
        busybox_root(context)
        write(f"{context}/Dockerfile", "FROM scratch\nCOPY rootfs /\nRUN true\n")
        runtimes = [["--isolation=oci", f"--runtime={name}"] for name in ("runc", "crun") if shutil.which(name)]
        for isolation in [*runtimes, ["--isolation=chroot"]]:
            command = self.words() + ["build", "--network=host", *isolation, context]
            if subprocess.run(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log).returncode == 0:
                return isolation
        fail(f"buildah can run no step here; see {self.log.name}")

    def words(self):
        return ["buildah", "--root", f"{self.root}/root", "--runroot", f"{self.root}/run", "--storage-driver", "overlay"]

    def fresh(self):
        self.close()
        self.root = tempfile.mkdtemp(prefix="buildah-", dir=self.work)
        self.isolation = self.isolation or self.choose_isolation()

    def build(self, context):
        command = self.words() + ["build", "--layers", "--network=host", *self.isolation, "-t", "bench:latest", context]
        return measure(command, log=self.log)

    def close(self):
        # Its storage stays mounted on itself otherwise.
        if self.root and os.path.ismount(f"{self.root}/root/overlay"):
            subprocess.run(["umount", f"{self.root}/root/overlay"], check=True)
        self.root = None

    def version(self):
        return f"{first_line(['buildah', '--version'])} {' '.join(self.isolation or [])}"


def settle():
    """Waits: who builds has not written all of the context within the last second, and the disk is done with it."""
    os.sync()
    time.sleep(3)


def remove_all_but_log(work):
    """Removes contexts and stores, when everything has been measured: for minutes after many files were deleted, ext4 searches
    so long for the inode of each new one that this would be most of what is measured."""
    for entry in os.scandir(work):
        if entry.name != "log":
            shutil.rmtree(entry.path, ignore_errors=True) if entry.is_dir(follow_symlinks=False) else os.remove(entry.path)


def first_line(command):
    printed = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    return printed.strip().splitlines()[0] if printed.strip() else "?"


def high_water(pid):
    with open(f"/proc/{pid}/status") as file:
        return next((int(line.split()[1]) for line in file if line.startswith("VmHWM:")), 0)


def busybox_root(context):
    """The smallest root file system with a shell."""
    binary = shutil.which("busybox") or fail("no busybox; install busybox-static")
    os.makedirs(f"{context}/rootfs/bin")
    shutil.copy(binary, f"{context}/rootfs/bin/busybox")
    for name in ("sh", "touch", "true", "cat"):
        os.symlink("busybox", f"{context}/rootfs/bin/{name}")


def small_files(directory, count):
    """Files of 1 to 8 KiB, some larger, 100 to a folder; the same for every run of the benchmark."""
    chance = random.Random(1)
    noise = chance.randbytes(1 << 20)
    for number in range(count):
        folder = f"{directory}/{number // 10000}/{number // 100 % 100}"
        if number % 100 == 0:
            os.makedirs(folder)
        size = chance.randrange(1024, 8192) if number % 20 else chance.randrange(8192, 32768)
        start = chance.randrange(len(noise) - size)
        with open(f"{folder}/{number}", "wb") as file:
            file.write(noise[start:start + size])


def warm(directory):
    """Reads a folder, so that each tool finds all of it in the page cache, however long the one before took."""
    for folder, _, files in os.walk(directory):
        for name in files:
            with open(f"{folder}/{name}", "rb") as file:
                file.read()


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


class CachedRebuild:
    """20 steps over 5,000 files, nothing changed."""

    name = "cached"

    def __init__(self, directory, options):
        self.files = min(options.files, 5000)
        self.context = f"{directory}/cached"
        busybox_root(self.context)
        small_files(f"{self.context}/files", self.files)
        lines = ["FROM scratch", "COPY rootfs /", "COPY files /files"]
        for number in range(9):
            lines += [f"RUN touch /made-{number}", f"COPY files/0/{number} /again-{number}"]
        write(f"{self.context}/Dockerfile", "\n".join(lines) + "\n")

    def prepare(self, tool):
        tool.fresh()
        tool.build(self.context)

    def round(self, tool, _):
        yield "cached", tool.build(self.context)


class Steps:
    """100 RUN steps that touch one file each, none of them cached; what the build costs without them is taken off."""

    name = "steps"

    def __init__(self, directory, _):
        self.context = f"{directory}/steps"
        busybox_root(self.context)

    def dockerfile(self, steps):
        write(f"{self.context}/Dockerfile", "\n".join(["FROM scratch", "COPY rootfs /", *steps]) + "\n")

    def prepare(self, tool):
        tool.fresh()
        self.dockerfile(["RUN true"])
        tool.build(self.context)

    def round(self, tool, number):
        self.dockerfile(["RUN true"])
        rest, _ = tool.build(self.context)
        self.dockerfile(["RUN true", *(f"RUN touch /round-{number}-{step}" for step in range(STEPS))])
        seconds, memory = tool.build(self.context)
        yield "step", ((seconds - rest) / STEPS, memory)


class ManyFiles:
    """COPY of 50,000 small files into an empty store, then again with a new one in their middle."""

    name = "files"

    def __init__(self, directory, options):
        self.context = f"{directory}/files"
        small_files(f"{self.context}/files", options.files)
        middle = options.files // 2
        self.folder = f"{self.context}/files/{middle // 10000}/{middle // 100 % 100}"
        write(f"{self.context}/Dockerfile", "FROM scratch\nCOPY files /files\n")

    def prepare(self, tool):
        tool.close()

    def round(self, tool, number):
        tool.fresh()
        warm(self.context)
        yield "copy-cold", tool.build(self.context)
        write(f"{self.folder}/changed", f"round {number} {tool.name}\n")
        yield "copy-changed", tool.build(self.context)
        os.remove(f"{self.folder}/changed")
        tool.close()


class IgnoredFiles:
    """COPY of the few files that an ignore file of 200 patterns leaves of 200,000."""

    name = "ignore"

    def __init__(self, directory, options):
        self.context = f"{directory}/ignore"
        for number in range(options.files * 4 // 100):
            folder = f"{self.context}/part-{number // 100}/package-{number % 100}"
            os.makedirs(folder)
            for file in range(100):
                open(f"{folder}/{file}.{('log', 'tmp', 'o', 'map')[file % 4]}", "w").close()
            if number % 100 == 0:
                write(f"{folder}/README.md", str(number))
        kinds = ("**/{0}.log", "**/*-{0}/cache", "part-*/package-{0}/*.tmp", "build-{0}/", "*.{0}~")
        patterns = [kinds[number % len(kinds)].format(number) for number in range(190)]
        # With exceptions no directory can be passed over.
        patterns += ["**/*.log", "**/*.tmp", "**/*.o", "**/*.map", "part-9*/package-9*", "!**/README.md",
                     "secret", "*.key", "**/node_modules", "!part-0/package-0/README.md"]
        write(f"{self.context}/.dockerignore", "\n".join(patterns) + "\n")
        write(f"{self.context}/Dockerfile", "FROM scratch\nCOPY . /files\n")

    def prepare(self, tool):
        tool.close()

    def round(self, tool, _):
        tool.fresh()
        yield "ignore", tool.build(self.context)
        tool.close()


def floor():
    """Seconds that the kernel needs for a mount and a process namespace with a program in it."""
    began = time.monotonic()
    for _ in range(FLOOR_RUNS):
        subprocess.run(["unshare", "-m", "-p", "-f", "true"], stdin=subprocess.DEVNULL, check=True)
    return (time.monotonic() - began) / FLOOR_RUNS


ROWS = {
    "cached": "cached rebuild, 20 steps, {small:,} files",
    "step": "one `RUN` step (of {steps}, each touches a file)",
    "copy-cold": "`COPY` of {files:,} small files, cold",
    "copy-changed": "the same after one change",
    "ignore": "`COPY` of what 200 ignore patterns leave of {ignored:,} files, first time",
}


def seconds_text(value):
    return f"{value * 1000:.1f} ms" if value < 1 else f"{value:.2f} s"


def report(tools, results, floors, options):
    lines = [f"{options.rounds} rounds, medians; `×` is how many times slower than slipway.", ""]
    lines.append("| workload | " + " | ".join(tool.name for tool in tools) + " |")
    lines.append("|---|" + "---:|" * len(tools))
    for key, title in ROWS.items():
        if (tools[0].name, key) not in results:
            continue
        cells = []
        ours = statistics.median(seconds for seconds, _ in results.get(("slipway", key), [(0, 0)]))
        for tool in tools:
            times = [seconds for seconds, _ in results[tool.name, key]]
            median = statistics.median(times)
            ratio = f", **{median / ours:.1f}×**" if ours > 0 and tool.name != "slipway" else ""
            cells.append(f"{seconds_text(median)}{ratio}")
        title = title.format(small=min(options.files, 5000), steps=STEPS, files=options.files, ignored=options.files * 4)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", "| peak memory | " + " | ".join(tool.name for tool in tools) + " |", "|---|" + "---:|" * len(tools)]
    for key, title in ROWS.items():
        if (tools[0].name, key) not in results:
            continue
        cells = [f"{max(memory for _, memory in results[tool.name, key]) / 1024:.0f} MiB" for tool in tools]
        title = title.format(small=min(options.files, 5000), steps=STEPS, files=options.files, ignored=options.files * 4)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if floors:
        median = statistics.median(floors)
        line = f"Floor: `unshare -m -p -f true` takes {seconds_text(median)} on this machine"
        if ("slipway", "step") in results:
            step = statistics.median(seconds for seconds, _ in results["slipway", "step"])
            line += f"; a `RUN` step of slipway costs {step / median:.1f}× that"
        lines += ["", line + "."]
    lines += ["", f"{os.cpu_count()} cores, Linux {platform.release()}; " + "; ".join(tool.version() for tool in tools) + "."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=int, default=50000, help="files of the largest workload")
    parser.add_argument("--tools", default="slipway,buildkit,buildah", help="which tools, of those that are there")
    parser.add_argument("--only", choices=["cached", "steps", "files", "ignore"], action="append", help="which workloads")
    parser.add_argument("--slipway", default=f"{TARGET}/dist/slipway")
    parser.add_argument("--work", default=f"{REPOSITORY}/.work/bench", help="where contexts and stores go")
    parser.add_argument("--markdown", help="write the tables to this file as well")
    options = parser.parse_args()
    if os.geteuid() != 0:
        fail("the tools are compared as root: buildkitd and the floor need it")

    shutil.rmtree(options.work, ignore_errors=True)
    os.makedirs(options.work)
    log = open(f"{options.work}/log", "wb")
    tools = []
    for kind in (Slipway, BuildKit, Buildah):
        if kind.name not in options.tools.split(","):
            continue
        binary = kind.here(options)
        if binary:
            tools.append(kind(options.work, log, binary))
        else:
            print(f"bench: {kind.name} is not here and is left out", file=sys.stderr)
    if not tools:
        fail("none of the tools is here")

    results, floors = {}, []
    try:
        for kind in (CachedRebuild, Steps, ManyFiles, IgnoredFiles):
            if options.only and kind.name not in options.only:
                continue
            print(f"bench: {kind.__doc__.splitlines()[0]}", file=sys.stderr)
            workload = kind(options.work, options)
            settle()
            for tool in tools:
                workload.prepare(tool)
            for number in range(options.rounds):
                # Each tool is first, second and last equally often.
                turn = number % len(tools)
                for tool in tools[turn:] + tools[:turn]:
                    for key, result in workload.round(tool, number):
                        results.setdefault((tool.name, key), []).append(result)
                        print(f"  round {number + 1}: {tool.name:9} {key:12} {seconds_text(result[0]):>10}  "
                              f"{result[1] / 1024:.0f} MiB", file=sys.stderr)
                if kind is Steps:
                    floors.append(floor())
            for tool in tools:
                tool.close()
    finally:
        for tool in tools:
            tool.close()
        remove_all_but_log(options.work)
    text = report(tools, results, floors, options)
    print(text, end="")
    if options.markdown:
        write(options.markdown, text)


if __name__ == "__main__":
    main()
