"""Makes preference data: renders prompts, samples responses, matches answers and forms pairs."""
