#!/usr/bin/env python3
"""Assembles Debian packages into a multi-platform OCI archive.

    oci_image.py ARCHIVE ARCHITECTURE=BASE_DIRECTORY,DEV_DIRECTORY …

Each directory holds .deb files and becomes one layer. Files go from the packages' own tar streams into the layer,
so that owners and modes survive without root. Order, times and compression are fixed: equal packages, equal bytes.
"""

import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile

NAME = "slipway.local/debian"
# What no image of a test needs.
LEFT_OUT = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/lintian", "usr/share/info",
            "usr/share/bug", "usr/share/doc-base", "usr/share/menu", "usr/lib/x86_64-linux-gnu/gconv",
            "usr/lib/aarch64-linux-gnu/gconv")
# Debian's merged /usr: packages may still ship files below the old names.
MERGED = ("bin", "sbin", "lib", "lib64", "lib32", "libx32")
PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUP = """root:x:0:
daemon:x:1:
tty:x:5:
adm:x:4:daemon
www-data:x:33:
nogroup:x:65534:
"""
ENV = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


class Layer:
    """Entries of one layer, by path."""

    def __init__(self):
        self.entries = {}

    def add_directory(self, path, mode=0o755):
        info = tarfile.TarInfo(path)
        info.type, info.mode = tarfile.DIRTYPE, mode
        self.entries.setdefault(path, (info, b""))

    def add_file(self, path, content, mode=0o644):
        info = tarfile.TarInfo(path)
        info.size, info.mode = len(content), mode
        self.entries[path] = (info, content)

    def add_symlink(self, path, target):
        info = tarfile.TarInfo(path)
        info.type, info.linkname, info.mode = tarfile.SYMTYPE, target, 0o777
        self.entries[path] = (info, b"")

    def add_package(self, deb):
        stream = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE)
        with tarfile.open(fileobj=stream.stdout, mode="r|") as archive:
            for info in archive:
                path = merged(info.name)
                if not path or any(path == out or path.startswith(out + "/") for out in LEFT_OUT):
                    continue
                content = archive.extractfile(info).read() if info.isreg() else b""
                info.name = path
                if info.islnk():
                    info.linkname = merged(info.linkname)
                if info.isdir():
                    self.entries.setdefault(path, (info, content))
                elif path not in MERGED:
                    self.entries[path] = (info, content)
        if stream.wait() != 0:
            sys.exit(f"oci_image: cannot unpack {deb}")

    def parents(self):
        for path in list(self.entries):
            while "/" in path:
                path = path.rsplit("/", 1)[0]
                self.add_directory(path)

    def tar(self, epoch):
        self.parents()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
            # A hard link must follow the file that it names.
            order = sorted(self.entries.items(), key=lambda item: (item[1][0].islnk(), item[0].split("/")))
            for path, (info, content) in order:
                info.mtime = min(int(info.mtime) or epoch, epoch)
                info.uname = info.gname = ""
                info.pax_headers = {}
                archive.addfile(info, io.BytesIO(content) if info.isreg() else None)
        return out.getvalue()


def merged(name):
    """The path of a package's entry, below /usr where Debian has merged the two trees."""
    name = os.path.normpath(name).lstrip("/")
    name = "" if name == "." else name
    first = name.split("/", 1)[0]
    return f"usr/{name}" if first in MERGED and "/" in name else name


def packages(directory):
    return sorted(os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".deb"))


def base_layer(directory, applets):
    layer = Layer()
    for name in ("root", "tmp", "proc", "sys", "dev", "etc", "run", "var/tmp", "usr/bin", "usr/sbin", "usr/lib"):
        layer.add_directory(name)
    for name in ("tmp", "var/tmp"):
        layer.entries[name][0].mode = 0o1777
    layer.entries["root"][0].mode = 0o700
    for deb in packages(directory):
        layer.add_package(deb)
    for name in MERGED:
        layer.entries.pop(name, None)
        if f"usr/{name}" in layer.entries or any(path.startswith(f"usr/{name}/") for path in layer.entries):
            layer.add_directory(f"usr/{name}")
            layer.add_symlink(name, f"usr/{name}")
    for applet in applets:
        path = f"usr/bin/{applet}"
        if path not in layer.entries and f"usr/sbin/{applet}" not in layer.entries:
            layer.add_symlink(path, "busybox")
    layer.add_file("etc/passwd", PASSWD.encode())
    layer.add_file("etc/group", GROUP.encode())
    # An image needs no linker cache when the loader knows the directories.
    layer.add_file("etc/ld.so.conf", b"/usr/lib/x86_64-linux-gnu\n/usr/lib/aarch64-linux-gnu\n")
    return layer


