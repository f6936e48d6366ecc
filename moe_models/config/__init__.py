"""The ds_config JSON as types, and the grid of ranks that it makes. Imports: families and the modules on the ground."""
