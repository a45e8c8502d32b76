"""Configurations: compiling them without a GPU, judging the machine code, and choosing."""
