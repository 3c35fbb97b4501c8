"""Other tools: their results judged by ours, and ours written in their formats."""
