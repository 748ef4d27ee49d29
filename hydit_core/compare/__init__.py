"""Settings, files and folders of pictures side by side: ``python -m hydit_core.compare``."""