def dev_layer(directory):
    layer = Layer()
    for deb in packages(directory):
        layer.add_package(deb)
    layer.add_symlink("usr/bin/cc", "tcc")
    return layer


def busybox_applets(directories):
    """The applet names, asked from the busybox of this machine's architecture; all builds share one list."""
    machine = subprocess.run(["dpkg", "--print-architecture"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    directory = directories.get(machine)
    if directory is None:
        sys.exit(f"oci_image: the architecture of this machine, {machine}, is not among those of the image")
    deb = next(deb for deb in packages(directory[0]) if os.path.basename(deb).startswith("busybox-static_"))
    target = os.path.join(directory[0], "busybox")
    subprocess.run(["dpkg-deb", "--extract", deb, target], check=True)
    for path in ("usr/bin/busybox", "bin/busybox"):
        if os.path.exists(os.path.join(target, path)):
            listing = subprocess.run([os.path.join(target, path), "--list"], stdout=subprocess.PIPE, text=True, check=True)
            return sorted(set(listing.stdout.split()) - {"busybox"})
    sys.exit("oci_image: no busybox in " + deb)


class Archive:
    """Blobs by digest, and the index that names images."""

    def __init__(self):
        self.blobs = {}

    def blob(self, media_type, content):
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    def document(self, value):
        return self.blob(value["mediaType"], json.dumps(value, separators=(",", ":")).encode())

    def image(self, architecture, layers, created):
        config = {
            "architecture": architecture, "os": "linux", "created": created,
            "config": {"Env": ENV, "Cmd": ["/bin/sh"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id for _, diff_id, _ in layers]},
            "history": [{"created": created, "created_by": words} for _, _, words in layers],
        }
        if architecture == "arm64":
            config["variant"] = "v8"
        config = self.blob("application/vnd.oci.image.config.v1+json",
                           json.dumps(config, separators=(",", ":")).encode())
        manifest = self.document({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": [descriptor for descriptor, _, _ in layers],
        })
        manifest["platform"] = {"architecture": architecture, "os": "linux"}
        if architecture == "arm64":
            manifest["platform"]["variant"] = "v8"
        return manifest

    def index(self, manifests):
        return self.document({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests,
        })

    def write(self, path, images, epoch):
        named = []
        for tag, descriptor in images:
            named.append({**descriptor, "annotations": {
                "io.containerd.image.name": f"{NAME}:{tag}", "org.opencontainers.image.ref.name": tag,
            }})
        files = {"oci-layout": b'{"imageLayoutVersion":"1.0.0"}'}
        for digest in sorted(self.blobs):
            files[f"blobs/sha256/{digest}"] = self.blobs[digest]
        files["index.json"] = json.dumps({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": named,
        }, separators=(",", ":")).encode()
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
            for name in ("blobs", "blobs/sha256"):
                info = tarfile.TarInfo(name)
                info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, epoch
                archive.addfile(info)
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size, info.mtime = len(content), epoch
                archive.addfile(info, io.BytesIO(content))


def main(path, arguments):
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "1700000000"))
    created = subprocess.run(["date", "-u", "-d", f"@{epoch}", "+%Y-%m-%dT%H:%M:%SZ"], stdout=subprocess.PIPE,
                             text=True, check=True).stdout.strip()
    directories = dict((name, value.split(",")) for name, value in (argument.split("=", 1) for argument in arguments))
    applets = busybox_applets(directories)
    archive = Archive()
    base, dev = [], []
    for architecture, (base_directory, dev_directory) in directories.items():
        layers = []
        for words, layer in (("base packages", base_layer(base_directory, applets)), ("compiler", dev_layer(dev_directory))):
            tar = layer.tar(epoch)
            descriptor = archive.blob("application/vnd.oci.image.layer.v1.tar+gzip",
                                      gzip.compress(tar, compresslevel=6, mtime=0))
            layers.append((descriptor, f"sha256:{hashlib.sha256(tar).hexdigest()}", words))
        base.append(archive.image(architecture, layers[:1], created))
        dev.append(archive.image(architecture, layers, created))
    archive.write(path, [("base", archive.index(base)), ("dev", archive.index(dev))], epoch)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
