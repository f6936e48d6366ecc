"""Layouts and links, measured. Imports: everything above."""
