"""What follows from the code, drawn and written: figures, tables of flags and of seams. ``python -m docs.tools.write``.

``svg`` is a sheet of paper, ``figures`` draws layouts and bytes on it, ``models`` has the shapes of published models,
``reference`` makes pages of the recipes' flags and of the seams, ``write`` writes all of it. ``site`` turns the
repository's Markdown into a site that needs no network (``mkdocs.yml``).

Imports: moe_models and recipes. Nothing imports this package but its tests.
"""
