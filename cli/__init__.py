"""The command line: options in, writers out; no logic of its own."""
