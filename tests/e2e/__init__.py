"""End-to-end tests: a checkpoint in, a GGUF out, judged by readers that share no code with ggufx."""
