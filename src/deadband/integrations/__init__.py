"""Other libraries: transformers, lm-eval, Trainer, Lightning, GGUF. Each module imports its own."""
