"""A dense checkpoint becomes a Mixture of Experts. Imports: checkpoint, families."""
