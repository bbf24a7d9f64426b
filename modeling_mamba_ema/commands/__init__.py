"""What `mamba-ema` does, a file a command. Heavy modules are imported where a command runs, so that help is quick."""
