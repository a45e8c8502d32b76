"""The Llama 4 text model: config, KV cache, checkpoints, tokenizer, reference and kernel twin.

Start with `config.py` (the numbers), then `reference.py` (the model in plain PyTorch). Importing
this package imports nothing else.
"""
