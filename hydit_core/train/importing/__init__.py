"""``python -m hydit_core.train import FILE``: the settings of other trainers as a configuration of ours."""
