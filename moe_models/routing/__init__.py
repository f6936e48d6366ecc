"""The routers of a run, watched and kept in balance. Imports: engine, config, families."""
