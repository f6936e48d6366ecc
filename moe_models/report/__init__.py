"""The routing report: real text through a model's routers, as one HTML page without network, and PNGs beside it.

``text`` reads, ``record`` routes, ``layouts`` turns the JSON files of ``ds_configs/`` into grids of ranks, ``history``
reads ``expert_load.jsonl``, ``data`` gathers what the page shows, ``page`` puts it together, ``plots`` draws the PNGs.
``page.html``, ``page.css`` and the ``.js`` files are the page itself. ``recipes/routing_report.py`` uses all of it.

Imports: config, families, routing, and the ground.
"""
