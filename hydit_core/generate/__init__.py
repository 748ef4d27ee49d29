"""Text to picture on the command line: ``python -m hydit_core.generate``."""
