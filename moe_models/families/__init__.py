"""What differs between Hugging Face MoE families, read from their config.json. Imports: errors, files."""
