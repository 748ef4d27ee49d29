"""What can be trained: one file for each objective, and :mod:`.table`, which names them."""
