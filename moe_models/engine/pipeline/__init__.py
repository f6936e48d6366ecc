"""Pipeline stages of a stock Hugging Face model on DeepSpeed's pipeline engine. Imports what engine may."""
