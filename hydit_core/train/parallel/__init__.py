"""How the processes of a run share its model: a whole copy each (DDP), or parts of one (FSDP2)."""
