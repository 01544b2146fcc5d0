#!/usr/bin/env python3
"""Compares `slipway daemon` with `buildkitd`, both driven by the same `buildctl`. Standard library only.

    daemons.py [--rounds N] [--files N] [--records N] [--only WORKLOAD] [--slipway BINARY] [--markdown FILE]

The daemons take turns, round by round; medians are compared and ratios are what counts. See README.md beside this file.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import run

BUILDERS = 32

# Seconds until a daemon has failed to start.
START_LIMIT = 600


class Daemon:
    """A daemon over a state folder of its own, and `buildctl` to speak to it."""

    def __init__(self, work, log):
        self.work, self.log = work, log
        self.root = self.process = None

    def fresh(self):
        self.close()
        self.root = tempfile.mkdtemp(prefix=f"{self.name}-", dir=self.work)
        self.start()

    def start(self):
        """Starts the daemon; returns the seconds until it has answered a request."""
        self.socket = f"{self.root}/socket"
        if os.path.exists(self.socket):
            os.remove(self.socket)
        began = time.monotonic()
        self.process = subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        while not answers(self.socket):
            if self.process.poll() is not None or time.monotonic() > began + START_LIMIT:
                run.fail(f"{self.name} does not start; see {self.log.name}")
            time.sleep(0.0005)
        return time.monotonic() - began

    def stop(self):
        if self.process:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait()
        self.process = None

    def close(self):
        self.stop()
        self.root = None

    def buildctl(self, *arguments):
        return ["buildctl", "--addr", f"unix://{self.socket}", *arguments]

    def build(self, context, output="type=image,name=bench:latest"):
        self.clear_peak()
        arguments = ["build", "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={context}",
                     f"--local=dockerfile={context}", f"--output={output}"]
        seconds, _ = run.measure(self.buildctl(*arguments), log=self.log)
        return seconds, self.peak()

    def solve(self, definition):
        """Builds raw LLB as an image without a name."""
        done = subprocess.run(self.buildctl("build", "--progress=plain", "--output=type=image"), input=definition,
                              stdout=self.log, stderr=self.log)
        if done.returncode != 0:
            run.fail(f"buildctl failed; see {self.log.name}")

    def records(self):
        listed = subprocess.run(self.buildctl("du", "--format", "{{json .}}"), stdin=subprocess.DEVNULL,
                                stdout=subprocess.PIPE, stderr=self.log, text=True, check=True).stdout
        return len(json.loads(listed) or [])

    def clear_peak(self):
        with open(f"/proc/{self.process.pid}/clear_refs", "w") as file:
            file.write("5")  # The high-water mark starts again.

    def peak(self):
        return run.high_water(self.process.pid)

    def resident(self):
        """Resident memory in KiB: all, and what is the process's own."""
        with open(f"/proc/{self.process.pid}/status") as file:
            found = dict(line.split(":", 1) for line in file if line.startswith(("VmRSS", "RssAnon")))
        return int(found["VmRSS"].split()[0]), int(found["RssAnon"].split()[0])


class Slipway(Daemon):
    """`slipway daemon`."""

    name = "slipway"

    def __init__(self, work, log, binary):
        super().__init__(work, log)
        self.binary = binary

    def command(self):
        return [self.binary, "--root", f"{self.root}/state", "daemon", "--addr", f"unix://{self.socket}",
                "--config", os.devnull]

    def version(self):
        return run.first_line([self.binary, "--version"])


class BuildKit(Daemon):
    """`buildkitd` with its own worker and overlayfs."""

    name = "buildkit"

    def command(self):
        return ["buildkitd", "--root", f"{self.root}/state", "--addr", f"unix://{self.socket}", "--oci-worker=true",
                "--containerd-worker=false", "--oci-worker-snapshotter=overlayfs", "--oci-worker-net=host",
                "--config", os.devnull]

    def version(self):
        return run.first_line(["buildkitd", "--version"])


