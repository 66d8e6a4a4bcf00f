"""What the commands do: one module a group of verbs, stages chained by files."""
