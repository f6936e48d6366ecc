"""Layouts and links, measured: what ``recipes/bench.py`` and ``recipes/bench_alltoall.py`` run. Imports: everything."""
