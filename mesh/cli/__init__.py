"""The command line: one file per noun, a table of verbs in `main`."""
