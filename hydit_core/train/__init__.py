"""Training: whole models, LoRAs and ControlNets, by one loop, with one kind of checkpoint and data order."""
