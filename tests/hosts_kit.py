"""Hosts on one machine: each has a network, processes, `/tmp/ray` and a home of its own.

They are Linux namespaces, joined by a bridge, and need the right to make such. `ssh` and `rsync` are
stand-ins on their PATH: the first sends a command over the hosts' network, the second copies into a home.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

_SERVER = """
import socketserver, subprocess, sys, tempfile

class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        command = self.rfile.read().decode()
        with tempfile.TemporaryFile() as said:  # a pipe would be held open by what goes on in the background
            done = subprocess.run(["bash", "-c", command], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            said.seek(0)
            self.wfile.write(said.read() + bytes([done.returncode % 256]))

socketserver.ThreadingTCPServer.allow_reuse_address = True
socketserver.ThreadingTCPServer((sys.argv[1], 22), Handler).serve_forever()
"""
_SSH = """#!{python} -S
import socket, sys

at = next(i for i, word in enumerate(sys.argv) if "@" in word and not word.startswith("-") and i > 0)
host, command = sys.argv[at].partition("@")[2], " ".join(sys.argv[at + 1 :])
with socket.create_connection((host, 22), timeout=10) as link:
    link.settimeout(None)
    link.sendall(command.encode())
    link.shutdown(socket.SHUT_WR)
    said = b"".join(iter(lambda: link.recv(65536), b""))
sys.stdout.buffer.write(said[:-1])
sys.exit(said[-1] if said else 255)
"""
_RSYNC = """#!{python} -S
import pathlib, shutil, sys

*_, source, target = sys.argv
skipped = [word for before, word in zip(sys.argv, sys.argv[1:]) if before == "--exclude"]
host, _, path = target.partition("@")[2].partition(":")
place = pathlib.Path("{root}", host, path.replace("~/", "home/", 1).lstrip("/"))
if pathlib.Path(source).is_dir():
    ignore = shutil.ignore_patterns(*(word.removeprefix("**/") for word in skipped))
    shutil.copytree(source, place, ignore=ignore, symlinks=True, dirs_exist_ok=True)
else:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, place)
"""


class Hosts:
    """Two of them with the addresses `ips`; `environment` is that of a user at a third, this machine."""

    def __init__(self, folder: Path) -> None:
        self._root, self._bin = folder, folder / "bin"
        number = os.getpid() % 250
        self._bridge = f"caprl{number}"
        self.ips = [f"10.77.{number}.{1 + i}" for i in range(2)]
        self._own = f"10.77.{number}.254"
        self._first: list[subprocess.Popen[bytes]] = []
        self._servers: list[subprocess.Popen[bytes]] = []
        self.environment = self._environment(folder / "laptop")

    def start(self) -> None:
        """
        Raises:
            PermissionError: this process may not make namespaces.
        """
        tried = subprocess.run(
            ["unshare", "--net", "--pid", "--mount", "--fork", "true"], capture_output=True
        )
        if tried.returncode:
            raise PermissionError(tried.stderr.decode().strip())
        self._bin.mkdir(parents=True)
        for name, text in {"ssh": _SSH, "rsync": _RSYNC}.items():
            program = self._bin / name
            program.write_text(text.format(python=sys.executable, root=self._root))
            program.chmod(0o755)
        _do(f"ip link add {self._bridge} type bridge")
        _do(f"ip addr add {self._own}/24 dev {self._bridge}")
        _do(f"ip link set {self._bridge} up")
        for i, ip in enumerate(self.ips):
            self._add(i, ip)

    def _add(self, i: int, ip: str) -> None:
        place = self._root / ip
        for name in ("home", "ray"):
            (place / name).mkdir(parents=True)
        profile = f"export PATH={self._bin}:$PATH OMP_NUM_THREADS=1 RAY_raylet_start_wait_time_s=120\n"
        (place / "home" / ".bash_profile").write_text(profile)
        names = "".join(f"{ip} h{i}\n" for i, ip in enumerate(self.ips))
        (place / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
        (place / "resolv.conf").touch()  # there is nobody to ask, nor to wait for
        binds = {"ray": "/tmp/ray", "hosts": "/etc/hosts", "resolv.conf": "/etc/resolv.conf"}
        mounts = [f"mount --bind {place}/{name} {where}" for name, where in binds.items()]
        life = " && ".join(["mkdir -p /tmp/ray", *mounts, "mount -t tmpfs none /dev/shm", f"hostname h{i}"])
        flags = ["--net", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
        first = subprocess.Popen(["unshare", *flags, "bash", "-c", f"{life} && sleep 9999; :"])
        self._first.append(first)
        pid = _child(first.pid)
        link = f"{self._bridge}v{i}"
        _do(f"ip link add {link} type veth peer name eth0 netns {pid}")
        _do(f"ip link set {link} master {self._bridge} up")
        inside = ["nsenter", f"--target={pid}", "--net", "--pid", "--mount", "--uts"]
        for command in (f"ip addr add {ip}/24 dev eth0", "ip link set eth0 up", "ip link set lo up"):
            _do(" ".join([*inside, command]))
        _do(" ".join([*inside, f"ip route add default via {self._own}"]))
        server = [*inside, sys.executable, "-S", "-c", _SERVER, ip]
        self._servers.append(subprocess.Popen(server, env=self._environment(place / "home")))

    def _environment(self, home: Path) -> dict[str, str]:
        home.mkdir(parents=True, exist_ok=True)
        return {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(home),
            "USER": "root",
            "LANG": "C.UTF-8",
            "RAY_AUTH_MODE": "token",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_UP_enable_autoscaler_v2": "0",
            **({"TMPDIR": str(home)} if home.name == "laptop" else {}),  # Ray keeps what it was told there
        }

    def home(self, i: int) -> Path:
        """A host's home, as seen from here."""
        return self._root / self.ips[i] / "home"

    def stop(self) -> None:
        """Ends every process of the hosts, and what joined them."""
        for process in [*self._first, *self._servers]:
            process.kill()
        for process in [*self._first, *self._servers]:
            process.wait()
        for i in range(len(self._first)):  # a link may have gone with its host
            subprocess.run(["ip", "link", "del", f"{self._bridge}v{i}"], capture_output=True)
        subprocess.run(["ip", "link", "del", self._bridge], capture_output=True)


def _do(command: str) -> None:
    subprocess.run(command.split(), check=True, capture_output=True)


def _child(pid: int) -> int:
    """The first process within the namespaces that `pid` has made."""
    for _ in range(100):
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if found and Path(f"/proc/{found[0]}/ns/net").readlink() != Path("/proc/self/ns/net").readlink():
            return int(found[0])
        time.sleep(0.05)
    raise TimeoutError(f"process {pid} has made no namespaces")
