"""What a run leaves for its user: results under names that stay, the report's files, and the last lines."""
