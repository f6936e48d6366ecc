"""What is done to DeepSpeed, transformers and TRL at run time. Imports: preflight, config, families."""
