"""From the engine or its checkpoints to Hugging Face folders and other layouts. Imports: engine, config, families."""