def answers(path):
    """Asks a daemon for its version, by hand: a client program takes longer to start than a daemon may."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.settimeout(START_LIMIT)
        connection.connect(path)
        literal = lambda name, value: b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value
        headers = b"".join(literal(name, value) for name, value in (
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/moby.buildkit.v1.Control/Info"),
            (b":authority", b"localhost"), (b"content-type", b"application/grpc"), (b"te", b"trailers")))
        frame = lambda kind, flags, stream, body: (
            len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body)
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers)
                           + frame(0, 1, 1, b"\x00\x00\x00\x00\x00"))
        received = b""
        while True:
            while len(received) >= 9 and len(received) >= 9 + int.from_bytes(received[:3], "big"):
                if received[3] == 1:
                    return True
                received = received[9 + int.from_bytes(received[:3], "big"):]
            data = connection.recv(65536)
            if not data:
                return False
            received += data
    except (ConnectionRefusedError, FileNotFoundError, ConnectionResetError, BrokenPipeError):
        return False
    finally:
        connection.close()


# ---- LLB, as far as it is needed here ----


def varint(number):
    number &= (1 << 64) - 1
    encoded = bytearray()
    while number > 127:
        encoded.append(number & 127 | 128)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def field(number, value):
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def digest(message):
    return f"sha256:{hashlib.sha256(message).hexdigest()}".encode()


def inputs(messages):
    return b"".join(field(1, field(1, digest(message))) for message in messages)


def made_file(path, text):
    """An operation that makes a file in an empty file system."""
    file = field(1, path.encode()) + field(2, 0o644) + field(3, text.encode()) + field(5, -1)
    action = field(1, -1) + field(2, -1) + field(3, 0) + field(5, file)
    return field(4, field(2, action))


def definition(messages):
    return b"".join(field(1, message) for message in [*messages, inputs(messages[-1:])])


def many_records(count, batch):
    """As many layers as are wanted, each with one file, on top of one another."""
    steps = [made_file("/f", f"{batch} {number}") for number in range(count)]
    merged = b"".join(field(1, field(1, number)) for number in range(count))
    return definition([*steps, inputs(steps) + field(6, merged)])


# ---- workloads ----


class Idle:
    """Start and rest, with nothing in the store."""

    name = "idle"

    def __init__(self, directory, options):
        pass

    def prepare(self, daemon):
        daemon.fresh()
        daemon.stop()

    def round(self, daemon, _):
        seconds = daemon.start()
        time.sleep(2)
        resident, own = daemon.resident()
        daemon.stop()
        yield "idle-ready", seconds, resident
        yield "idle-own", None, own


class Records:
    """Start and rest, with many records in the store."""

    name = "records"
    BATCH = 100

    def __init__(self, directory, options):
        self.records = options.records

    def prepare(self, daemon):
        daemon.fresh()
        for batch in range(-(-self.records // self.BATCH)):
            daemon.solve(many_records(min(self.BATCH, self.records), batch))
        found = daemon.records()
        if found < self.records:
            run.fail(f"{daemon.name} has {found} records")
        daemon.stop()

    def round(self, daemon, _):
        seconds = daemon.start()
        time.sleep(2)
        resident, own = daemon.resident()
        daemon.stop()
        yield "records-ready", seconds, resident
        yield "records-own", None, own


class ManyFiles(run.ManyFiles):
    """COPY of many small files that the client sends, then again with one of them changed."""

    def prepare(self, daemon):
        daemon.close()

    def round(self, daemon, number):
        for key, (seconds, memory) in super().round(daemon, number):
            yield key, seconds, memory


class Together:
    """The same build 32 times at once, with a step that takes half a second."""

    name = "together"

    def __init__(self, directory, _):
        self.context = f"{directory}/together"
        self.count = f"{directory}/together-count"
        run.busybox_root(self.context)
        for name in ("sleep", "head"):
            os.symlink("busybox", f"{self.context}/rootfs/bin/{name}")

    def prepare(self, daemon):
        daemon.fresh()
        run.write(f"{self.context}/Dockerfile", "FROM scratch\nCOPY rootfs /\nRUN true\n")
        daemon.build(self.context)

    def round(self, daemon, number):
        # What a step writes differs from run to run, so equal results are results of one run.
        run.write(f"{self.context}/Dockerfile", "FROM scratch\nCOPY rootfs /\n"
                  f"RUN sleep 0.5; head -c 16 /dev/urandom > /round-{number}\n")
        daemon.clear_peak()
        began = time.monotonic()
        clients, files = [], []
        for client in range(BUILDERS):
            files.append(f"{daemon.work}/metadata-{client}")
            command = daemon.buildctl(
                "build", "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={self.context}",
                f"--local=dockerfile={self.context}", f"--output=type=image,name=bench:{client}",
                f"--metadata-file={files[-1]}")
            clients.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=daemon.log, stderr=daemon.log))
        if any([client.wait() for client in clients]):
            run.fail(f"a build failed; see {daemon.log.name}")
        seconds = time.monotonic() - began
        images = {json.load(open(file))["containerimage.digest"] for file in files}
        yield "together", seconds, daemon.peak()
        yield "together-images", len(images), None


class LargeFile:
    """A file of 4 GiB, of which a sixteenth is not zero, to the daemon and back in every form."""

    name = "large"
    SIZE = 4 << 30

    def __init__(self, directory, _):
        self.context, self.out = f"{directory}/large", f"{directory}/out"
        os.makedirs(self.context)
        with open(f"{self.context}/large", "wb") as file:
            noise = os.urandom(1 << 20)
            for start in range(0, self.SIZE, 16 << 20):
                file.seek(start)
                file.write(noise)
            file.truncate(self.SIZE)
        run.write(f"{self.context}/Dockerfile", "FROM scratch\nCOPY large /\n")

    def prepare(self, daemon):
        daemon.close()

    def round(self, daemon, _):
        daemon.fresh()
        arguments = ["build", "--progress=plain", "--frontend=dockerfile.v0", f"--local=context={self.context}",
                     f"--local=dockerfile={self.context}"]
        for key, output in (("large-in", []), ("large-folder", [f"--output=type=local,dest={self.out}"]),
                            ("large-tar", [f"--output=type=tar,dest={self.out}"]),
                            ("large-oci", [f"--output=type=oci,dest={self.out}"])):
            daemon.clear_peak()
            seconds, _ = run.measure(daemon.buildctl(*arguments, *output), log=daemon.log)
            yield key, seconds, daemon.peak()
            shutil.rmtree(self.out) if os.path.isdir(self.out) else os.path.exists(self.out) and os.remove(self.out)
        daemon.close()


ROWS = {
    "idle-ready": "start until the first answer, empty store",
    "idle-own": "– of its memory, not shared with files",
    "records-ready": "the same with {records:,} records",
    "records-own": "– of its memory, not shared with files",
    "copy-cold": "`COPY` of {files:,} small files, cold",
    "copy-changed": "the same after one change",
    "together": "{builders} equal builds at once, with a step of 0.5 s",
    "together-images": "– different images that came of them",
    "large-in": "a file of 4 GiB, to the daemon",
    "large-folder": "– and back as a folder",
    "large-tar": "– and back as a tar",
    "large-oci": "– and back as an image in an archive",
}


def report(daemons, results, options):
    lines = [f"{options.rounds} rounds, medians; `×` is how many times more than slipway's; memory is the largest of all rounds.", ""]
    lines.append("| | " + " | ".join(f"{daemon.name} | memory" for daemon in daemons) + " |")
    lines.append("|---|" + "---:|---:|" * len(daemons))
    for key, title in ROWS.items():
        if (daemons[0].name, key) not in results:
            continue
        cells = []
        middle = {daemon.name: statistics.median([seconds for seconds, _ in results[daemon.name, key]] or [0])
                  for daemon in daemons if results[daemon.name, key][0][0] is not None}
        for daemon in daemons:
            memories = [memory for _, memory in results[daemon.name, key] if memory is not None]
            value = ""
            if daemon.name in middle:
                value = middle[daemon.name]
                ratio = f", **{value / middle['slipway']:.1f}×**" if "slipway" in middle and daemon.name != "slipway" else ""
                value = f"{value:.0f}" if key.endswith("-images") else f"{run.seconds_text(value)}{ratio}"
            cells += [value, f"{max(memories) / 1024:.1f} MiB" if memories else ""]
        title = title.format(files=options.files, records=options.records, builders=BUILDERS)
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    lines += ["", f"{os.cpu_count()} cores, Linux {platform.release()}; "
              + "; ".join(daemon.version() for daemon in daemons) + "."]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    kinds = (Idle, Records, ManyFiles, Together, LargeFile)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--files", type=int, default=50000, help="files of the largest workload")
    parser.add_argument("--records", type=int, default=10000, help="records in the store")
    parser.add_argument("--only", choices=[kind.name for kind in kinds], action="append", help="which workloads")
    parser.add_argument("--tools", default="slipway,buildkit", help="which daemons")
    parser.add_argument("--slipway", default=f"{run.TARGET}/dist/slipway")
    parser.add_argument("--work", default=f"{run.REPOSITORY}/.work/bench-daemons", help="where contexts and stores go")
    parser.add_argument("--markdown", help="write the table to this file as well")
    options = parser.parse_args()
    if os.geteuid() != 0:
        run.fail("the daemons are compared as root")
    if not shutil.which("buildctl"):
        run.fail("no buildctl")

    shutil.rmtree(options.work, ignore_errors=True)
    os.makedirs(options.work)
    log = open(f"{options.work}/log", "wb")
    daemons = []
    if "slipway" in options.tools.split(","):
        daemons.append(Slipway(options.work, log, options.slipway))
    if "buildkit" in options.tools.split(",") and shutil.which("buildkitd"):
        daemons.append(BuildKit(options.work, log))
    results = {}
    try:
        for kind in kinds:
            if options.only and kind.name not in options.only:
                continue
            print(f"bench: {kind.__doc__.splitlines()[0]}", file=sys.stderr)
            workload = kind(options.work, options)
            run.settle()
            for daemon in daemons:
                workload.prepare(daemon)
            for number in range(options.rounds):
                turn = number % len(daemons)
                for daemon in daemons[turn:] + daemons[:turn]:
                    for key, seconds, memory in workload.round(daemon, number):
                        results.setdefault((daemon.name, key), []).append((seconds, memory))
                        print(f"  round {number + 1}: {daemon.name:9} {key:16} {seconds!s:>22} {memory} KiB",
                              file=sys.stderr)
            for daemon in daemons:
                daemon.close()
    finally:
        for daemon in daemons:
            daemon.close()
        run.remove_all_but_log(options.work)
    text = report(daemons, results, options)
    print(text, end="")
    if options.markdown:
        run.write(options.markdown, text)


if __name__ == "__main__":
    main()
