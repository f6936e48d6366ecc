"""More than one machine: before anything is read, the nodes compare what must be equal on all of them.

A training step is one program on every rank. A node with another version, another JSON or another data file does not
fail: it trains something else, or hangs an hour later. So the nodes meet at the store that torch would open anyway (at
MASTER_ADDR:MASTER_PORT, before there is a process group):

1. The first process of every node writes a report. What that node alone found wrong (a missing file) is part of it.
2. The last one to arrive compares all reports and writes one verdict.
3. Every rank reads the verdict. All go on, or all end with the same lines and exit code 2.

Afterwards the nodes watch each other: ``moe_models/nodes/watch.py``.

On one machine nothing here is used. Cost on two: one report of a few kB per node, a few round trips.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from moe_models.errors import UserError
from moe_models.nodes.facts import FIXES, Facts, Report, differences
from moe_models.ranks import ranks_per_node

SECONDS_TO_COME = 600
"""How long the nodes wait for each other at the start."""
SECONDS_TO_SEE = 5
"""How long a node looks for a file that another one wrote, and rank 0 waits until all have read why they may not
start."""
SECONDS_BEFORE_TELLING = 30
"""After which rank 0 prints that it waits for the other nodes."""


class Meeting:
    """The nodes of this run at their store. Made on every rank; the first of each node speaks for it.

    Raises UserError if the store cannot be reached.
    """

    def __init__(self) -> None:
        # 1. Who this process is. torchrun sets GROUP_*, deepspeed's launcher CROSS_*.
        env = os.environ
        self.rank = int(env["RANK"])
        self.world_size = int(env["WORLD_SIZE"])
        self.speaks = int(env.get("LOCAL_RANK", "0")) == 0
        per_node = ranks_per_node()
        self.index = _first_number(env, ("GROUP_RANK", "CROSS_RANK"), otherwise=self.rank // per_node)
        nodes = -(-self.world_size // per_node)  # rounded up
        self.count = _first_number(env, ("GROUP_WORLD_SIZE", "CROSS_SIZE"), otherwise=nodes)
        self.names: list[str] = []
        # 2. The very store that init_process_group will use: torchrun's agent has it, or else rank 0 (whose later
        # stores on this port share one server, as long as this one lives).
        self.hosts_store = self.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        host = env["MASTER_ADDR"]
        store = self._open_store(host, int(env["MASTER_PORT"]))
        # 3. Keys of our own in it, and others after an elastic restart.
        from torch.distributed import PrefixStore  # type: ignore[attr-defined]

        restart = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        self.store = PrefixStore(f"moe_recipes/{restart}", store)
        # 4. How messages name this node.
        self.address = _address_towards(host)
        self.name = f"{socket.gethostname()} ({self.address}, rank {self.rank})"

    def _open_store(self, host: str, port: int) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            return TCPStore(
                host,
                port,
                is_master=self.hosts_store,
                wait_for_workers=False,
                multi_tenant=True,
                timeout=timedelta(seconds=SECONDS_TO_COME),
            )
        except RuntimeError as error:
            if self.hosts_store:
                reason = f"cannot listen on port {port} ({_first_line(error)}); free it, or choose another MASTER_PORT"
            else:
                reason = f"{host}:{port}, where the first node waits, was not reached in {SECONDS_TO_COME} s; start the"
                reason += " recipe there too, and let the nodes reach each other on all ports"
            raise UserError(f"{socket.gethostname()} (node rank {self.index}): {reason}") from error

    def compare(self, facts: Facts, problems: Iterable[str] = ()) -> None:
        """Raise UserError, on every rank with the same lines, unless the nodes have equal ``facts`` and no problems."""
        launch = {"WORLD_SIZE": str(self.world_size), "number of nodes": str(self.count)}
        mine = Report(self.index, self.name, self.address, {**facts, "launch": launch}, tuple(problems))
        verdict = self._verdict("start", mine.__dict__, _judge)
        self.names = verdict["names"]
        # gloo binds to what the host name resolves to, on many systems a loopback address that no other node reaches.
        # The first node may know itself by such an address too, so it looks from another node's side.
        if self.index == 0:
            here = _address_towards(verdict["addresses"][-1])
        else:
            here = self.address
        interface = _interface_of(here)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

    def require_shared(self, folder: Path, flag: str) -> None:
        """Raise UserError, on every rank, unless the other nodes see what node 0 writes at ``folder``.

        ``folder`` need not exist: the nearest folder above it that does is probed.
        """
        problems: list[str] = []
        probe: Path | None = None
        parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
        # 1. Node 0 writes a file under a name that nothing else has, and tells the others that name.
        if self.speaks and self.index == 0:
            probe = parent / f".seen-by-every-node-{secrets.token_hex(8)}"
            try:
                probe.touch(exist_ok=False)
            except OSError as error:
                problems.append(f"{flag} {folder}: cannot be written ({error.strerror})")
            self.store.set("probe", probe.name)
        # 2. The others look for it.
        elif self.speaks:
            name = self.store.get("probe").decode()
            if not _appears(parent / name):
                problems.append(
                    f"{flag} {folder}: {self.name} does not see what {self.names[0]} writes there, and every rank "
                    "writes and reads its own part of a checkpoint; give a folder that all nodes share, or keep no "
                    "checkpoints (--save_strategy no; the finished model then lies on the first node)"
                )
        # 3. All hear what any of them found. The file stays until every node has looked.
        try:
            self._verdict("shared", {"problems": problems}, _all_problems)
        finally:
            if probe is not None:
                probe.unlink(missing_ok=True)

    def _verdict(self, topic: str, report: dict[str, Any], judge: Callable[[list[Any]], dict[str, Any]]) -> Any:
        """What ``judge`` makes of the reports of all nodes; the same on every rank.

        Raises UserError with the "problems" of the verdict, if there are any.
        """
        store = self.store
        if self.speaks:
            # 1. The report goes into a slot of its own: two nodes may believe that they have the same node rank.
            slot = store.add(f"{topic}/slots", 1)
            store.set(f"{topic}/{slot}", json.dumps({**report, "count": self.count}))
            store.set(f"beat/{self.index}", "0")
            # 2. Only then is it counted, so whichever node comes last finds all reports written.
            come = store.add(f"{topic}/come", 1)
            reports = [json.loads(store.get(f"{topic}/{number}")) for number in range(1, come + 1)]
            # The smallest number: nodes that were told different ones must not wait for each other.
            if come >= min(report["count"] for report in reports):
                store.compare_set(f"{topic}/verdict", "", json.dumps(judge(reports)))
        # 3. Every rank reads the verdict, and says so.
        self._wait_for(topic)
        verdict = json.loads(store.get(f"{topic}/verdict"))
        readers = store.add(f"{topic}/readers", 1)
        if not verdict["problems"]:
            return verdict
        # 4. The store ends with the rank that hosts it, so that rank stays until the others have read.
        deadline = time.monotonic() + SECONDS_TO_SEE
        while self.hosts_store and readers < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            readers = store.add(f"{topic}/readers", 0)
        raise UserError(verdict["problems"])

    def _wait_for(self, topic: str) -> None:
        """Return when the verdict is there. Raises UserError after :data:`SECONDS_TO_COME`."""
        begun = time.monotonic()
        told = self.rank != 0
        while not self.store.check([f"{topic}/verdict"]):
            waited = time.monotonic() - begun
            if waited > SECONDS_TO_COME:
                come = self.store.add(f"{topic}/come", 0)
                raise UserError(
                    f"{self.name}: {come} of {self.count} nodes came within {SECONDS_TO_COME} s; start the recipe on "
                    "every node, each with its own node rank"
                )
            if not told and waited > SECONDS_BEFORE_TELLING:
                told = True
                come = self.store.add(f"{topic}/come", 0)
                print(f"waiting for the other nodes; {come} of {self.count} are here", flush=True)
            time.sleep(0.02 if waited < 5 else 0.1)


def _judge(reports: list[Any]) -> dict[str, Any]:
    """What is wrong or differs, with the names and addresses of all nodes in the order of their node ranks."""
    nodes = [
        Report(report["index"], report["name"], report["address"], report["facts"], tuple(report["problems"]))
        for report in sorted(reports, key=lambda report: (report["index"], report["name"]))
    ]
    problems = differences(nodes)
    for earlier, later in itertools.pairwise(nodes):
        if earlier.index == later.index:
            problems.append(f"node rank {later.index}: {earlier.name} and {later.name} both have it; {FIXES['launch']}")
    return {
        "problems": problems,
        "names": [node.name for node in nodes],
        "addresses": [node.address for node in nodes],
    }


def _all_problems(reports: list[Any]) -> dict[str, Any]:
    return {"problems": [line for report in reports for line in report["problems"]]}


def _first_number(env: Mapping[str, str], names: Iterable[str], otherwise: int) -> int:
    for name in names:
        if name in env:
            return int(env[name])
    return otherwise


def _appears(path: Path) -> bool:
    """Whether the file is there within :data:`SECONDS_TO_SEE`: a shared file system may show it late."""
    deadline = time.monotonic() + SECONDS_TO_SEE
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return path.exists()


def _address_towards(host: str) -> str:
    """The address of this machine that ``host`` sees. Connecting a UDP socket looks up the route and sends nothing."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(where)
            return str(sock.getsockname()[0])
    except OSError:
        return "no address"


def _interface_of(address: str) -> str | None:
    """The network interface that has ``address``, or None."""
    import psutil

    for name, held in psutil.net_if_addrs().items():
        if any(one.address == address for one in held):
            return str(name)
    return None


def _first_line(error: BaseException) -> str:
    """At most 200 characters of the first line: torch puts its C++ stack into the lines below."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
