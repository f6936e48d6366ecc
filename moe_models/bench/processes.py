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

HERE = Path(__file__).resolve().parent


Report = Callable[[list[dict[str, Any]]], None]
"""Called with the rows so far, so that a call that is cut short leaves what it had."""


def measure(
    jobs: list[dict[str, Any]], args: argparse.Namespace, scratch: Path, report: Report
) -> list[dict[str, Any]]:
    """Run all jobs, in as few starts of the launcher as they allow; returns a row for each."""
    rows: dict[int, dict[str, Any]] = {}
    keys = ("row", "name", "kind", "micro_batch", "accumulation", "seq_length", "ep_size", *CHANGES)

    def add(job: dict[str, Any], figures: dict[str, Any]) -> None:
        rows[job["row"]] = {**{key: job[key] for key in keys}, **figures}
        report([rows[index] for index in sorted(rows)])

    while waiting := [job for job in jobs if job["row"] not in rows]:
        batch = next_batch(waiting, args.isolate)
        code, tail = launch(batch, args, scratch, add)
        undone = [job for job in batch if job["row"] not in rows]
        if undone and (code != 0 or len(undone) == len(batch)):
            add(undone[0], read_error(undone[0], code, tail, scratch))
            print(f"row {undone[0]['row']}: {undone[0]['name']}: {rows[undone[0]['row']]['error']}", flush=True)
    return [rows[job["row"]] for job in jobs]


def next_batch(waiting: list[dict[str, Any]], isolate: bool) -> list[dict[str, Any]]:
    """The jobs of the next start. Liger's patches stay in a process, so its rows have processes of their own."""
    if isolate:
        return waiting[:1]
    return [job for job in waiting if job["liger"] == waiting[0]["liger"]]


def launch(
    batch: list[dict[str, Any]], args: argparse.Namespace, scratch: Path, add: Callable[..., None]
) -> tuple[int | None, str]:
    """Start the deepspeed launcher on these jobs. Returns its exit code (None: killed as hung) and its last words."""
    path = scratch / "jobs.json"
    path.write_text(json.dumps(batch))
    log = scratch / f"log-{batch[0]['row']}.txt"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # the launcher would not heed it beside --num_gpus
    where = ["--include", f"localhost:{visible}"] if visible else ["--num_gpus", str(args.num_gpus)]
    command = [
        sys.executable, "-m", "deepspeed.launcher.runner", *where,
        "--master_port", str(free_port()), str(HERE / "worker.py"), str(path),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE.parents[1]), os.getenv("PYTHONPATH")])),
    }
    with log.open("w") as file:
        # A group of its own, so that the launcher and its ranks can be ended together; no new session.
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, preexec_fn=os.setpgrp)
        try:
            code = wait(process, batch, args.row_timeout, scratch, add)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(15)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return code, "\n".join(log.read_text(errors="replace").splitlines()[-30:])


def wait(
    process: subprocess.Popen[Any], batch: list[dict[str, Any]], timeout: float, scratch: Path, add: Callable[..., None]
) -> int | None:
    """Wait until the launcher ends, or no row came for ``timeout`` seconds; adds each row as it comes."""
    waiting, last = list(batch), time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.5)
        ended = process.returncode is not None
        while waiting and (path := scratch / f"row-{waiting[0]['row']}.json").exists():
            job, row = waiting.pop(0), json.loads(path.read_text())
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


def read_error(job: dict[str, Any], code: int | None, tail: str, scratch: Path) -> dict[str, Any]:
    """Why a row has no figures: what its ranks left, or how its processes ended."""
    found = [json.loads(path.read_text()) for path in sorted(scratch.glob(f"row-{job['row']}.rank*.error"))]
    short = [error for error in found if error["status"] == "out of memory"]
    if found:
        return {**(short or found)[0], "log": tail}
    if code is None:
        return {"status": "failed", "error": "no end within --row_timeout; its processes were ended", "log": tail}
    return {"status": "failed", "error": f"its processes ended with exit code {code} and left no message", "log": tail}


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def make_jobs(
    args: argparse.Namespace, layouts: list[BenchLayout], model_config: dict[str, Any], scratch: Path
) -> list[dict[str, Any]]:
    """One job for each row of the table. Those of one layout follow each other."""
    accumulations = args.accumulation * (len(args.micro_batch) if len(args.accumulation) == 1 else 1)
    jobs: list[dict[str, Any]] = []
    for layout in layouts:
        path = scratch / f"layout-{len(jobs)}.json"
        path.write_text(json.dumps(layout.json))
        for micro_batch, accumulation in zip(args.micro_batch, accumulations, strict=True):
            jobs.append(
                {
                    "row": len(jobs),
                    "name": layout.name,
                    "kind": layout.kind,
                    "json_path": str(path),
                    "ep_size": layout.ep_size,
                    **{change: getattr(layout, change) for change in CHANGES},
                    "micro_batch": micro_batch,
                    "accumulation": accumulation,
                    "model_config": model_config,
                    **{key: getattr(args, key) for key in SHARED},
                }
            )
    return jobs


SHARED = ("seq_length", "steps", "warmup", "profile_steps", "attn_implementation", "tokens", "seed")
"""Flags that all rows have in common."""
