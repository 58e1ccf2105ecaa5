"""Reports on finished runs as HTML, Markdown and figures; report/publish has the publication of results on the Hub."""
