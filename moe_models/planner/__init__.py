"""Memory and time of a layout, before anything runs. Imports: preflight, config, families."""
