"""What a run does: the stages, one short function each, and the graph that chains them."""
