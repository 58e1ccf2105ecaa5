"""Reports on finished runs: HTML, Markdown, JSON and figures. The package publish puts results on the Hub."""
