"""Runs on more than one machine: ``facts`` to compare, the ``meeting`` before anything is read, the ``watch`` after it.

Imports: the modules on the ground.
"""
