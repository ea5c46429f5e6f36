"""What decides: mixture, scores, budget, layouts, search and judging."""
