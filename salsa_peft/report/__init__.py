"""Reports on finished runs as HTML, Markdown and figures, and publication of results on the Hub."""
