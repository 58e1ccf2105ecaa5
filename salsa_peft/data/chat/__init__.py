"""Chat templates: rendering, loss masks, and the tokens that end a turn."""
