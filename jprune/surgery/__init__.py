"""What is done with a decision: mask, compact, expand, replay, plan."""
