"""Pages without network: the routing report with PNGs beside it, and the plan.

The routing report is real text through a model's routers. ``text`` reads, ``record`` routes, ``layouts`` turns the JSON
files of ``ds_configs/`` into grids of ranks, ``history`` reads ``expert_load.jsonl``, ``data`` gathers what the page
shows, ``plots`` draws the PNGs. ``page.html``, ``page.css`` and the ``.js`` files are the page itself.
``recipes/routing_report.py`` uses all of it.

The plan is what ``recipes/plan.py --html`` writes. ``plans`` gathers what the page shows. ``plan.html``, ``plan.css``
and the ``plan*.js`` files are the page itself, and share ``page.css`` and ``draw.js`` with the report.

``page`` puts either together.

Imports: config, families, planner, routing, and the ground.
"""
