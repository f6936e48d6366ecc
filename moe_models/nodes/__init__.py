"""Runs on more than one machine. Imports: the modules on the ground."""
