"""Pictures by the million: the rows of a table, drawn into tar files that no interruption changes."""
