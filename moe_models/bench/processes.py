"""The processes of a benchmark: jobs, starts of the launcher, and the rows that come back."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moe_models.bench.layouts import CHANGES, BenchLayout

ROOT = Path(__file__).resolve().parents[2]
SHARED = ("seq_length", "steps", "warmup", "profile_steps", "attn_implementation", "tokens", "seed")
"""Flags that all rows have in common."""

Job = dict[str, Any]
"""What one row is to measure, as JSON that the worker reads; see :func:`make_jobs`."""
Row = dict[str, Any]
"""What came of a job: its name and sizes, a ``status`` (ok, out of memory, failed), and figures or an ``error``."""
Report = Callable[[list[Row]], None]
"""Called with the rows so far, so that a call that is cut short leaves what it had."""


def make_jobs(
    args: argparse.Namespace, layouts: list[BenchLayout], model_config: dict[str, Any], scratch: Path
) -> list[Job]:
    """One job for each row of the table. Those of one layout follow each other."""
    accumulations = args.accumulation
    if len(accumulations) == 1:
        accumulations = accumulations * len(args.micro_batch)
    shared = {key: getattr(args, key) for key in SHARED}
    jobs: list[Job] = []
    for layout in layouts:
        path = scratch / f"layout-{len(jobs)}.json"
        path.write_text(json.dumps(layout.json))
        switches = {change: getattr(layout, change) for change in CHANGES}
        for micro_batch, accumulation in zip(args.micro_batch, accumulations, strict=True):
            jobs.append(
                {
                    "row": len(jobs),
                    "name": layout.name,
                    "kind": layout.kind,
                    "json_path": str(path),
                    "ep_size": layout.ep_size,
                    **switches,
                    "micro_batch": micro_batch,
                    "accumulation": accumulation,
                    "model_config": model_config,
                    **shared,
                }
            )
    return jobs


def measure(jobs: list[Job], args: argparse.Namespace, scratch: Path, report: Report) -> list[Row]:
    """Run all jobs, in as few starts of the launcher as they allow; returns a row for each."""
    rows: dict[int, Row] = {}
    keys = ("row", "name", "kind", "micro_batch", "accumulation", "seq_length", "ep_size", *CHANGES)

    def add(job: Job, figures: dict[str, Any]) -> None:
        rows[job["row"]] = {**{key: job[key] for key in keys}, **figures}
        report([rows[index] for index in sorted(rows)])

    while len(rows) < len(jobs):
        # 1. One start; each row that it completes is added.
        waiting = [job for job in jobs if job["row"] not in rows]
        batch = next_batch(waiting, args.isolate)
        code, tail = launch(batch, args, scratch, add)
        # 2. A start that failed, or made nothing, failed in its first job that has no row. The worker also ends well
        #    before its last job, where a row left memory allocated; then the rest is started anew.
        undone = [job for job in batch if job["row"] not in rows]
        if undone and (code != 0 or len(undone) == len(batch)):
            failed = undone[0]
            error = read_error(failed, code, tail, scratch)
            add(failed, error)
            print(f"row {failed['row']}: {failed['name']}: {error['error']}", flush=True)
    return [rows[job["row"]] for job in jobs]


def next_batch(waiting: list[Job], isolate: bool) -> list[Job]:
    """The jobs of the next start. Liger's patches stay in a process, so its rows have processes of their own."""
    if isolate:
        return waiting[:1]
    return [job for job in waiting if job["liger"] == waiting[0]["liger"]]


def launch(
    batch: list[Job], args: argparse.Namespace, scratch: Path, add: Callable[..., None]
) -> tuple[int | None, str]:
    """Start the deepspeed launcher on these jobs. Returns its exit code (None: killed as hung) and its last words."""
    # 1. The command. The worker is a module: by path, the folder of this file would hide modules of the same names.
    path = scratch / "jobs.json"
    path.write_text(json.dumps(batch))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the launcher would not heed it beside --num_gpus
    if visible:
        where = ["--include", f"localhost:{visible}"]
    else:
        where = ["--num_gpus", str(args.num_gpus)]
    command = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--master_port", str(free_port())]
    command += ["--module", "moe_models.bench.worker", str(path)]
    python_path = [str(ROOT)]
    if os.environ.get("PYTHONPATH"):
        python_path.append(os.environ["PYTHONPATH"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path)}
    # 2. The processes: a group of their own, so that the launcher and its ranks can be ended together; no new session.
    log = scratch / f"log-{batch[0]['row']}.txt"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=os.setpgrp)
        try:
            code = wait(process, batch, args.row_timeout, scratch, add)
        finally:
            end_group(process)
    last_lines = log.read_text(errors="replace").splitlines()[-30:]
    return code, "\n".join(last_lines)


def end_group(process: subprocess.Popen[Any]) -> None:
    """End the launcher and all that it started: politely if it still runs, then whatever is left."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait(
    process: subprocess.Popen[Any], batch: list[Job], timeout: float, scratch: Path, add: Callable[..., None]
) -> int | None:
    """Wait until the launcher ends, or no row came for ``timeout`` seconds (None); adds each row as it comes."""
    waiting = list(batch)
    last = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        ended = process.returncode is not None  # looked at before the rows, which may come just before the end
        while waiting:
            path = scratch / f"row-{waiting[0]['row']}.json"
            if not path.exists():
                break
            job = waiting.pop(0)
            row = json.loads(path.read_text())
            add(job, {"status": "ok", **row})
            print(
                f"row {job['row']}: {job['name']}, {job['accumulation']} x {job['micro_batch']} sequences: "
                f"{row['step_seconds'] * 1e3:,.1f} ms a step ({row['wall_seconds']} s)",
                flush=True,
            )
            last = time.monotonic()
        if ended:
            return process.returncode
        if time.monotonic() - last > timeout:
            return None


def read_error(job: Job, code: int | None, tail: str, scratch: Path) -> dict[str, Any]:
    """Why a row has no figures: what its ranks left, or how its processes ended."""
    paths = sorted(scratch.glob(f"row-{job['row']}.rank*.error"))
    found: list[dict[str, Any]] = [json.loads(path.read_text()) for path in paths]
    if found:
        # The rank that lacked memory explains the others, which lost a peer.
        out_of_memory = [error for error in found if error["status"] == "out of memory"]
        first = (out_of_memory or found)[0]
        return {**first, "log": tail}
    if code is None:
        reason = "no end within --row_timeout; its processes were ended"
    else:
        reason = f"its processes ended with exit code {code} and left no message"
    return {"status": "failed", "error": reason, "log": tail}


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
