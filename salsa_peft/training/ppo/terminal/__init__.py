"""What PPO prints: a table with a row for each update, and samples of responses."""
