"""Making preference data: prompts, sampled responses, answer matching, pairs."""
