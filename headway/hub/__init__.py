"""Models of other libraries: Hugging Face folders and GGUF, in and out."""
