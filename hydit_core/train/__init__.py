"""Training: whole models, LoRAs and ControlNets, by one loop, with one kind of checkpoint and data order."""

RECORDS = "metrics.jsonl"
"""The file in a run's folder that holds its losses; a folder with it is a run's."""
