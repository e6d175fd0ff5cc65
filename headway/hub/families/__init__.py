"""Families of models on the Hugging Face hub, one file each."""
