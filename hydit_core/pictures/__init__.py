"""Pictures that are made: what stands in their files, and the graph that draws them again."""
