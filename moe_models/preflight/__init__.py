"""What is refused or advised before a weight is read. Imports: config, families."""
