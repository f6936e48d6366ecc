"""More than one machine: before anything is read, the nodes compare what must be equal on all of them.

A training step is one program on every rank. A node with another version, another JSON or another data file does not
fail, it trains something else, or hangs an hour later. So the first process of every node reports to the store that
torch would open anyway (at MASTER_ADDR:MASTER_PORT, before there is a process group), the last one to come compares
the reports, and every rank reads the same verdict: go on, or the same lines and exit code 2. What one node alone finds
wrong (a file that is not there) is part of its report. Afterwards the nodes hear each other:
``moe_models/nodes/watch.py``.

On one machine nothing here does anything. Cost on two: one report of a few kB per node, a few round trips.
"""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

from moe_models.errors import UserError
from moe_models.nodes.facts import MENDS, Facts, Report, differences
from moe_models.ranks import ranks_per_node

SECONDS_TO_COME = 600
"""How long the nodes wait for each other at the start."""
SECONDS_TO_SEE = 5
"""How long a node looks for a file that another one wrote."""


class Meeting:
    """The nodes of this run at their store. Made on every rank; the first of each node speaks for it.

    Raises UserError if the store cannot be reached.
    """

    def __init__(self) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        env = os.environ
        self.rank, self.world_size = int(env["RANK"]), int(env["WORLD_SIZE"])
        self.speaks = int(env.get("LOCAL_RANK", "0")) == 0
        self.index = int(env.get("GROUP_RANK", env.get("CROSS_RANK", self.rank // ranks_per_node())))
        self.count = int(env.get("GROUP_WORLD_SIZE", env.get("CROSS_SIZE", -(-self.world_size // ranks_per_node()))))
        self.names: list[str] = []
        host, port = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        # The very store that init_process_group will use: torchrun's agent has it, or else rank 0 (whose later stores
        # on this port share one server, as long as this one lives).
        self.hosts_store = self.rank == 0 and env.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            store = TCPStore(
                host, port, is_master=self.hosts_store, wait_for_workers=False, multi_tenant=True,
                timeout=timedelta(seconds=SECONDS_TO_COME),
            )  # fmt: skip
        except RuntimeError as error:
            if self.hosts_store:
                reason = f"cannot listen on port {port} ({_first_line(error)}); free it, or choose another MASTER_PORT"
            else:
                reason = f"{host}:{port}, where the first node waits, was not reached in {SECONDS_TO_COME} s; start the"
                reason += " recipe there too, and let the nodes reach each other on all ports"
            raise UserError(f"{socket.gethostname()} (node rank {self.index}): {reason}") from error
        self.store = PrefixStore(f"moe_recipes/{env.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.address = _address_towards(host)
        self.name = f"{socket.gethostname()} ({self.address}, rank {self.rank})"

    def compare(self, facts: Facts, problems: Iterable[str] = ()) -> None:
        """Raise UserError, on every rank with the same lines, unless the nodes have equal ``facts`` and no problems."""
        launch = {"WORLD_SIZE": str(self.world_size), "number of nodes": str(self.count)}
        mine = Report(self.index, self.name, self.address, {**facts, "launch": launch}, tuple(problems))
        verdict = self._verdict("start", mine.__dict__, _judge)
        self.names = verdict["names"]
        # gloo binds to what the host name resolves to, on many systems a loopback address that no other node reaches.
        # The first node may know itself by such an address too, so it looks from another node's side.
        here = _address_towards(verdict["addresses"][-1]) if self.index == 0 else self.address
        interface = _interface_of(here)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)

    def require_shared(self, folder: Path, flag: str) -> None:
        """Raise UserError, on every rank, unless what node 0 writes at ``folder`` is seen by the others."""
        problems, probe = [], None
        parent = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.is_dir())
        if self.speaks and self.index == 0:
            probe = parent / f".seen-by-every-node-{secrets.token_hex(8)}"
            try:
                probe.touch(exist_ok=False)
            except OSError as error:
                problems = [f"{flag} {folder}: cannot be written ({error.strerror})"]
            self.store.set("probe", probe.name)
        elif self.speaks:
            written = parent / self.store.get("probe").decode()
            deadline = time.monotonic() + SECONDS_TO_SEE
            while not written.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            if not written.exists():
                problems = [
                    f"{flag} {folder}: {self.name} does not see what {self.names[0]} writes there, and every rank "
                    "writes and reads its own part of a checkpoint; give a folder that all nodes share, or keep no "
                    "checkpoints (--save_strategy no; the finished model then lies on the first node)"
                ]
        try:
            self._verdict("shared", {"problems": problems}, _all_problems)
        finally:
            if probe is not None:
                probe.unlink(missing_ok=True)

    def _verdict(self, topic: str, report: dict[str, Any], judge: Callable[[list[Any]], dict[str, Any]]) -> Any:
        """Every node's ``report`` goes to whoever comes last; ``judge`` makes of them what all ranks get.

        Raises UserError with its "problems", if there are any.
        """
        store = self.store
        if self.speaks:
            store.set(f"{topic}/{store.add(f'{topic}/slots', 1)}", json.dumps({**report, "count": self.count}))
            store.set(f"beat/{self.index}", "0")
            come = store.add(f"{topic}/come", 1)
            reports = [json.loads(store.get(f"{topic}/{slot + 1}")) for slot in range(come)]
            # The smallest number: nodes that were told different ones must not wait for each other.
            if come >= min(report["count"] for report in reports):
                store.compare_set(f"{topic}/verdict", "", json.dumps(judge(reports)))
        self._wait_for(topic)
        verdict = json.loads(store.get(f"{topic}/verdict"))
        readers = store.add(f"{topic}/readers", 1)
        if not verdict["problems"]:
            return verdict
        deadline = time.monotonic() + SECONDS_TO_SEE
        while self.hosts_store and readers < self.world_size and time.monotonic() < deadline:  # it ends with this rank
            time.sleep(0.05)
            readers = store.add(f"{topic}/readers", 0)
        raise UserError(verdict["problems"])

    def _wait_for(self, topic: str) -> None:
        begun, told = time.monotonic(), self.rank != 0
        while not self.store.check([f"{topic}/verdict"]):
            waited = time.monotonic() - begun
            if waited > SECONDS_TO_COME:
                come = self.store.add(f"{topic}/come", 0)
                raise UserError(
                    f"{self.name}: {come} of {self.count} nodes came within {SECONDS_TO_COME} s; start the recipe on "
                    "every node, each with its own node rank"
                )
            if not told and waited > 30:
                told = True
                come = self.store.add(f"{topic}/come", 0)
                print(f"waiting for the other nodes; {come} of {self.count} are here", flush=True)
            time.sleep(0.02 if waited < 5 else 0.1)


def _judge(reports: list[Any]) -> dict[str, Any]:
    nodes = [
        Report(r["index"], r["name"], r["address"], r["facts"], tuple(r["problems"]))
        for r in sorted(reports, key=lambda r: r["index"])
    ]
    problems = differences(nodes)
    for earlier, later in itertools.pairwise(nodes):
        if earlier.index == later.index:
            problems.append(f"node rank {later.index}: {earlier.name} and {later.name} both have it; {MENDS['launch']}")
    return {"problems": problems, "names": [n.name for n in nodes], "addresses": [n.address for n in nodes]}


def _all_problems(reports: list[Any]) -> dict[str, Any]:
    return {"problems": [line for report in reports for line in report["problems"]]}


def _address_towards(host: str) -> str:
    """The address of this machine that ``host`` sees (nothing is sent)."""
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as sock:
            sock.connect(where)
            return str(sock.getsockname()[0])
    except OSError:
        return "no address"


def _interface_of(address: str) -> str | None:
    import psutil

    every = psutil.net_if_addrs().items()
    return next((name for name, held in every if any(one.address == address for one in held)), None)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
