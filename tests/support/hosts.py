"""Two "machines" on this one, to start a recipe on as its users do: one launcher on each, with the same hostfile.

- :class:`Namespaces`: two Linux network namespaces, each with its own address, host name and loopback, joined by a
  cable (a veth pair) that can be pulled. Needs root that may make them: marker ``netns``. They live as long as the two
  processes that hold them, so that nothing stays behind whatever becomes of the test.
- :data:`LOOPBACK`: no walls, two of this machine's own addresses; the launchers and the recipe behave as on two nodes.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.cluster import free_port
from tests.support.recipe import ENVIRONMENT, ROOT, SCRIPT, Ended, end_of

LOOPBACK = ("127.0.0.2", "127.0.0.3")


@functools.cache
def namespaces_permitted() -> bool:
    """Whether this process may make network and host name namespaces, and cables between them."""
    if not all(shutil.which(name) for name in ("ip", "unshare", "nsenter")):
        return False
    words = ["unshare", "--net", "--uts", "ip", "link", "add", "moe0", "type", "veth", "peer", "name", "moe1"]
    return subprocess.run(words, capture_output=True).returncode == 0


class Namespaces:
    """``with Namespaces() as machines``: node-a at 10.77.0.1 and node-b at 10.77.0.2."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __enter__(self) -> Namespaces:
        self._holders = [subprocess.Popen(["unshare", "--net", "--uts", "sleep", "1000"]) for _ in self.addresses]
        self.enter = [["nsenter", "--target", str(holder.pid), "--net", "--uts"] for holder in self._holders]
        here = os.readlink("/proc/self/ns/net")
        while any(os.readlink(f"/proc/{holder.pid}/ns/net") == here for holder in self._holders):
            time.sleep(0.01)
        cable = [
            "ip",
            "link",
            "add",
            "eth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            str(self._holders[1].pid),
        ]
        self._do(0, *cable)
        for node, name in enumerate(("node-a", "node-b")):
            self._do(node, "hostname", name)
            self._do(node, "ip", "addr", "add", f"{self.addresses[node]}/24", "dev", "eth0")
            self._do(node, "ip", "link", "set", "eth0", "up")
            self._do(node, "ip", "link", "set", "lo", "up")
        return self

    def __exit__(self, *error: object) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def pull_the_cable(self) -> None:
        """Nothing that one of them sends reaches the other from now on, and neither is told."""
        self._do(1, "ip", "link", "set", "eth0", "down")

    def _do(self, node: int, *words: str) -> None:
        subprocess.run([*self.enter[node], *words], check=True, capture_output=True, text=True)


def start_on_both(
    arguments: list[str] | tuple[list[str], list[str]],
    folder: Path,
    slots: int = 1,
    machines: Namespaces | None = None,
    script: Path = SCRIPT,
) -> list[subprocess.Popen[str]]:
    """The deepspeed launcher on both machines, ``--no_ssh``; a pair of ``arguments`` is one list for each."""
    addresses = machines.addresses if machines else LOOPBACK
    hostfile = folder / "hosts"
    hostfile.write_text("".join(f"{address} slots={slots}\n" for address in addresses))
    port = str(free_port())
    started = []
    for node in (0, 1):
        log = folder / f"node{node}.log"
        words = [
            *(machines.enter[node] if machines else []),
            *(sys.executable, "-m", "deepspeed.launcher.runner", "--quiet", "--hostfile", str(hostfile), "--no_ssh"),
            *("--node_rank", str(node), "--master_addr", addresses[0], "--master_port", port, str(script)),
            *(arguments if isinstance(arguments, list) else arguments[node]),
        ]
        started.append(
            subprocess.Popen(
                words,
                stdout=log.open("w"),
                stderr=log.with_suffix(".err").open("w"),
                cwd=ROOT,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                start_new_session=True,
            )
        )
    return started


def ends(started: list[subprocess.Popen[str]], folder: Path, timeout: float = 150) -> list[Ended]:
    """How they ended. None of them is left behind."""
    try:
        return [end_of(process, folder / f"node{node}.log", timeout) for node, process in enumerate(started)]
    finally:
        for process in started:
            kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """A launcher and all its ranks, at once and without a word."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
