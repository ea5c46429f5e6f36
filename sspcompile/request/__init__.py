"""What a user asks for: recipe and options, scenario, domain pools, and which text may choose, guard or judge."""
